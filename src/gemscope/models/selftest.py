"""A few identities that every reading relies on, checked on the loaded model with some ten tokens.

Notable: the sums of the residual stream must hold bit for bit, since they repeat the model's own additions.
"""

import torch
from transformers import PreTrainedModel

from gemscope.core.arrays import Tensor
from gemscope.core.errors import SelfTestError
from gemscope.core.sites import Site
from gemscope.models.forward import Pass, lock_of, run
from gemscope.models.layout import Decoder
from gemscope.models.positions import Moment
from gemscope.models.tokens import Tokens, collate

TEXT = "The capital of France is Paris. 1+2=3"

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}
_SUMS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def check(model: PreTrainedModel, decoder: Decoder, tokens: Tokens, name: str) -> None:
    """Three short passes; raises SelfTestError naming the identity that does not hold.

    The identities: resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out in every layer;
    resid_pre[i+1] = resid_post[i]; logits = lm_head(norm(resid_post[-1])), capped for Gemma 2; logits with
    hooks = logits of the untouched model; attention rows sum to one; logits are finite.
    """
    batch = collate([tokens], pad_id=0)
    ids = batch.ids.to(next(decoder.trunk.parameters()).device)
    moment, layers = Moment(batch, 0, len(tokens)), range(decoder.shape.n_layers)
    sites = [Site(kind, layer) for layer in layers for kind in _SUMS]
    acts, last = run(decoder, Pass(moment, ids, batch.mask, sites=sites, final=True))
    assert last is not None
    _sums(acts, decoder.shape.n_layers, name)
    with lock_of(decoder.trunk), torch.no_grad():
        plain: Tensor = model(input_ids=ids, use_cache=False).logits
        hooked, lens = decoder.unembed(last), decoder.unembed(decoder.final(acts[sites[-1]]))
    tolerance = _TOLERANCE[plain.dtype]
    if not bool(plain.isfinite().all()):
        raise _failed(name, "the logits are finite")
    if not _close(hooked, plain, tolerance):
        raise _failed(name, "logits with hooks = logits without")
    if not _close(lens, plain, tolerance):
        raise _failed(name, "logits = lm_head(norm(resid_post[-1]))")
    watched = {decoder.shape.layer_kinds.index(kind): kind for kind in decoder.shape.layer_kinds}
    patterns, _ = run(decoder, Pass(moment, ids, batch.mask, sites=[Site("pattern", layer) for layer in watched]))
    for site, pattern in patterns.items():
        if not _close(pattern.float().sum(-1), torch.ones(pattern.shape[:-1]), tolerance):
            raise _failed(name, f"the rows of {site} sum to one")


def _sums(acts: dict[Site, Tensor], n_layers: int, name: str) -> None:
    for layer in range(n_layers):
        pre, attn, mid, mlp, post = (acts[Site(kind, layer)] for kind in _SUMS)
        if not torch.equal(pre + attn, mid):
            raise _failed(name, f"resid_mid.{layer} = resid_pre.{layer} + attn_out.{layer}")
        if not torch.equal(mid + mlp, post):
            raise _failed(name, f"resid_post.{layer} = resid_mid.{layer} + mlp_out.{layer}")
        if layer and not torch.equal(pre.cpu(), acts[Site("resid_post", layer - 1)].cpu()):
            raise _failed(name, f"resid_pre.{layer} = resid_post.{layer - 1}")


def _close(value: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Largest difference within ``tolerance`` of the largest value; False for NaN."""
    value, truth = value.double().cpu(), truth.double().cpu()
    return bool((value - truth).abs().max() <= tolerance * truth.abs().max())


def _failed(name: str, identity: str) -> SelfTestError:
    return SelfTestError(
        f"the self-test of {name!r} failed: '{identity}' does not hold, so readings of this model would be"
        f" wrong;"
        " check the checkpoint and the transformers version."
    )
