"""What a dictionary's figures are held against: chance, and methods that know nothing of sparse features.

- *random dictionary*: the same kind and size with random unit directions for encoder and decoder, one threshold for all
  latents at which as many are active as in the dictionary, and one scale that fits the rows best;
- *PCA at equal k*: as many principal components of what is reconstructed as latents are active. For kinds that write
  something else than they read it sees the very thing they have to predict, so there it is a ceiling and not a control;
- *random weights*: the model with the entries of every weight matrix in another order, so that only the distribution
  of the weights and the tokens themselves are left.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gemscope.artifacts.config import AnyDictionary
from gemscope.core.arrays import Float, Tensor
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import Transcoder
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma


@dataclass(frozen=True)
class Control:
    """One line beside a dictionary's own."""

    name: str
    l0: float
    fvu: float
    delta_loss: float | None = None
    """None when no loss was measured."""
    kl: float | None = None


def random_like(
    subject: Subject, x: Float[Tensor, "rows n d_in"], y: Float[Tensor, "rows n d_out"], l0: float, seed: int = 0
) -> Subject:
    """A random dictionary for ``subject``, whose threshold, biases and scale are set on the rows given."""
    generator = torch.Generator().manual_seed(seed)
    one, rows = subject.dictionary, x.float().cpu()
    n, center, target = one.n_positions, x.float().mean(0).cpu(), y.float().mean(0).cpu()
    W_enc = [_directions(one.d_sae, one.d_in, generator).T.contiguous() for _ in range(n)]
    b_enc = [-(center[at] @ W_enc[at]) for at in range(n)]
    pre_acts = torch.stack([rows[:, at] @ W_enc[at] + b_enc[at] for at in range(n)], 1).flatten()
    active = max(1, min(len(pre_acts), round(l0 * len(rows))))
    threshold = max(float(pre_acts.topk(active).values[-1]), 0.0)
    if subject.reads == subject.writes:
        W_dec = [torch.stack([W_enc[at].T] * (n - at)) for at in range(n)]
    else:
        W_dec = [torch.stack([_directions(one.d_sae, one.d_out, generator) for _ in range(n - at)]) for at in range(n)]
    made = _make(one, W_enc, b_enc, W_dec, list(target), threshold)
    recon, wanted = made(rows if n > 1 else rows[:, 0]).view(y.shape) - target, y.float().cpu() - target
    scale = float((recon * wanted).sum() / recon.square().sum().clamp_min(1e-30))
    made = _make(one, W_enc, b_enc, [table * scale for table in W_dec], list(target), threshold)
    device = next(one.parameters()).device
    return replace(subject, name=f"random dictionary for {subject.name}", dictionary=made.to(device))


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    found = torch.randn(count, width, generator=generator)
    return found / found.norm(dim=1, keepdim=True)


def _make(
    like: AnyDictionary,
    W_enc: list[Tensor],
    b_enc: list[Tensor],
    W_dec: list[Tensor],
    b_dec: list[Tensor],
    threshold: float,
) -> AnyDictionary:
    activation, floors = Activation("jumprelu"), [torch.full_like(b, threshold) for b in b_enc]
    if isinstance(like, Crosscoder | CrossLayerTranscoder):
        return type(like)(W_enc, b_enc, W_dec, b_dec, floors, activation=activation)
    kind = SAE if isinstance(like, SAE) else Transcoder
    return kind(W_enc[0], b_enc[0], W_dec[0][0], b_dec[0], floors[0], activation=activation)


class Principal:
    """Principal components of some rows."""

    def __init__(self, rows: Float[Tensor, "rows width"]) -> None:
        rows = rows.double().cpu()
        self.mean: Float[Tensor, " width"] = rows.mean(0)
        centred = rows - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        self.values: Float[Tensor, " width"] = values.flip(0).clamp_min(0.0)
        self.directions: Float[Tensor, "width components"] = vectors.flip(1)

    def fvu(self, k: int) -> float:
        """Of the first ``k`` components, on the rows they come from."""
        return float(self.values[k:].sum() / self.values.sum())

    def project(self, x: Float[Tensor, "rows width"], k: int) -> Float[Tensor, "rows width"]:
        """What ``k`` components keep of ``x``."""
        basis, mean = self.directions[:, :k].to(x.device), self.mean.to(x.device)
        return ((x.double() - mean) @ basis @ basis.T + mean).to(x.dtype)


def components(subject: Subject, principal: Mapping[Site, Principal], l0: float) -> dict[Site, int]:
    """How many components each written site gets for ``l0`` active latents: an equal share, at least one."""
    share = max(1, round(l0 / len(subject.writes)))
    return {site: min(share, len(principal[site].mean)) for site in subject.writes}


def random_weights(gemma: Gemma, seed: int = 0) -> Gemma:
    """The model with the entries of each weight matrix shuffled; norm gains stay. Takes as much memory again."""
    model = copy.deepcopy(gemma.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return Gemma.wrap(model, gemma.tokenizer, name=f"{gemma.name} with random weights", check=False)
