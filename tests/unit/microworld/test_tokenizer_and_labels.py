from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gemscope.core.errors import InputError
from gemscope.microworld.concepts import CONCEPTS, INDEX
from gemscope.microworld.corpus import documents
from gemscope.microworld.documents import Document, Span
from gemscope.microworld.labels import token_concepts
from gemscope.microworld.tokenizer import END_ID, EOS_ID, START_ID, save_tokenizer, train_tokenizer
from gemscope.models.tokens import Vocabulary


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_tokenizer((d.text for d in documents("it", "train", 0, 1500)), 1200)


@pytest.fixture(scope="module")
def vocabulary(learned: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(learned, folder, chat=True)
    return Vocabulary(AutoTokenizer.from_pretrained(folder), "test")


def test_special_tokens_have_gemmas_ids(learned: Tokenizer):
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    assert [learned.token_to_id(n) for n in names] == [0, EOS_ID, 2, 3, 4, START_ID, END_ID]
    assert learned.get_vocab_size() == 1200


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(lambda s: "<" not in s and "▁" not in s and "[" not in s))
def test_any_text_comes_back(learned: Tokenizer, text: str):
    assert learned.decode(learned.encode(text).ids) == text
    assert 3 not in learned.encode(text).ids  # nothing is unknown: bytes spell the rest


def test_digits_and_punctuation_stand_alone(learned: Tokenizer):
    assert learned.encode("12 + 345.", add_special_tokens=False).tokens[-4:] == ["3", "4", "5", "."]
    assert learned.encode("hi").ids[0] == 2


def test_the_chat_template_is_gemmas(tmp_path: Path, learned: Tokenizer):
    save_tokenizer(learned, tmp_path, chat=True)
    render = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "yo"},
    ]
    assert render(turns, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nS\n\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="alternate"):
        render(turns[1:] + turns[2:], tokenize=False)


def test_every_token_of_a_document_has_the_concepts_of_its_characters(vocabulary: Vocabulary):
    for document in [*documents("it", "validation", 1, 60), *documents("pt", "validation", 1, 60)]:
        tokens = vocabulary.encode(document.text, context=512, vocab_size=1200)
        labels = token_concepts(tokens, document)
        for row, (start, end) in enumerate(tokens.offsets):
            piece = document.text[start:end]
            inside = start + len(piece) - len(piece.lstrip()) if piece.strip() else start
            last = end - (len(piece) - len(piece.rstrip())) if piece.strip() else end
            expected: set[str] = set()
            for span in document.spans:
                if span.start < last and inside < span.end:
                    name: str | None = span.concept
                    while name is not None:
                        expected.add(name)
                        name = CONCEPTS[name].parent
            assert {name for name, i in INDEX.items() if labels[row, i]} == expected, piece


def test_the_space_before_a_word_does_not_carry_the_label_of_the_word_before(vocabulary: Vocabulary):
    document = Document("dog xyzzy", (Span(0, 3, "mammal"),), "x")
    tokens = vocabulary.encode(document.text, context=512, vocab_size=1200)
    labelled = [
        tokens.text[s:e]
        for (s, e), on in zip(tokens.offsets, token_concepts(tokens, document).any(1), strict=True)
        if on
    ]
    assert "".join(labelled).strip() == "dog"


def test_labels_of_another_text_are_refused(vocabulary: Vocabulary):
    with pytest.raises(InputError):
        token_concepts(vocabulary.encode("a", context=9, vocab_size=1200), Document("b", (), "x"))
