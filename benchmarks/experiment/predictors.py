"""The tables of docs/results.md that set gains beside what could predict them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from experiment import RATES, SHOWN, TASKS, Experiment, mean, rates_of, table, without_guidance


def _gains(experiment: Experiment, task: str) -> list[tuple[list[str], dict[str, float]]]:
    """Return for each pair and rate its name, what could predict, and what the graft gained at scale 1."""
    found = []
    for pair in experiment.pairs:
        core, known = experiment.core(task, pair=pair), experiment.known[task][pair]
        for rate in rates_of(core):
            gaps = experiment.gaps(task, pair, rate)
            figures = {key: sum(gap[key] for gap in gaps) / len(gaps) for key in ("sigma", "delta_to_gap", "cosine")}
            for side, of in product(("base", "instruct"), ("template", "chosen")):
                figures[f"{side}_{of}"] = known[side][of]
            direct, graft = (without_guidance(task, arm, rate, 1.0) for arm in ("direct", "shadow"))
            for name in SHOWN:
                figures[name] = mean(core, graft, name) - mean(core, direct, name)
            found.append(([TASKS[task], pair, f"{rate:g}"], figures))
    return found


def predictors(experiment: Experiment) -> str:
    """What could predict a gain, beside the gain."""
    rows = []
    for name, figures in [one for task in TASKS for one in _gains(experiment, task)]:
        losses = [f"{figures[f'base_{of}']:.2f} / {figures[f'instruct_{of}']:.2f}" for of in ("template", "chosen")]
        gains = [f"{figures[of]:+.1f}" for of in SHOWN]
        middle = [f"{100 * figures['sigma']:.2f}%", f"{figures['delta_to_gap']:.3f}", f"{figures['cosine']:+.3f}"]
        rows.append([*name, *middle, *losses, *gains])
    heads = ["task", "pair", "rate", "sigma", "delta/gap", "cosine", "loss on template, BASE / INSTRUCT"]
    heads += ["loss on answers, BASE / INSTRUCT", *(f"{of}, graft - direct" for of in SHOWN)]
    return table(heads, rows)


def correlations(experiment: Experiment) -> str:
    """Rank correlations of what could predict with each gain, over the pairs and rates of a task."""
    rows = []
    for task in TASKS:
        gains = [figures for _, figures in _gains(experiment, task)]
        for key, label in (
            ("sigma", "sigma"), ("delta_to_gap", "delta/gap"), ("cosine", "cosine"),
            ("base_template", "BASE's loss on the template"), ("base_chosen", "BASE's loss on the answers"),
        ):  # fmt: skip
            cells = [TASKS[task], label, str(len({round(one[key], 9) for one in gains}))]
            for name in SHOWN:
                correlation, p = all_orders([one[key] for one in gains], [one[name] for one in gains])
                cells.append(f"{correlation:+.2f} (p {p:.2g})")
            rows.append(cells)
    return table(["task", "figure", "values", *SHOWN], rows)


def all_orders(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return the rank correlation of x and y, and its p value over all orders of y.

    The usual approximation means nothing for so few values.
    """
    from scipy.stats import permutation_test, rankdata

    ranks, others = ((values - values.mean()) / values.std() for values in (rankdata(x), rankdata(y)))
    found = permutation_test(
        (others,), lambda order, axis=-1: (order * ranks).mean(axis).round(9) + 0.0,
        permutation_type="pairings", vectorized=True,
        n_resamples=10**6,
    )  # fmt: skip
    return float(found.statistic), float(found.pvalue)


def kinds(experiment: Experiment) -> str:
    """Sigma and the delta by kind of weight, at the recipes' rates, the mean over pairs and seeds."""
    rows = []
    found = {
        task: [gap["by_kind"] for pair in experiment.pairs for gap in experiment.gaps(task, pair, RATES[task])]
        for task in TASKS
    }

    def average(task: str, kind: str, key: str) -> float:
        return sum(one[kind][key] for one in found[task]) / len(found[task])

    for kind in found["dpo"][0]:
        cells = [kind, f"{100 * average('dpo', kind, 'sigma'):.2f}%"]
        for task in TASKS:
            cells += [f"{average(task, kind, 'delta_to_gap'):.3f}", f"{average(task, kind, 'cosine'):+.3f}"]
        rows.append(cells)
    heads = [f"{task}, {figure}" for task in TASKS.values() for figure in ("delta/gap", "cosine")]
    return table(["kind", "sigma", *heads], rows)
