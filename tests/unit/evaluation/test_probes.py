"""Probes, their scores, absorption and intervals, against brute force in float64."""

import itertools

import pytest
import torch

from gemscope.evaluation.absorption import absorption, splits
from gemscope.evaluation.bootstrap import central, draws, interval, ratios
from gemscope.evaluation.concepts import ActiveEntries
from gemscope.evaluation.features import Dense, Sparse, strongest
from gemscope.evaluation.probes import (
    accuracy_at,
    auroc,
    auroc_intervals,
    best_balance,
    best_threshold,
    dense_logistic,
    f1_at,
    f1_intervals,
    logistic,
    token_statistics,
)
from gemscope.evaluation.study import _shuffled, _Table  # pyright: ignore[reportPrivateUsage]


def rows(n: int = 200, width: int = 5, seed: int = 0):
    """Features with awkward means and scales, labels that depend on two of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    y = x[:, 0] + 0.5 * x[:, 1] + 0.7 * torch.randn(n, generator=generator, dtype=torch.float64) > 0.8
    return x * torch.logspace(-2, 2, width, dtype=torch.float64) + 10, y


def brute_auroc(score, y) -> float:
    pairs = itertools.product(score[y].tolist(), score[~y].tolist())
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / (int(y.sum()) * int((~y).sum()))


def test_auroc_is_the_share_of_pairs_in_the_right_order_ties_counting_half():
    x, y = rows()
    for score in (x[:, 0], x[:, 4].round(), torch.zeros(len(y), dtype=torch.float64), -x[:, 0]):
        assert auroc(score, y) == pytest.approx(brute_auroc(score, y), abs=1e-12)


def test_the_interval_of_an_auroc_is_close_to_that_of_aurocs_of_drawn_documents():
    x, y = rows(600)
    score, documents = x[:, 0], torch.arange(600) // 6
    value, (found,) = auroc(score, y), auroc_intervals(score[:, None], y[:, None], documents, 100, seed=0)
    drawn = []
    for counts in draws(100, 0)[:300]:
        again = torch.cat([torch.arange(600)[documents == d].repeat(int(c)) for d, c in enumerate(counts) if c])
        drawn.append(brute_force_by_ranks(score[again], y[again]))
    wanted = central(torch.tensor(drawn, dtype=torch.float64))
    assert found[0] < value < found[1]
    assert found == pytest.approx(wanted, abs=0.012)


def brute_force_by_ranks(score, y) -> float:
    less = (score[y][:, None] > score[~y][None]).double() + 0.5 * (score[y][:, None] == score[~y][None]).double()
    return float(less.mean())


def test_the_threshold_has_the_best_f1_of_all_and_f1_is_its_formula():
    x, y = rows()
    for score in (x[:, 0], x[:, 3].round()):
        cut = best_threshold(score, y)

        def f1(at, score=score):
            said = score >= at
            return 2 * float((said & y).sum()) / (float(said.sum()) + float(y.sum()))

        assert f1(cut) == pytest.approx(max(f1(at) for at in score.tolist()), abs=1e-12)
        assert f1_at(score, y, cut) == pytest.approx(f1(cut), abs=1e-12)


def test_the_level_has_the_best_balanced_accuracy_which_is_that_on_as_many_of_each():
    x, y = rows()
    for score in (x[:, 0], x[:, 3].round()):
        level = best_balance(score, y)

        def balanced(at, score=score):
            right = (score >= at) == y
            copies = torch.cat([right[y].repeat(int((~y).sum())), right[~y].repeat(int(y.sum()))])
            return float(copies.double().mean())

        assert balanced(level) == pytest.approx(max(balanced(at) for at in score.tolist()), abs=1e-12)
        assert accuracy_at(score, y, level) == pytest.approx(balanced(level), abs=1e-12)


def test_the_interval_of_an_f1_is_that_of_drawn_documents():
    x, y = rows(300)
    score, documents, cut = x[:, 0], torch.arange(300) // 6, 10.01
    (found,) = f1_intervals(score[:, None], y[:, None], torch.tensor([cut]).double(), documents, 50)
    hits = torch.tensor([float(2 * ((score >= cut) & y)[documents == d].sum()) for d in range(50)])
    both = torch.tensor([float(((score >= cut).int() + y.int())[documents == d].sum()) for d in range(50)])
    assert found == pytest.approx(interval(hits, both), abs=1e-12)
    assert found[0] < f1_at(score, y, cut) < found[1]


def test_a_logistic_probe_is_where_the_gradient_of_its_loss_vanishes():
    x, y = rows()
    z = (x - x.mean(0)) / x.std(0)
    several = torch.stack([z[:, :3], z[:, 2:]])
    marks = torch.stack([y, ~y], 1)
    weight = logistic(several, marks)
    for i in range(2):
        w = weight[i].clone().requires_grad_()
        score = several[i] @ w[:-1] + w[-1]
        target = marks[:, i].double()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="sum")
        (loss + 0.5 * w[:-1].square().sum()).backward()
        assert float(w.grad.abs().max()) < 1e-6


def test_the_dense_probe_is_the_same_regression_on_all_columns():
    x, y = rows()
    z = (x - x.mean(0)) / x.std(0)
    marks = torch.stack([y, z[:, 3] > 0.5], 1)
    wanted = logistic(torch.stack([z, z]), marks)
    assert torch.allclose(dense_logistic(z, marks).T, wanted, atol=2e-5)


def test_a_sparse_matrix_has_the_probe_of_its_dense_form():
    x, y = rows()
    z = ((x - x.mean(0)) / x.std(0)).relu()
    marks = torch.stack([y, z[:, 3] > 0.5], 1)
    assert torch.allclose(dense_logistic(z.to_sparse(), marks), dense_logistic(z, marks), atol=1e-9)


def test_shuffled_labels_keep_their_number_and_runs_and_lose_their_places():
    """Documents of one pattern: the fourth and fifth tokens of seven, the first of five."""
    lengths = [7] * 60 + [5] * 60
    documents = torch.repeat_interleave(torch.arange(120), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    long = documents < 60
    y = torch.stack([long & ((place == 3) | (place == 4)), ~long & (place == 0)], 1)
    train = documents % 2 == 0
    table = _Table(torch.arange(len(y)), y, ("a", "b"), train, documents, 120, torch.zeros(len(y), 2).long(), 0)
    moved = _shuffled(table)
    for side in (train, ~train):
        assert moved[side].sum(0).tolist() == y[side].sum(0).tolist()
        marks = moved[side][:, 0].int()
        assert int((marks[1:] > marks[:-1]).sum()) == 30
    hits = [float((moved[:, 0] & long & (place == p)).sum()) for p in range(7)]
    assert max(hits) < 0.4 * sum(hits)


def test_separable_labels_do_not_break_a_probe():
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)[None, :, None]
    weight = logistic(x, (x[0] > 0))
    assert weight.isfinite().all()
    assert float(weight[0, 0]) > 1


def test_contrast_and_columns_are_the_same_for_sparse_codes_and_their_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(80, 12, generator=generator) * (torch.rand(80, 12, generator=generator) < 0.3)
    acts[:, 7] = 0.0
    row, latent = acts.nonzero().unbind(1)
    sparse, dense = Sparse(ActiveEntries((80, 12), row, latent, acts[row, latent])), Dense(acts.double())
    y = torch.rand(80, 3, generator=generator) < 0.4
    train = torch.arange(80) % 3 > 0
    known, mark = acts[train].double(), y[train]
    wanted = torch.stack(
        [(known[m].mean(0) - known[~m].mean(0)) / known.std(0, correction=0) for m in mark.T], 1
    ).nan_to_num(0.0)
    assert torch.allclose(sparse.contrast(train, y), wanted, atol=1e-9)
    assert torch.allclose(dense.contrast(train, y), wanted, atol=1e-9)
    chosen = strongest(wanted, 2)
    assert chosen.tolist() == wanted.abs().topk(2, dim=0).indices.T.tolist()
    assert torch.equal(sparse.columns(chosen).double(), dense.columns(chosen))


def test_nothing_is_fitted_on_the_test_rows():
    """Their labels and values change neither what is chosen nor what token statistics say of them."""
    x, y = rows()
    train = torch.arange(len(y)) % 2 == 0
    other, marks = x.clone(), y[:, None].clone()
    other[~train] += 5
    marks[~train] = ~marks[~train]
    assert torch.equal(Dense(x).contrast(train, y[:, None]), Dense(other).contrast(train, marks))
    pairs = torch.randint(5, (len(y), 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_statistics(pairs, train, y[:, None]), token_statistics(pairs, train, marks))


def test_token_statistics_are_smoothed_shares():
    pairs = torch.tensor([[1, 7], [1, 7], [2, 7], [3, 8], [9, 9]])
    train = torch.tensor([True, True, True, True, False])
    y = torch.tensor([[True], [False], [True], [False], [True]])
    prior = 2 / 4
    own7, own8, own9 = (2 + prior) / 4, (0 + prior) / 2, prior
    wanted = [(1 + own7) / 3, (1 + own7) / 3, (1 + own7) / 2, (0 + own8) / 2, own9]
    assert token_statistics(pairs, train, y)[:, 0].tolist() == pytest.approx(wanted, abs=1e-12)


def test_splits_end_where_another_latent_adds_little():
    assert splits([0.5, 0.52, 0.9]) == 1
    assert splits([0.5, 0.6, 0.62]) == 2
    assert splits([0.5, 0.6, 0.7]) == 3


def absorbing_case(scale: float = 1.0):
    """Latent 0 means the concept, latent 1 an exception to it, latent 2 something else."""
    decoder = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1.0]], dtype=torch.float64) * scale
    acts = torch.zeros(6, 3, dtype=torch.float64)
    acts[:3, 0] = 2.0
    acts[3:5, 1] = 2.0
    acts[5, 2] = 2.0
    acts[:, 2] += 0.1
    acts = acts / scale
    row, latent = acts.nonzero().unbind(1)
    x = acts @ decoder
    direction = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    positive = torch.tensor([True, True, True, True, True, False])
    return ActiveEntries((6, 3), row, latent, acts[row, latent]), decoder, direction, x @ direction, positive


@pytest.mark.parametrize("scale", [1.0, 10.0, 0.01])
def test_absorption_counts_the_tokens_at_which_another_latent_stands_in(scale):
    """Whatever the decoders' norms."""
    got = absorption(*absorbing_case(scale), torch.tensor([0]))
    assert got.full == pytest.approx(2 / 5)
    assert got.partial == pytest.approx(2 / 5)
    assert got.true_positives == 5
    assert got.stand_ins == ((1, 2),)
    both = absorption(*absorbing_case(scale), torch.tensor([0, 1]))
    assert (both.full, both.partial) == (0.0, 0.0)


