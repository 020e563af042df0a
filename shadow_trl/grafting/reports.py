"""What a graft and a gap report: counts, figures overall and by kind of weight, warnings, and their text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..arithmetic.sums import Sums, is_whole
from ..checkpoints.weight_names import kind_of, layer_key, layer_of
from ..results.usage import kept

WIDE_GAP = 0.1
"""sigma above which grafts of this pair are doubtful; families of the paper lie below 0.05."""
POOR_NOISE = 5.0
"""`noise` of stochastic rounding above which it does: it averages out in part (docs/precision.md)."""
FIGURES = ("sigma", "delta_norm", "realised", "noise")
"""Of `Sums`, as reports have them."""

_CAUTION = (
    "delta/gap and cosine say how far training went beside INSTRUCT and in which direction. They do not tell whether a "
    "graft gains:\ndocs/results.md sets them against gains on three small pairs. Measure it: shadow-trl compare."
)


class _Report:
    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON knows."""
        fields = asdict(self)  # type: ignore[call-overload]
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}

    def _figures(self) -> list[str]:
        """Return a line of the figures that were measured; none where nothing was."""
        found = {name: getattr(self, name, None) for name in FIGURES}
        line = "  ".join(f"{name} {value:.4g}" for name, value in found.items() if value is not None)
        return [line] if line else []


@dataclass(frozen=True)
class GraftReport(_Report):
    """What `graft` wrote and measured.

    Args:
        output: folder of the result.
        form: `model` (dense weights) or `adapter`.
        grafted: number of weights that received a delta; of modules for the adapter form.
        copied: number of weights taken over from INSTRUCT.
        dtype: torch name of the dtype of most elements of the result.
        scale, instruct_scale: the multipliers.
        sigma: sum|B-I| / (sum|B| + sum|I|) over the grafted weights; None where BASE's weights were not read.
        delta_norm: Euclidean norm of the change, scale included; None where nothing was measured.
        realised: <r,d>/<d,d>, the share of the change d that the stored weights r - the rounded ones - hold.
        noise: |r-d|/|d|, what rounding put beside the change.
        realised_in_bf16: the same share after a load in bf16; None where nothing was measured.
        by_kind: kind of weight -> the same figures and the number of weights and elements.
        warnings: what the user should know.
        dense_because: why an adapter became dense weights, where `auto` chose them.
        rounding: `nearest` or `stochastic`, for dense weights.
        rounded_because: why the sums are not rounded to nearest in INSTRUCT's dtype, where `auto` chose that.
        beside: folder below `output` with the same graft as an adapter; None where there is none.
        load: the Python call that loads the result.
        text_class: the text-only class of a multimodal INSTRUCT whose names the modules of an adapter have; else None.
    """

    output: Path
    form: str
    grafted: int
    copied: int
    dtype: str
    scale: float = 1.0
    instruct_scale: float = 1.0
    sigma: float | None = None
    delta_norm: float | None = None
    realised: float | None = None
    noise: float | None = None
    realised_in_bf16: float | None = None
    by_kind: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    dense_because: list[str] = field(default_factory=list)
    rounding: str | None = None
    rounded_because: str | None = None
    beside: str | None = None
    load: str = ""
    text_class: str | None = None

    def text(self) -> str:
        """Return the report as lines for a terminal."""
        unit = "modules" if self.form == "adapter" else "weights"
        lines = [f"{self.form} in {self.output}: {self.grafted} {unit} grafted, {self.copied} copied, {self.dtype}"]
        if self.dense_because:
            lines.append(f"dense because {'; '.join(self.dense_because)}")
        if self.rounded_because:
            how = "rounded stochastically" if self.rounding == "stochastic" else f"in {self.dtype}"
            lines.append(f"{how} because {self.rounded_because}")
        lines += self._figures()
        lines += [line for line in (kept(vars(self)),) if line is not None]
        if self.beside is not None:
            lines.append(f"The same as an adapter for instruct: {self.output / self.beside}")
        return "\n".join([*lines, *([f"Load it with  {self.load}"] if self.load else [])])


