"""Generate with some latents added to, held at a value, or removed, beside the model as it is.

Notable:
- what is changed is only what the latents write: x becomes x + the sum over the latents of (a' - a) d, so all that the
  dictionaries do not explain stays (their error terms);
- every a is of what is read there before any latent writes to that site; a latent of a later site is read from what
  those of earlier ones left;
- strength is in units of the latent's own largest activation in the index, so that 1 means as strong as it gets;
- transcoders and CLTs are steered where they write, with activations from where they read, in the same forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from gemscope.artifacts.config import Loaded
from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.single import SingleLayer
from gemscope.features.index import FeatureIndex
from gemscope.features.passing import check_widths
from gemscope.models.chat import Turn
from gemscope.models.gemma import Gemma
from gemscope.models.interventions import Edit, Intervention
from gemscope.models.positions import Positions, Steps
from gemscope.models.tokens import Tokens

Mode = Literal["add", "clamp", "ablate"]
Where = Literal["all", "prompt", "generated"] | Sequence[int]
"""``all``: content of the prompt, and what is generated; ``generated``: from the last token of the prompt on, which
gives the first new one; numbers: these positions of the prompt, control tokens and ``<bos>`` too."""


@dataclass(frozen=True)
class Steer:
    """One latent and what becomes of it."""

    dictionary: str
    latent: int
    mode: Mode = "add"
    """``add``: its activation rises by strength; ``clamp``: it is strength; ``ablate``: it is 0."""
    strength: float = 1.0
    """In units of the latent's largest activation; not used by ``ablate``."""
    unit: float = 1.0
    """The latent's largest activation."""

    def __post_init__(self) -> None:
        if not abs(self.strength) < float("inf"):
            raise InputError(f"a strength of {self.strength} is no number; give for example 2.")

    @classmethod
    def of(cls, index: FeatureIndex, feature: str, mode: Mode = "add", strength: float = 1.0) -> "Steer":
        """A feature of an index, with its largest activation; raises InputError for one that never fired."""
        found = index.find_id(feature)
        peak = float(index.latents(found.dictionary).records["peak"][found.latent])
        if peak == 0 and mode != "ablate":
            raise InputError(f"{feature} was never active in the index, so its strength has no unit; choose another.")
        return cls(found.dictionary, found.latent, mode, strength, peak)


@dataclass(frozen=True)
class TokenScore:
    """One generated token."""

    piece: str
    """The vocabulary's spelling."""
    logprob: float
    """In nats, given everything before it."""
    best: tuple[tuple[str, float], ...]
    """The likeliest tokens in its place."""


@dataclass(frozen=True)
class Side:
    """One of the two continuations."""

    text: str
    tokens: tuple[TokenScore, ...]
    finish: str
    """``stop``: the model ended it; ``length``: there was no more room."""


@dataclass(frozen=True)
class Steered:
    """The model as it is beside the steered one."""

    prompt: str
    steers: tuple[Steer, ...]
    default: Side
    steered: Side

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def steer(
    gemma: Gemma,
    dictionaries: Mapping[str, Loaded],
    prompt: str | Tokens | Sequence[Turn],
    steers: Sequence[Steer],
    *,
    where: Where = "all",
    special: bool = False,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int | None = 0,
    best: int = 5,
) -> Steered:
    """Continue a text, or answer a chat (a sequence of turns), as the model does and steered.

    Control tokens and the chat template's words are steered only with ``special``, the ``<bos>`` not even then; but
    positions given as numbers are taken as given, whatever is there. Greedy, and with strength 0 added, both are the
    same. Raises the errors of ``interventions``, and InputError for a position that does not exist or a dictionary of
    another width than the model's.
    """
    tokens = _prompt(gemma, prompt)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    positions, steps = selection(tokens, where, special)
    changes = interventions(dictionaries, steers, positions, steps)
    check_widths(gemma, {one.dictionary: dictionaries[one.dictionary] for one in steers})
    (plain,) = gemma.generate(tokens, **sampling)
    (changed,) = gemma.generate(tokens, interventions=changes, **sampling)
    scored = _whole(positions, steps, len(tokens), len(changed.tokens))
    return Steered(
        tokens.text,
        tuple(steers),
        Side(plain.text, _scores(gemma, plain.tokens, len(tokens), best, ()), plain.finish),
        Side(
            changed.text,
            _scores(gemma, changed.tokens, len(tokens), best, interventions(dictionaries, steers, scored, "all")),
            changed.finish,
        ),
    )


def _prompt(gemma: Gemma, prompt: str | Tokens | Sequence[Turn]) -> Tokens:
    if isinstance(prompt, Tokens):
        return prompt
    return gemma.tokens(prompt) if isinstance(prompt, str) else gemma.chat(prompt)


def selection(tokens: Tokens, where: Where, special: bool = False) -> tuple[list[int], Steps]:
    """Positions of the prompt that are steered, and whether new tokens are, as steps."""
    every = [i for i in range(1, len(tokens)) if special or bool(tokens.content_mask[i])]
    if isinstance(where, str):
        chosen = [len(tokens) - 1] if where == "generated" else every
        return chosen, "prefill" if where == "prompt" else "all"
    beyond = [i for i in where if not -len(tokens) <= i < len(tokens)]
    if beyond:
        raise InputError(
            f"position {beyond[0]} is outside a prompt of {len(tokens)} tokens; give 0 to {len(tokens) - 1}."
        )
    return sorted({i % len(tokens) for i in where}), "prefill"


