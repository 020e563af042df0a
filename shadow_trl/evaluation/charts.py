"""Charts of a comparison as SVG text: colours and marks that every eye can tell apart, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, told apart with every kind of colour vision; each has a mark of its own as well.
MARKS = {
    "instruct": ("var(--ink)", "M-6,-6h12v12h-12z"),
    "direct": ("#d55e00", "M0,-7L7,6H-7z"),
    "shadow": ("var(--blue)", "M-6,0a6,6 0 1,0 12,0a6,6 0 1,0 -12,0"),
    "re-adapt": ("#009e73", "M0,-8L8,0L0,8L-8,0z"),
    "chat-vector": ("#cc79a7", "M-2,-7h4v5h5v4h-5v5h-4v-5h-5v-4h5z"),
}
DASHES = ("", "7 4", "2 4", "12 4 2 4", "1 6", "16 4")
"""Of lines that have one colour."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        points: (x, y) in the units of the axes.
        style: name of colour and mark in `MARKS`.
        name: for the legend.
        dash: place in `DASHES`. Default 0, a whole line.
        labels: what is written beside each point, "" for nothing; none at all: no labels.
        hints: what a pointer over each point shows; none at all: no hints.
        rings: which points are in a ring.
        marked: whether each point has a mark, besides a point that is alone. Default True.
    """

    points: Sequence[Point]
    style: str
    name: str
    dash: int = 0
    labels: Sequence[str] = ()
    hints: Sequence[str] = ()
    rings: frozenset[int] = frozenset()
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """An axis: its ticks in order with their labels, linear or logarithmic."""

    ticks: Sequence[float]
    labels: Sequence[str]
    log: bool = False

    @classmethod
    def linear(cls, values: Iterable[float]) -> Axis:
        """Return an axis with round ticks about `values`."""
        several = list(values)
        low, high = min(several), max(several)
        spread = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
        power = 10.0 ** math.floor(math.log10(spread / 4))
        step = next(power * by for by in (1, 2, 5, 10) if power * by * 4 >= spread)
        first, last = math.floor(low / step), math.ceil(high / step)
        first, last = (first, last) if last > first else (first - 1, last + 1)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        ticks = [step * at for at in range(first, last + 1)]
        return cls(ticks, [f"{tick:.{digits}f}" for tick in ticks])

    @classmethod
    def logarithmic(cls, values: Iterable[float]) -> Axis:
        """Return an axis with ticks at 1, 2 and 5 times the powers of ten about `values`, which are above 0."""
        several = list(values)
        low, high = (math.log10(end(several)) for end in (min, max))
        found = [by * 10.0**power for power in range(math.floor(low), math.floor(high) + 2) for by in (1, 2, 5)]
        first = max(at for at, tick in enumerate(found) if math.log10(tick) <= low + 1e-9)
        last = min(at for at, tick in enumerate(found) if math.log10(tick) >= high - 1e-9)
        ticks = found[first : max(last, first + 1) + 1]
        shown = ticks if len(ticks) <= 7 else [tick for tick in ticks if f"{tick:e}".startswith("1")]
        return cls(ticks, [f"{tick:g}" if tick in shown else "" for tick in ticks], log=True)

    @classmethod
    def named(cls, names: Sequence[str]) -> Axis:
        """Return an axis with one place for each name, at 0, 1, ..."""
        return cls(range(len(names)), names)

    def share(self, value: float) -> float:
        """Return where `value` is, from 0 to 1."""
        scaled = [math.log10(one) if self.log else one for one in (value, self.ticks[0], self.ticks[-1])]
        wide = scaled[2] - scaled[1]
        return 0.04 + 0.92 * (scaled[0] - scaled[1]) / wide if wide else 0.5


@dataclass(frozen=True)
class Frame:
    """The place of a chart: size and margins in pixels, and both axes with what is written at them."""

    across: Axis
    up: Axis
    below: str
    beside: str
    width: int = 640
    height: int = 400
    left: int = 64
    right: int = 20
    top: int = 16
    bottom: int = 52

    def at(self, point: Point) -> Point:
        """Return where a point is on the page."""
        x = self.left + self.across.share(point[0]) * (self.width - self.left - self.right)
        return x, self.height - self.bottom - self.up.share(point[1]) * (self.height - self.top - self.bottom)

    def grid(self) -> list[str]:
        """Return lines and labels of both axes."""
        right, bottom = self.width - self.right, self.height - self.bottom
        drawn = []
        for tick, text in zip(self.across.ticks, self.across.labels, strict=True):
            x, _ = self.at((tick, self.up.ticks[0]))
            drawn.append(f'<line x1="{x:.1f}" y1="{self.top}" x2="{x:.1f}" y2="{bottom}" stroke="var(--line)"/>')
            drawn.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
        for tick, text in zip(self.up.ticks, self.up.labels, strict=True):
            _, y = self.at((self.across.ticks[0], tick))
            drawn.append(f'<line x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="var(--line)"/>')
            drawn.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        middle, height = (self.left + right) / 2, (self.top + bottom) / 2
        drawn.append(f'<text x="{middle}" y="{self.height - 10}" text-anchor="middle">{escape(self.below)}</text>')
        turned = f'transform="rotate(-90 14 {height})"'
        return [*drawn, f'<text x="14" y="{height}" text-anchor="middle" {turned}>{escape(self.beside)}</text>']

    def free_spot(self, x: float, y: float, width: float, taken: list[tuple[float, float, float]]) -> Point | None:
        """Return where a label beside a mark hides no other one; None where there is no room: it is then in a table."""
        for left, base in ((x + 12, y + 4), (x - 12 - width, y + 4), (x - width / 2, y - 14), (x - width / 2, y + 24)):
            free = all(
                left > other + size or other > left + width or abs(base - line) > 14 for other, line, size in taken
            )
            if free and left > self.left and left + width < self.width and self.top < base < self.height - self.bottom:
                taken.append((left, base, width))
                return left, base
        return None


def chart(frame: Frame, lines: Sequence[Line], *, label: str, caption: str) -> str:
    """Return a figure with its legend; `label` is for those who do not see it."""
    drawn, labels = frame.grid(), []
    # Marks hide labels too.
    taken = [(x - 7, y + 5, 14.0) for line in lines if line.marked for x, y in map(frame.at, line.points)]
    for line in lines:
        places = [frame.at(point) for point in line.points]
        drawn.append(_path(places, line))
        for number, (x, y) in enumerate(places):
            if not line.marked and len(places) > 1:
                continue
            hint = f"<title>{escape(line.hints[number])}</title>" if line.hints else ""
            drawn.append(f"<g>{_mark(line.style, x, y, ring=number in line.rings)}{hint}</g>")
            text = line.labels[number] if line.labels else ""
            spot = frame.free_spot(x, y, 7.5 * len(text), taken) if text else None
            if spot is not None:
                labels.append(f'<text x="{spot[0]:.1f}" y="{spot[1]:.1f}">{escape(text)}</text>')
    size = f'viewBox="0 0 {frame.width} {frame.height}" style="max-width:{round(1.15 * frame.width)}px"'
    inside = "".join([*drawn, *labels])
    return (
        f'<figure>{_legend(lines)}<svg {size} role="img" aria-label="{escape(label)}">{inside}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _path(places: Sequence[Point], line: Line) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{DASHES[line.dash % len(DASHES)]}"' if line.dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{MARKS[line.style][0]}" stroke-width="2"{dashed}/>'


def _mark(style: str, x: float, y: float, *, ring: bool = False) -> str:
    colour, path = MARKS[style]
    about = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="11" fill="none" stroke="{colour}" stroke-width="1.5"/>' if ring else ""
    )
    return f'<path d="{path}" transform="translate({x:.1f},{y:.1f})" fill="{colour}"/>{about}'


def _legend(lines: Sequence[Line]) -> str:
    entries = []
    for line in {line.name: line for line in lines}.values():
        sample = _path([(-17, 0), (17, 0)], line) if len(line.points) > 1 else ""
        mark = _mark(line.style, 0, 0) if line.marked or len(line.points) == 1 else ""
        entries.append(
            f'<li><svg viewBox="-18 -9 36 18" aria-hidden="true">{sample}{mark}</svg> {escape(line.name)}</li>'
        )
    return f'<ul class="legend">{"".join(entries)}</ul>'
