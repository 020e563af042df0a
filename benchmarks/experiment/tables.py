"""The tables of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

from experiment import (
    RATES,
    SHOWN,
    TASKS,
    Experiment,
    best,
    compared,
    mean,
    rates_of,
    renamed,
    spread,
    table,
    whole_seeds,
    without_guidance,
)
from predictors import correlations, kinds, predictors

from shadow_trl.evaluation.comparison import Comparison
from shadow_trl.evaluation.exam import Metric
from shadow_trl.evaluation.measured import Settings
from shadow_trl.evaluation.statistics import Difference

ALL = 100.0
LOSSES = (1.0, 2.0, 5.0, 10.0, ALL)
"""Points that `kept` may lose."""


def interval(found: Difference, digits: int = 1) -> str:
    """Return a difference with its interval."""
    low, high = found.interval
    return f"{found.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def three(comparison: Comparison, settings: Settings | None) -> str:
    """Return target, in style and kept."""
    if settings is None:
        return "none"
    return " / ".join(f"{mean(comparison, settings, name):.1f}" for name in SHOWN)


def untouched(experiment: Experiment) -> str:
    """INSTRUCT of each pair, and how far it is from BASE."""
    rows = []
    for task, pair in product(TASKS, experiment.pairs):
        core = experiment.core(task, pair=pair)
        sigma = experiment.gaps(task, pair)[0]["sigma"]
        rows.append([TASKS[task], pair, f"{100 * sigma:.2f}%", *three(core, Settings("instruct")).split(" / ")])
    return table(["task", "pair", "sigma", *SHOWN], rows)


def equal_rate(experiment: Experiment) -> str:
    """Graft and direct tuning with the same learning rate and scale."""
    rows = []
    for task in TASKS:
        core = experiment.core(task)
        for rate, scale in product(rates_of(core), (0.5, 1.0)):
            direct, graft = (without_guidance(task, arm, rate, scale) for arm in ("direct", "shadow"))
            cells = [TASKS[task], f"{rate:g}", f"{scale:g}"]
            for name in SHOWN:
                metric = core.by_name[name]
                cells.append(f"{mean(core, direct, name):.1f} / {mean(core, graft, name):.1f}")
                cells.append(interval(core.compared(graft, direct, metric)))
            rows.append(cells)
    heads = ["task", "rate", "scale"] + [head for name in SHOWN for head in (name, "graft - direct")]
    return table(heads, rows)


def equal_kept(experiment: Experiment) -> str:
    """The highest target that each arm reaches where `kept` may lose so much."""
    rows = []
    for task, within in product(TASKS, LOSSES):
        core = experiment.core(task, within=within)
        found = [best(core, arm) for arm in ("direct", "shadow")]
        cells = [TASKS[task], "any" if within == ALL else f"{within:g}"]
        for one in found:
            cells += ["none" if one is None else f"{one.learning_rate:g} x {one.scale:g}", three(core, one)]
        direct, graft = found
        both = direct is not None and graft is not None
        cells += [
            interval(core.compared(graft, direct, core.by_name[name])) if both else ""
            for name in ("target", "in style")
        ]
        rows.append(cells)
    heads = ["task", "may lose", "direct", "target / in style / kept", "graft", "target / in style / kept"]
    return table([*heads, "target, graft - direct", "in style, graft - direct"], rows)


def verdicts(experiment: Experiment) -> str:
    """What the comparison says of the settings chosen with at most one point lost."""
    rows = []
    for task in TASKS:
        for test in experiment.core(task).tests:
            if (test.a, test.b) == ("shadow", "direct"):
                rows.append(
                    [TASKS[task], test.metric.name, interval(test.found), f"{test.p_adjusted:.2g}", test.verdict]
                )
    return table(["task", "metric", "graft - direct", "p, adjusted", "verdict for the graft"], rows)


def by_pair(experiment: Experiment) -> str:
    """The same choice on each pair alone."""
    rows = []
    for task, pair in product(TASKS, experiment.pairs):
        core = experiment.core(task, pair=pair)
        direct, graft = best(core, "direct"), best(core, "shadow")
        cells = [TASKS[task], pair]
        for one in (direct, graft):
            cells += ["none" if one is None else f"{one.learning_rate:g} x {one.scale:g}", three(core, one)]
        both = direct is not None and graft is not None
        cells.append(interval(core.compared(graft, direct, core.by_name["target"])) if both else "")
        rows.append(cells)
    heads = ["task", "pair", "direct", "target / in style / kept", "graft", "target / in style / kept"]
    return table([*heads, "target, graft - direct"], rows)


def factors(experiment: Experiment) -> str:
    """One factor at a time on the first pair."""
    rows = []
    for task in TASKS:
        core = experiment.core(task, pair="pair-1", seeds=3)
        whole = without_guidance(task, "shadow", RATES[task], 1.0)
        rows += _pairs_of(task, "full, all weights", core, whole, (0.5, 1.0))
        for name, label in (("modules", ""), ("lora", "LoRA"), ("reference", "reference"), ("readapt", "INSTRUCT x")):
            models = experiment.models(f"{name}_{task}")
            if not models:
                continue
            rows += _factor(task, label, compared(models, task))
    heads = ["task", "what", "scale", "direct: target / in style / kept", "graft: target / in style / kept", "spread"]
    return table(heads, rows)


def _factor(task: str, label: str, own: Comparison) -> list[list[str]]:
    """Return the lines of a factor, by what its settings differ in."""
    rows = []
    for one in own.groups:
        if one.arm != ("re-adapt" if label == "INSTRUCT x" else "shadow"):
            continue
        what = {
            "": f"{one.modules} only", "LoRA": f"LoRA, rate {one.learning_rate:g}" if one.learning_rate else "",
            "reference": f"reference {one.ref_policy}", "INSTRUCT x": f"INSTRUCT x {one.instruct_scale}",
        }[label]  # fmt: skip
        rows += _pairs_of(task, what, own, one, (one.scale,))
    return rows


def _pairs_of(
    task: str, what: str, comparison: Comparison, graft: Settings, scales: Sequence[float | None]
) -> list[list[str]]:
    """Return a line for each scale, with direct tuning at the same settings where it was measured."""
    rows = []
    for scale in scales:
        here = replace(graft, scale=scale)
        direct = replace(here, arm="direct", ref_policy=None)
        both = [one for one in (direct, here) if one in comparison.groups]
        spreads = max(spread(comparison, one) for one in both)
        shown = [three(comparison, one) if one in comparison.groups else "" for one in (direct, here)]
        rows.append([TASKS[task], what, f"{scale:g}", *shown, f"{spreads:.1f}"])
    return rows


def stages(experiment: Experiment) -> str:
    """DPO after SFT, on the rows of DPO."""
    rows = []
    models = experiment.models("sft_dpo")
    if not models:
        return "Not run."
    for start, arm, what in (
        ("shadow", "instruct", "graft after SFT"), ("direct", "instruct", "INSTRUCT after SFT, tuned directly"),
        ("shadow", "shadow", "graft after SFT and DPO"), ("direct", "direct", "INSTRUCT tuned directly, SFT and DPO"),
        ("shadow", "direct", "graft after SFT, then DPO directly"),
    ):  # fmt: skip
        found = [one for one in models if one.pair.startswith(start) and one.settings.arm == arm]
        own = compared(found, "dpo")
        for settings in own.groups:
            scale = "" if settings.scale is None else f"{settings.scale:g}"
            rows.append([what, scale, *three(own, settings).split(" / "), f"{spread(own, settings):.1f}"])
    return table(["what", "scale of DPO", *SHOWN, "spread"], rows)


def guidance(experiment: Experiment) -> str:
    """With INSTRUCT as a guide and without, each at its best with at most one point of `kept` lost, pair by pair."""
    rows = []
    seeds = {None, *whole_seeds(experiment.models("guidance_sft"))}
    for pair, arm in product(experiment.pairs, ("direct", "shadow")):
        guided = experiment.models("guidance_sft", lambda one, pair=pair: one.pair == pair and one.seed in seeds)
        plain = [
            one for one in experiment.models("core_sft", lambda one, pair=pair: one.pair == pair)
            if one.seed in seeds and one.settings.scale in (None, 0.5, 0.75, 1.0)
        ]  # fmt: skip
        instruct = [one for one in plain if one.settings.arm == "instruct"]
        if not guided or not instruct:
            continue
        own = compared([*instruct, *renamed(plain, arm, "direct"), *renamed(guided, arm, "shadow")], "sft")
        without, with_ = best(own, "direct"), best(own, "shadow")
        power = "" if with_ is None else f"{with_.learning_rate:g} x {with_.scale:g}, power {with_.guidance_power:g}"
        rate = "none" if without is None else f"{without.learning_rate:g} x {without.scale:g}"
        both = without is not None and with_ is not None
        difference = interval(own.compared(with_, without, own.by_name["target"])) if both else ""
        label = {"direct": "direct", "shadow": "graft"}[arm]
        rows.append([pair, label, rate, three(own, without), power, three(own, with_), difference])
    heads = ["pair", "arm", "without", "target / in style / kept", "with", "target / in style / kept", "target, gained"]
    of = ", ".join(str(seed) for seed in sorted(filter(None, seeds)))
    return f"{table(heads, rows)}\n\nSeeds {of}." if rows else "Not run."


def real(experiment: Experiment) -> str:
    """Real data: the loss or the preference accuracy of what was held out, and what was kept."""
    rows = []
    kept = Metric("kept", ("rule", "skill", "refuse"))
    for name, title in (
        ("real_gsm8k", "GSM8K"), ("real_svamp", "SVAMP"), ("real_instructions", "short instructions"),
        ("real_preferences", "preferences"),
    ):  # fmt: skip
        models = experiment.models(name)
        if not models:
            continue
        by = (
            Metric("preference accuracy", ("preference accuracy",)) if name == "real_preferences"
            else Metric("loss", ("loss",), higher=False, share=False)
        )  # fmt: skip
        own = Comparison(models, (by, kept), by.name, "kept")
        digits = 1 if by.share else 3
        measured = by.name + (", %" if by.share else ", nats")
        shown = {
            (one.arm, one.scale): f"{mean(own, one, by.name):.{digits}f} / {mean(own, one, 'kept'):.1f}"
            for one in own.groups
        }
        found = {(one.arm, one.scale): one for one in own.groups}
        for scale in (0.5, 1.0):
            sides = ("instruct", None), ("direct", scale), ("shadow", scale)
            difference = own.compared(found["shadow", scale], found["direct", scale], by)
            rows.append([title, measured, f"{scale:g}", *(shown[side] for side in sides), interval(difference, digits)])
    heads = ["data", "figure", "scale", *(f"{arm}: figure / kept" for arm in ("INSTRUCT", "direct", "graft"))]
    return table([*heads, "graft - direct"], rows) if rows else "Not run."


def cost(experiment: Experiment) -> str:
    """What was trained and scored."""
    trained = sum(len(cell["train"]) for cell in experiment.cells)
    models = [model for cell in experiment.cells for model in cell["models"]]
    seeds = ", ".join(f"{len(found)} seeds of {TASKS[task]}" for task, found in experiment.seeds.items())
    return (
        f"{len(experiment.cells)} cells, {trained} trainings, {len(models)} scored models; whole in the core: {seeds}."
    )


TABLES: dict[str, Callable[[Experiment], str]] = {
    "untouched": untouched, "equal_rate": equal_rate, "equal_kept": equal_kept, "verdicts": verdicts,
    "by_pair": by_pair, "factors": factors, "stages": stages, "guidance": guidance, "real": real,
    "predictors": predictors, "correlations": correlations, "kinds": kinds, "cost": cost,
}  # fmt: skip
"""Name in page.md -> what makes it."""
