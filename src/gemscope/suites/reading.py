"""What the latents of one layer say about a text, position by position."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.logit_effects import logit_effects
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation.concepts import ConceptReport
from gemscope.evaluation.fidelity import Fidelity
from gemscope.lens.trace import Microscope
from gemscope.models.gemma import Gemma
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens
from gemscope.suites.suite import Suite

ANSWER_TOKENS = 64
"""Length of an answer in a chat, at most."""


@dataclass(frozen=True)
class LatentReading:
    """One latent that is active at a position."""

    latent: int
    activation: float
    strength: float | None
    """Activation over the latent's largest on held-out text; None where that is unknown or it never fired there."""
    concept: str | None
    """The labelled concept that the latent is named after (``evaluation.concepts``); None without one."""
    concept_share: float
    """Share of the latent's activation on held-out text that falls on tokens of that concept."""
    promotes: tuple[str, ...]
    """Tokens whose logit its decoder direction raises most, strongest first."""


@dataclass(frozen=True)
class PositionReading:
    """One position of the text; what is not content has no latents: the dictionary never saw any."""

    position: int
    token: int
    piece: str
    """The vocabulary's spelling."""
    role: str
    active: int
    """Number of active latents."""
    latents: tuple[LatentReading, ...]
    """Those that say most, the first before the others: by how much they write and how seldom they are on."""


@dataclass(frozen=True)
class Reading:
    """A text read through the dictionary at one site."""

    model: str
    site: Site
    d_sae: int
    text: str
    """What was read; a chat is rendered with its markers."""
    answer: str | None
    """What the model answered, when the text was a user's turn."""
    fvu: float | None
    """Fraction of variance unexplained over the content positions; None for fewer than two."""
    positions: tuple[PositionReading, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"site": str(self.site)}


@torch.no_grad()
def read(
    gemma: Gemma,
    suite: Suite,
    text: str | Tokens,
    *,
    layer: int | None = None,
    top: int = 3,
    promoted: int = 5,
    answer: str | None = None,
) -> Reading:
    """The ``top`` latents that say most about every content position at a layer (None: the one that finds most
    concepts): that write most, weighted by how seldom they are on.

    ``promoted`` is the number of tokens shown per latent. Raises InputError when the text cannot be read, the
    suite has no such layer or is of another model.
    """
    tokens = gemma.tokens(text) if isinstance(text, str) else text
    site = suite.best_site() if layer is None else suite.site(layer)
    dictionary, measured = dictionary_for(gemma, suite, site), suite.evaluation(site)
    concepts = measured.concepts
    content = tokens.content_mask.nonzero()[:, 0].cpu()
    x = gemma.capture(tokens, [site])[site][0].float().cpu()[content]
    acts = dictionary.encode(x)
    latent = _weight(acts, dictionary, measured.fidelity).topk(min(top, dictionary.d_sae), dim=1).indices
    value = acts.gather(1, latent)
    promotes = _promoted(gemma, dictionary, latent[value > 0].unique(), promoted)
    strongest = {
        position: tuple(
            _latent(int(j), float(a), concepts, promotes) for a, j in zip(value[row], latent[row], strict=True) if a > 0
        )
        for row, position in enumerate(content.tolist())
    }
    active = dict(zip(content.tolist(), (acts > 0).sum(1).tolist(), strict=True))
    positions = tuple(
        PositionReading(i, int(tokens.ids[i]), piece, str(role), active.get(i, 0), strongest.get(i, ()))
        for i, (piece, role) in enumerate(zip(tokens.pieces, tokens.roles, strict=True))
    )
    fvu = _fvu(x, dictionary.decode(acts))
    return Reading(gemma.name, site, dictionary.d_sae, tokens.text, answer, fvu, positions)


