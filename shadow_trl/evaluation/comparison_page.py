"""A comparison as one HTML page that needs nothing else: no script, no network, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby

from .comparison import Comparison, Settings

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 16, 52

# Okabe and Ito's colours, told apart with every kind of colour vision; each arm has a mark of its own as well.
_MARKS = {
    "instruct": ("var(--ink)", "M-6,-6h12v12h-12z"),
    "direct": ("#d55e00", "M0,-7L7,6H-7z"),
    "shadow": ("#0072b2", "M-6,0a6,6 0 1,0 12,0a6,6 0 1,0 -12,0"),
    "re-adapt": ("#009e73", "M0,-8L8,0L0,8L-8,0z"),
    "chat-vector": ("#cc79a7", "M-2,-7h4v5h5v4h-5v5h-4v-5h-5v-4h5z"),
}
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--line:#d0d0d0;--soft:#595959}
@media(prefers-color-scheme:dark){:root{--ink:#ececec;--paper:#161616;--line:#454545;--soft:#b4b4b4}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1000px;margin:2rem auto;
padding:0 1rem}
h1,h2{line-height:1.2}figure{margin:1rem 0}
svg{width:100%;max-width:760px;height:auto}svg text{fill:var(--ink);font-size:13px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th.text,td.text{text-align:left}pre{overflow-x:auto;border:1px solid var(--line);padding:.7rem}
.note,figcaption{color:var(--soft)}.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;list-style:none;padding:0}
.legend svg{width:18px;height:18px;vertical-align:-4px}
"""


def page(comparison: Comparison, *, titles: Mapping[str, str], command: str | None) -> str:
    """Return the page.

    Args:
        comparison: what is shown.
        titles: what a reader calls each arm.
        command: writes the chosen graft; None where there is none.
    """
    parts = ["<h1>Comparison</h1>", f"<p>Chosen: {escape(comparison.condition)}.</p>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in comparison.notes]
    if comparison.keep is not None and comparison.keep != comparison.target:
        parts += ["<h2>What is kept against what is learnt, on the test rows</h2>", _legend(comparison, titles)]
        rates = sorted({one.learning_rate for one in comparison.groups if one.learning_rate is not None})
        parts += [_panel(comparison, rate) for rate in rates or (None,)]
    parts += ["<h2>Selected settings</h2>", _selected(comparison, titles)]
    parts += ["<h2>Differences on the test rows</h2>", _tests(comparison, titles)]
    parts += ["<h2>All settings, test rows</h2>", _scores(comparison, titles)]
    if command is not None:
        parts += ["<h2>The chosen graft</h2>", f"<pre>{escape(command)}</pre>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>Comparison</title><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _legend(comparison: Comparison, titles: Mapping[str, str]) -> str:
    entries = [
        f'<li><svg viewBox="-9 -9 18 18" aria-hidden="true">{_mark(arm, 0, 0)}</svg> {escape(titles[arm])}</li>'
        for arm in comparison.selected
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _mark(arm: str, x: float, y: float, chosen: bool = False) -> str:
    colour, path = _MARKS[arm]
    ring = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="11" fill="none" stroke="{colour}" stroke-width="1.5"/>' if chosen else ""
    )
    return f'<path d="{path}" transform="translate({x:.1f},{y:.1f})" fill="{colour}"/>{ring}'


def _panel(comparison: Comparison, rate: float | None) -> str:
    """Return a chart of one learning rate: a line an arm over its scales, the selected settings in a ring."""
    target, keep = comparison.by_name[comparison.target], comparison.by_name[str(comparison.keep)]
    shown = [one for one in comparison.groups if one.learning_rate in (None, rate)]
    points = {one: tuple(comparison.mean(one, by, "test") for by in (target, keep)) for one in shown}
    across, up = (_Axis.of([point[at] for point in points.values()]) for at in (0, 1))

    def place(one: Settings) -> tuple[float, float]:
        x, y = points[one]
        return (
            LEFT + across.share(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up.share(y) * (HEIGHT - TOP - BOTTOM),
        )

    drawn = _grid(across, up, target.name + (", %" if target.share else ""), keep.name + (", %" if keep.share else ""))
    labels: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for (arm, *_), line in groupby(shown, key=lambda one: (one.arm, *vars(replace(one, arm="", scale=None)).values())):
        along = sorted(line, key=lambda one: one.scale or 0.0)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, along))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{_MARKS[arm][0]}" stroke-width="2"/>')
        for one in along:
            x, y = place(one)
            drawn.append(
                f"<g>{_mark(arm, x, y, one in comparison.selected.values())}"
                f"<title>{escape(f'{one.arm} {one.words()}: {points[one][0]:.1f}, {points[one][1]:.1f}')}</title></g>"
            )
            text = "" if one.scale is None else f"{one.scale:g}"
            spot = _free_spot(x, y, 7.5 * len(text), taken) if text else None
            if spot is not None:
                labels.append(f'<text x="{spot[0]:.1f}" y="{spot[1]:.1f}">{text}</text>')
    title = f"learning rate {rate:g}: " if rate is not None else ""
    caption = f"{title}numbers are scales; a ring marks the selected settings."
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(keep.name)} against '
        f'{escape(target.name)}">{"".join([*drawn, *labels])}</svg><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _free_spot(x: float, y: float, width: float, taken: list[tuple[float, float, float]]) -> tuple[float, float] | None:
    """Return where a label beside a mark hides no other label, None where there is no room; it is then in the table."""
    for left, base in ((x + 12, y + 4), (x - 12 - width, y + 4), (x - width / 2, y - 14), (x - width / 2, y + 24)):
        free = all(left > other + size or other > left + width or abs(base - line) > 14 for other, line, size in taken)
        if free and left > LEFT and left + width < WIDTH and TOP < base < HEIGHT - BOTTOM:
            taken.append((left, base, width))
            return left, base
    return None


