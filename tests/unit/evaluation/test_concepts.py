"""AUROC and F1 of latents for concepts, against scikit-learn and brute force in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from gemscope.core.errors import InputError
from gemscope.evaluation.concepts import ActiveEntries, auroc_matrix, f1_matrix, score_concepts


def random_case(seed: int, rows: int = 300, latents: int = 7, concepts: int = 5, levels: int = 4):
    """Activations with many ties (``levels`` values), a dense latent and a silent one; labels of unequal
    frequency.
    """
    rng = np.random.default_rng(seed)
    acts = rng.integers(1, levels + 1, (rows, latents)) * (rng.random((rows, latents)) < 0.2)
    acts[:, 0] = rng.integers(1, 50, rows)
    acts[:, 1] = 0
    labels = rng.random((rows, concepts)) < rng.uniform(0.1, 0.6, concepts)
    labels[0], labels[1] = True, False
    return torch.tensor(acts, dtype=torch.float32), torch.tensor(labels)


def entries(acts: torch.Tensor) -> ActiveEntries:
    row, latent = acts.nonzero(as_tuple=True)
    return ActiveEntries((acts.shape[0], acts.shape[1]), row, latent, acts[row, latent])


def best_f1(acts: np.ndarray, labels: np.ndarray) -> float:
    """Every threshold at a positive activation, tried with scikit-learn."""
    return max((f1_score(labels, acts >= t) for t in set(acts[acts > 0])), default=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_sklearn_for_every_pair_with_ties(seed):
    acts, labels = random_case(seed)
    ours = auroc_matrix(entries(acts), labels)
    for latent in range(acts.shape[1]):
        for concept in range(labels.shape[1]):
            expected = roc_auc_score(labels[:, concept].numpy(), acts[:, latent].numpy())
            assert abs(ours[latent, concept].item() - expected) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_f1_equals_the_best_of_all_thresholds_and_its_threshold_gives_it(seed):
    acts, labels = random_case(seed)
    f1, threshold = f1_matrix(entries(acts), labels)
    for latent in range(acts.shape[1]):
        for concept in range(labels.shape[1]):
            column, truth = acts[:, latent].numpy(), labels[:, concept].numpy()
            assert f1[latent, concept].item() == pytest.approx(best_f1(column, truth), abs=1e-12)
            if column.any():
                predicted = column >= threshold[latent, concept].item()
                assert f1_score(truth, predicted) == pytest.approx(f1[latent, concept].item(), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_chance_to_rank_a_positive_above_a_negative(pairs):
    labels = torch.tensor([[label] for _, label in pairs])
    if labels.all() or not labels.any():
        return
    acts = torch.tensor([[float(value)] for value, _ in pairs])
    positive, negative = acts[labels[:, 0]], acts[~labels[:, 0]]
    wins = (positive > negative.T).double().mean() + (positive == negative.T).double().mean() / 2
    assert auroc_matrix(entries(acts), labels).item() == pytest.approx(wins.item(), abs=1e-12)


def test_the_order_of_entries_and_the_batches_they_came_in_do_not_matter():
    acts, labels = random_case(11)
    whole = entries(acts)
    parts = ActiveEntries.stack([entries(acts[:100]), entries(acts[100:])])
    shuffle = torch.randperm(len(whole.value), generator=torch.Generator().manual_seed(0))
    mixed = ActiveEntries(whole.shape, whole.row[shuffle], whole.latent[shuffle], whole.value[shuffle])
    for other in (parts, mixed):
        assert torch.equal(auroc_matrix(whole, labels), auroc_matrix(other, labels))
        assert torch.equal(f1_matrix(whole, labels)[0], f1_matrix(other, labels)[0])


def test_a_planted_latent_is_named_and_rare_concepts_are_not_scored():
    acts, labels = random_case(3, rows=400)
    acts[:, 4] = labels[:, 2] * 2.0
    labels[:, 3] = False
    labels[:19, 3] = True
    labels[:, 4] = True
    labels[:5, 4] = False
    names = ["a", "b", "planted", "rare", "nearly_always"]
    report = score_concepts(entries(acts), labels, names, min_positives=20)
    planted = next(score for score in report.scores if score.concept == "planted")
    assert (planted.auroc, planted.f1, planted.auroc_latent, planted.f1_latent) == (1.0, 1.0, 4, 4)
    assert planted.f1_threshold == 2.0
    assert report.too_few == {"rare": 19, "nearly_always": 395}
    assert [score.concept for score in report.scores] == ["a", "b", "planted"]
    assert report.latent_concept[4] == "planted"
    assert report.latent_share[4] == 1.0
    assert report.latent_max[4] == 2.0
    assert report.latent_concept[1] is None
    assert report.latent_share[1] == 0.0
    assert report.found == (sum(score.auroc >= 0.9 for score in report.scores), 3)


def test_passages_are_counted_apart():
    acts, labels = random_case(3, rows=400)
    acts[:, 4] = labels[:, 2] * 2.0
    report = score_concepts(entries(acts), labels[:, :3], ["a", "b", "planted"], frozenset({"planted", "b"}))
    assert report.found == (0, 1)
    assert report.found_passages == (1, 2)


def test_a_name_is_the_concept_that_a_latents_activation_falls_on_most_exclusively():
    """Rows 0-9 are mammals, 0-39 animals, 0-79 words, of 100; each latent's activation is counted by hand."""
    labels = torch.zeros(100, 3, dtype=torch.bool)
    labels[:10, 0], labels[:40, 1], labels[:80, 2] = True, True, True
    acts = torch.zeros(100, 4)
    acts[0, 0], acts[20, 0] = 5.0, 1.0  # 5/6 on mammals, all on animals: lifts 8.3 and 2.5
    acts[0, 1], acts[1, 1], acts[20, 1] = 1.0, 1.0, 4.0  # 2/6 on mammals: too little; animals: lift too small
    acts[:40, 2] = 1.0  # animals, at a lift of 2.5
    report = score_concepts(entries(acts), labels, ["mammal", "animal", "word"], min_positives=5)
    assert report.latent_concept == ("mammal", None, None, None)
    assert report.latent_share == pytest.approx((5 / 6, 0, 0, 0))
    assert report.latent_max == (5.0, 4.0, 1.0, 0.0)


def test_nothing_measurable_gives_an_empty_report():
    acts, labels = random_case(1)
    report = score_concepts(entries(acts), torch.zeros_like(labels), list("abcde"))
    assert report.scores == ()
    assert report.found == report.found_passages == (0, 0)
    assert len(report.latent_concept) == acts.shape[1]


def test_labels_that_do_not_fit_and_negative_activations_are_refused():
    acts, labels = random_case(0)
    with pytest.raises(InputError, match="must agree"):
        score_concepts(entries(acts), labels[:-1], list("abcde"))
    with pytest.raises(InputError, match="not positive"):
        score_concepts(entries(-acts), labels, list("abcde"))
