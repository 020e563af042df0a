"""The command line: parse, validate, call the library. `--help` loads neither torch nor transformers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import ConfigError, ends_with
from .grafting.options import DTYPES, declared
from .runtime.command_line import Parser, Switch, stdout_is_kept
from .runtime.endings import exit_code
from .runtime.startup import import_undisturbed

_RECIPES = {
    "sft": "train BASE with SFT, then graft",
    "dpo": "train BASE with DPO, then graft",
    "sft-dpo": "train BASE with SFT, then with DPO, then graft",
}
_WRITING = ("graft", "delta", "compare")
"""Commands whose errors say what is on the disk: the others leave nothing there, or say it of the files they make."""
_STDOUT = Path("-")
_QUIET = "print only errors and warnings"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `shadow-trl` with `argv` (default: the process's) and return its exit code.

    0: done. 1: a failure at run time, nothing is half-written. 2: bad input, nothing was written. 130: Ctrl-C. 143:
    SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    import_undisturbed()
    # A training leaves threads and uploads to end, which people may have to stop.
    final = argv is None and not _is_recipe(arguments)
    return exit_code(lambda: _run(arguments), final=final)


def _is_recipe(arguments: list[str]) -> bool:
    return bool(arguments) and arguments[0] in _RECIPES


def _run(arguments: list[str]) -> int:
    if _is_recipe(arguments):
        return _recipe(arguments[0], arguments[1:])
    with ends_with("Nothing was written." if arguments[:1] and arguments[0] in _WRITING else ""):
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="shadow-trl",
        description="Graft what BASE learnt onto INSTRUCT: grafted = instruct + scale * (tuned - base).",
        epilog="`shadow-trl COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"shadow-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (add, text, example) in _COMMANDS.items():
        add(commands.add_parser(name, help=text, epilog=f"example:\n  shadow-trl {name} {example}"))
    for name, text in _RECIPES.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_graft(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write INSTRUCT + scale * (TUNED - BASE) to a folder. Models are folders or hub ids, optionally with @revision."
    )
    need = parser.add_argument_group("models")
    need.add_argument(
        "--base", metavar="B", help="BASE, before training (default: the one that an adapter or a run records)"
    )
    need.add_argument(
        "--instruct", metavar="I", help="INSTRUCT, which receives the delta (default: the one that a run records)"
    )
    text = "take BASE from the table of known pairs or the card of INSTRUCT (see `shadow-trl pairs`)"
    need.add_argument("--find-base", action="store_true", help=text)
    learnt = need.add_mutually_exclusive_group(required=True)
    learnt.add_argument(
        "--tuned", metavar="T[:WEIGHT]", action="append",
        help="BASE after training: a checkpoint or a PEFT adapter; given several times, the weighted sum",
    )  # fmt: skip
    learnt.add_argument(
        "--delta", metavar="D", help="instead of --tuned: a folder that `shadow-trl delta` wrote; needs no BASE"
    )
    need.add_argument("--output", metavar="O", required=True, help="folder for the result; must not exist")
    sums, form = parser.add_argument_group("result"), parser.add_argument_group("output")
    for name, option in declared().items():
        _add_option(sums if option.recorded else form, name)
    _add_output(form)
    hub = parser.add_argument_group("hub")
    hub.add_argument("--push-to-hub", metavar="REPO[@BRANCH]", help="upload the result to owner/name afterwards")
    _add_private(hub)
    parser.set_defaults(run=_graft)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Upload a graft or a delta to a repository of the Hugging Face hub. Paths of this machine are not published."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the graft or delta")
    parser.add_argument("repo", metavar="REPO[@BRANCH]", help="owner/name; created if it does not exist")
    _add_private(parser)
    parser.add_argument("--json", action="store_true", help="print the commit as JSON on stdout")
    parser.set_defaults(run=_push)


def _add_private(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")


def _push(options: argparse.Namespace) -> int:
    from .results.upload import check_publishable, upload

    check_publishable(options.folder)
    repo, branch = _claimed(options.repo, options.private)
    commit = upload(options.folder, repo, revision=branch)
    print(json.dumps({"url": commit.commit_url, "commit": commit.oid}) if options.json else commit.commit_url)
    return 0


def _claimed(given: str, private: bool | None) -> tuple[str, str | None]:
    from .results.upload import claim

    name, _, branch = given.partition("@")
    return claim(name, private=private, revision=branch or None), branch or None


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.description = "Talk to a model, line by line; Ctrl-D ends the conversation."
    parser.add_argument("model", metavar="MODEL", help="folder (weights or adapter) or hub id with a chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    text = "print each answer as a line of JSON, {prompt, answer}, and nothing else"
    parser.add_argument("--json", action="store_true", help=text)
    parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    from .evaluation.chat import chat

    chat(options.model, system=options.system, max_new_tokens=options.max_new_tokens, as_json=options.json)
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure INSTRUCT, the graft of TUNED, and INSTRUCT tuned directly, at several scales and without training. "
        "Settings are selected on half of the prompts and tested on the rest. Writes comparison.json, .md and .html."
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="train the arms that the file describes first; of the other options only --output goes with it",
    )
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--base", metavar="B", help="BASE, before training (default: the one that an adapter or a run records)")
    add("--instruct", metavar="I", help="INSTRUCT (default: the one that a run records)")
    add("--tuned", metavar="T", help="BASE after training")
    add("--direct", metavar="D", help="INSTRUCT after the same training")
    scales = (0.25, 0.5, 0.75, 1.0, 1.25)
    shown = " ".join(f"{scale:g}" for scale in scales)
    add("--scales", metavar="A", type=float, nargs="+", default=scales, help=f"scales of the delta (default {shown})")
    text = "choices of weights to compare: all, linear, attention, mlp or expressions (default all)"
    add("--modules", metavar="M", nargs="+", default=["all"], help=text)
    text = "dtype of the grafts, rounded to nearest (default: dtype and rounding of the run's own graft, else auto)"
    _add_option(models, "dtype", default=None, help=text)
    add = parser.add_argument_group("held-out data (JSONL)").add_argument
    add("--rows", metavar="FILE", help="{prompt, answer, kind}: exact match of greedy answers")
    add("--validation-rows", metavar="FILE", help="rows to select settings on; all of --rows are then for the test")
    add("--conversations", metavar="FILE", help="{messages}: loss and token accuracy of the last answer")
    add("--preferences", metavar="FILE", help="{prompt, chosen, rejected}: accuracy and margin")
    text = "function of (model, tokenizer, rows) that returns one number per row; may be repeated"
    add("--metric", metavar="MODULE:FUNCTION", action="append", default=[], help=text)
    text = "task of lm-eval (extra eval), such as gsm8k:exact_match,flexible-extract; may be repeated"
    add("--task", metavar="NAME[:METRIC,FILTER]", action="append", default=[], help=text)
    add(
        "--task-folder",
        metavar="DIR",
        action="append",
        default=[],
        help="folder with task files of your own; may be repeated",
    )
    add("--kept", metavar="KIND", nargs="+", default=[], help="kinds of rows whose mean is the metric `kept`")
    _add_choice(parser.add_argument_group("selection").add_argument)
    add = parser.add_argument_group("work").add_argument
    add("--output", metavar="DIR", required=True, help="folder for the result; must not exist")
    add("--batch-size", metavar="N", type=int, default=64, help="rows at once (default 64)")
    add("--max-new-tokens", metavar="N", type=int, default=64, help="longest answer in tokens (default 64)")
    add("--score-dtype", choices=DTYPES, default="float32", help="dtype in which all models answer (default float32)")
    add("--device", metavar="D", help="device, such as cuda:1 (default: the accelerator, else cpu)")
    _add_output(parser)
    parser.set_defaults(run=_compare)


def _compare_arms(options: argparse.Namespace) -> int:
    given = {"config", "output", "quiet", "json", "run", "command"}
    parser = _parser()
    plain = vars(parser.parse_args(["compare", "--config", options.config, "--output", options.output]))
    if beside := [name for name, value in vars(options).items() if name not in given and value != plain[name]]:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
        raise ConfigError(f"{words} beside --config: these are keys of the file.")
    from .evaluation.comparison_report import summary
    from .recipes.arms import compare_arms

    with stdout_is_kept(options.json):  # trainings print their losses
        found = compare_arms(Path(options.config), options.output, progress=not options.quiet)
    return _tell(found, summary, options)


def _tell(found: Any, summary: Callable[[Any], str], options: argparse.Namespace) -> int:
    from accelerate import PartialState

    if (options.json or not options.quiet) and PartialState().is_main_process:
        print(json.dumps(found.to_dict(), indent=2) if options.json else summary(found))
    return 0


def _add_choice(add: Callable[..., Any]) -> None:
    add("--target", metavar="METRIC", help="what to maximise (default: target where there is one, else the first)")
    add("--keep", metavar="METRIC", help="what must not get worse than INSTRUCT's (default: kept where there is one)")
    add("--within", metavar="X", type=float, default=1.0, help="how much worse --keep may get (default 1)")
    text = "differences of up to this many points do not count (default 2)"
    add("--margin", metavar="X", type=float, default=2.0, help=text)


def _compare(options: argparse.Namespace) -> int:
    from .evaluation.comparison_report import summary

    if options.config is not None:
        return _compare_arms(options)
    if options.tuned is None:
        raise ConfigError("--tuned is missing (or --config, to train the arms first).")
    from .evaluation.scales import Data, compare_scales
    from .evaluation.steps import Sources
    from .grafting.tuned import recorded_sides

    sides = recorded_sides([(options.tuned, 1.0)], base=options.base, instruct=options.instruct)
    sources = Sources(sides["instruct"], options.tuned, sides.get("base"), options.direct)
    data = Data(
        options.rows, options.validation_rows, options.conversations, options.preferences, tuple(options.metric),
        tuple(options.kept), options.batch_size, options.max_new_tokens, tuple(options.task),
        tuple(options.task_folder),
    )  # fmt: skip
    with stdout_is_kept(options.json):  # a metric of the user may print
        found = compare_scales(
            sources, data, output=options.output, scales=options.scales, modules=options.modules,
            graft_dtype=options.dtype, target=options.target, keep=options.keep, within=options.within,
            margin=options.margin, dtype=options.score_dtype, device=options.device, progress=not options.quiet,
        )  # fmt: skip
    return _tell(found, summary, options)


def _add_option(parser: argparse._ActionsContainer, name: str, **changes: Any) -> None:
    """Add an option of the graft as it is declared, but for `changes` that another command makes."""
    known = {**vars(declared()[name]), **changes}
    default, text, more = known["default"], known["help"], dict(known["flags"])
    if default is False:
        more["action"] = "store_true"
    elif default is True:
        text += " (default on)"
        more |= {"action": Switch, "choices": ("on", "off")}
    else:
        text += f" (default {default})" if default is not None else ""
        more["choices"] = known["choices"]
    parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **more)


def _add_gap(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure sigma = sum|B-I| / (sum|B| + sum|I|) overall, by kind of weight and by layer."
    parser.add_argument(
        "--base", metavar="B", help="BASE: folder or hub id, with @revision (default: the one that a run records)"
    )
    parser.add_argument("--instruct", metavar="I", help="INSTRUCT (default: the one that a run records)")
    parser.add_argument("--tuned", metavar="T", help="BASE after training: also compare its delta with the gap")
    text = "print the figures as JSON on stdout, or write them to FILE"
    parser.add_argument("--json", metavar="FILE", nargs="?", type=Path, const=_STDOUT, help=text)
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw sigma by layer (needs matplotlib)")
    parser.add_argument("--quiet", action="store_true", help=_QUIET)
    parser.set_defaults(run=_gap)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the known pairs whose names contain FILTER. An INSTRUCT that is not among them is looked up by its card."
    )
    parser.add_argument("filter", metavar="FILTER", nargs="?", default="", help="part of a name, or an INSTRUCT")
    parser.add_argument("--json", action="store_true", help="print the list as JSON on stdout")
    parser.set_defaults(run=_pairs)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run this before training: it reports versions, devices, what would fail with this pair, sigma, and the memory "
        "and disk that full fine-tuning and LoRA need. Reads both models. The exit code is 1 if something would fail."
    )
    parser.add_argument("--base", metavar="B", required=True, help="BASE: folder or hub id, with @revision")
    parser.add_argument("--instruct", metavar="I", required=True, help="INSTRUCT")
    parser.add_argument("--max-length", metavar="N", type=int, default=1024, help="tokens per row (default 1024)")
    parser.add_argument("--rank", metavar="R", type=int, default=16, help="rank of the LoRA (default 16)")
    _add_output(parser)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from .operations.doctor import doctor

    found = doctor(**_named(options))
    _show(found, options.quiet, options.json)
    return 1 if found.fails else 0


def _pairs(options: argparse.Namespace) -> int:
    from .pair.known import KnownPair, find_base, matching, near

    found = matching(options.filter)
    if not found and ("/" in options.filter or Path(options.filter).is_dir()):
        base, how = find_base(options.filter)
        found = [KnownPair(base, options.filter, "", "", "")]
        print(f"BASE of {options.filter} is {base}, {how}.", file=sys.stderr)
    rows = [pair.shown() for pair in found]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        alike = f" Names like it: {', '.join(names)}." if (names := near(options.filter)) else ""
        raise ConfigError(f"no known pair has {options.filter!r} in a name.{alike} Or give an INSTRUCT as owner/name.")
    widths = {name: max(len(row[name]) for row in [*rows, {name: name}]) for name in rows[0]}
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        print("  ".join(text.ljust(widths[name]) for name, text in row.items()).rstrip())
    return 0


def _add_delta(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write TUNED - BASE to a folder; `shadow-trl graft --delta` adds it to any INSTRUCT of that BASE."
    )
    parser.add_argument(
        "--base", metavar="B", help="BASE, before training (default: the one that an adapter or a run records)"
    )
    parser.add_argument("--tuned", metavar="T", required=True, help="BASE after training")
    parser.add_argument("--output", metavar="D", required=True, help="folder for the result; must not exist")
    _add_option(parser, "rank", help="write a LoRA adapter for BASE of this rank instead")
    _add_option(parser, "dtype", help="dtype of the result", default="float32", choices=DTYPES[1:])
    _add_option(parser, "base_dtype")
    _add_option(parser, "max_shard_size", help="size of the largest file, such as 5GB; default: the files of BASE")
    _add_option(parser, "overwrite", help="replace an existing delta")
    _add_option(parser, "digest")
    _add_option(parser, "stats", help="measure the delta")
    _add_output(parser, ", with every module")
    parser.set_defaults(run=_delta)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Repeat the graft in FOLDER with the options in its shadow.json, and compare. The exit code is 0 if it is that "
        "graft and 1 if not. Models that are not given are the ones that shadow.json names."
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of the graft")
    parser.add_argument("--base", metavar="B", help="BASE")
    parser.add_argument("--instruct", metavar="I", help="INSTRUCT")
    learnt = parser.add_mutually_exclusive_group()
    learnt.add_argument("--tuned", metavar="T[:WEIGHT]", action="append", help="BASE after training")
    learnt.add_argument("--delta", metavar="D", help="a folder that `shadow-trl delta` wrote, instead of --tuned")
    _add_output(parser)
    parser.set_defaults(run=_verify)


def _add_output(parser: argparse._ActionsContainer, more: str = "") -> None:
    parser.add_argument("--quiet", action="store_true", help=_QUIET)
    parser.add_argument("--json", action="store_true", help=f"print the report as JSON on stdout{more}")


def _graft(options: argparse.Namespace) -> int:
    from .operations.graft import graft

    given = _named(options)
    repo, private = given.pop("push_to_hub"), given.pop("private")
    if repo is None:
        return _show(graft(**given), options.quiet, options.json)
    from .results.upload import check_adapter_base, upload

    if options.format == "adapter" or options.rank is not None:
        check_adapter_base(options.instruct)
    name, branch = _claimed(repo, private)
    report = graft(**given)
    _show(report, options.quiet, options.json)
    upload(report.output, name, revision=branch)
    return 0


def _gap(options: argparse.Namespace) -> int:
    files = [path for path in (options.plot, options.json) if path not in (None, _STDOUT)]
    for path in files:
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"the folder of {path} does not exist.")
    if options.plot is not None:
        from .operations.gap_plot import require_matplotlib

        require_matplotlib()
    from .operations.gap import gap
    from .results.folder import whole_file
    from .results.written import tells_what_is_written

    report = gap(options.base, options.instruct, options.tuned, progress=not options.quiet)
    _show(report, options.quiet, options.json == _STDOUT)
    with tells_what_is_written(*files):
        if options.plot is not None:  # before the figures: an image of an unknown format leaves nothing behind
            from .operations.gap_plot import plot_gap

            with whole_file(options.plot) as new:
                plot_gap(report, new)
        if options.json in files:
            with whole_file(options.json) as new:
                new.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0


def _delta(options: argparse.Namespace) -> int:
    from .operations.delta import extract_delta

    return _show(extract_delta(**_named(options)), options.quiet, options.json)


def _verify(options: argparse.Namespace) -> int:
    from .operations.verify import verify

    report = verify(**_named(options))
    _show(report, options.quiet and report.same, options.json)
    return 0 if report.same else 1


def _recipe(name: str, argv: list[str]) -> int:
    with ends_with("Nothing was written."):
        from .recipes import launch

    return launch.main(name, argv)


def _named(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command's function is called with."""
    given = {name: value for name, value in vars(options).items() if name not in ("run", "command", "quiet", "json")}
    return {**given, "progress": not options.quiet}


