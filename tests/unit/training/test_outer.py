"""Sparse gradients of the large tables against dense autograd in float64, and Adam on them against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.dictionaries import sparse
from gemscope.dictionaries.sparse import Support
from gemscope.training import optimizer
from gemscope.training.optimizer import TableAdam, remove_parallel
from gemscope.training.outer import OuterGradient, decode, encode


def _support(dense: torch.Tensor) -> Support:
    rows, latents = dense.nonzero(as_tuple=True)
    return Support(rows, latents, *dense.shape)


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.05, 0.4]), limit=st.sampled_from([0.0, 0.1, 2.0]))
@settings(max_examples=40, deadline=None)
def test_encode_and_decode_give_every_gradient_of_the_dense_computation(seed: int, share: float, limit: float) -> None:
    """``limit`` forces the dense or the sparse products; half of the codes are zero, as below a threshold."""
    torch.manual_seed(seed)
    x, centre = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)
    E, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(13, 4), (13,)])
    W_dec = torch.randn(13, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(9, 13) < share
    factor = (torch.rand(9, 13) < 0.5).double()
    pull = torch.randn(9, 3, dtype=torch.float64)

    pre_acts = (x - centre) @ E.T + bias
    recon = ((pre_acts * mask * factor).square()) @ W_dec
    expected = torch.autograd.grad((recon * pull).sum(), [centre, E, bias, W_dec])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_DENSE", limit)
        support = _support(mask)
        of_E, of_W = OuterGradient((13, 4)), OuterGradient((13, 3))
        centred = (x - centre).detach()
        values = pre_acts.detach()[support.rows, support.latents]
        entries = encode(support, values, centred, E.detach(), bias, centre, of_E)
        codes = (entries * factor[support.rows, support.latents]).square()
        found = decode(support, codes, W_dec.detach(), of_W)
        torch.testing.assert_close(found, recon, rtol=0, atol=1e-11)
        of_centre, of_bias = torch.autograd.grad((found * pull).sum(), [centre, bias])
        for a, b in zip([of_centre, of_E.dense(), of_bias, of_W.dense()], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        blocks = [torch.zeros(0, 4).double() if b is None else b for b in of_E.blocks(5)]
        for start, block in zip((0, 5, 10), blocks, strict=True):
            if len(block):
                torch.testing.assert_close(block, expected[1][start : start + 5], rtol=0, atol=1e-11)
            else:
                assert not expected[1][start : start + 5].any()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("unit", [False, True])
def test_table_adam_is_torch_adam(beta1: float, unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "BLOCK", {"cpu": 5})
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(17, 4, dtype=torch.float64), dim=1)
    other = table.clone().requires_grad_()
    own, torchs = TableAdam(table, (beta1, 0.99), unit), torch.optim.Adam([other], lr=0.1, betas=(beta1, 0.99))
    for _ in range(6):
        dense = torch.randn(8, 17, dtype=torch.float64) * (torch.rand(8, 17) < 0.1)
        dense[:, 5:10] = 0  # a whole block without gradient
        rows = torch.randn(8, 4, dtype=torch.float64)
        gradient = OuterGradient((17, 4))
        support = _support(dense)
        gradient.add(support, dense[support.rows, support.latents], rows)
        own.step(gradient, 0.1)
        other.grad = dense.T @ rows
        if unit:
            remove_parallel(other.grad, other.detach())
        torchs.step()
        if unit:
            with torch.no_grad():
                other /= other.norm(dim=1, keepdim=True)
        torch.testing.assert_close(table, other.detach(), rtol=1e-10, atol=1e-12)


def test_remove_parallel_leaves_only_what_turns_the_rows() -> None:
    W_dec = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    grad = torch.randn(7, 5, dtype=torch.float64)
    before = grad.clone()
    remove_parallel(grad, W_dec)
    torch.testing.assert_close((grad * W_dec).sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    along = ((before - grad) * W_dec).sum(1, keepdim=True) * W_dec
    torch.testing.assert_close(before - grad, along, rtol=0, atol=1e-12)
