"""Reading and changing the values at sites during one forward pass.

Notable: a site is a module's output or a module's input. ``resid_mid`` is the input of a norm, but the block
adds the MLP's output to the very same value, so a change there is also carried to the block's output, without
rounding twice. Hooks are removed whatever happens; the pass stops after the last site anybody waits for.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from gemscope.core.arrays import Tensor
from gemscope.core.sites import Site
from gemscope.models.attention import PatternTransform, watching
from gemscope.models.layout import Decoder

Transform = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], None]
Attach = Callable[[], RemovableHandle]

_INPUT_OF = {
    "resid_pre": "",
    "z": "self_attn.o_proj",
    "resid_mid": "pre_feedforward_layernorm",
    "mlp_act": "mlp.down_proj",
    "final_in": "norm",
}


class Stop(Exception):
    """Raised in a hook to end the pass: everything that was asked for has been seen."""


@dataclass(eq=False)
class Hooks:
    """What happens at each site during one pass: first the writes in order, then the read."""

    decoder: Decoder
    norms: list[tuple[nn.Module, Transform]] = field(default_factory=list[tuple[nn.Module, Transform]])
    """Norms whose output is computed by our function of their input instead."""
    writes: dict[Site, list[Transform]] = field(default_factory=dict[Site, list[Transform]])
    reads: dict[Site, Read] = field(default_factory=dict[Site, Read])
    stop_after: Site | None = None
    """Where to end the pass; None runs it through."""

    @contextmanager
    def active(self) -> Generator[None]:
        """Attach everything; on leaving, remove everything. A Stop that arrives here ends the block
        quietly."""
        sites = sorted({*self.writes, *self.reads}, key=lambda site: site.order)
        patterns: dict[int, PatternTransform] = {
            site.layer: self._at(site) for site in sites if site.name == "pattern" and site.layer is not None
        }
        attachments = [_recompute(norm, compute) for norm, compute in self.norms]
        attachments += [attach for _, attach in sorted(self._attachments(sites), key=lambda pair: pair[0])]
        with ExitStack() as stack:
            for attach in attachments:
                stack.callback(attach().remove)
            if patterns:
                stack.enter_context(watching(self.decoder.config, patterns))
            try:
                yield
            except Stop:
                return

    def _at(self, site: Site) -> Transform:
        writes: Sequence[Transform] = self.writes.get(site, ())
        read, stop = self.reads.get(site), site == self.stop_after

        def at(x: Tensor) -> Tensor:
            for write in writes:
                x = write(x)
            if read is not None:
                read(x)
            if stop:
                raise Stop
            return x

        return at

    def _attachments(self, sites: Sequence[Site]) -> Iterator[tuple[tuple[float, float], Attach]]:
        """How to attach each site's hook, with the order in which to do it: that of the pass."""
        for site in sites:
            if site.name == "pattern":
                continue
            module, is_input = locate(self.decoder, site)
            at = self._at(site)
            if site.name == "resid_mid" and site in self.writes:
                new: list[Tensor] = []
                at = _keep(at, new)
                yield from self._carry(site, new)
            yield site.order, _on_input(module, at) if is_input else _on_output(module, at)

    def _carry(self, site: Site, resid_mid: list[Tensor]) -> Iterator[tuple[tuple[float, float], Attach]]:
        """Make the block's output the changed resid_mid plus mlp_out, as the block itself would have.

        mlp_out is taken after its own writes, and resid_post's writes come later: hence the half step.
        """
        assert site.layer is not None
        mlp_out: list[Tensor] = []
        layer, order = Site("mlp_out", site.layer).order
        last_norm, _ = locate(self.decoder, Site("mlp_out", site.layer))
        yield (layer, order + 0.5), _on_output(last_norm, _keep(_same, mlp_out))
        block = self.decoder.layer(site.layer)
        yield (layer, order + 0.5), _on_output(block, lambda _: resid_mid.pop() + mlp_out.pop())


def locate(decoder: Decoder, site: Site) -> tuple[nn.Module, bool]:
    """The module at ``site``, and whether the site is that module's input rather than its output."""
    is_input = site.name in _INPUT_OF
    path = _INPUT_OF[site.name] if is_input else site.kind.module
    assert path is not None
    return (decoder.trunk if site.layer is None else decoder.layer(site.layer)).get_submodule(path), is_input


def _same(x: Tensor) -> Tensor:
    return x


def _keep(at: Transform, kept: list[Tensor]) -> Transform:
    """``at``, with its result also put into ``kept``."""

    def keep(x: Tensor) -> Tensor:
        kept[:] = [at(x)]
        return kept[0]

    return keep


def _on_input(module: nn.Module, at: Transform) -> Attach:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = at(args[0])
        return None if new is args[0] else (new, *args[1:])

    return lambda: module.register_forward_pre_hook(hook)


def _on_output(module: nn.Module, at: Transform) -> Attach:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        new = at(output)
        return None if new is output else new

    return lambda: module.register_forward_hook(hook)


def _recompute(module: nn.Module, compute: Transform) -> Attach:
    """Give out ``compute`` of the module's input instead of the module's own output."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return compute(args[0])

    return lambda: module.register_forward_hook(hook)
