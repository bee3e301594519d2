"""The table of arrays in docs/formats.md is what is saved."""

import re
from pathlib import Path

import pytest

from gemscope.lens.attention import attend
from gemscope.lens.difference import attend_edit
from gemscope.lens.direct import attribute
from gemscope.lens.formation import form
from gemscope.lens.heads import find_heads
from gemscope.lens.logit_lens import logit_lens
from gemscope.lens.trace import trace
from unit.models.tiny_gemma import gemma

TABLE = (Path(__file__).parents[3] / "docs" / "formats.md").read_text("utf-8").split("## Results of the lens")[1]
READERS = (attend, find_heads, logit_lens, attribute, trace, form)


def _documented(kind: str) -> dict[str, int]:
    """Array -> number of axes."""
    found: dict[str, int] = {}
    for line in TABLE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and kind in re.split(r", | with .*", cells[2]):
            axes = len(cells[1].split(";")[0].split(",")) + (";" in cells[1] and "first" in cells[1])
            found |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), axes)
    return found


@pytest.mark.parametrize(
    "read", [*READERS, lambda model, text: attend_edit(model, text, "France=Lyon", null_samples=2)]
)
def test_the_documented_arrays_are_the_saved_ones(read):
    result = read(gemma(), "the capital of France is Paris")
    assert {name: value.ndim for name, value in result.arrays().items()} == _documented(result.as_dict()["kind"])
    assert f"`{result.as_dict()['kind']}`" in TABLE