def _whole(positions: Sequence[int], steps: Steps, prompt: int, total: int) -> list[int]:
    """The same positions of prompt and continuation, read at once."""
    return [*positions, *(range(prompt, total) if steps == "all" else ())]


def interventions(
    dictionaries: Mapping[str, Loaded], steers: Sequence[Steer], positions: Positions, steps: Steps = "all"
) -> list[Intervention]:
    """Changes that steer at ``positions`` of the prompt (everywhere for None) and, when ``steps`` is ``all``, at every
    new token. At a site that several latents share, all are read before any of them writes.

    Raises InputError for a dictionary or latent that does not exist, for a latent that is given twice, and for one of a
    TopK over several layers in another mode than ``add``: its activation is not known before the last layer.
    """
    places: list[tuple[Positions, Steps]] = [(positions, steps if positions is None else "prefill")]
    if positions is not None and steps == "all":
        places.append((None, "new"))
    readers, writers = list[Intervention](), list[Intervention]()
    for number, one in enumerate(steers):
        if any((one.dictionary, one.latent) == (other.dictionary, other.latent) for other in steers[:number]):
            raise InputError(f"{one.dictionary}/{one.latent} is given twice; say once what becomes of it.")
        loaded = _loaded(dictionaries, one)
        if one.mode == "add" and one.strength == 0:
            continue
        delta = _Delta(loaded, one)
        if one.mode != "add":
            readers.append(Edit(delta.site, delta.read))
        for site, row in _written(loaded, one.latent):
            writers += [Edit(site, delta.writer(row), positions=at, steps=when) for at, when in places]
    return [*readers, *writers]


def _loaded(dictionaries: Mapping[str, Loaded], one: Steer) -> Loaded:
    """The latent's dictionary; raises InputError where it cannot be steered so."""
    if one.dictionary not in dictionaries:
        raise InputError(f"there is no dictionary {one.dictionary!r} here; there are {', '.join(dictionaries)}.")
    loaded = dictionaries[one.dictionary]
    dictionary = loaded.dictionary
    if not 0 <= one.latent < dictionary.n_latents:
        raise InputError(
            f"there is no latent {one.latent} of {one.dictionary}; it has latents 0 to {dictionary.n_latents - 1}."
        )
    if one.mode != "add" and dictionary.n_positions > 1 and dictionary.activation.top is not None:
        raise InputError(
            f"cannot {one.mode} {one.dictionary}/{one.latent}: its latents compete with those of later layers;"
            " steer it with add."
        )
    return loaded


def _written(loaded: Loaded, latent: int) -> list[tuple[Site, Float[Tensor, " d_out"]]]:
    """Where a latent writes, and what, per unit of activation."""
    dictionary, writes = loaded.dictionary, loaded.config.writes
    if isinstance(dictionary, SingleLayer):
        return [(writes[0], dictionary.decoder_rows([latent])[0])]
    layer, own = divmod(latent, dictionary.d_sae)
    return [
        (writes[out], dictionary.decoder_rows(layer, [own], out)[0]) for out in range(layer, dictionary.n_positions)
    ]


class _Delta:
    """The change of one latent's activation in the running forward pass."""

    def __init__(self, loaded: Loaded, one: Steer) -> None:
        self._dictionary, self._one = loaded.dictionary, one
        self._place = one.latent // self._dictionary.d_sae
        self.site = loaded.config.reads[self._place]
        """Where the latent is read."""
        self._delta: Tensor | None = None

    @torch.no_grad()
    def read(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """Finds the change, and changes nothing."""
        dictionary, one = self._dictionary, self._one
        rows = x.to(next(dictionary.parameters()).device)
        if not isinstance(dictionary, SingleLayer):
            rows = torch.zeros_like(rows)[..., None, :].repeat(1, 1, dictionary.n_positions, 1)
            rows[..., self._place, :] = x
        wanted = 0.0 if one.mode == "ablate" else one.strength * one.unit
        self._delta = (wanted - dictionary.encode(rows, [one.latent])).to(x.device)
        return x

    def writer(self, row: Float[Tensor, " d_out"]) -> Callable[[Tensor], Tensor]:
        """Adds what the change writes."""

        def change(x: Float[Tensor, "batch pos d_out"]) -> Float[Tensor, "batch pos d_out"]:
            delta = self._one.strength * self._one.unit if self._delta is None else self._delta
            return x + (delta * row.to(x.device)).to(x.dtype)

        return change


def _scores(
    gemma: Gemma, tokens: Tokens, prompt: int, best: int, changes: Sequence[Intervention]
) -> tuple[TokenScore, ...]:
    """Log-probabilities of what follows the prompt."""
    if len(tokens) == prompt:
        return ()
    logits = gemma.logits(tokens, interventions=changes)[0, prompt - 1 : -1].float()
    scores = logits.log_softmax(-1)
    new = tokens.ids[prompt:].to(scores.device)
    mine = scores.gather(1, new[:, None])[:, 0].tolist()
    top = scores.topk(min(best, scores.shape[1]), dim=1)
    found: list[TokenScore] = []
    for row, value in enumerate(mine):
        pieces = gemma.tokenizer.convert_ids_to_tokens(top.indices[row].tolist())
        pairs = tuple(zip(map(str, pieces), top.values[row].tolist(), strict=True))
        found.append(TokenScore(tokens.pieces[prompt + row], value, pairs))
    return tuple(found)
