"""The mutants of a source: every single small change that `mutants.py` draws from.

A comparison turned round or moved by one, `and` for `or`, another constant, another arithmetic operator, two operands
exchanged, a condition negated, a statement removed. Left alone: docstrings, annotations, decorators, imports for type
checkers, texts of errors, of logs and of `__repr__`. The rest of the file stays byte for byte.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.MatMult: ast.Mult, ast.BitXor: ast.BitOr,
}  # fmt: skip
ORDERED = ast.Sub | ast.Div | ast.FloorDiv | ast.Mod | ast.Pow | ast.BitOr | ast.MatMult
LOGS = {"debug", "info", "warning", "warning_once", "warn", "print"}
TYPES = {"TypeVar", "isinstance", "issubclass", "cast"}


class Mutant(NamedTuple):
    """`new` in place of the bytes of a source from `start` to `stop`."""

    kind: str
    start: int
    stop: int
    new: str

    def applied(self, source: bytes) -> bytes:
        """The source with the change."""
        return source[: self.start] + self.new.encode() + source[self.stop :]


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _parts(node: ast.AST) -> Iterable[ast.AST]:
    """The children of a node in which mutants are looked for."""
    match node:
        case (
            ast.FunctionDef(name="__repr__" | "__str__")
            | ast.If(test=ast.Name("TYPE_CHECKING"))
            | ast.Assign(targets=[ast.Name("__all__")])
            | ast.Expr(value=ast.Constant())
            | ast.JoinedStr()
            | ast.Raise()
            | ast.keyword(arg="strict")  # of zip: a guard that no right code meets
        ):
            return ()
        case ast.FunctionDef():
            return [*filter(None, [*node.args.defaults, *node.args.kw_defaults]), *node.body]
        case ast.ClassDef():
            return node.body
        case ast.AnnAssign():
            return filter(None, [node.value])
        case ast.Call() if _called(node) in TYPES | LOGS:
            return node.args[:1] if _called(node) in TYPES else ()
    return ast.iter_child_nodes(node)


def _changes(node: Any) -> Iterator[tuple[str, ast.AST, str]]:  # noqa: PLR0912 (a table of cases)
    """What a node can become: the kind of change, the node that is replaced (itself or its condition), the new text."""

    def text(**fields: Any) -> str:
        changed = copy.copy(node)
        vars(changed).update(fields)
        return ast.unparse(changed)

    match node:
        case ast.If(test=ast.Name("TYPE_CHECKING")):
            pass
        case ast.Raise() | ast.Break() | ast.Continue() | ast.Delete() | ast.Expr(value=ast.Call()):
            yield "statement removed", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):  # what reads a removed name would crash
            yield "statement removed", node, "pass"
        case ast.AugAssign(op=op):
            yield "statement removed", node, "pass"
            yield "operator", node, text(op=OPERATORS[type(op)]())
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test, *_]):
            if not isinstance(test, ast.Compare | ast.UnaryOp | ast.Constant):  # those are turned round by themselves
                yield "condition negated", test, f"not ({ast.unparse(test)})"
        case ast.Compare(ops=ops):
            for index, old in enumerate(ops):
                for new in COMPARISONS[type(old)]:
                    yield "comparison", node, text(ops=[*ops[:index], new(), *ops[index + 1 :]])
        case ast.BoolOp(op=op):
            yield "and/or", node, text(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not dropped", node, ast.unparse(operand)
        case ast.BinOp(op=op, left=left, right=right) if not (_is_text(left) or _is_text(right)):  # nor a path
            yield "operator", node, text(op=OPERATORS[type(op)]())
            if isinstance(op, ORDERED):
                yield "operands exchanged", node, text(left=right, right=left)
        case ast.Call(args=[ast.Name() as one, ast.Name() as two, *others]) if _called(node) not in TYPES | LOGS:
            yield "operands exchanged", node, text(args=[two, one, *others])
        case ast.Constant(bool(value)):
            yield "constant", node, repr(not value)
        case ast.Constant(int(value) | float(value)):
            yield "constant", node, repr(value + 1)
        case ast.Constant(str(value)) if re.fullmatch(r"[\w./-]+", value):  # a key or a file; a sentence has spaces
            yield "constant", node, repr(value + "_")


def mutants(source: bytes) -> list[Mutant]:
    """Every mutant of a source, in the order of the file; some may not compile, or change nothing."""
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    nodes: list[ast.AST] = [ast.parse(source)]
    found = []
    for node in nodes:  # grows
        nodes.extend(_parts(node))
        for kind, old, new in _changes(node):
            start, stop = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            found.append(Mutant(kind, start, stop, f"({new})" if isinstance(old, ast.expr) else new))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.stop, mutant.kind, mutant.new))


def is_valid(source: bytes, mutant: Mutant) -> bool:
    """Whether the mutant compiles, and to something else than the source."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(SyntaxError):
        compile(mutant.applied(source), "mutant", "exec")
        return ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source))
    return False
