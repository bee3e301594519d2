"""What a sweep found: each dictionary a point, the best of each kind and place a Pareto front.

``report.json`` has the numbers, ``report.html`` the curves as inline SVG (no network, no script), ``report.png`` the
same by matplotlib where the extra ``plot`` is installed.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemscope.core.errors import InputError
from gemscope.core.extras import need
from gemscope.core.files import atomic_path, write_json, write_text

FORMAT = "gemscope.sweep"
VERSION = 1
REPORT = ("report.json", "report.html", "report.png")
"""Files that a report may have."""
COLOURS = ("#3366cc", "#d1602f", "#2b8a57", "#8b4bb8", "#b03060", "#5b6b7a", "#b8860b", "#178f9c")


@dataclass(frozen=True)
class Point:
    """One dictionary."""

    name: str
    kind: str
    place: str
    """What it reads, and its activation: what makes points comparable, beside the kind."""
    d_sae: int
    l0: float
    """Held-out."""
    fvu: float
    """Held-out."""
    delta_loss: float | None = None
    """Nats lost when spliced in, where it was measured."""
    seed: int = 0

    @property
    def group(self) -> str:
        """The curve it belongs to."""
        return f"{self.kind} {self.place} {self.d_sae:,}"


def pareto(points: Sequence[Point], value: Callable[[Point], float | None]) -> list[Point]:
    """The points that no other beats in both L0 and ``value`` (smaller is better), by ascending L0."""
    known = [(p.l0, v, p) for p in points if (v := value(p)) is not None]
    front: list[Point] = []
    best = float("inf")
    for _, v, point in sorted(known, key=lambda found: found[:2]):
        if v < best:
            front.append(point)
            best = v
    return front


def write_report(folder: Path, points: Sequence[Point], title: str = "Sweep", png: bool = True) -> list[Path]:
    """Write the report into ``folder``; the paths. The picture is left out where matplotlib is not installed.

    Raises InputError when there is no point, StorageError.
    """
    if not points:
        raise InputError("there is no dictionary to report on; train at least one.")
    fronts = {name: [p.name for p in pareto(points, get)] for name, _, get in _panels(points)}
    value: dict[str, Any] = {"format": FORMAT, "version": VERSION, "title": title}
    value |= {"points": [asdict(p) for p in points], "pareto": fronts}
    data, page, picture = (folder / name for name in REPORT)
    write_json(data, value)
    write_text(page, as_html(points, title))
    try:
        return [data, page, *([as_png(picture, points, title)] if png else [])]
    except InputError:
        return [data, page]


Panel = tuple[str, str, Callable[[Point], float | None]]


def _panels(points: Sequence[Point]) -> list[Panel]:
    panels: list[Panel] = [("fvu", "FVU", lambda p: p.fvu)]
    if any(p.delta_loss is not None for p in points):
        panels.append(("delta_loss", "Δ loss (nats)", lambda p: p.delta_loss))
    return panels


def _groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.l0):
        found.setdefault(point.group, []).append(point)
    return found


def _colours(points: Sequence[Point]) -> dict[str, str]:
    """One for each curve, the same in every panel."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(_groups(points))}


def as_html(points: Sequence[Point], title: str = "Sweep") -> str:
    """One self-contained page: a panel a measure, a line a curve, the numbers in a table."""
    svgs = "\n".join(as_svg(points, label, get) for _, label, get in _panels(points))
    legend = "".join(
        f'<li><span style="background:{colour}"></span>{html.escape(name)}</li>'
        for name, colour in _colours(points).items()
    )
    rows = "".join(
        f"<tr><td>{html.escape(p.name)}</td><td>{p.d_sae:,}</td><td>{p.l0:.1f}</td><td>{p.fvu:.4f}</td>"
        f"<td>{'–' if p.delta_loss is None else f'{p.delta_loss:.4f}'}</td></tr>"
        for p in sorted(points, key=lambda p: (p.group, p.l0))
    )
    style = (
        "body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1c2733}"
        "svg{width:520px;max-width:100%;height:auto}ul{list-style:none;padding:0;columns:2}"
        "li span{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:8px}"
        "table{border-collapse:collapse;width:100%}td,th{padding:3px 10px;border-bottom:1px solid #dde3ea}"
        "td:not(:first-child),th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}"
    )
    head = "<tr><th style='text-align:left'>dictionary</th><th>latents</th><th>L0</th><th>FVU</th><th>Δ loss</th></tr>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><p>Held-out rows; lines join each curve's Pareto front,"
        f" rings are dictionaries off it.</p>{svgs}<ul>{legend}</ul><table>{head}{rows}</table></html>\n"
    )


