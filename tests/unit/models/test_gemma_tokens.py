"""Texts, offsets, roles and batches, on a tokenizer laid out like Gemma's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gemscope.core.errors import ContextLengthError, FormatError, InputError
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Role, Tokens
from unit.models.tiny_gemma import TEXTS, build, gemma, tokenizer

G = gemma()
CONTEXT = G.shape.context


def _spelled(tokens: Tokens) -> str:
    """The text put together again from the spans alone."""
    spans = [span for span in dict.fromkeys(tokens.offsets) if span != (0, 0)]
    return "".join(tokens.text[start:end] for start, end in spans)


def test_four_byte_tokens_of_an_emoji_share_its_span_and_offsets_after_it_are_right() -> None:
    tokens = G.tokens("hello 🙂 world")
    spans = dict(zip(tokens.pieces, tokens.offsets, strict=True))
    assert [spans[f"<0x{b:02X}>"] for b in "🙂".encode()] == [(6, 7)] * 4
    assert spans["▁world"] == (7, 13)
    assert tokens.offsets[0] == (0, 0)
    assert tokens.pieces[0] == "<bos>"


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25))
def test_any_text_is_covered_exactly_and_comes_back(text: str) -> None:
    tokens = G.tokens(text)
    assert tokens.text == text
    assert _spelled(tokens) == text
    starts = [start for start, _ in tokens.offsets]
    assert starts == sorted(starts)
    assert tokens.ids.tolist().count(2) == 1
    assert len(tokens) == len(tokens.ids) == len(tokens.offsets) == len(tokens.roles) == len(tokens.pieces)
    decoded = tokenizer().decode(tokens.ids[1:])
    assert decoded == text.replace("▁", " ")
    again = G.tokens_of(tokens.ids)
    assert again.text == decoded
    assert (again.pieces, again.offsets) == (tokens.pieces, tokens.offsets)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(tokenizer()) - 1), max_size=20))
def test_any_ids_are_decoded_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    tokens = G.tokens_of([2, *ids])
    assert tokens.text == tokenizer().decode(ids, skip_special_tokens=False)
    assert tokens.ids.tolist() == [2, *ids]
    for piece, (start, end) in zip(tokens.pieces[1:], tokens.offsets[1:], strict=True):
        if not piece.startswith("<0x"):
            assert tokens.text[start:end] == piece.replace("▁", " ")


def test_an_underscore_like_space_in_the_text_keeps_its_offsets() -> None:
    tokens = G.tokens("a▁b z")
    assert [tokens.text[a:b] for a, b in tokens.offsets[1:]] == ["a", "▁", "b", " ", "z"]


@pytest.mark.parametrize("text", ["<bos>hello", "<bos><bos>hello", "<bos><bos><bos>hello"])
def test_a_text_that_starts_with_bos_gets_no_second_one(text: str) -> None:
    tokens = G.tokens(text)
    assert tokens.text == "<bos>hello"
    assert tokens.pieces == ("<bos>", "hello")
    assert tokens.offsets == ((0, 5), (5, 10))
    assert tokens.roles == (Role.SPECIAL, Role.CONTENT)


def test_what_cannot_be_read_says_why() -> None:
    for text in ("", "<bos>", "<bos><bos>"):
        with pytest.raises(InputError, match="empty"):
            G.tokens(text)
    with pytest.raises(InputError, match=r"character 1.*surrogate"):
        G.tokens("a\ud800b")
    with pytest.raises(ContextLengthError, match=f"{CONTEXT + 1} tokens.*at most {CONTEXT}"):
        G.tokens("#" * CONTEXT)
    assert len(G.tokens("#" * (CONTEXT - 1))) == CONTEXT
    with pytest.raises(InputError, match="no token 99999"):
        G.tokens_of([99999])


def test_a_piece_without_embedding_is_refused() -> None:
    """The 270M and 1B tokenizers know an image token that these models have no row for."""
    small = Gemma.wrap(build("gemma3", vocab_size=len(tokenizer()) - 1), tokenizer(), name="small", check=False)
    last = tokenizer().convert_ids_to_tokens(len(tokenizer()) - 1)
    with pytest.raises(InputError, match="no embedding"):
        small.tokens(last.replace("▁", " "))


def test_a_tokenizer_that_does_not_spell_its_text_is_refused() -> None:
    from tokenizers import Tokenizer, models, normalizers

    inner = Tokenizer(models.WordLevel({"<bos>": 2, "<unk>": 3, "hello": 4}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    lower = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")
    g = Gemma.wrap(build("gemma3"), lower, name="lower", check=False)
    with pytest.raises(InputError, match="does not spell"):
        g.tokens("HELLO")
    with pytest.raises(FormatError, match="<bos>"):
        Gemma.wrap(build("gemma3"), PreTrainedTokenizerFast(tokenizer_object=inner), name="no-bos")


def test_roles_of_a_rendered_chat_in_raw_text() -> None:
    text = "<start_of_turn>user\nhello user<end_of_turn>\n<start_of_turn>model\nuser\n\nand<end_of_turn>\n"
    tokens = G.tokens(text)
    got = [(piece, role.value) for piece, role in zip(tokens.pieces, tokens.roles, strict=True)]
    assert got == [
        ("<bos>", "special"),
        ("<start_of_turn>", "special"),
        ("user", "template"),
        ("\n", "template"),
        ("hello", "content"),
        ("▁user", "content"),
        ("<end_of_turn>", "special"),
        ("\n", "template"),
        ("<start_of_turn>", "special"),
        ("model", "template"),
        ("\n", "template"),
        ("user", "content"),
        ("\n\n", "content"),
        ("and", "content"),
        ("<end_of_turn>", "special"),
        ("\n", "template"),
    ]
    assert tokens.content_mask.tolist() == [role == "content" for _, role in got]


def test_the_words_user_and_model_are_content_in_plain_text() -> None:
    tokens = G.tokens("user\nmodel\nhello")
    assert tokens.roles[0] is Role.SPECIAL
    assert set(tokens.roles[1:]) == {Role.CONTENT}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_pads_on_its_side(side: str) -> None:
    items = [G.tokens(text) for text in TEXTS]
    batch = G.batch(items, side)
    assert batch.ids.shape == batch.mask.shape == (3, max(map(len, items)))
    for row, item in enumerate(items):
        assert torch.equal(batch.ids[row][batch.mask[row]], item.ids)
        assert bool((batch.ids[row][~batch.mask[row]] == 0).all())
        columns = batch.mask[row].nonzero().flatten()
        assert torch.equal(columns, torch.arange(len(item)) + int(batch.first[row]))
        assert bool(batch.mask[row, 0 if side == "right" else -1])
    assert batch.lengths.flatten().tolist() == [len(item) for item in items]
    with pytest.raises(InputError, match="empty"):
        G.batch([])
