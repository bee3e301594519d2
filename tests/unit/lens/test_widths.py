"""Every result prints in 80 columns, each number apart from the next, at the sizes of the real models."""

from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len

from gemscope.lens.attention import attend
from gemscope.lens.difference import attend_edit
from gemscope.lens.direct import attribute
from gemscope.lens.formation import form
from gemscope.lens.heads import find_heads
from gemscope.lens.inputs import Target
from gemscope.lens.lines import hang, short
from gemscope.lens.logit_lens import logit_lens
from gemscope.lens.trace import Active, trace
from gemscope.models.layout import LayerAttention
from unit.models.tiny_gemma import gemma

TEXT = "the capital of France is Paris and we like the capital"
CASES = {
    "270m": ((18, 4, 1), 1e4),
    "1b": ((26, 4, 1), 0.5),
    "4b": ((34, 8, 4), 3e7),
    "12b": ((48, 16, 8), 150.0),
    "27b": ((62, 32, 16), 123456.7),
}
"""Layers, heads and key/value heads of a model; how large its numbers are."""
PIECE = "▁internationalisationally"


@pytest.fixture(scope="module")
def tiny():
    return gemma()


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def shape(case):
    return case[0]


@pytest.fixture
def size(case):
    return case[1]


def _layers(shape):
    n, heads, kv = shape
    of = tuple(head * kv // heads for head in range(heads))
    return tuple(
        LayerAttention(i, "global" if i % 6 == 5 else "local", None if i % 6 == 5 else 1024, of) for i in range(n)
    )


def _filled(size, *axes):
    """Values of both signs up to ``size``, the largest among them."""
    values = size * (2 * torch.rand(*axes, generator=torch.Generator().manual_seed(0)) - 1)
    values.view(-1)[0] = -size
    return values


def _lens(found, shape, size):
    rows, pos = shape[0] + 1, len(found.tokens)
    ids = torch.zeros(rows, pos, 5, dtype=torch.long)
    prob = torch.full((rows, pos), 0.999)
    rank = torch.full((rows, pos), 262_144 if size > 1 else 1)
    rank[-1] = 1
    return replace(
        found,
        rows=("embed", *map(str, range(shape[0]))),
        top_ids=ids,
        top_probs=torch.ones(rows, pos, 5),
        entropy=torch.full((rows, pos), 12.47),
        target_prob=prob,
        target_rank=rank,
        pieces={0: PIECE} | dict(found.pieces),
    )


def _trace(found, shape, size):
    n, pos = shape[0], len(found.tokens)
    norm = _filled(size, n, pos).abs()
    latents = ((Active(1_048_575, size, None, "the name of a feature"),) * 5,) * pos
    return replace(
        found,
        layers=_layers(shape),
        embed_norm=norm[0],
        resid_norm=norm,
        attention_norm=norm,
        mlp_norm=norm,
        cosine_before=_filled(1.0, n, pos),
        cosine_last=_filled(1.0, n, pos),
        latents=(latents,) * n,
    )


def _parts(found, shape, size):
    n, heads, _ = shape
    about = {"target": Target(0, PIECE, 1, PIECE), "layers": _layers(shape), "logit": size, "embed": -size}
    keys = _filled(size, n, heads, len(found.tokens))
    return replace(found, attention=keys[..., 0], mlp=keys[:, 0, 0], keys=keys, **about)


def _fits(text, width=80):
    assert max(map(cell_len, text.splitlines())) <= width


def _apart(lines, first, columns):
    """Right of ``first`` each line has so many numbers."""
    for line in lines:
        cells = line[first:].replace(" ± ", " ").split()
        assert len(cells) == columns, line
        assert [float(cell) for cell in cells], line


def test_maps(tiny, shape, size):
    found = attend(tiny, TEXT, layers=[0], kind="written")
    values = _filled(size, *shape[:2], len(found.tokens), len(found.tokens))
    found = replace(found, layers=_layers(shape), values=values)
    text = found.text()
    _fits(text)
    _fits(found.head_text(shape[0] - 1, shape[1] - 1))
    heads = " ".join(line[24:] for line in text.splitlines()[3:] if line[:8].strip() in ("", "0"))
    assert all(f"{head})" in heads or f"{head} " in heads for head in range(shape[1]))
    listed = text.split("query")[1].splitlines()[1:]
    _apart(listed, 48, 1)
    assert len(listed) == 10
    assert len(found.text(top=2).split("query")[1].splitlines()[1:]) == 2


def test_one_head_of_a_long_text(tiny):
    found = attend(tiny, TEXT, layers=[0])
    pieces = ("▁internationalisation",) * 1200
    tokens = replace(found.tokens, pieces=pieces)
    values = torch.full((1, 1, 1200, 1200), 0.0)
    values[..., ::150] = 0.125
    found = replace(found, tokens=tokens, values=values)
    _fits(found.head_text(0, 0))


def test_head_scores(tiny, shape, size):
    found = find_heads(tiny, TEXT)
    values = _filled(min(size, 9999.0), len(found.metrics), *shape[:2]).abs()
    found = replace(found, layers=_layers(shape), values=values)
    for top in (4, 9):
        text = found.text(top=top)
        _fits(text)
        named = text.split("previous")[1].split("induction")[0].split()[1:]
        expected = found.ranked("previous")[:top]
        assert named[::2] == [f"{layer}.{head}" for layer, head, _ in expected]
        assert [float(value) for value in named[1::2]] == pytest.approx(
            [v for _, _, v in expected], rel=0.05, abs=0.006
        )
    table = found.table("distance", 8)
    _fits(table)
    _apart(table.splitlines()[1:], 20, 6)


def test_a_difference(tiny, shape, size):
    found = attend_edit(tiny, TEXT, "France=Lyon", layers=[0], null_samples=2, kind="written")
    groups = len(found.alignment.groups)
    before, after = _filled(size, *shape[:2], groups, groups), _filled(-size, *shape[:2], groups, groups)
    null = replace(found.null, scores=_filled(size, 3, *shape[:2]).abs())
    found = replace(
        found, layers=_layers(shape), before=before, after=after, null=null, target=Target(0, PIECE * 3, 1, PIECE * 3)
    )
    text = found.text()
    _fits(text)
    heads, moves = text.split("head    sees")[1].split("head   query")
    _apart(heads.splitlines()[1:9], 22, 5)
    _apart(moves.splitlines()[1:], 45, 3)
    _fits(found.head_text((0, 0)))


def test_an_attribution(tiny, shape, size):
    text = _parts(attribute(tiny, TEXT), shape, size).text()
    _fits(text)
    _apart(text.splitlines()[4 : 4 + shape[0]], 20, 3)


def test_a_logit_lens(tiny, shape, size):
    found = _lens(logit_lens(tiny, TEXT), shape, size)
    for width in (80, 100):
        _fits(found.text(width), width)


def test_a_trace(tiny, shape, size):
    text = _trace(trace(tiny, TEXT), shape, size).text()
    _fits(text)
    _apart(text.splitlines()[4::2], 14, 5)


def test_a_formation(tiny, shape, size):
    found = form(tiny, TEXT)
    found = replace(
        found,
        lens=_lens(found.lens, shape, size),
        parts=_parts(found.parts, shape, size),
        trace=_trace(found.trace, shape, size),
    )
    text = found.text()
    _fits(text)
    _apart(text.splitlines()[4:-3:2], 27, 8)


@pytest.mark.parametrize(
    ("value", "most", "digits", "expected"),
    [
        (1.23456, 6, 2, "1.23"),
        (123.456, 6, 2, "123.46"),
        (1234.56, 6, 2, "1234.6"),
        (123456.7, 6, 2, "123457"),
        (-123456.7, 7, 2, "-123457"),
        (3e7, 6, 2, "3e+07"),
        (-0.004, 6, 2, "-0.00"),
    ],
)
def test_a_number_keeps_as_many_decimals_as_fit(value, most, digits, expected):
    assert short(value, most, digits) == expected


def test_words_are_wrapped_whole():
    assert hang("", ["aa", "bb", "cc"], 5) == ["aa bb", "cc"]
    assert hang("1  ", ["aa", "bb", "cc"], 10, "   ") == ["1  aa   bb", "   cc"]
    assert hang("> ", ["a long word", "b"], 5) == ["> a long word", "  b"]
    assert hang("> ", [], 5) == ["> "]
