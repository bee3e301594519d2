"""Pareto fronts, and a report that shows them without a network."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from gemscope.core.errors import InputError
from gemscope.training.sweep import Point, as_html, as_png, as_svg, pareto, write_report


def points() -> list[Point]:
    found = [
        Point(f"sae.{w}.{l0}", "sae", "resid_post.3 jumprelu", w, float(l0), 4.0 / l0 / (w / 512), 0.5 / l0)
        for w in (512, 1024)
        for l0 in (10, 20, 50, 100)
    ]
    worse = Point("sae.512.bad", "sae", "resid_post.3 jumprelu", 512, 30.0, 0.9, 0.4, seed=1)
    return [*found, worse, Point("t", "transcoder", "mlp_in.3 <topk>", 512, 32.0, 0.2)]


def test_the_front_is_what_nothing_beats() -> None:
    front = pareto(points()[:9], lambda p: p.fvu)
    for p in points()[:9]:
        beaten = any(q.l0 <= p.l0 and q.fvu <= p.fvu and q != p for q in points()[:9])
        assert (p in front) == (not beaten)
    assert [p.l0 for p in pareto(points(), lambda p: p.delta_loss)] == [10, 20, 50, 100]


def test_a_report_in_three_forms(tmp_path: Path) -> None:
    paths = write_report(tmp_path, points(), "A <sweep>")
    assert [p.name for p in paths] == ["report.json", "report.html", "report.png"]
    value = json.loads(paths[0].read_text())
    assert len(value["points"]) == 10
    assert set(value["pareto"]) == {"fvu", "delta_loss"}
    page = paths[1].read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert "A &lt;sweep&gt;" in page
    assert "&lt;topk&gt;" in page
    assert page.count("<circle") == 10 + 9
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_all_points_lie_inside_the_panel() -> None:
    page = as_html(points())
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', page):
        assert 62 <= float(x) <= 506
        assert 14 <= float(y) <= 294


def test_a_loss_below_zero_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary that helps the model a little; the axis begins below it, with zero among its marks."""
    found = [Point(f"{i}", "sae", "p", 8, 10.0 + i, 0.5, loss) for i, loss in enumerate((0.02, -0.03, 0.0))]
    svg = as_svg(found, "loss", lambda p: p.delta_loss)
    high, low, zero = (float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([-\d.]+)"', svg))
    marks = {float(label): float(y) - 4 for y, label in re.findall(r'y="([\d.]+)"[^>]*text-anchor="end">([^<]+)', svg)}
    assert (min(marks), max(marks)) == (-0.03, 0.02)
    assert 14 <= high < zero < low <= 294
    assert (marks[0.02], marks[0.0], marks[-0.03]) == pytest.approx((high, zero, low), abs=0.11)

    figure = pytest.importorskip("matplotlib.figure", reason="the extra 'plot' is not installed").Figure
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    as_png(tmp_path / "report.png", found)
    bottom, top = drawn[0].axes[1].get_ylim()
    assert bottom < -0.03
    assert top > 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-21, 5e-324, 1e30, 0.0, -1.0])
def test_any_number_can_be_reported(value: float, tmp_path: Path) -> None:
    """What is not finite is not drawn; the rest is, inside the panel."""
    found = [Point("a", "sae", "p", 8, 10.0, value), Point("b", "sae", "p", 8, 20.0, 0.5)]
    svg = as_svg(found, "FVU", lambda p: p.fvu)
    places = re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', svg)
    assert len(places) == (2 if math.isfinite(value) else 1)
    assert all(62 <= float(x) <= 506 and 14 <= float(y) <= 294 for x, y in places)
    assert as_svg(found[:1], "FVU", lambda p: p.fvu).count("<circle") == len(places) - 1
    assert as_png(tmp_path / "report.png", found).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("value", [0.9, 1.0, 1.01, 7.3e-21, 0.001, 999.0, 1e308])
def test_axes_end_at_a_round_number_above_all(value: float) -> None:
    labels = [float(x) for x in re.findall(r'text-anchor="end">([^<]+)', as_svg([point(value)], "", lambda p: p.fvu))]
    assert labels[0] == 0
    assert value * 0.999 <= labels[-1] <= 2 * value
    assert 4 <= len(labels) <= 7


def point(value: float) -> Point:
    return Point("a", "sae", "p", 8, 10.0, value)


def test_no_dictionary_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        write_report(tmp_path, [])
