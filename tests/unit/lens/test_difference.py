"""Change one word: the six invariants on 300 random edits, and the null band, the confounds, the moves."""

import random

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.lens.alignment import align, collapse, edited
from gemscope.lens.attention import attend, visible
from gemscope.lens.difference import attend_edit, compare
from gemscope.lens.null_band import SPREAD_FLOOR, later_queries, movement
from unit.models.tiny_gemma import gemma

WORDS = "the capital of France is Paris hello world and we like long words in Lyon today zebra Q7".split()
TEXT = "we like the capital of France and the words of Paris"


@pytest.fixture(scope="module")
def tiny():
    return gemma()


def _edits(n: int, seed: int) -> list[tuple[str, str]]:
    """Texts of 5 to 12 words, one of which is replaced by 0 to 4 others."""
    rng = random.Random(seed)
    found: list[tuple[str, str]] = []
    for _ in range(n):
        words = [rng.choice(WORDS) for _ in range(rng.randint(5, 12))]
        place = rng.randrange(len(words))
        new = [rng.choice(WORDS) for _ in range(rng.randint(0, 4))]
        found.append((" ".join(words), " ".join([*words[:place], *new, *words[place + 1 :]])))
    return found


def _rows_sum_to_one(values, spans):
    there = torch.tensor([stop > start for start, stop in spans])
    sums = values.double().sum(-1)
    return torch.allclose(sums, there.double().expand_as(sums), atol=1e-5)


def test_the_six_invariants_on_300_random_edits():
    tiny = gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    lengths, changed = set(), 0
    for a, b in _edits(300, seed=0):
        moved = compare(tiny, a, b, null_samples=0)
        groups, difference = moved.alignment.groups, moved.difference
        # 1 collapsed rows sum to one
        assert _rows_sum_to_one(moved.before, moved.alignment.spans("a"))
        assert _rows_sum_to_one(moved.after, moved.alignment.spans("b"))
        # 2 what one key loses another gains
        assert float(difference.double().sum(-1).abs().max()) < 1e-5
        # 3 nothing before the edit can have changed: exactly
        first = len(groups) if moved.alignment.changed is None else moved.alignment.changed
        assert bool((moved.before[:, :, :first] == moved.after[:, :, :first]).all())
        assert bool((difference[:, :, :first] == 0).all())
        # 4 exchanging the texts changes the sign
        back = compare(tiny, b, a, null_samples=0)
        assert torch.equal(back.difference, -difference)
        assert back.alignment.groups == moved.alignment.swapped.groups
        # 5 no edit, no difference
        assert moved.alignment.changed is not None or not bool(difference.any())
        # 6 groups cover all tokens of both texts once
        for side, tokens in (("a", moved.a), ("b", moved.b)):
            spans = moved.alignment.spans(side)
            assert [i for start, stop in spans for i in range(start, stop)] == list(range(len(tokens)))
        lengths.add(moved.length_change)
        changed += moved.alignment.changed is not None and bool(difference.any())
    assert len(lengths) > 5
    assert changed > 200


def test_no_edit_moves_nothing(tiny):
    moved = compare(tiny, TEXT, TEXT)
    assert moved.alignment.changed is None
    assert moved.null is None
    assert not bool(moved.difference.any())
    assert moved.moved() == []
    assert "nothing was changed" in str(moved)


def test_local_layers_have_no_mass_outside_their_window(tiny):
    maps = attend(tiny, TEXT)
    for values, about in zip(maps.values, maps.layers, strict=True):
        seen = visible(about, len(maps.tokens))
        assert bool((values[:, ~seen] == 0).all())
        assert bool((values[:, seen] > 0).any())


