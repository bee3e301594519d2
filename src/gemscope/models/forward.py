"""One forward pass of the decoder: hooks on, run, hooks off.

Notable: the decoder is called directly, below lm_head and the multimodal wrapper, so logits are computed only
when asked for. Padding on the right needs no mask, since nothing looks ahead: such batches run the same fused
causal kernel as a single text. Hooks belong to modules and modules to every thread, hence one lock a model.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gemscope.core.arrays import Bool, Float, Int, Tensor
from gemscope.core.sites import Site
from gemscope.models.freeze import FreezeNorms, FreezePatterns
from gemscope.models.hooks import Hooks
from gemscope.models.interventions import Intervention, Replace, SiteEdit
from gemscope.models.layout import Decoder
from gemscope.models.positions import Moment

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(module: nn.Module) -> threading.RLock:
    """The one lock of ``module``, whoever wraps it."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(module, threading.RLock())


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass reads and how it differs from a plain one."""

    moment: Moment
    ids: Int[Tensor, "batch pos"]
    """The tokens of columns ``moment.start`` to ``moment.stop``."""
    mask: Bool[Tensor, "batch seen"]
    """True at tokens, for every column up to ``moment.stop``."""
    sites: Collection[Site] = ()
    """Sites to capture."""
    interventions: Sequence[Intervention] = ()
    final: bool = False
    """Run to the end and return the final norm's output; otherwise stop after the last of ``sites``."""
    grad: bool = False
    past: Any = None
    """transformers' key/value cache, filled in place."""


def run(decoder: Decoder, this: Pass) -> tuple[dict[Site, Tensor], Float[Tensor, "batch pos d_model"] | None]:
    """The captured tensors, and the final norm's output if ``this.final``.

    With ``grad`` the embeddings are a leaf that requires a gradient, and everything captured is connected to
    it.
    """
    acts: dict[Site, Tensor] = {}
    hooks = Hooks(decoder, reads={site: partial(acts.__setitem__, site) for site in this.sites})
    if this.grad:
        hooks.writes[Site("embed")] = [_leaf]
    for intervention in this.interventions:
        _plan(hooks, intervention, decoder, this.moment)
    if not this.final:
        hooks.stop_after = max(this.sites, key=lambda site: site.order)
    last = None
    with lock_of(decoder.trunk), torch.set_grad_enabled(this.grad), hooks.active():
        last = decoder.trunk(
            use_cache=this.past is not None, past_key_values=this.past, **_inputs(this)
        ).last_hidden_state
    return {site: acts[site] for site in this.sites}, last


def _inputs(this: Pass) -> Mapping[str, Tensor]:
    """Arguments of the decoder; mask and positions only where there is padding on the left, or several texts a row.

    Places alone, without mask and cache, are how transformers is told of several texts: it builds the masks of every
    kind of layer and attention so that each text sees itself only.
    """
    if this.moment.batch.places is not None:
        return {"input_ids": this.ids, "position_ids": this.moment.batch.places.to(this.ids.device)}
    if this.moment.batch.side == "right" or bool(this.mask.all()):
        return {"input_ids": this.ids}
    position_ids = (this.mask.cumsum(dim=1) - 1).clamp(min=0)[:, this.moment.start :]
    return {
        "input_ids": this.ids,
        "attention_mask": this.mask.to(this.ids.device),
        "position_ids": position_ids.to(this.ids.device),
    }


def _plan(hooks: Hooks, intervention: Intervention, decoder: Decoder, moment: Moment) -> None:
    if isinstance(intervention, SiteEdit):
        site = decoder.shape.check(intervention.place)
        hooks.writes.setdefault(site, []).append(partial(_edit, intervention, moment, decoder))
    elif isinstance(intervention, FreezePatterns):
        for site, pattern in intervention.reference.acts.items():
            if site.name == "pattern":
                _plan(hooks, Replace(site, pattern.detach()), decoder, moment)
    else:
        assert isinstance(intervention, FreezeNorms)
        for norm, site in intervention.norms(decoder):
            hooks.norms.append((norm, partial(intervention.apply, norm=norm, site=site, moment=moment)))


def _edit(intervention: SiteEdit, moment: Moment, decoder: Decoder, x: Tensor) -> Tensor:
    return intervention.apply(x, moment, decoder.shape)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
