"""Does a dictionary belong where it is said to belong? Measured, before anything is concluded from it.

A dictionary that is read from a norm's input instead of its output, with a transposed skip connection, or one layer off
still gives numbers. So it has to show, on a short text, that it explains the place it names: better than the mean does,
and better than it explains the neighbouring layers, the other sites of the layer and the other states of the norms.
What it explains better instead is the likely mistake, and named in the refusal.

Notable: the error is compared as FVU (see ``fidelity``) over content tokens, so that places of different size compare;
for several positions it is the mean of theirs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gemscope.artifacts.config import AnyDictionary, Loaded
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError, PairingError, SiteError
from gemscope.core.sites import SITE_KINDS, Site
from gemscope.dictionaries.multilayer import MultiLayer
from gemscope.evaluation.reference import CHATS, TEXTS
from gemscope.models.chat import Turn
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Tokens

MARGIN = 0.05
"""How far below 1, the mean's FVU, a dictionary has to be."""

ADVANTAGE = 0.9
"""Another place refutes the one named when its FVU is below this share of it, and by 0.01 at least."""

ROWS = 256
"""Content tokens that are looked at, at most."""

_NAMES = tuple(
    name for name, kind in SITE_KINDS.items() if kind.per_layer and kind.width in ("d_model", "d_z", "d_mlp")
)
_GAINS = {"mlp_in": "resid_mid", "attn_in": "resid_pre"}
"""Norms whose output is read, and what enters them."""

_WIDTHS = {
    640: "gemma-3-270m",
    1152: "gemma-3-1b",
    2560: "gemma-3-4b",
    3840: "gemma-3-12b",
    5376: "gemma-3-27b",
    2304: "gemma-2-2b",
    3584: "gemma-2-9b",
    4608: "gemma-2-27b",
}


@dataclass(frozen=True)
class Alternative:
    """Another way in which the dictionary could be meant."""

    meaning: str
    """As the end of a sentence: ``it belongs to layer 4``."""
    fvu: float


@dataclass(frozen=True)
class Verification:
    """What was measured of a dictionary that belongs where it says."""

    model: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    rows: int
    """Content tokens."""
    fvu: float
    """Of the place that is named."""
    alternatives: tuple[Alternative, ...]
    """Every other place that was tried, the best first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@torch.no_grad()
def verify(
    gemma: Gemma,
    loaded: Loaded,
    text: str | Tokens | Sequence[Tokens] | None = None,
    *,
    margin: float = MARGIN,
    advantage: float = ADVANTAGE,
) -> Verification:
    """Measure that ``loaded`` belongs to its sites in this model; ``text`` is a built-in one unless given.

    Raises PairingError, naming the likely mistake, when it does not; InputError when the text is too short to tell.
    """
    items = _items(gemma, text)
    _check_fits(gemma, loaded)
    rows = _Rows(gemma, items, loaded.dictionary)
    views = _Views(gemma, loaded, rows)
    stated, found = views.fvu(views.stated()), views.ranked(views.others())
    better = bool(found) and found[0].fvu < min(advantage * stated, stated - 0.01, 1 - margin)
    if stated < 1 - margin and not better:
        sites = tuple(map(str, loaded.config.reads)), tuple(map(str, loaded.config.writes))
        return Verification(gemma.name, *sites, rows.count, stated, tuple(found))
    likely = [one for one in (*found, *views.ranked(views.far())) if one.fvu < 1 - margin]
    raise _refusal(gemma, loaded, rows.count, stated, min(likely, key=lambda one: one.fvu, default=None))


def _items(gemma: Gemma, text: str | Tokens | Sequence[Tokens] | None) -> list[Tokens]:
    """The text as tokens; raises PairingError when it does not begin with exactly one ``<bos>``."""
    if text is None:
        items = [gemma.tokens(one) for one in TEXTS]
        if gemma.is_chat:
            items += [gemma.chat([Turn("user", q), Turn("model", a)], answer=False) for q, a in CHATS]
        return items
    items = [gemma.tokens(text)] if isinstance(text, str) else [text] if isinstance(text, Tokens) else list(text)
    for item in items:
        starts = [token == gemma.vocabulary.bos_id for token in item.ids[:2].tolist()]
        if starts != [True, False][: len(starts)]:
            many = "twice" if starts == [True, True] else "not at all"
            raise PairingError(
                f"a text begins with <bos> {many}, and every activation after it would be another; let gemma.tokens or"
                " gemma.chat put it there, and hand them text without it."
            )
    return items


def _check_fits(gemma: Gemma, loaded: Loaded) -> None:
    """Raise PairingError when the model has no such place, or one of another width."""
    config = loaded.config
    for site, size, verb in ((config.reads, config.d_in, "reads"), (config.writes, config.d_out, "writes")):
        for one in site:
            try:
                width = gemma.width(one)
            except SiteError as error:
                raise PairingError(
                    f"the dictionary {verb} {one}, which {gemma.name} does not have ({error}) It was made for"
                    f" {config.model}: load that model."
                ) from error
            if width != size:
                known = f", the width of {_WIDTHS[size]}" if size in _WIDTHS else ""
                raise PairingError(
                    f"the dictionary {verb} {size} numbers{known}, but {one} of {gemma.name} has {width}; it was made"
                    f" for {config.model}: load that model."
                )


class _Rows:
    """Activations of the content tokens of a text, captured when they are asked for."""

    def __init__(self, gemma: Gemma, items: Sequence[Tokens], dictionary: AnyDictionary) -> None:
        self._gemma = gemma
        self._place = next(dictionary.parameters()).device
        self._items = list(items)
        self._kept: dict[Site, Tensor] = {}
        self.count = min(ROWS, sum(int(item.content_mask.sum()) for item in items))
        if self.count < 16:
            raise InputError(f"{self.count} content tokens are too few to verify a dictionary; give a longer text.")

    def prepare(self, sites: Sequence[Site]) -> None:
        """Capture several sites in one pass."""
        wanted = [site for site in dict.fromkeys(sites) if site not in self._kept]
        if not wanted:
            return
        parts: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        for item in self._items:
            capture = self._gemma.capture(item, wanted)
            for site in wanted:
                parts[site].append(capture.item(0, site)[item.content_mask.to(capture[site].device)].float())
        for site, found in parts.items():
            self._kept[site] = torch.cat(found)[: self.count].to(self._place)

    def __call__(self, site: Site, gain: bool = True) -> Float[Tensor, "rows width"]:
        """Rows of a site; without ``gain``, a norm's output before its gain."""
        if gain or site.name not in _GAINS:
            self.prepare([site])
            return self._kept[site]
        x = self(Site(_GAINS[site.name], site.layer))
        eps = float(getattr(self._gemma.decoder.config, "rms_norm_eps", 1e-6))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True, eq=False)
