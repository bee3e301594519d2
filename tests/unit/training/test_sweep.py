"""Pareto fronts, and a report that shows them without a network."""

import json
import re
from pathlib import Path

import pytest

from gemscope.core.errors import InputError
from gemscope.training.sweep import Point, as_html, pareto, write_report


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


def test_no_dictionary_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        write_report(tmp_path, [])
