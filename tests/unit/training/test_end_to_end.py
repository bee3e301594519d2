"""End-to-end training: the divergence and its gradient against an explicit spliced model, and going on bit for bit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gemscope.activations import divergence
from gemscope.activations.contexts import ContextStream, LiveContexts
from gemscope.activations.plan import HarvestConfig
from gemscope.activations.sources import Documents
from gemscope.activations.streaming import LiveActivations
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import is_largest
from gemscope.models.chat import Turn
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Edit
from gemscope.models.tokens import Batch, Tokens
from gemscope.training.config import TrainConfig
from gemscope.training.data import BatchReader
from gemscope.training.end_to_end import splice_of
from gemscope.training.outcome import Keeping, Progress
from gemscope.training.outer import OuterGradient
from gemscope.training.single import SingleLayerLearner
from gemscope.training.trainer import train
from unit.models import tiny_gemma
from unit.training.worlds import MemorySource

SAE, MLP_IN, MLP_OUT = Site("resid_post", 1), Site("mlp_in", 2), Site("mlp_out", 2)
CONFIG = TrainConfig(
    SAE, d_sae=32, target_l0=4.0, activation="topk", steps=9, batch_size=24, calibration_rows=48, end_to_end=2.0
)
TRANSCODER: dict[str, Any] = {"site": MLP_IN, "target_site": MLP_OUT, "kind": "transcoder"}
CHAT = (Turn("user", "the capital of France"), Turn("model", "Paris is in France and we like Lyon"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return tiny_gemma.gemma("gemma3", dtype=torch.float64)


def contexts(gemma: Gemma, row_tokens: int | None = None) -> LiveContexts:
    """Of a few short documents; with ``row_tokens`` several share a row."""
    texts = Documents((*tiny_gemma.TEXTS, CHAT, "we like long words in Lyon today", "Paris and Lyon") * 2)
    live = LiveActivations.of(gemma, texts, HarvestConfig((str(SAE), str(MLP_IN), str(MLP_OUT)), batch_tokens=40))
    return LiveContexts(replace(live, plan=replace(live.plan, config={**live.plan.config, "row_tokens": row_tokens})))


def explicit(gemma: Gemma, stream: ContextStream, site: Site, recon: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean KL(plain ‖ spliced) over content positions, from the logits of one context at a time; ``rows`` are what was
    read at ``site``, which shows that these are the positions."""
    found: list[torch.Tensor] = []
    start = 0
    for item in [item for one in stream.given for item in alone(gemma, one.batch)]:
        where = item.content_mask.nonzero()[:, 0]
        at = slice(start, start := start + len(where))
        plain = gemma.capture(item, [site], logits=True)
        torch.testing.assert_close(plain[site][0, where], rows[at])

        def put(x: torch.Tensor, where: torch.Tensor = where, at: slice = at) -> torch.Tensor:
            return x[0].index_put((where,), recon[at])[None]

        spliced = gemma.capture(item, [], logits=True, interventions=[Edit(site, put)], grad=True)
        assert plain.logits is not None
        assert spliced.logits is not None
        p, q = plain.logits[0, where].softmax(-1), spliced.logits[0, where].softmax(-1)
        found.append((p * (p / q).log()).sum(-1))
    assert start == len(recon)
    return torch.cat(found).mean()


def alone(gemma: Gemma, batch: Batch) -> Iterator[Tokens]:
    """The contexts of a rectangle, where several may share a row."""
    for row, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        places = torch.arange(len(ids)) if batch.places is None else batch.places[row]
        begins = [*(places[mask] == 0).nonzero()[:, 0].tolist(), int(mask.sum())]
        for low, high in pairwise(begins):
            yield gemma.tokens_of(ids[low:high])


@pytest.mark.parametrize("row_tokens", [None, 32])
@pytest.mark.parametrize("site", [SAE, MLP_OUT])
def test_the_divergence_is_that_of_an_explicit_spliced_model(gemma: Gemma, site: Site, row_tokens: int | None) -> None:
    """Its value, and its gradient to what is spliced in, in float64; chat markers and <bos> keep their own."""
    stream = contexts(gemma, row_tokens).stream([site], 30, 1)
    for _ in range(2):
        rows = next(stream)[site]
        assert any(one.batch.places is not None for one in stream.given) == (row_tokens is not None)
        recon = (0.8 * rows + 0.1).requires_grad_()
        value = stream.divergence(site, recon)
        expected = explicit(gemma, stream, site, recon, rows)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        assert value.item() > 1e-4
        (slope,), (wanted,) = (torch.autograd.grad(x, recon) for x in (value, expected))
        torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
        assert (wanted.norm(dim=1) > 0).all()


