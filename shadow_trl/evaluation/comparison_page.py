"""A comparison as one HTML page that needs nothing else: no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby

from .charts import Axis, Frame, Line, chart
from .comparison import Comparison
from .measured import ARMS, Settings
from .trained import Trained, costs

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--line:#d0d0d0;--soft:#595959;--blue:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#161616;--line:#454545;--soft:#b4b4b4;--blue:#56b4e9}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1000px;margin:2rem auto;
padding:0 1rem}
h1,h2{line-height:1.2}figure{margin:1rem 0}
svg{width:100%;height:auto}
svg text{fill:var(--ink);font-size:13px;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th.text,td.text{text-align:left;white-space:normal}pre{overflow-x:auto;border:1px solid var(--line);padding:.7rem}
.note,figcaption{color:var(--soft)}.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;list-style:none;padding:0}
.legend svg{width:36px;height:18px;vertical-align:-4px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 1rem}
"""


def page(comparison: Comparison) -> str:
    """Return the page."""
    parts = ["<h1>Comparison</h1>", f"<p>Chosen: {escape(comparison.condition)}.</p>", _arms(comparison)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in comparison.notes]
    shown = "What is kept against what is learnt" if comparison.keep is not None else "What is learnt over the scales"
    parts += [f"<h2>{shown}, on the test rows</h2>"]
    rates = sorted({one.learning_rate for one in comparison.groups if one.learning_rate is not None})
    parts += [_panel(comparison, rate) for rate in rates or (None,)]
    parts += ["<h2>Selected settings, on the test rows</h2>", _selected(comparison)]
    parts += ["<h2>Differences on the test rows</h2>", _tests(comparison)]
    parts += ["<h2>All settings, test rows</h2>", _scores(comparison)]
    if distances := [*_distances(comparison)]:
        parts += ["<h2>How far training moved BASE, beside the gap to INSTRUCT</h2>", *distances]
    if curves := [*_curves(comparison)]:
        parts += ["<h2>Training loss of BASE and of INSTRUCT</h2>", f'<div class="two">{"".join(curves)}</div>']
    heads, rows = costs(comparison.selected, comparison.models, comparison.trainings)
    parts += ["<h2>Cost of each arm</h2>", _table(heads, rows, text=1)]
    parts += ['<p class="note">A training that several arms share counts for each of them.</p>']
    if comparison.command is not None:
        parts += ["<h2>The chosen graft</h2>", f"<pre>{escape(comparison.command)}</pre>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>Comparison</title><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _arms(comparison: Comparison) -> str:
    named = (f"<li><b>{arm}</b>: {escape(ARMS[arm])}</li>" for arm in comparison.selected)
    return f'<ul class="note">{"".join(named)}</ul>'


def _panel(comparison: Comparison, rate: float | None) -> str:
    """Return a chart of one learning rate: a line an arm over its scales, the selected settings in a ring."""
    target = comparison.by_name[comparison.target]
    keep = comparison.by_name[comparison.keep] if comparison.keep not in (None, comparison.target) else None
    shown = [one for one in comparison.groups if one.learning_rate in (None, rate)]

    def point(one: Settings) -> tuple[float, float]:
        if keep is None:
            return one.scale or 0.0, comparison.mean(one, target, "test")
        return comparison.mean(one, target, "test"), comparison.mean(one, keep, "test")

    lines: list[Line] = []
    for (arm, *_), group in groupby(shown, key=lambda one: (one.arm, *vars(replace(one, arm="", scale=None)).values())):
        along = sorted(group, key=lambda one: one.scale or 0.0)
        points = [point(one) for one in along]
        lines.append(Line(
            points, arm, _name(along[0]), sum(line.style == arm for line in lines),
            ["" if one.scale is None or keep is None else f"{one.scale:g}" for one in along],
            [f"{one.arm} {one.words()}: {x:.1f}, {y:.1f}" for one, (x, y) in zip(along, points, strict=True)],
            frozenset(at for at, one in enumerate(along) if one in comparison.selected.values()),
        ))  # fmt: skip
    across, up = (Axis.linear(xy[at] for line in lines for xy in line.points) for at in (0, 1))
    units = [metric.name + (", %" if metric.share else "") for metric in (target, keep) if metric is not None]
    below, beside = units if keep is not None else ("scale (INSTRUCT at 0)", units[0])
    title = f"Learning rate {rate:g}. " if rate is not None else ""
    numbers = "Numbers are scales; a" if keep is not None else "A"
    return chart(
        Frame(across, up, below, beside), lines, label=f"{beside} against {below}",
        caption=f"{title}{numbers} ring marks the selected settings.",
    )  # fmt: skip


def _name(one: Settings) -> str:
    """Return arm and settings without what a panel and the points of a line tell."""
    words = replace(one, learning_rate=None, scale=None).words()
    return f"{one.arm}, {words}" if words else one.arm


def _distances(comparison: Comparison) -> Iterator[str]:
    """Yield for each pair sigma and the size of the delta, by layer and by kind of weight."""
    known = [one for one in comparison.trainings if one.by_layer is not None and one.by_kind is not None]
    for pair in dict.fromkeys(one.pair for one in known):
        here = [one for one in known if one.pair == pair]
        layers = [name for name in here[0].by_layer or {} if name.rpartition(".")[2].isdigit()]
        kinds = list(here[0].by_kind or {})[::-1]
        by_layer = _moved(here, "by_layer", layers)
        by_kind = [
            Line([(y, x) for x, y in line.points], line.style, line.name, line.dash)
            for line in _moved(here, "by_kind", kinds)
        ]
        title = "" if len({one.pair for one in known}) == 1 else f"Pair {pair}. "
        unit = "relative size, % (logarithmic)"
        charts = []
        if by_layer:
            up = Axis.logarithmic(y for line in by_layer for _, y in line.points)
            step = max(1, -(-len(layers) // 12))
            across = Axis(range(0, len(layers)), [str(at) if at % step == 0 else "" for at in range(len(layers))])
            caption = f"{title}By layer: sum|difference| over the sum of both sizes; mean over the trainings of a rate."
            charts.append(
                chart(
                    Frame(across, up, "layer", unit, width=480, height=340), by_layer, label="by layer", caption=caption
                )
            )
        if by_kind:
            across = Axis.logarithmic(x for line in by_kind for x, _ in line.points)
            frame = Frame(
                across, Axis.named(kinds), unit, "", width=480, height=max(200, 90 + 24 * len(kinds)), left=130
            )
            charts.append(chart(frame, by_kind, label="by kind", caption=f"{title}By kind of weight, the same."))
        yield f'<div class="two">{"".join(charts)}</div>'


def _moved(trainings: Sequence[Trained], groups: str, names: Sequence[str]) -> list[Line]:
    """Return a line of the gap and one a learning rate of the delta, in percent, over the places of `names`."""

    def line(some: Sequence[Trained], figure: str, style: str, name: str, dash: int = 0) -> Line:
        points = []
        for at, group in enumerate(names):
            values = [getattr(one, groups).get(group, {}).get(figure) for one in some]
            above = [value for value in values if value]
            if above:
                points.append((float(at), 100.0 * sum(above) / len(above)))
        return Line(points, style, name, dash)

    found = [line(trainings[:1], "sigma", "instruct", "gap between BASE and INSTRUCT (sigma)")]
    groups_of: dict[str, list[Trained]] = {}
    for one in sorted(trainings, key=lambda one: one.learning_rate or 0.0):
        words = Settings("", learning_rate=one.learning_rate, guidance_power=one.guidance_power).words()
        groups_of.setdefault("change by training" + (f", {words}" if words else ""), []).append(one)
    found += [line(some, "delta", "shadow", name, dash) for dash, (name, some) in enumerate(groups_of.items())]
    return [one for one in found if one.points]


def _curves(comparison: Comparison) -> Iterator[str]:
    """Yield for each learning rate the loss of every training over its steps."""
    known = [one for one in comparison.trainings if one.curve]
    for rate in sorted({one.learning_rate for one in known}, key=lambda rate: rate or 0.0):
        here = [one for one in known if one.learning_rate == rate]
        lines = [
            Line(one.curve, *{"base": ("shadow", "BASE"), "instruct": ("direct", "INSTRUCT")}[one.side], marked=False)
            for one in here
        ]
        across, up = (Axis.linear(xy[at] for line in lines for xy in line.points) for at in (0, 1))
        title = f"Learning rate {rate:g}. " if rate is not None else ""
        yield chart(
            Frame(across, up, "step of the optimiser", "loss", width=480, height=320), lines, label="loss over steps",
            caption=f"{title}One line per training; each point is the mean since the one before.",
        )  # fmt: skip


def _selected(comparison: Comparison) -> str:
    """Return a table with a column an arm: its settings, and each metric with its interval."""
    found = {arm: settings for arm, settings in comparison.selected.items() if settings is not None}
    rows = [["settings", *(settings.words() for settings in found.values())]]
    for metric, head in zip(comparison.metrics, _heads(comparison), strict=True):
        cells = (comparison.shown(settings, metric.name, "test", interval=True) for settings in found.values())
        rows.append([head, *cells])
    table = _table(["95% intervals in brackets", *found], rows, text=len(found) + 1)
    absent = [arm for arm in comparison.selected if arm not in found]
    if absent:
        table += f'<p class="note">No settings of {", ".join(absent)} meet the condition.</p>'
    return table


def _heads(comparison: Comparison) -> list[str]:
    return [metric.name + (", %" if metric.share else "") for metric in comparison.metrics]


def _scores(comparison: Comparison) -> str:
    rows = [
        [one.arm, one.words(), *(comparison.shown(one, by.name, "test") for by in comparison.metrics)]
        for one in comparison.groups
    ]
    return _table(["arm", "settings", *_heads(comparison)], rows, text=2)


def _tests(comparison: Comparison) -> str:
    rows = []
    for test in comparison.tests:
        digits, (low, high) = test.digits, test.found.interval
        unit = " points" if test.metric.share else ""
        rows.append([
            f"{test.a} against {test.b}", test.metric.name, test.verdict, f"{test.found.value:+.{digits}f}{unit}",
            f"{low:+.{digits}f} to {high:+.{digits}f}", f"{test.p_adjusted:.2g}",
        ])  # fmt: skip
    heads = ["compared", "metric", "verdict for the first", "difference", "95% interval", "p, adjusted"]
    return _table(heads, rows, text=3)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> str:
    """Return a table whose first `text` columns are words and whose others are numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="text"' if at < text else "" for at in range(len(cells)))
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
            + "</tr>"
        )

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table></div>'
