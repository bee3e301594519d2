"""Labels by rule and by the user, and what figures are held against."""

import json

import pytest
import torch

from gemscope.core.errors import FormatError
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.controls import Principal, random_like, random_weights
from gemscope.evaluation.geometry import geometry
from gemscope.evaluation.labelled import chosen_documents, from_jsonl
from gemscope.evaluation.study import is_training
from gemscope.evaluation.subject import Subject
from gemscope.evaluation.tasks import RULES, rule_labels
from unit.dictionaries.zoo import KINDS, inputs, random_dictionary
from unit.models import tiny_gemma


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


def shown(rule: str, text: str) -> list[str]:
    return [text[start:end] for start, end in RULES[rule](text)]


def test_rules_read_the_text():
    assert shown("digit", "in 1984, 7 of 12") == ["1984", "7", "12"]
    assert shown("inside quotes", 'she said "well, yes" and "no"') == ["well, yes", "no"]
    assert shown("inside parentheses", "a (b c) d (e)") == ["b c", "e"]
    assert shown("all capitals", "NEWS: A man of NATO") == ["NEWS", "NATO"]
    assert shown("ends a sentence", "Yes. No! 3.5") == [".", "!"]
    code = "def f(x):\n    return x\nThe return was late.\ncount = 0\n"
    assert shown("code", code) == ["def f(x):", "    return x", "count = 0"]
    both = "The dog is in the house. El perro está en la casa."
    assert [text.strip() for text in shown("language: spanish", both)] == ["El perro está en la casa."]
    assert [text.strip() for text in shown("language: english", both)] == ["The dog is in the house."]
    assert shown("language: german", both) == []


def test_rule_labels_mark_tokens_and_repeats(model):
    item = model.tokens("Lyon is (hello Lyon) 12 Lyon")
    labels = rule_labels([item])
    column = {name: i for i, name in enumerate(labels.names)}
    inside = [p for p, m in zip(item.pieces, labels.marks[0][:, column["rule: inside parentheses"]], strict=True) if m]
    assert "".join(inside) == "hello▁Lyon"
    repeats = labels.marks[0][:, column["rule: repeats an earlier token"]]
    assert [p for p, m in zip(item.pieces, repeats, strict=True) if m].count("▁Lyon") == 1
    assert not repeats[0]


def test_a_line_ends_with_a_newline_and_nothing_else(model, tmp_path):
    texts = ["Paris\u2028and\u2029Lyon\x85hello", "the capital"]
    lines = [json.dumps({"text": text, "label": "a"}, ensure_ascii=False) for text in texts]
    (tmp_path / "lines.jsonl").write_text("\r\n".join(lines), "utf-8")
    assert [item.text for item in from_jsonl(model, tmp_path / "lines.jsonl")[0]] == texts


