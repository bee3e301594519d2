"""Everything measured of one dictionary, and its way to disk and back."""

import pytest
import torch

from gemscope.core.errors import FormatError, InputError, SiteError
from gemscope.core.files import write_json
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.concepts import ConceptLabels
from gemscope.evaluation.evaluate import Evaluation, evaluate
from unit.models import tiny_gemma

SITE = "resid_post.2"
TEXTS = [
    *tiny_gemma.TEXTS,
    "<start_of_turn>user\nhello we<end_of_turn>\n<start_of_turn>model\nParis<end_of_turn>\n",
]


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


@pytest.fixture(scope="module")
def items(model):
    return [model.tokens(text) for text in TEXTS]


def identity(d_in: int, at: float = 1e4) -> SAE:
    """A dictionary that returns its input: one pair of latents per dimension, shifted far above zero."""
    eye = torch.eye(d_in, dtype=torch.float64)
    b_enc, zero = torch.full((d_in,), at, dtype=torch.float64), torch.zeros(d_in, dtype=torch.float64)
    return SAE(eye, b_enc, eye.clone(), zero - at, zero.clone())


def random_sae(d_in: int, d_sae: int = 32) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d_sae, d_in, generator=generator) / d_in**0.5
    return SAE(W.T.contiguous(), torch.zeros(d_sae), W, torch.zeros(d_in), torch.full((d_sae,), 1.0))


def content(model, items) -> torch.Tensor:
    """Rows of single, unpadded captures in float64."""
    return torch.cat([model.capture(i, [SITE])[SITE][0][i.content_mask] for i in items]).double()


@pytest.mark.parametrize("batch_tokens", [20, 4096])
def test_fidelity_is_that_of_the_content_rows(model, items, batch_tokens):
    sae = random_sae(model.width(SITE))
    got = evaluate(model, sae, SITE, items, batch_tokens=batch_tokens).fidelity
    x = content(model, items)
    acts = sae.encode(x.float()).double()
    recon = acts @ sae.W_dec.double() + sae.b_dec.double()
    assert got.rows == len(x)
    assert got.l0 == pytest.approx((acts > 0).sum(1).double().mean().item())
    fvu = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    assert got.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert got.firings == tuple((acts > 0).sum(0).tolist())


def test_a_perfect_dictionary_scores_perfectly(model, items):
    got = evaluate(model, identity(model.width(SITE)), SITE, items)
    assert got.fidelity.fvu < 1e-20
    assert got.loss.delta_loss == 0.0


def test_a_latent_that_marks_a_labelled_concept_is_found(model, items):
    items = items * 3
    direction = content(model, items)[::5].mean(0)
    projection = [model.capture(i, [SITE])[SITE][0].double() @ direction for i in items]
    values = torch.cat([p[i.content_mask] for p, i in zip(projection, items, strict=True)]).unique()
    cut = values[len(values) // 2 - 1 : len(values) // 2 + 1].mean()
    marks = [torch.stack([p > cut, p < -1e9], 1) for p in projection]
    sae = random_sae(model.width(SITE))
    W_enc = sae.W_enc.clone()
    W_enc[:, 5] = direction.float()
    threshold = sae.threshold.clone()
    threshold[5] = float(cut)
    sae = SAE(W_enc, sae.b_enc.clone(), sae.W_dec.clone(), sae.b_dec.clone(), threshold)
    for batch_tokens in (20, 4096):
        labels = ConceptLabels(("above", "never"), marks)
        found = evaluate(model, sae, SITE, items, labels, batch_tokens=batch_tokens).concepts
        assert found.too_few == {"never": 0}
        assert found.found[0] == 1
        (score,) = found.scores
        assert (score.f1_latent, score.auroc_latent) == (5, 5)
        assert score.f1 == 1.0
        assert score.auroc == 1.0


def test_the_loss_is_measured_on_the_first_documents_only(model, items):
    sae = random_sae(model.width(SITE))
    some = evaluate(model, sae, SITE, items, splice_tokens=len(items[0].ids) + 1).loss
    first_two = evaluate(model, sae, SITE, items[:2]).loss
    assert (some.predictions, some.original, some.spliced) == (
        first_two.predictions,
        first_two.original,
        first_two.spliced,
    )
    assert some.predictions < evaluate(model, sae, SITE, items).loss.predictions


def test_an_evaluation_reads_back_as_it_was(model, items, tmp_path):
    marks = [torch.ones(len(i.ids), 2, dtype=torch.bool) for i in items]
    for mark in marks:
        mark[::2, 0] = False
    sae = random_sae(model.width(SITE))
    for labels in (None, ConceptLabels(("even", "all"), marks)):
        made = evaluate(model, sae, SITE, items, labels, about={"key": "k"})
        made.save(tmp_path / "e.json")
        assert Evaluation.load(tmp_path / "e.json") == made
        assert made.about["key"] == "k"
        assert "versions" in made.about["provenance"]


def test_progress_runs_to_the_end(model, items):
    calls = []
    evaluate(model, random_sae(24), SITE, items, batch_tokens=20, progress=lambda *now: calls.append(now))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1]
    assert len({call[1] for call in calls}) == 1


def test_what_does_not_fit_is_refused(model, items, tmp_path):
    with pytest.raises(InputError, match="reads 23"):
        evaluate(model, random_sae(23), SITE, items)
    with pytest.raises(SiteError):
        evaluate(model, random_sae(24), "resid_post.9", items)
    with pytest.raises(InputError, match="spread"):
        evaluate(model, random_sae(24), SITE, [])
    short = ConceptLabels(("a",), [torch.zeros(1, 1, dtype=torch.bool)] * len(items))
    with pytest.raises(InputError, match="label the same tokens"):
        evaluate(model, random_sae(24), SITE, items, short)
    write_json(tmp_path / "e.json", {"format": "gemscope.evaluation", "version": 1, "site": SITE})
    with pytest.raises(FormatError, match="lacks a part"):
        Evaluation.load(tmp_path / "e.json")
    write_json(tmp_path / "e.json", [])
    with pytest.raises(FormatError, match=r"no gemscope\.evaluation"):
        Evaluation.load(tmp_path / "e.json")