def test_a_collapse_against_loops(tiny):
    values = attend(tiny, "hello world and we").values.double()
    spans = [(0, 1), (1, 3), (3, 3), (3, values.shape[-1])]
    found = collapse(values, spans)
    for i, (q0, q1) in enumerate(spans):
        for j, (k0, k1) in enumerate(spans):
            rows = [values[..., q, k0:k1].sum(-1) for q in range(q0, q1)]
            expected = sum(rows) / len(rows) if rows else torch.zeros(values.shape[:2]).double()
            assert torch.allclose(found[..., i, j], expected, atol=1e-12)


def test_changed_pieces_grow_to_whole_words(tiny):
    moved = compare(tiny, "we like zebra today", "we like zebu today", null_samples=0)
    assert [tuple(moved.names())[i] for i in (0, -1)] == ["<bos>", "today"]
    assert moved.words("a", moved.alignment.changed) == "zebra"
    assert moved.words("b", moved.alignment.changed) == "zebu"


@pytest.mark.parametrize(
    ("a", "b", "old", "new"),
    [
        ("Paris, today", "Lyon, today", "Paris", "Lyon"),
        ("the 125 words", "the 128 words", "125", "128"),
        ("über alles", "über allem", "alles", "allem"),
        ("a cat", "a big cat", "–", "big"),
        ("a big cat", "a cat", "big", "–"),
        ("東京に行く", "東北に行く", "<0xE4><0xBA><0xAC>", "<0xE5><0x8C><0x97>"),
        ("I am 🙂 now", "I am 🙃 now", "🙂", "🙃"),
        ("यह हिन्दी है", "यह हिन्दू है", "हिन्दी", "हिन्दू"),
        ("un cafe\u0301 noir", "un cafe\u0300 noir", "cafe\u0301", "cafe\u0300"),
        ("un e\u0301te noir", "un e\u0300te noir", "e\u0301te", "e\u0300te"),
        ("อาที่นี", "อาที้นี", "ที่", "ที้"),
        ("a ☀\ufe0e b", "a ☀\ufe0f b", "☀\ufe0e", "☀\ufe0f"),
    ],
)
def test_which_words_were_changed(tiny, a, b, old, new):
    x, y = tiny.tokens(a), tiny.tokens(b)
    found = align(x, y)
    group = found.groups[found.changed]

    def spelled(tokens, start, stop):
        spans = tokens.offsets[start:stop]
        return tokens.text[spans[0][0] : spans[-1][1]].strip() if spans else "–"

    if old.startswith("<0x"):
        old, new = "京", "北"
    assert spelled(x, group.a_start, group.a_stop) == old
    assert spelled(y, group.b_start, group.b_stop) == new


@pytest.mark.parametrize(
    ("text", "edit", "expected"),
    [
        ("France is France", "France#2=Japan", "France is Japan"),
        ("Parisian Paris", "Paris=Lyon", "Parisian Lyon"),
        ("the big cat", "big=", "the cat"),
        ("the big cat", "cat=", "the big"),
        ("a=b or c", "or=and", "a=b and c"),
        ("I said hello world.", "hello world=hi", "I said hi."),
        ("C#2 is here", "C#2=D", "D is here"),
        ("cafe\u0301 cafe", "cafe=tea", "cafe\u0301 tea"),
        ("हिन्दी हिन्द", "हिन्द=भारत", "हिन्दी भारत"),
        ("a ☀\ufe0fabc", "abc=x", "a ☀\ufe0fx"),
        ("xa a a", "a a=b", "xa b"),
        ("a a a", "a a#1=b", "b a"),
        ("か\u3099か", "か=き", "か\u3099き"),
    ],
)
def test_an_edit(text, edit, expected):
    assert edited(text, edit) == expected


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ("France", "write word=other"),
        ("=x", "write word=other"),
        ("Spain=Japan", "not in the text"),
        ("the=a", "write the#1=a"),
        ("the#4=a", "count from 1"),
        ("we l=x", "not in the text"),
    ],
)
def test_an_edit_that_cannot_be_made(edit, reason):
    with pytest.raises(InputError, match=reason):
        edited(TEXT, edit)