def test_a_user_s_spans_become_labels_with_parents(model, tmp_path):
    path = tmp_path / "spans.jsonl"
    one = {"text": "hello Paris and Lyon", "spans": [{"start": 6, "end": 11, "label": "place/city"}]}
    two = {"text": "the capital", "label": "geography"}
    path.write_text(json.dumps(one) + "\n\n" + json.dumps(two) + "\n")
    items, labels = from_jsonl(model, path)
    assert labels.names == ("place", "place/city", "geography")
    assert labels.parents == {"place/city": "place"}
    assert labels.passages == {"geography"}
    marked = [p for p, m in zip(items[0].pieces, labels.marks[0][:, 1], strict=True) if m]
    assert marked == ["▁Paris"]
    assert torch.equal(labels.marks[0][:, 0], labels.marks[0][:, 1])
    assert labels.marks[1][items[1].content_mask, 2].all()
    assert not labels.marks[1][0, 2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1"),
        ('{"spans": []}', "line 1"),
        ('{"text": "abc", "spans": [{"start": 1, "end": 9, "label": "x"}]}', "outside its text of 3"),
        ('{"text": "abc", "spans": [{"start": 1}]}', "no labelled text"),
    ],
)
def test_a_line_that_is_no_labelled_text_is_named(model, tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(FormatError, match=said):
        from_jsonl(model, tmp_path / "bad.jsonl")


def test_equal_documents_are_held_out_together(model):
    sides = [is_training(model.tokens(f"hello {i}")) for i in range(40)]
    assert sides == [is_training(model.tokens(f"hello {i}")) for i in range(40)]
    assert 5 < sum(sides) < 35


def test_probed_documents_hold_enough_rows(model):
    items = [model.tokens("hello world " * (i + 1)) for i in range(10)]
    chosen = chosen_documents(items, 30, 0)
    assert sum(int(items[i].content_mask.sum()) for i in chosen) >= 30
    assert chosen == chosen_documents(items, 30, 0)
    assert chosen_documents(items, 0, 0) == frozenset()
    assert chosen_documents(items, 10**6, 0) == frozenset(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_dictionary_is_of_the_kind_size_and_l0(kind):
    one = random_dictionary(kind, d_in=8, d_out=8, d_sae=40, dtype=torch.float32)
    n = one.n_positions
    sites = tuple(Site("mlp_out", i) for i in range(n))
    subject = Subject(kind, one, sites, sites)
    x = inputs(one, 300).view(300, n, 8)
    made = random_like(subject, x, x, 5.0, seed=1)
    assert made.dictionary.kind == one.kind.removeprefix("skip_")  # a random linear path would be no control
    assert made.dictionary.n_latents == one.n_latents
    support, values = made.codes(x)
    assert len(values) / 300 == pytest.approx(5.0, abs=0.05)
    error = (x - made.reconstruct(x, support, values)).square().sum()
    assert error < (x - x.mean(0)).square().sum()
    again = random_like(subject, x, x, 5.0, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(made.dictionary.parameters(), again.dictionary.parameters(), strict=True)
    )


def test_principal_components_explain_what_their_eigenvalues_say():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + 20
    principal = Principal(x)
    for k in (0, 2, 6):
        error = (x - principal.project(x, k)).square().sum() / (x - x.mean(0)).square().sum()
        assert principal.fvu(k) == pytest.approx(error.item(), abs=1e-12)


def test_random_weights_keep_the_entries_and_lose_the_function(model):
    blank = random_weights(model)
    for old, new in zip(model.model.parameters(), blank.model.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    item = model.tokens("the capital of France is Paris")
    assert not torch.allclose(model.logits(item), blank.logits(item), atol=0.1)


def test_geometry_is_that_of_the_weights_taken_one_by_one():
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 7), (7, 5)))
    W_dec[3] = 2 * W_dec[1]
    b_enc = torch.randn(7, generator=generator, dtype=torch.float64)
    zero = torch.zeros(7, dtype=torch.float64)
    got = geometry(SAE(W_enc, b_enc, W_dec, zero[:5], zero))
    cosine = torch.nn.functional.cosine_similarity
    for i in range(7):
        others = [j for j in range(7) if j != i]
        assert got.max_decoder_cosine[i] == pytest.approx(max(float(cosine(W_dec[i], W_dec[j], dim=0)) for j in others))
        best = max(float(cosine(W_enc[:, i], W_enc[:, j], dim=0)) for j in others)
        assert got.max_encoder_cosine[i] == pytest.approx(best)
        assert got.encoder_decoder_cosine[i] == pytest.approx(float(cosine(W_enc[:, i], W_dec[i], dim=0)))
        assert got.decoder_norm[i] == pytest.approx(float(W_dec[i].norm()))
    assert got.duplicates == 2
    assert got.encoder_bias == pytest.approx(b_enc.tolist())
    singular = torch.linalg.svdvals(torch.nn.functional.normalize(W_dec, dim=1)).square()
    share = singular / singular.sum()
    assert got.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