class _View:
    """One way to read a dictionary."""

    x: Float[Tensor, "rows n d_in"]
    y: Float[Tensor, "rows n d_out"]
    flipped: bool = False
    """Whether the skip connection is taken the other way round."""


class _Views:
    """The ways to read a dictionary: inputs, targets and weights."""

    def __init__(self, gemma: Gemma, loaded: Loaded, rows: _Rows) -> None:
        self._gemma, self._rows = gemma, rows
        self._config, self._dictionary = loaded.config, loaded.dictionary
        self._same = loaded.config.reads == loaded.config.writes
        layers = [site.layer for site in (*self._config.reads, *self._config.writes) if site.layer is not None]
        span = range(min(layers) - 2, max(layers) + 3) if layers else range(0)
        near = [layer for layer in span if 0 <= layer < gemma.shape.n_layers]
        rows.prepare([Site(name, layer) for layer in near for name in self._names(self._config.site)])

    def fvu(self, view: _View) -> float:
        """Mean over positions of error over spread; infinite for what is not finite, NaN where there is no spread."""
        dictionary, x, y = self._dictionary, view.x, view.y
        if isinstance(dictionary, MultiLayer):
            recon = dictionary(x)
            skips = list(dictionary.W_skip or [])
        else:
            recon = dictionary(x[:, 0])[:, None]
            skips = [] if dictionary.W_skip is None else [dictionary.W_skip]
        if view.flipped:
            recon = recon + torch.stack([x[:, m] @ (W.T - W).float() for m, W in enumerate(skips)], 1)
        error = (y - recon).double().square().sum((0, 2))
        spread = (y - y.mean(0)).double().square().sum((0, 2))
        if not bool((spread > 0).all()):
            return float("nan")
        found = float((error / spread).mean())
        return found if found == found else float("inf")

    def ranked(self, views: Iterable[tuple[str, _View]]) -> list[Alternative]:
        """Each with its FVU, the best first; those without spread are left out."""
        found = [Alternative(meaning, self.fvu(view)) for meaning, view in views]
        return sorted((one for one in found if one.fvu == one.fvu), key=lambda one: one.fvu)

    def stated(self) -> _View:
        """As the config says."""
        return self._view()

    def others(self) -> Iterator[tuple[str, _View]]:
        """What it may be instead, as ends of a sentence."""
        yield from self._norm_states()
        yield from self._other_sites()
        yield from self._layers([-2, -1, 1, 2])
        if self._dictionary.W_skip is not None and self._dictionary.d_in == self._dictionary.d_out:
            yield "its skip connection is transposed", replace(self._view(), flipped=True)

    def far(self) -> Iterator[tuple[str, _View]]:
        """The same site in every other layer, for single-layer kinds."""
        layer = self._config.site.layer
        if layer is None or len(self._config.reads) > 1:
            return
        yield from self._layers(
            [other - layer for other in range(self._gemma.shape.n_layers) if abs(other - layer) > 2]
        )

    def _norm_states(self) -> Iterator[tuple[str, _View]]:
        name, last = self._config.site.name, self._gemma.shape.n_layers - 1
        if name in _GAINS:
            said = "without" if self._config.read_gain else "with"
            meaning = f"it reads the output of the norm {said} the norm's gain"
            yield meaning, self._view(gain=not self._config.read_gain)
        if self._same and name == "resid_post" and self._config.reads[-1].layer == last:
            final = Site("final_norm")

            def swapped(site: Site) -> Site:
                return final if site.layer == last else site

            meaning = "it was made on hidden_states[-1], which is after the final norm"
            yield meaning, self._view(read=swapped, write=swapped)

    def _other_sites(self) -> Iterator[tuple[str, _View]]:
        reads, writes = self._config.site, self._config.writes[0]
        if reads.layer is None:
            return
        for name in self._names(reads):
            at = Site(name, reads.layer)
            if self._same and not self._is_next_layer(reads, at):
                yield f"it belongs to {at}", self._view(read=_named(name), write=_named(name))
            elif not self._same:
                raw = " (before the norm)" if name == "resid_mid" else ""
                yield f"it reads {at}{raw}, not {reads}", self._view(read=_named(name))
        if not self._same:
            for name in self._names(writes):
                yield f"it writes {Site(name, writes.layer)}, not {writes}", self._view(write=_named(name))

    def _is_next_layer(self, site: Site, other: Site) -> bool:
        """Whether ``other`` is the tensor that ``site`` is in a neighbouring layer: the stream between two layers."""
        last = self._gemma.shape.n_layers - 1
        pair = (site.name, other.name)
        return (pair == ("resid_post", "resid_pre") and site.layer != 0) or (
            pair == ("resid_pre", "resid_post") and site.layer != last
        )

    def _layers(self, shifts: Sequence[int]) -> Iterator[tuple[str, _View]]:
        layers = [site.layer for site in (*self._config.reads, *self._config.writes)]
        if None in layers:
            return
        known = [layer for layer in layers if layer is not None]
        for shift in shifts:
            if min(known) + shift < 0 or max(known) + shift >= self._gemma.shape.n_layers:
                continue
            moved = _moved(shift)
            yield f"it belongs to layer {known[0] + shift}", self._view(read=moved, write=moved)

    def _names(self, site: Site) -> list[str]:
        """Other sites of the same width."""
        width = self._gemma.width(site)
        return [name for name in _NAMES if name != site.name and self._gemma.width(Site(name, 0)) == width]

    def _view(
        self,
        *,
        read: Callable[[Site], Site] | None = None,
        write: Callable[[Site], Site] | None = None,
        gain: bool | None = None,
    ) -> _View:
        gain = self._config.read_gain if gain is None and read is None else gain is None or gain
        into = [read(site) if read else site for site in self._config.reads]
        out = [write(site) if write else site for site in self._config.writes]
        self._rows.prepare([*into, *out])
        x = torch.stack([self._rows(site, gain) for site in into], 1)
        y = x if into == out else torch.stack([self._rows(site) for site in out], 1)
        return _View(x, y)


def _named(name: str) -> Callable[[Site], Site]:
    return lambda site: Site(name, site.layer)


def _moved(shift: int) -> Callable[[Site], Site]:
    return lambda site: Site(site.name, (site.layer or 0) + shift)


def _refusal(gemma: Gemma, loaded: Loaded, rows: int, stated: float, best: Alternative | None) -> PairingError:
    """The sentence that says what does not fit, and what would."""
    config = loaded.config
    what = f"this {config.kind.replace('_', ' ')} does not fit {config.site} of {gemma.name}"
    measured = f"FVU {_shown(stated)} on {rows} tokens, where 1 is the mean"
    if best is not None:
        return PairingError(
            f"{what} ({measured}): most likely {best.meaning}, for which it is {_shown(best.fvu)}; correct the site"
            " or the file, or go on without this check (--no-verify)."
        )
    other = f"made for {config.model}, " if config.model != gemma.name else ""
    return PairingError(
        f"{what} ({measured}), nor any site near it: it is {other}damaged or hardly trained; load the model it was made"
        " for, fetch or train it again, or go on without this check (--no-verify)."
    )


def _shown(fvu: float) -> str:
    return f"{fvu:.2f}" if fvu < 100 else f"{fvu:.0e}"
