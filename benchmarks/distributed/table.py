"""Runs in several processes beside the same in one, beside plain TRL's, and the graft beside one made afterwards."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import inputs
import metered
from engines import weights
from ranks import in_processes

from shadow_trl import graft


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        kind: sft or dpo.
        lora: else full fine-tuning.
        policy: `ref_policy`; "" for SFT.
    """

    kind: str
    lora: bool
    policy: str = ""

    def __str__(self) -> str:
        return ", ".join(word for word in (self.kind.upper(), "LoRA" if self.lora else "full", self.policy) if word)

    @property
    def precompute(self) -> bool:
        """Whether the values of the reference are computed before training; those of the policy itself are not."""
        return self.policy in ("instruct", "grafted")

    @property
    def continues(self) -> bool:
        """Whether training starts from an earlier stage: else `grafted` would be `instruct`."""
        return self.policy == "grafted"


CASES = [
    *(Case("sft", lora) for lora in (False, True)),
    *(Case("dpo", lora, policy) for policy in ("init", "base", "instruct", "grafted") for lora in (False, True)),
]
STEPS, GRAFTED, TRL_DIFFERS = 5, "eval_grafted_", 1e-5


def compare(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make every row under each engine; yield the lines of the table."""
    # Of several lengths, so that a process has fewer tokens than another.
    lengths = range(options.length // 2, 2 * options.length + 1)
    made = inputs.make(folder, hidden=options.hidden, layers=options.layers, rows=options.rows, answers=lengths)
    bench = Bench(made, folder / "runs", options.processes, options.limit)
    yield f"A model of {made.bytes / 1e6:.0f} MB in {options.processes} processes.\n"
    yield (
        "| engine | run | losses | reference values | eval_grafted | TUNED is TRL's | graft is TUNED's "
        "| MiB, reference values | MiB, training |\n|---|---|---|---|---|---|---|---|---|"
    )
    for engine in options.engines:
        for case in CASES:
            if not options.only or str(case) in options.only:
                yield f"| {engine} | {case} | {' | '.join(bench.row(engine, case))} |"


@dataclass(frozen=True, eq=False)
class Bench:
    """Where runs are made and kept."""

    made: inputs.Inputs
    folder: Path
    processes: int
    limit: float
    _evaluates: dict[str, bool] = field(default_factory=dict)

    def row(self, engine: str, case: Case) -> list[str]:
        """Return the cells of a row."""
        try:
            ours, out = self.trained(engine, case)
            one = self.alone(case)
            cells = [
                difference(ours["losses"], one["losses"]),
                difference(ours["references"], one["references"]),
                evaluated(ours, one) if self._evaluates[engine] else "refused",
                self.like_plain(engine, case, out),
                same(weights(out / "grafted"), weights(self.graft_of(out))),
                *(f"{ours['peaks'][part]:.0f}" if part in ours["peaks"] else "" for part in ("reference", "training")),
            ]
        except RuntimeError as error:
            cells = [f"failed: {' '.join(str(error).split())[:300]}", *[""] * 6]
        return cells

    @cache  # noqa: B019
    def alone(self, case: Case) -> dict[str, Any]:
        """Run a case in one process; return what was seen."""
        return self.trained("single", case)[0]

    def trained(self, engine: str, case: Case) -> tuple[dict[str, Any], Path]:
        """Run a case with our trainer; return what was seen and the folder."""
        out, how = self.folder / engine / "ours", {"ref_policy": case.policy} if case.policy else {}
        shutil.rmtree(out, ignore_errors=True)
        if self._evaluates.setdefault(engine, True):
            try:
                return self._run(engine, case, out, eval_grafted=True, **how), out
            except RuntimeError as error:
                if "eval_grafted=True is not possible" not in str(error):
                    raise
                self._evaluates[engine] = False
        return self._run(engine, case, out, **how), out

    def like_plain(self, engine: str, case: Case, ours: Path) -> str:
        """Return whether TRL alone, given the reference as a model, leaves the same TUNED; "" where it cannot."""
        if case.continues and case.lora:
            return ""
        # To TRL, BASE is the policy as it starts.
        return same(weights(ours), self.plain(engine, replace(case, policy="init") if case.policy == "base" else case))

    @cache  # noqa: B019
    def plain(self, engine: str, case: Case) -> dict[str, str]:
        """Run a case with TRL's trainer; return the digests of TUNED."""
        reference = None
        if case.policy == "instruct":
            reference = str(self.made.instruct)
        elif case.continues:
            reference = str(self.graft_of(self.start(case.lora), dtype="float32"))
        out = self.folder / engine / "plain"
        shutil.rmtree(out, ignore_errors=True)
        # Without being told to, TRL leaves the shards of ZeRO-3 as they are.
        gathers = {"stage3_gather_16bit_weights_on_model_save": True} if engine == "zero3" else {}
        self._run(engine, case, out, plain=True, reference=reference, eval_strategy="no", zero=gathers)
        return weights(out)

    @cache  # noqa: B019
    def start(self, lora: bool) -> Path:
        """Return the folder of an SFT stage that was made in one process."""
        out = self.folder / f"start-{lora}"
        self._run("single", Case("sft", lora), out, max_steps=3)
        return out

    def graft_of(self, tuned: Path, **options: Any) -> Path:
        """Graft a folder as a user would; return the folder of the graft."""
        output = tuned.with_name(f"{tuned.name}-grafted")
        shutil.rmtree(output, ignore_errors=True)
        graft(base=self.made.pair[0], instruct=self.made.pair[1], tuned=str(tuned), output=output, **options)
        return output

    def _run(self, engine: str, case: Case, out: Path, **how: Any) -> dict[str, Any]:
        count = 1 if engine == "single" else self.processes
        model = str(self.start(case.lora)) if case.continues else self.made.pair[0]
        settings: dict[str, Any] = {
            "rows": str(self.made.rows[case.kind]), "lora": case.lora and not case.continues, "max_steps": STEPS,
            "per_device_train_batch_size": 2 * self.processes // count, "per_device_eval_batch_size": 2,
            "eval_strategy": "steps", "eval_steps": STEPS, "learning_rate": 1e-3 if case.lora else 1e-4,
            **({"precompute_ref_log_probs": case.precompute} if case.kind == "dpo" else {}), **how,
        }  # fmt: skip
        ends = in_processes(
            metered.run, engine, case.kind, (model, self.made.pair[1]), str(out), count=count, limit=self.limit,
            **settings,
        )  # fmt: skip
        for end in ends:
            if end.error:
                raise RuntimeError(end.error)
        peaks = {part: max(end.value["peaks"][part] for end in ends) for part in ends[0].value["peaks"]}
        return {**ends[0].value, "peaks": peaks}


def difference(found: list[float], expected: list[float]) -> str:
    """Return the largest relative difference; "" where both have nothing."""
    if len(found) != len(expected):
        return f"{len(found)} values, not {len(expected)}"
    shares = [abs(one - other) / abs(other) if other else abs(one) for one, other in zip(found, expected, strict=True)]
    if not shares:
        return ""
    largest = max(shares, key=_size)
    return f"{largest:.1e}" if largest else "0"


def evaluated(ours: dict[str, Any], one: dict[str, Any]) -> str:
    """Return the difference of `eval_grafted_loss` and the largest of the other figures of the graft, with its name.

    Figures of which TRL's own, of the model in training, differ as well are left out: TRL weighs some by the tokens
    of a batch of all processes, and those batches are others.
    """
    found, expected = ours["evaluated"], one["evaluated"]

    def shown(name: str) -> str:
        return difference([entry[name] for entry in found], [entry[name] for entry in expected])

    names = {name.removeprefix(GRAFTED) for entry in (*found, *expected) for name in entry if name.startswith(GRAFTED)}
    alike = [name for name in sorted(names - {"loss"}) if float(shown(f"eval_{name}")) < TRL_DIFFERS]
    worst = max(alike, key=lambda name: _size(float(shown(GRAFTED + name))))
    return f"{shown(GRAFTED + 'loss')}; {worst} {shown(GRAFTED + worst)}"


def _size(share: float) -> tuple[bool, float]:
    return math.isnan(share), share  # NaN is the largest


def same(found: dict[str, str], expected: dict[str, str]) -> str:
    """Return whether two folders have the same weight files, of which there are some."""
    return "yes" if found and found == expected else "**no**"
