"""The index of a suite: what another process writes is left alone, what a changed suite leaves is made again."""

import pytest
import torch

from gemscope.activations import locks
from gemscope.artifacts.config import DictionaryConfig, Loaded
from gemscope.core.errors import InputError
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.suites import indexing
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.suite import index_folder
from unit.dictionaries.zoo import random_dictionary
from unit.models.tiny_gemma import TEXTS, gemma

SITE = Site("resid_post", 1)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Index a dictionary of the suite in ``tmp_path``."""
    model = gemma("gemma3")

    def build_(d_in: int = 24):
        sae = random_dictionary("sae", d_in=d_in, d_sae=9, dtype=torch.float32)
        loaded = {str(SITE): Loaded(sae, DictionaryConfig.of(sae, SITE, model="tiny"))}
        monkeypatch.setattr(indexing, "dictionaries_of", lambda *_: loaded)
        monkeypatch.setattr(indexing, "training_text", lambda *_: [model.tokens(text) for text in TEXTS])
        return indexing.build_index(model, tmp_path, (), (), QuickstartConfig(), "key")

    return build_


def test_an_index_that_another_process_writes_is_left_alone(build, tmp_path):
    begun = index_folder(tmp_path) / "counted" / "0-of-1.safetensors"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"begun")
    with locks.writing(index_folder(tmp_path), 0, 1), pytest.raises(InputError, match="is writing into"):
        build()
    assert begun.read_bytes() == b"begun"


def test_dictionaries_of_something_else_do_not_cost_the_index_that_is_there(build, tmp_path):
    assert len(build()) == 9
    with pytest.raises(InputError, match="reads 40 numbers"):
        build(d_in=40)
    assert (index_folder(tmp_path) / "index.json").is_file()


def test_the_index_of_a_changed_suite_is_made_again(build, tmp_path):
    write_json(index_folder(tmp_path) / "plan.json", {"rows": "others"})
    assert len(build()) == 9