def read_chat(
    gemma: Gemma, suite: Suite, text: str, *, layer: int | None = None, top: int = 3, promoted: int = 5
) -> Reading:
    """``text`` as a user's turn, and the model's answer to it (greedy, at most ``ANSWER_TOKENS``), read
    together.

    Raises InputError when the model is not instruction-tuned, ContextLengthError when no room is left for an
    answer.
    """
    if not gemma.is_chat:
        raise InputError(f"{gemma.name} is not instruction-tuned, so it has no chat; leave out --chat.")
    prompt = gemma.chat(text)
    room = max(1, min(ANSWER_TOKENS, gemma.shape.context - len(prompt)))
    (answer,) = gemma.generate(prompt, max_new_tokens=room)
    return read(gemma, suite, answer.tokens, layer=layer, top=top, promoted=promoted, answer=answer.text)


def dictionary_for(gemma: Gemma, suite: Suite, site: Site) -> SAE:
    """The suite's dictionary at a site; raises InputError when it is of another width than the model's."""
    dictionary = suite.dictionary(site)
    if dictionary.d_in != gemma.width(site):
        raise InputError(f"the suite in {suite.folder} is of {suite.model}, not of {gemma.name}; give --suite another.")
    return dictionary


def microscopes(gemma: Gemma, suite: Suite) -> dict[int, Microscope]:
    """The suite's dictionaries of the residual stream by layer, their latents named after concepts, for the lens.

    Raises InputError when the suite is of another model.
    """
    found: dict[int, Microscope] = {}
    for site in suite.sites:
        if site.name != "resid_post" or site.layer is None:
            continue
        concepts = suite.evaluation(site).concepts
        names = () if concepts is None else enumerate(concepts.latent_concept)
        largest = None if concepts is None else torch.tensor(concepts.latent_max)
        named = {latent: name.replace("_", " ") for latent, name in names if name is not None}
        found[site.layer] = Microscope(dictionary_for(gemma, suite, site), named, largest)
    return found


def _latent(
    latent: int, activation: float, concepts: ConceptReport | None, promotes: dict[int, tuple[str, ...]]
) -> LatentReading:
    if concepts is None:
        return LatentReading(latent, activation, None, None, 0.0, promotes[latent])
    most = concepts.latent_max[latent]
    return LatentReading(
        latent=latent,
        activation=activation,
        strength=activation / most if most else None,
        concept=concepts.latent_concept[latent],
        concept_share=concepts.latent_share[latent],
        promotes=promotes[latent],
    )


def _weight(acts: Float[Tensor, "pos d_sae"], dictionary: SAE, fidelity: Fidelity) -> Float[Tensor, "pos d_sae"]:
    """What latents are ranked by: the length of what each writes, times how surprising it is that it is on, -log of
    its frequency on held-out text (as words are ranked by tf-idf); the large ones that are always on say little.
    """
    frequency = (torch.tensor(fidelity.firings, device=acts.device) + 1) / (fidelity.rows + 2)
    return acts * dictionary.W_dec.float().norm(dim=1) * -frequency.log()


def _promoted(gemma: Gemma, dictionary: SAE, latents: Int[Tensor, "latents"], count: int) -> dict[int, tuple[str, ...]]:
    """Per latent, the tokens it promotes as a person reads them; the same word with and without a space
    counts once.
    """
    found: dict[int, tuple[str, ...]] = {}
    gain, unembedding = gemma.final_gain().float().cpu(), gemma.unembedding()
    for block in latents.split(64):
        effects = logit_effects(dictionary.decoder_rows(block), gain, unembedding.cpu())
        best = effects.topk(min(3 * count, effects.shape[1]), dim=1).indices
        for latent, ids in zip(block.tolist(), best.tolist(), strict=True):
            found[latent] = _words(gemma, ids)[:count]
    return found


def _words(gemma: Gemma, ids: Sequence[int]) -> tuple[str, ...]:
    pieces = gemma.tokenizer.convert_ids_to_tokens(list(ids))
    return tuple(dict.fromkeys(shown(piece) for piece in pieces if piece))


def _fvu(x: Float[Tensor, "rows d_in"], recon: Float[Tensor, "rows d_in"]) -> float | None:
    spread = float((x - x.mean(0)).double().square().sum()) if len(x) > 1 else 0.0
    return float((x - recon).double().square().sum()) / spread if spread > 0 else None