def test_a_stand_in_has_to_make_up_enough_of_the_projection():
    active, decoder, direction, projection, positive = absorbing_case()
    got = absorption(active, decoder, direction, projection * 3, positive, torch.tensor([0]))
    assert got.full == 0.0
    nothing = absorption(active, decoder, direction, projection, torch.zeros(6, dtype=torch.bool), torch.tensor([0]))
    assert (nothing.full, nothing.true_positives) == (0.0, 0)


def test_an_interval_of_a_ratio_is_that_of_drawn_documents():
    generator = torch.Generator().manual_seed(0)
    below = torch.randint(1, 50, (30,), generator=generator).double()
    above = below * torch.rand(30, generator=generator, dtype=torch.float64)
    counts = draws(30, 3)
    assert torch.equal(counts.sum(1), torch.full((len(counts),), 30.0, dtype=torch.float64))
    wanted = torch.stack([(c * above).sum() / (c * below).sum() for c in counts])
    assert torch.allclose(ratios(above, below, 3), wanted, rtol=1e-12)
    assert interval(above, below, 3) == pytest.approx(wanted.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
    only_one = torch.zeros(30, dtype=torch.float64)
    only_one[0] = 1.0
    assert interval(above, only_one) is None


def test_documents_and_not_tokens_are_drawn():
    """Ten documents that agree within themselves say little, however many tokens they have."""
    per_document = torch.tensor([0.0, 1.0] * 5, dtype=torch.float64)
    few = interval(per_document, torch.ones(10, dtype=torch.float64))
    many = interval(per_document * 1000, torch.full((10,), 1000.0, dtype=torch.float64))
    assert few == many
    assert few[1] - few[0] > 0.4
