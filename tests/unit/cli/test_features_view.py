"""What the terminal shows of features: text as it is, nothing lost, nothing that is not known."""

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from gemscope.cli import features_view as view
from gemscope.cli.terminal import out
from gemscope.features import histogram
from gemscope.features.feature import Example, Feature
from gemscope.features.search import Hit
from gemscope.features.steering import Side, Steer, Steered, TokenScore
from unit.models.tiny_gemma import gemma

EXAMPLE = Example((" a", "b"), (0.0, 3.0), 1, 3.0, (False, False), 0, 0)
FEATURE = Feature(
    id="x/1", labels=(), count=0, density=0.26442, peak=94.0, special_count=0, special_peak=0.0, steps=(), histogram=(),
    promoted=(), suppressed=(), by_output=(), suppressed_by_output=(), nearest=(), elsewhere=(), partners=(),
    top=(), groups=(),
)  # fmt: skip
ABOUT = {"model": "m", "tokens": 0, "special_tokens": 0, "steps": []}


def drawn(what, width: int = 80) -> list[str]:
    """The lines of a terminal of that width, of a console that reads markup."""
    console = Console(width=width, color_system=None, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text().splitlines()


def page(width: int = 80, about=ABOUT, **changed) -> list[str]:
    return drawn(view.page(replace(FEATURE, **changed), about, width, 2), width)


@pytest.mark.parametrize("piece", ["[i]", "[/b]", ":apple:", "[dim]x"])
def test_a_piece_that_looks_like_markup_is_shown_as_it_is(piece):
    tokens = replace(gemma("gemma3").tokens("we like"), pieces=("<bos>", "we", piece))
    lines = drawn(view.hits([Hit("x[b]/1", 1.0, 0.1, ("[red]label",), (0.0, 1.0, 2.0))], 80, tokens))
    assert lines[1].split() == ["x[b]/1", "1.000", "10.00%", piece, "[red]label"]
    assert drawn(view.token(piece))[0].rstrip() == piece


def test_a_folder_that_looks_like_markup_is_printed_as_it_is(capsys):
    out().print("runs[1]/[b]:apple:/[/x] is whole.")
    assert capsys.readouterr().out == "runs[1]/[b]:apple:/[/x] is whole.\n"


def test_a_text_is_said_to_be_strongest_on_its_content_only():
    tokens = gemma("gemma3").tokens("we like")
    values = [0.0] * len(tokens)
    values[0], values[-1] = 9.0, 1.0
    lines = drawn(view.hits([Hit("x/1", 1.0, 0.1, (), tuple(values))], 80, tokens))
    assert lines[1].split()[3] == tokens.pieces[-1].replace("▁", "")


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        (0, 0, "active on 26.442% of content tokens, at most 94"),
        (0, 55, "active on 26.442% of content tokens, at most 94"),
        (500, 0, "active on 26.442% of content tokens, at most 94"),
        (208, 55, "active on 55 of 208 content tokens (26.442%), at most 94"),
    ],
)
def test_counts_that_nobody_has_are_left_out(tokens, count, expected):
    assert page(about={**ABOUT, "tokens": tokens}, count=count)[2] == expected
    assert page(about={**ABOUT, "tokens": 500}, density=0.0)[2].startswith("active on 0 of 500 content tokens")


def test_groups_are_called_after_their_bounds_where_these_are_known():
    groups = ((EXAMPLE,), (EXAMPLE,))
    assert [line for line in page(groups=groups) if "random" in line] == [
        "random, 50-100 % of its activations",
        "random, 0-50 % of its activations",
    ]
    assert "strongest" not in page(groups=groups)
    assert "strongest" in page(top=(EXAMPLE,))
    assert [line for line in page(groups=groups, bounds=((2.0, 4.0), (8.0, 10.5))) if "random" in line] == [
        "random, activations from 8 to 10.5",
        "random, activations from 2 to 4",
    ]


def test_a_histogram_has_a_uniform_axis_with_its_empty_bins():
    middles = histogram.centres()
    few = [(float(middles[i]), n) for i, n in ((100, 4), (101, 2), (104, 1))]
    assert histogram.columns(few, 50) == [4, 2, 0, 0, 1]
    assert histogram.columns([(0.3, 1), (0.5, 2), (1.1, 3)], 50) == [1, 2, 0, 0, 3]
    assert histogram.columns([(0.3, 7)], 50) == [7]
    rounded = [(round(1.2447 * (i + 0.5) / 50, 3), 1) for i in range(50)]
    assert histogram.columns(rounded, 50) == [1] * 50
    many = [(float(middles[i]), i) for i in range(90, 200) if i != 95]
    assert histogram.columns(many, 50) == [
        sum(n for n in range(first, min(first + 3, 200)) if n != 95) for first in range(90, 200, 3)
    ]
    for width in (60, 80, 120):
        lines = page(width, histogram=tuple(many))
        (bars,) = [line for line in lines if line.startswith("activations ")]
        assert bars.startswith(f"activations {many[0][0]:.3g} ▄")
        assert bars.endswith(f" {many[-1][0]:.3g}")
        assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_continuations_in_wide_letters_are_shown_whole(width):
    wide, spaced = "大阪は日本の都市です" * 6, "one two three " * 12
    token = TokenScore("▁大阪は日本の都市です", -1.0, (("▁東京", -0.5),))
    sides = Side(wide, (token,), "stop"), Side(spaced, (), "stop")
    lines = drawn(view.steered(Steered("p", (Steer("x", 1),), *sides), width), width)
    assert max(map(cell_len, lines)) <= width
    letters = "".join(lines[2 : lines.index(next(line for line in lines if "mean log" in line))])
    assert "".join(letter for letter in letters if letter in wide) == wide
    assert letters.split().count("three") == 12
    assert "…" not in letters


def test_tokens_of_each_output_layer_stand_below_those_of_all():
    low, high = (("x", -1.0),), (("y", 2.0),)
    lines = page(
        promoted=high,
        suppressed=low,
        by_output=((), high, (("z", 1.0),)),
        suppressed_by_output=((), (("w", -3.0),), ()),
    )
    first = next(i for i, line in enumerate(lines) if line.startswith("promotes"))
    shown = [line.split() for line in lines[first : first + 5]]
    assert shown == [["promotes", "y", "+2.00"], ["output", "1", "y"], ["output", "2", "z"],
                     ["suppresses", "x", "-1.00"], ["output", "1", "w"]]  # fmt: skip
