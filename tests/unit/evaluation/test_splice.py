"""Delta loss: exact zero for a perfect dictionary, the brute-force loss for others, and who is counted."""

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.evaluation.splice import counted_targets, splice_loss
from gemscope.models.interventions import Edit
from gemscope.models.tokens import Role
from unit.models import tiny_gemma

CHAT = "<start_of_turn>user\nhello world<end_of_turn>\n<start_of_turn>model\nLyon and Paris<end_of_turn>\n"


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


def documents(model):
    return [model.tokens(text) for text in [*tiny_gemma.TEXTS, "Paris", CHAT]]


def brute_force(model, item, site, change):
    """Σ −log p over the counted targets of one unpadded document, in float64, position by position."""
    content = [i for i, role in enumerate(item.roles) if role is Role.CONTENT]

    def function(x):
        y = x.clone()
        y[:, content] = change(x[:, content])
        return y

    logits = model.logits(item, interventions=[] if change is None else [Edit(site, function)])[0].double()
    return sum(-float(logits[i - 1].log_softmax(-1)[item.ids[i]]) for i in content[1:]), len(content) - 1


def measured(model, change, mean=None, **options):
    mean = torch.zeros(model.width("resid_post.1")) if mean is None else mean
    return splice_loss(model, change, "resid_post.1", documents(model), mean, **options)


@pytest.mark.parametrize("batch_tokens", [20, 10_000])
@pytest.mark.parametrize("perfect", [lambda x: x, torch.clone, lambda x: (x.double() * 2 / 2).float()])
def test_a_perfect_dictionary_has_a_delta_loss_of_exactly_zero(model, perfect, batch_tokens):
    loss = measured(model, perfect, batch_tokens=batch_tokens)
    assert loss.delta_loss == 0.0
    assert loss.recovered_zero in (1.0, None)
    assert loss.zero != loss.original


@pytest.mark.parametrize("batch_tokens", [20, 10_000])
def test_every_loss_equals_brute_force_over_unpadded_documents(model, batch_tokens):
    mean = torch.linspace(-1, 1, model.width("resid_post.1"))

    def shrink(x):
        return 0.5 * x + 0.1

    loss = measured(model, shrink, mean, batch_tokens=batch_tokens)
    changes = {
        "original": None,
        "spliced": shrink,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    for name, change in changes.items():
        sums, counts = zip(*(brute_force(model, d, "resid_post.1", change) for d in documents(model)), strict=True)
        assert loss.predictions == sum(counts)
        assert getattr(loss, name) == pytest.approx(sum(sums) / sum(counts), abs=2e-5)
    assert abs(loss.delta_loss) > 1e-3
    assert loss.as_dict()["delta_loss"] == loss.delta_loss


def test_counted_targets_are_content_without_the_first_of_each_document(model):
    items = documents(model)
    mask = counted_targets(model.batch(items))
    for row, item in enumerate(items):
        content = [i for i, role in enumerate(item.roles) if role is Role.CONTENT]
        assert mask[row].nonzero()[:, 0].tolist() == content[1:]
    counted = "".join(items[-1].pieces[i] for i in mask[-1].nonzero()[:, 0].tolist())
    assert counted == "▁worldLyon▁and▁Paris"


def test_a_prediction_that_is_not_counted_could_not_have_changed(model):
    item = documents(model)[0]
    edited = [Edit("resid_post.1", lambda x: x * 0, positions="content")]
    before, after = model.logits(item)[0, 0], model.logits(item, interventions=edited)[0, 0]
    assert torch.equal(before, after)


def test_loss_recovered_is_one_for_the_original_and_zero_for_the_ablation(model):
    mean = torch.full((model.width("resid_post.1"),), 0.3)
    loss = measured(model, torch.zeros_like, mean)
    assert loss.spliced == loss.zero
    assert loss.recovered_zero == (0.0 if loss.zero > loss.original else None)
    same = measured(model, lambda x: mean.expand_as(x), mean)
    assert same.spliced == same.mean


def test_documents_without_a_prediction_are_refused(model):
    with pytest.raises(InputError, match="no prediction"):
        splice_loss(model, torch.clone, "resid_post.1", [model.tokens("a")], torch.zeros(model.width("resid_post.1")))
