"""Small charts as SVG text: scatter, lines, columns and bars, in the page's own colours.

Colours are CSS variables (``--c0`` to ``--c7``, ``--ink``, ``--dim``, ``--rule``), so one drawing serves light, dark
and print.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 14.0, 14.0, 46.0
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """Points of one dictionary."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()
    """Of y, where they are known."""


@dataclass(frozen=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value is drawn."""
        low, high, at = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers in the range."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first < 3 else (1,)
            found = [s * 10.0**e for e in range(first, last + 1) for s in steps]
            return [t for t in found if self.low * 0.999 <= t <= self.high * 1.001]
        rough = (self.high - self.low) / 4 or 1.0
        size = 10 ** math.floor(math.log10(rough))
        step = min((s * size for s in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step - 1e-9)
        return [float(i * step) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick or a value, short."""
    if value == 0:
        return "0"
    if abs(value) >= 10000 or abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}"


def _span(values: Sequence[float], log: bool, zero: bool) -> tuple[float, float]:
    usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(usable), max(usable)
    if log:
        return low / 1.25, high * 1.25
    low = min(low, 0.0) if zero else low
    margin = (high - low or abs(high) or 1.0) * 0.08
    return (low if zero and low == 0 else low - margin), high + margin


def _frame(x: Axis, y: Axis, x_title: str, y_title: str, inside: Sequence[str], names: Sequence[str] = ()) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">']
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    labels = names or [number(tick) for tick in x.ticks()]
    places = [x(float(i)) for i in range(len(names))] if names else [x(tick) for tick in x.ticks()]
    for label, at in zip(labels, places, strict=True):
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    parts += inside
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="title" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
    turned = f'transform="rotate(-90)" x="{-(HEIGHT - _BOTTOM + _TOP) / 2}" y="11" text-anchor="middle"'
    parts.append(f'<text class="title" {turned}>{escape(y_title)}</text></svg>')
    return "".join(parts)


def _axes(
    series: Sequence[Series], log_x: bool, log_y: bool, zero: bool, x_range: tuple[float, float] | None = None
) -> tuple[Axis, Axis]:
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    ys += [end for one in series for pair in one.intervals if pair is not None for end in pair]
    log_y = log_y and all(v > 0 for v in ys)
    log_x = log_x and all(v > 0 for v in xs) and max(xs, default=1.0) > 4 * min(xs, default=1.0)
    across = x_range or _span(xs, log_x, False)
    return (
        Axis(*across, _LEFT, WIDTH - _RIGHT, log_x),
        Axis(*_span(ys, log_y, zero), HEIGHT - _BOTTOM, _TOP, log_y),
    )


def scatter(series: Sequence[Series], x_title: str, y_title: str, log_x: bool = False, log_y: bool = False) -> str:
    """One mark per point, with its interval as a whisker, and the frontier of least y for each x."""
    x, y = _axes(series, log_x, log_y, zero=not log_y)
    inside: list[str] = []
    points = sorted(point for one in series for point in one.points)
    best, frontier = math.inf, list[tuple[float, float]]()
    for point in points:
        if point[1] < best:
            best = point[1]
            frontier.append(point)
    if len(frontier) > 1:
        inside.append(f'<path class="frontier" d="M{"L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in frontier)}"/>')
    for i, one in enumerate(series):
        for j, (a, b) in enumerate(one.points):
            pair = one.intervals[j] if j < len(one.intervals) else None
            if pair is not None:
                inside.append(
                    f'<path class="s{i % COLOURS} whisker" d="M{x(a):.1f} {y(pair[0]):.1f}V{y(pair[1]):.1f}"/>'
                )
            tip = f"<title>{escape(one.name)}: {number(a)}, {number(b)}</title>"
            inside.append(f'<circle class="f{i % COLOURS}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="4.5">{tip}</circle>')
    return _frame(x, y, x_title, y_title, inside)


def lines(series: Sequence[Series], x_title: str, y_title: str, names: Sequence[str] = (), log_x: bool = False) -> str:
    """One line per series; with ``names`` the x values are their indices."""
    x_range = (-0.3, len(names) - 0.7) if names else None
    x, y = _axes(series, log_x, False, zero=True, x_range=x_range)
    inside: list[str] = []
    for i, one in enumerate(series):
        if not one.points:
            continue
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in one.points)
        inside.append(f'<path class="s{i % COLOURS} line" d="M{path}"><title>{escape(one.name)}</title></path>')
        if len(one.points) < 20:
            for a, b in one.points:
                tip = f"<title>{escape(one.name)}: {number(b)}</title>"
                inside.append(f'<circle class="f{i % COLOURS}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6">{tip}</circle>')
    return _frame(x, y, x_title, y_title, inside, names)


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart."""

    name: str
    value: float
    interval: tuple[float, float] | None
    marks: Sequence[tuple[str, float]] = ()
    """(method, value) of what stands beside it; drawn as ticks in the order of ``MARKS``."""
    depth: int = 0
    """How far the name is indented."""


def bars(rows: Sequence[Bar], low: float, high: float, colour: int = 0) -> str:
    """Horizontal bars from ``low`` to ``high`` with whiskers, and ticks for what stands beside each."""
    row, left, right, width = 17.0, 190.0, 46.0, 700.0
    height = row * len(rows) + 26
    x = Axis(low, high, left, width - right)
    parts = [f'<svg class="bars" viewBox="0 0 {width} {height}" role="img" aria-label="one bar per concept">']
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x(tick):.1f} 4V{height - 20}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{number(tick)}</text>'
        )
    for i, one in enumerate(rows):
        at = 4 + row * i
        end = x(min(max(one.value, low), high))
        name = escape(one.name)
        parts.append(f'<text class="label" x="{8 + 12 * one.depth}" y="{at + 12}">{name}</text>')
        parts.append(
            f'<rect class="f{colour} bar" x="{left}" y="{at + 3}" width="{max(end - left, 0.5):.1f}"'
            f' height="{row - 6}" rx="2">'
            f"<title>{name}: {one.value:.3f}</title></rect>"
        )
        if one.interval is not None:
            ends = [x(min(max(v, low), high)) for v in one.interval]
            parts.append(f'<path class="ci" d="M{ends[0]:.1f} {at + row / 2}H{ends[1]:.1f}"/>')
        for j, (method, value) in enumerate(one.marks):
            place = x(min(max(value, low), high))
            tip = f"<title>{name}, {escape(method)}: {value:.3f}</title>"
            parts.append(f'<path class="m{j} mark" d="M{place:.1f} {at + 1}v{row - 2}">{tip}</path>')
        parts.append(f'<text class="value" x="{width - 6}" y="{at + 12}" text-anchor="end">{one.value:.3f}</text>')
    return "".join(parts) + "</svg>"
