"""A picture of the gap: sigma by layer and by kind of weight."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..grafting.reports import GapReport


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed. Run `pip install matplotlib`, or use --json."
        )


def plot_gap(report: GapReport, path: Path) -> None:
    """Draw sigma by layer and by kind of weight into an image file; its ending chooses the format."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = {name: group["sigma"] for name, group in report.by_layer.items() if name.rpartition(".")[2].isdigit()}
    left.plot(range(len(layers)), [value or 0.0 for value in layers.values()], marker=".")
    left.set(xlabel="layer", ylabel="sigma", title=f"overall {report.sigma or 0.0:.4f}", ylim=(0, None))
    kinds = {name: group["sigma"] or 0.0 for name, group in report.by_kind.items()}
    right.barh(list(kinds), list(kinds.values()))
    right.set(xlabel="sigma")
    right.invert_yaxis()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"cannot draw {path}: {error}.") from error