def test_few_logits_are_in_memory_at_a_time(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into parts, the divergence and its gradient are the same, and no part is larger than asked for."""
    stream = contexts(gemma).stream([SAE], 30, 1)
    recon = (0.8 * next(stream)[SAE]).requires_grad_()
    whole = stream.divergence(SAE, recon)
    sizes: list[int] = []
    unembed = Gemma.unembed
    monkeypatch.setattr(divergence, "_AT_ONCE", 7 * gemma.shape.vocab_size)
    monkeypatch.setattr(Gemma, "unembed", lambda self, x: sizes.append(len(x)) or unembed(self, x))
    cut = stream.divergence(SAE, recon)
    assert max(sizes) == 7
    assert sum(sizes) == 2 * len(recon)
    assert cut.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, recon)[0] for x in (cut, whole)), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, **TRANSCODER)], ids=["sae", "transcoder"])
def test_the_gradient_of_the_whole_objective_is_that_of_autograd_through_the_model(
    gemma: Gemma, config: TrainConfig
) -> None:
    """(error + alpha beta KL) / (1 + beta) written out, with the reconstructions of a dense TopK."""
    reader = BatchReader(contexts(gemma), config.sites, 30, 0)
    stream = reader.stream
    assert isinstance(stream, ContextStream)
    learner = SingleLayerLearner(config, next(reader), splice=splice_of(reader, config))
    rows = next(reader)
    x, y = rows[config.reads[0]] / learner.moments_in.scale, rows[config.writes[0]] / learner.moments_out.scale
    tables = {name: OuterGradient(tuple(learner.weights[name].shape)) for name in ("E", "W_dec")}
    loss = learner._backward(x, y, 0, tables).loss

    w = {name: tensor.detach().clone().requires_grad_() for name, tensor in learner.weights.items()}
    z = (x - (w["b_dec"] if config.kind == "sae" else learner.centre)) @ w["E"].T + w["b_enc"]
    recon = z.relu() * is_largest(z.detach(), 4) @ w["W_dec"] + w["b_dec"]
    error = (y - recon).square().sum(1).mean()
    kl = explicit(gemma, stream, config.writes[0], recon * learner.moments_out.scale, rows[config.writes[0]])
    alpha = error.item() / (kl.item() + 1e-8)
    wanted = (error + alpha * 2.0 * kl) / (1 + 2.0)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    found = {name: table.dense() for name, table in tables.items()}
    found |= {name: tensor.grad for name, tensor in learner.small.items()}
    for name, tensor in w.items():
        assert tensor.grad is not None
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-6, atol=1e-6 * float(tensor.grad.abs().max()))


def test_dictionaries_of_one_pass_come_out_as_if_trained_alone(gemma: Gemma) -> None:
    """Each is spliced in at its own site, and only those that ask for it."""
    data = contexts(gemma)
    short = replace(CONFIG, steps=3)
    several = [short, replace(short, **TRANSCODER), replace(short, end_to_end=0.0)]
    together = train(data, several)
    for config, one in zip(several, together, strict=True):
        (single,) = train(data, [config])
        assert torch.equal(one.dictionary.W_dec, single.dictionary.W_dec)
    assert not torch.equal(together[0].dictionary.W_dec, together[2].dictionary.W_dec)


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_loss_curve(gemma: Gemma, tmp_path: Path) -> None:
    def run(folder: Path, last: int | None) -> torch.Tensor:
        def watch(now: Progress) -> None:
            if now.step == last:
                raise _Killed

        keep = Keeping(folder, every=3)
        return train(contexts(gemma), [CONFIG], keep=keep, progress=watch, report_every=1)[0].dictionary.W_dec

    whole = run(tmp_path / "whole", None)
    for last in (5, 7):
        with pytest.raises(_Killed):
            run(tmp_path / "killed", last)
    assert torch.equal(run(tmp_path / "killed", None), whole)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert logs[0].count(b"\n") == CONFIG.steps


def test_rows_without_contexts_are_refused(gemma: Gemma) -> None:
    with pytest.raises(InputError, match="train on a LiveContexts"):
        train(MemorySource({SAE: torch.randn(100, 24)}), [CONFIG])