def test_scores_are_the_mean_share_that_moved_after_the_edit(tiny):
    moved = attend_edit(tiny, TEXT, "France=Lyon", null_samples=0)
    place = moved.alignment.changed
    rows = range(place + 1, len(moved.alignment.groups))
    by_hand = sum(0.5 * moved.difference[:, :, q].abs().sum(-1) for q in rows) / len(rows)
    without = sum(0.5 * moved.difference[:, :, q, 1:].abs().sum(-1) for q in rows) / len(rows)
    assert torch.allclose(moved.scores, by_hand, atol=1e-6)
    assert torch.allclose(moved.scores_without_first, without, atol=1e-6)
    assert float(moved.scores.max()) <= 1


def test_scores_of_a_last_word_are_its_own(tiny):
    moved = attend_edit(tiny, TEXT, "Paris=Lyon", null_samples=0)
    assert moved.later.nonzero()[:, 0].tolist() == [moved.alignment.changed]
    assert float(moved.scores.max()) > 0


def test_the_null_band_is_made_of_random_edits_of_the_same_length(tiny):
    moved = attend_edit(tiny, TEXT, "France=Lyon", null_samples=5, seed=3)
    samples = moved.null.scores
    assert samples.shape == (5, 4, 4)
    z = (moved.scores - samples.mean(0)) / samples.std(0).clamp(min=SPREAD_FLOOR * float(samples.mean()))
    assert torch.equal(moved.z, z)
    again = attend_edit(tiny, TEXT, "France=Lyon", null_samples=5, seed=3)
    assert torch.equal(again.null.scores, samples)
    other = attend_edit(tiny, TEXT, "France=Lyon", null_samples=5, seed=4)
    assert not torch.equal(other.null.scores, samples)


def _make(piece):
    """How a token is written: a space in front, letters, digits, a capital."""
    bare = piece.removeprefix("▁")
    return piece != bare, bare.isalpha(), bare.isdigit(), bare[:1].isupper()


@pytest.mark.parametrize(
    ("edit", "side"),
    [("France=Lyon", "a"), ("of France=in the words", "a"), ("the words of=", "a"), ("France=France and Lyon", "b")],
)
def test_the_samples_are_the_text_with_tokens_of_the_same_make_in_the_place_of_the_edit(tiny, monkeypatch, edit, side):
    drawn = []
    tokens_of = type(tiny).tokens_of
    monkeypatch.setattr(type(tiny), "tokens_of", lambda self, ids: drawn.append(tokens_of(self, ids)) or drawn[-1])
    moved = attend_edit(tiny, TEXT, edit, null_samples=4, seed=1)
    monkeypatch.undo()
    text = {"a": moved.a, "b": moved.b}[side]
    spans, place = moved.alignment.spans(side), moved.alignment.changed
    changed = range(*spans[place])
    assert len(changed) > 0
    assert len(drawn) == 4
    kept = [i for i in range(len(text)) if i not in changed]
    for sample in drawn:
        assert sample.ids[kept].tolist() == text.ids[kept].tolist()
        assert [_make(sample.pieces[i]) for i in changed] == [_make(text.pieces[i]) for i in changed]
        assert all(sample.ids[i] != text.ids[i] for i in changed)
    assert len({tuple(sample.ids.tolist()) for sample in drawn}) > 1
    before = collapse(attend(tiny, moved.a).values, moved.alignment.spans("a"))
    for sample, found in zip(drawn, moved.null.scores, strict=True):
        difference = collapse(attend(tiny, sample).values, spans) - before
        rows = [0.5 * difference[:, :, q].abs().sum(-1) for q in range(place + 1, len(spans))]
        torch.testing.assert_close(found, sum(rows) / len(rows), rtol=1e-4, atol=1e-6)


