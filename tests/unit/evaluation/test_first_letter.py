"""First letters: words and positions for any tokenizer, and the letters that are left out."""

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.evaluation import first_letter
from gemscope.evaluation.first_letter import first_letters, last_token, prompts, words_of
from gemscope.evaluation.subject import Subject
from unit.dictionaries.zoo import random_dictionary
from unit.models import tiny_gemma


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3", max_position_embeddings=2048)


def subject() -> Subject:
    site = Site("resid_post", 1)
    return Subject("one", random_dictionary("sae", d_in=24, d_sae=32, dtype=torch.float32), (site,), (site,))


def test_words_come_from_the_vocabulary_and_are_whole(model):
    words = words_of(model, 1000)
    assert {"Paris", "capital", "we"} <= set(words)
    assert all(word.isalpha() and len(word) > 1 for word in words)
    assert words_of(model, 3) == words[:3]


def test_the_word_is_read_at_its_last_token_however_many_it_has(model):
    items, at = prompts(model, ["Paris", "Zebra", "über"])
    for item, place, word in zip(items, at, ("Paris", "Zebra", "über"), strict=True):
        assert item.text.endswith(f"\n {word}")
        assert place == last_token(item) == len(item) - 1
        start, end = item.offsets[place]
        assert item.text[start:end].strip()
        assert end == len(item.text)
        assert item.text.count("has the first letter:") == first_letter.SHOWN


def test_a_vocabulary_without_words_is_refused(model):
    with pytest.raises(InputError, match="alphabetic words"):
        first_letters(model, [subject()])


def test_letters_that_the_model_does_not_know_are_left_out(model, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    letters = "abcd"
    words = ["".join(letters[int(i)] for i in torch.randint(4, (5,), generator=generator)) for _ in range(220)]
    monkeypatch.setattr(first_letter, "words_of", lambda *_: words)
    monkeypatch.setattr(first_letter, "SHOWN", 1)
    (found,) = first_letters(model, [subject()])
    assert found.words == 220
    assert set("efgh") <= set(found.left_out)
    assert {one.concept for one in found.letters}.isdisjoint(found.left_out)
    for one in found.letters:
        assert one.absorption is not None
        assert one.score("dense").f1 > first_letter.PROBE_F1
    if found.letters:
        assert 0 <= found.full <= 1