class _Axis:
    """A linear axis with round ticks."""

    def __init__(self, ticks: Sequence[float], digits: int) -> None:
        self.ticks, self.digits = ticks, digits

    @classmethod
    def of(cls, values: Sequence[float]) -> _Axis:
        low, high = min(values), max(values)
        spread = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
        power = 10.0 ** math.floor(math.log10(spread / 4))
        step = next(power * by for by in (1, 2, 5, 10) if power * by * 4 >= spread)
        first, last = math.floor(low / step), math.ceil(high / step)
        first, last = (first, last) if last > first else (first - 1, last + 1)
        return cls([step * at for at in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9)))

    def share(self, value: float) -> float:
        return 0.04 + 0.92 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def _grid(across: _Axis, up: _Axis, below: str, beside: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    drawn = []
    for tick in across.ticks:
        x = LEFT + across.share(tick) * (right - LEFT)
        drawn.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="var(--line)"/>')
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:.{across.digits}f}</text>')
    for tick in up.ticks:
        y = bottom - up.share(tick) * (bottom - TOP)
        drawn.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="var(--line)"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.{up.digits}f}</text>')
    drawn.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(below)}</text>')
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    return [*drawn, f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(beside)}</text>']


def _selected(comparison: Comparison, titles: Mapping[str, str]) -> str:
    rows = []
    for arm, settings in comparison.selected.items():
        if settings is None:
            words = f"no settings meet the condition ({comparison.condition})"
            rows.append([titles[arm], words, *("" for _ in comparison.metrics)])
        else:
            rows.append(_line(comparison, settings, titles))
    return _table(["arm", "settings", *_heads(comparison)], rows, text=2)


def _heads(comparison: Comparison) -> list[str]:
    return [metric.name + (", %" if metric.share else "") for metric in comparison.metrics]


def _line(comparison: Comparison, settings: Settings, titles: Mapping[str, str]) -> list[str]:
    scores = [f"{comparison.mean(settings, by, 'test'):.{1 if by.share else 3}f}" for by in comparison.metrics]
    return [titles[settings.arm], settings.words(), *scores]


def _scores(comparison: Comparison, titles: Mapping[str, str]) -> str:
    rows, heads = [], ["arm", "settings", *_heads(comparison), "train and make, s", "score, s"]
    for settings, models in comparison.groups.items():
        costs = [
            sum(seconds for model in models for kind, seconds in model.seconds.items() if (kind == "score") == scoring)
            for scoring in (False, True)
        ]
        rows.append([*_line(comparison, settings, titles), *(f"{cost:.1f}" for cost in costs)])
    return _table(heads, rows, text=2)


def _tests(comparison: Comparison, titles: Mapping[str, str]) -> str:
    rows = []
    for test in comparison.tests:
        digits, (low, high) = 1 if test.metric.share else 3, test.found.interval
        unit = " points" if test.metric.share else ""
        rows.append([
            f"{titles[test.a]} against {titles[test.b]}", test.metric.name, test.verdict,
            f"{test.found.value:+.{digits}f}{unit}", f"{low:+.{digits}f} to {high:+.{digits}f}",
            f"{test.p_adjusted:.2g}",
        ])  # fmt: skip
    heads = ["compared", "metric", "verdict for the first", "difference", "95 % interval", "p, adjusted"]
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