@dataclass(frozen=True)
class DeltaReport(_Report):
    """What `extract_delta` wrote and measured.

    Args:
        output: folder of the result.
        form: `delta` (dense) or `adapter` (a LoRA made from it).
        weights: number of weights of the delta; of modules for the adapter.
        dtype: torch name of the dtype that was written.
        delta_norm: Euclidean norm of the delta; None where nothing was measured.
        exact: whether every stored value is exactly tuned - base, so that a graft of it has the bits of the direct one;
            None where nothing was measured or the delta came from an adapter.
        realised, noise: as in `GraftReport`, of storing the delta in `dtype`.
        by_kind: kind of weight -> the figures and the number of weights and elements.
        rank: of the adapter.
        kept: share of the delta's squared norm that the adapter keeps, all weights together.
        modules: module -> `energy`, the share of its own squared norm that is kept, and `share`, its share of the whole
            delta's squared norm.
        lost: weight without a low-rank form -> its share of the whole delta's squared norm, which is lost.
        warnings: what the user should know.
    """

    output: Path
    form: str
    weights: int
    dtype: str
    delta_norm: float | None = None
    exact: bool | None = None
    realised: float | None = None
    noise: float | None = None
    by_kind: dict[str, dict[str, Any]] = field(default_factory=dict)
    rank: int | None = None
    kept: float | None = None
    modules: dict[str, dict[str, float]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the report as lines for a terminal; the whole tables are in `to_dict`."""
        if self.form == "adapter":
            return "\n".join(self._adapter_lines())
        exact = {True: ", exact", False: ", rounded", None: ""}[self.exact]
        head = f"delta in {self.output}: {self.weights} weights, {self.dtype}{exact}"
        return "\n".join([head, *self._figures()])

    def _adapter_lines(self) -> list[str]:
        lines = [f"adapter in {self.output}: {self.weights} modules, rank {self.rank}, {self.dtype}"]
        lines += [f"keeps {self.kept or 0:.2%} of the delta's squared norm; of a module's own at least"]
        worst = sorted(self.modules.items(), key=lambda item: item[1]["energy"])[:5]
        lines += [f"  {found['energy']:.2%}  {name}" for name, found in worst]
        if self.lost:
            lines += [f"loses {sum(self.lost.values()):.2%} with {len(self.lost)} weights that have no low-rank form"]
            largest = sorted(self.lost.items(), key=lambda item: -item[1])[:5]
            lines += [f"  {share:.2%}  {name}" for name, share in largest]
        return lines


@dataclass(frozen=True)
class GapReport(_Report):
    """Relative distance of BASE and INSTRUCT, `sigma = sum|B-I| / (sum|B| + sum|I|)`.

    Args:
        sigma: over all common weights.
        by_kind: kind of weight -> `sigma`, number of `weights` and `elements`, and with TUNED the size of the delta.
        by_layer: the same by layer.
        weights, elements: how many were compared.
        delta: with TUNED, sum|T-B| / (sum|T| + sum|B|); else None.
        delta_to_gap: with TUNED, sum|T-B| / sum|B-I|; else None.
        cosine: with TUNED, <T-B, I-B> / (|T-B| |I-B|), whether training went the way that INSTRUCT went; else None.
        warnings: what the user should know.
    """

    sigma: float | None
    by_kind: dict[str, dict[str, Any]]
    by_layer: dict[str, dict[str, Any]]
    weights: int
    elements: int
    delta: float | None = None
    delta_to_gap: float | None = None
    cosine: float | None = None
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the report as a table for a terminal."""
        with_delta = self.delta is not None
        head = (
            f"{'':40}{'sigma':>10}"
            + (f"{'delta':>12}{'delta/gap':>12}{'cosine':>12}" if with_delta else "")
            + f"{'elements':>16}"
        )
        total = {name: getattr(self, name) for name in ("sigma", "delta", "delta_to_gap", "cosine", "elements")}
        rows = [head, _row("overall", total, with_delta)]
        for title, groups in (("by kind", self.by_kind), ("by layer", self.by_layer)):
            rows += ["", title, *[_row(f"  {name}", group, with_delta) for name, group in groups.items()]]
        return "\n".join([*rows, *(["", _CAUTION] if with_delta else [])])


def graft_figures(sums: Mapping[str, Sums], stats: bool, *, sigma: bool = True) -> dict[str, Any]:
    """Return the fields of `GraftReport` that are made of sums; {} when nothing was measured.

    Args:
        sums: name of each weight -> its sums.
        stats: whether they were measured.
        sigma: False where zeros stood in for BASE or INSTRUCT, so that their distance means nothing.
    """
    if not stats or not sums:
        return {}

    def figures(found: Sums) -> dict[str, Any]:
        return {name: getattr(found, name) if sigma or name != "sigma" else None for name in FIGURES}

    return {**figures(_total(sums.values())), "by_kind": _grouped(kind_of, figures, sums)}


def graft_warnings(figures: Mapping[str, Any], dtype: str, rounding: str, way_out: str = "") -> list[str]:
    """Return what the figures of a graft say against it; `way_out` follows where rounding lost a part of the delta."""
    found = []
    sigma, realised, noise = (figures.get(name) for name in ("sigma", "realised", "noise"))
    if figures and figures.get("delta_norm") == 0:
        found.append("the delta is zero: tuned and base hold the same weights, the result is instruct.")
    if sigma is not None and sigma > WIDE_GAP:
        found.append(
            f"base and instruct are far apart: sigma is {sigma:.3g}, pairs of one family lie below 0.05. The graft may "
            "carry over badly."
        )
    if drowns(realised, noise, rounding):
        how = "stochastically" if rounding == "stochastic" else "to nearest"
        kept_share = f"{realised:.3g} of the delta with noise of {noise:.3g} times its norm"
        found.append(f"{dtype} rounded {how} keeps {kept_share}.{way_out}")
    return found


def drowns(realised: float | None, noise: float | None, rounding: str) -> bool:
    """Whether rounding changes what the delta does: its size, or stochastically by noise that hides it."""
    if realised is None or noise is None:
        return False
    return not is_whole(realised) or (rounding == "stochastic" and noise > POOR_NOISE)


def realised_in_bf16(sums: Mapping[str, Sums], stats: bool) -> float | None:
    """Return the field of `GraftReport`; None where nothing was measured."""
    return _total(sums.values()).realised_in_bf16 if stats and sums else None


def gap_report(gaps: Mapping[str, Sums], deltas: Mapping[str, Sums] | None, warnings: list[str]) -> GapReport:
    """Return the report on the sums of each weight: of BASE against INSTRUCT, and of BASE against TUNED where given."""

    def figures(found: Sums, delta: Sums | None = None) -> dict[str, Any]:
        if delta is None:
            return {"sigma": found.sigma}
        between = delta.gap / found.gap if found.gap > 0 else None
        return {"sigma": found.sigma, "delta": delta.sigma, "delta_to_gap": between, "cosine": delta.cosine}

    parts = [gaps] if deltas is None else [gaps, deltas]
    layers = _grouped(layer_of, figures, *parts)
    return GapReport(
        **_summary(figures, gaps, *parts),
        by_kind=_grouped(kind_of, figures, *parts),
        by_layer={name: layers[name] for name in sorted(layers, key=layer_key)},
        warnings=warnings,
    )


def _grouped(
    key: Callable[[str], str], figures: Callable[..., dict[str, Any]], *parts: Mapping[str, Sums]
) -> dict[str, dict[str, Any]]:
    """Return group of names by `key` -> its summary; `parts` have the same names."""
    groups: dict[str, list[str]] = {}
    for name in parts[0]:
        groups.setdefault(key(name), []).append(name)
    return {group: _summary(figures, names, *parts) for group, names in groups.items()}


def _summary(
    figures: Callable[..., dict[str, Any]], names: Collection[str], *parts: Mapping[str, Sums]
) -> dict[str, Any]:
    totals = [_total(part[name] for name in names) for part in parts]
    return {**figures(*totals), "weights": len(names), "elements": totals[0].elements}


def _total(sums: Iterable[Sums]) -> Sums:
    total = Sums()
    for found in sums:
        total += found
    return total


def _row(name: str, group: Mapping[str, Any], with_delta: bool) -> str:
    def number(key: str) -> str:
        return "-" if group.get(key) is None else f"{group[key]:.5f}"

    middle = f"{number('delta'):>12}{number('delta_to_gap'):>12}{number('cosine'):>12}" if with_delta else ""
    return f"{name:40}{number('sigma'):>10}{middle}{group['elements']:>16,}"