def as_svg(points: Sequence[Point], label: str, get: Callable[[Point], float | None]) -> str:
    """One panel: L0 to the right, the measure upwards, both linear from zero or, where there are such, from below."""
    known = _known(points, get)
    width, height, left, bottom = 520, 340, 62, 46
    across, up = _ticks([p.l0 for p in known]), _ticks([get(p) or 0.0 for p in known])

    def place(l0: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 14) * (l0 - across[0]) / (across[-1] - across[0])
        return x, (height - bottom) - (height - bottom - 14) * (value - up[0]) / (up[-1] - up[0])

    def at(p: Point) -> tuple[float, float]:
        return place(p.l0, get(p) or 0.0)

    parts = [f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" font-family="sans-serif">']
    for tick in up:
        y = place(0.0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e8ee"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:.3g}", "end"))
    parts += [_text(place(tick, 0.0)[0], height - bottom + 18, f"{tick:g}", "middle") for tick in across]
    parts.append(_text((width + left) / 2, height - 8, "L0, active latents per token", "middle"))
    parts.append(f'<g transform="translate(14 {height / 2}) rotate(-90)">{_text(0, 0, label, "middle")}</g>')
    colours = _colours(points)
    for name, group in _groups(known).items():
        colour, front = colours[name], pareto(group, get)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, front))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in group:
            x, y = at(p)
            fill = colour if p in front else "white"
            about = html.escape(f"{p.name}: L0 {p.l0:.1f}, {label} {get(p):.4f}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2">'
                f"<title>{about}</title></circle>"
            )
    return "\n".join([*parts, "</svg>"])


def _text(x: float | int, y: float | int, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="#51606f" text-anchor="{anchor}">{text}</text>'


def _known(points: Sequence[Point], get: Callable[[Point], float | None]) -> list[Point]:
    """Those that can be drawn."""
    return [p for p in points if (value := get(p)) is not None and math.isfinite(value) and math.isfinite(p.l0)]


def _ticks(values: Sequence[float]) -> list[float]:
    """Some five round steps from zero or the smallest value to the largest; zero is always among them."""
    low, high = min([0.0, *values]), max([0.0, *values])
    step = _above(high / 5 - low / 5)
    return [step * i for i in range(math.floor(low / step), max(1, math.ceil(high / step)) + 1)]


def _above(value: float) -> float:
    """A round number not below ``value``; 1 where there is none."""
    if not 1e-300 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0) if step * power >= value)


def as_png(path: Path, points: Sequence[Point], title: str = "Sweep") -> Path:
    """The panels side by side. Raises InputError when matplotlib is not installed."""
    figures = need("matplotlib.figure", "plot")
    panels = _panels(points)
    figure = figures.Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    for (_, label, get), axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        known = _known(points, get)
        for name, group in _groups(known).items():
            colour, front = _colours(points)[name], pareto(group, get)
            axes.plot([p.l0 for p in front], [get(p) for p in front], color=colour, label=name)
            for p in group:
                axes.plot(p.l0, get(p), "o", color=colour, markerfacecolor=colour if p in front else "white")
        across, up = [0.0, *(p.l0 for p in known)], [0.0, *(get(p) or 0.0 for p in known)]
        limits = {"xlim": (0, 1.08 * max(across) or 1), "ylim": (1.08 * min(up), 1.08 * max(up) or 1)}
        axes.set(xlabel="L0, active latents per token", ylabel=label, **limits)
        axes.grid(color="#e3e8ee")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path