def test_words_that_were_put_in_are_measured_against_others_put_in_there(tiny):
    moved = attend_edit(tiny, TEXT, "France=France and Lyon", null_samples=4)
    assert moved.alignment.groups[moved.alignment.changed].kind == "insert"
    assert torch.isfinite(moved.z).all()
    assert "z against 4 random insertions of as many tokens" in str(moved)
    order = moved.z.flatten().argsort(descending=True, stable=True)
    assert moved.ranked() == [(int(i) // 4, int(i) % 4) for i in order]
    assert "random replacements" in str(attend_edit(tiny, TEXT, "France=Lyon", null_samples=4))


@pytest.mark.parametrize("edit", ["Paris=Paris and Lyon", "of Paris="])
def test_where_no_query_is_left_to_move_it_is_said(tiny, edit):
    moved = attend_edit(tiny, TEXT, edit, null_samples=4)
    assert not bool(moved.scores.any())
    assert moved.z is None
    assert "no word of both texts stands behind the edit" in str(moved)
    assert "stands behind" not in str(attend_edit(tiny, TEXT, "France=", null_samples=4))
    assert "stands behind" not in str(compare(tiny, TEXT, TEXT))


def test_random_edits_score_like_random_edits(tiny):
    """A replacement drawn like the null's own is no outlier of it."""
    z = [attend_edit(tiny, TEXT, f"France={word}").z.abs().mean() for word in ("Lyon", "Paris")]
    assert float(torch.stack(z).mean()) < 3


def test_confounds_are_said(tiny):
    moved = attend_edit(tiny, TEXT, "France=the long words")
    assert moved.length_change == 2
    about = moved.layers[0]
    equal = [g for g in moved.alignment.groups if g.kind == "equal"]
    by_hand = sum(
        (0 <= q.a_start - k.a_start < about.window) != (0 <= q.b_start - k.b_start < about.window)
        for q in equal
        for k in equal
    )
    assert moved.window_changes == by_hand > 0
    assert len(moved.suggestions) == 3
    shown = str(moved)
    assert "length changed by +2" in shown
    assert "windows shifted" in shown
    assert "words that would keep it" in shown
    same = attend_edit(tiny, TEXT, "France=Lyon")
    assert (same.length_change, same.window_changes, same.suggestions) == (0, 0, ())
    assert "length changed" not in str(same)


def test_moves_are_the_largest_differences(tiny):
    moved = attend_edit(tiny, TEXT, "France=Lyon", null_samples=0)
    moves = moved.moved(5)
    top = moved.difference.abs().flatten().topk(5).values
    assert [abs(move.change) for move in moves] == pytest.approx(top.tolist(), abs=1e-6)
    one = moved.moved(5, head=(2, 1))
    assert {(move.layer, move.head) for move in one} == {(2, 1)}
    with pytest.raises(InputError, match="was not read"):
        moved.moved(5, head=(2, 9))


@pytest.mark.parametrize("kind", ["written", "effect"])
def test_other_units_are_the_difference_of_their_maps(tiny, kind):
    a, b = TEXT, TEXT.replace("France", "Lyon")
    target = {"target": "Paris"} if kind == "effect" else {}
    moved = compare(tiny, a, b, kind=kind, null_samples=2, **target)
    first, second = (attend(tiny, x, kind=kind, **target).values for x in (a, b))
    assert torch.allclose(moved.difference, second - first, atol=1e-5)
    assert moved.null.scores.shape == (2, 4, 4)
    if kind == "written":
        assert bool((moved.difference[:, :, : moved.alignment.changed] == 0).all())


def test_later_queries_and_movement():
    difference = torch.zeros(1, 1, 3, 3)
    difference[0, 0, 2] = torch.tensor([0.5, -0.25, -0.25])
    assert float(movement(difference, torch.tensor([False, False, True]))) == 0.5
    x = gemma().tokens("hello world")
    assert later_queries(align(x, x)).all()


def test_a_null_band_of_one_is_refused(tiny):
    with pytest.raises(InputError, match="no spread"):
        compare(tiny, "hello world", "hello Lyon", null_samples=1)