def _show(report: Any, quiet: bool, as_json: bool = False) -> int:
    """Print what a command found; the exit code is 0."""
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        print(report.text())
    return 0


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str, str]] = {
    "graft": (
        _add_graft, "add the delta of TUNED to INSTRUCT",
        "--base Qwen/Qwen3-0.6B-Base --instruct Qwen/Qwen3-0.6B --tuned out --output grafted",
    ),
    "gap": (
        _add_gap, "measure how far INSTRUCT is from BASE", "--base Qwen/Qwen3-0.6B-Base --instruct Qwen/Qwen3-0.6B"
    ),
    "doctor": (
        _add_doctor, "check machine and pair, and estimate what training needs",
        "--base Qwen/Qwen3-0.6B-Base --instruct Qwen/Qwen3-0.6B",
    ),
    "pairs": (_add_pairs, "list known pairs, or find the BASE of an INSTRUCT", "gemma-3"),
    "delta": (
        _add_delta, "write TUNED - BASE on its own, or as a LoRA",
        "--base Qwen/Qwen3-0.6B-Base --tuned out --output delta",
    ),
    "verify": (_add_verify, "check that a folder is the graft it claims to be", "grafted"),
    "push": (_add_push, "upload a graft or a delta to the hub", "out/grafted me/grafted --private"),
    "chat": (_add_chat, "talk to a model in the terminal", "out/grafted"),
    "compare": (
        _add_compare, "find the best scale of a run, and whether it helped",
        "--instruct Qwen/Qwen3-0.6B --tuned out --rows ROWS.jsonl --output compared",
    ),
}  # fmt: skip
"""Each command: what adds its options, what it does, and the words of an example."""


if __name__ == "__main__":
    sys.exit(main())
