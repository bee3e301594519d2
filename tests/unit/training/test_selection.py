"""A crosscoder or CLT put together from single-layer dictionaries."""

import pytest
import torch

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder
from gemscope.training.multilayer import MultiLayerConfig, MultiLayerLearner
from gemscope.training.selection import from_single_layers

D, F = 16, 8


def perfect(order: list[int], scale: float = 1.0) -> SAE:
    """Latent i reads and writes axis ``order[i]``."""
    W = torch.eye(D)[order]
    return SAE(
        W.T.contiguous() / scale, torch.zeros(len(order)), W * scale, torch.zeros(D), torch.full((len(order),), 0.1)
    )


def rows(count: int = 400) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(count, D, generator=g) < 0.2) * (0.5 + torch.rand(count, D, generator=g))


def test_later_latents_that_see_the_same_are_left_to_the_earlier_ones() -> None:
    """Layer 2 sees all sixteen axes in another order: the eight that layer 1 chose are marked off there."""
    first, second = perfect(list(range(16))), perfect([3, 9, 1, 12, 0, 8, 5, 15, 2, 4, 10, 11, 6, 7, 13, 14], scale=2.0)
    x = rows()
    made, chosen = from_single_layers("crosscoder", [first, second], F, [x, x])
    assert chosen[0].tolist() == list(range(8))
    assert [second.W_dec[i].argmax().item() for i in chosen[1].tolist()] == [9, 12, 8, 15, 10, 11, 13, 14]
    recon = made(torch.stack([x, x], 1))
    active = torch.where(x > 0.1, x, 0.0)
    torch.testing.assert_close(recon[:, 0, :8], active[:, :8])
    # The first layer's latents write what the marked ones wrote, the second's the rest: everything is there once.
    torch.testing.assert_close(recon[:, 1], torch.where(x > 0.2, x, active), atol=0.06, rtol=0)


def test_training_begins_at_the_sum_of_the_l0s() -> None:
    x = rows()
    dictionaries = [perfect(list(range(16))), perfect(list(range(15, -1, -1)))]
    made, _ = from_single_layers("crosscoder", dictionaries, F, [x, x])
    sites = [Site("resid_post", 0), Site("resid_post", 1)]
    data = {site: x for site in sites}
    config = MultiLayerConfig(
        sites[0], kind="crosscoder", layers=(0, 1), d_sae=F, target_l0=1.0, steps=10, calibration_rows=400
    )
    learner = MultiLayerLearner(config, data, start=made)
    l0 = (made.encode(torch.stack([x, x], 1)) > 0).sum((1, 2)).float().mean().item()
    assert learner.first_l0 == pytest.approx(l0, rel=0.02)
    assert learner.update(data, 0).l0.item() == pytest.approx(l0, rel=0.02)


def test_transcoders_with_skips_make_a_clt_that_begins_as_their_sum() -> None:
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        W_enc, W_dec, W_skip = (torch.randn(*s, generator=g) for s in ((D, F), (F, D), (D, D)))
        zeros = torch.zeros(F), torch.zeros(D), torch.full((F,), 0.5)
        made.append(SkipTranscoder(W_enc, zeros[0], W_dec, zeros[1], zeros[2], W_skip=W_skip))
    x = [rows(), rows()]
    clt, _ = from_single_layers("clt", made, F, x)  # as many as there are: nothing can be marked off
    recon = clt(torch.stack(x, 1))
    for layer, one in enumerate(made):
        torch.testing.assert_close(recon[:, layer], one(x[layer]), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_taken_over_is_refused() -> None:
    with pytest.raises(InputError, match="cannot give 17"):
        from_single_layers("crosscoder", [perfect(list(range(16)))] * 2, 17, [rows(), rows()])
    W = torch.eye(D)
    topk = SAE(W, torch.zeros(D), W, torch.zeros(D), activation=Activation("topk", 2.0))
    with pytest.raises(InputError, match="no thresholds"):
        from_single_layers("crosscoder", [topk, topk], 4, [rows(), rows()])
