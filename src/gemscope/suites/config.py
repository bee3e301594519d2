"""What a quickstart builds, as one value."""

from dataclasses import asdict, dataclass
from typing import Any

from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig


@dataclass(frozen=True)
class QuickstartConfig:
    """One SAE per layer from one harvest; the defaults suit the microworld models and take minutes on two
    cores.
    """

    site: str = "resid_post"
    """Which site is read in every layer."""
    tokens: int = 300_000
    """Content tokens to harvest."""
    heldout_tokens: int = 40_000
    """Content tokens that fidelity and concepts are measured on."""
    splice_tokens: int = 12_000
    """Of these, tokens whose loss is measured with the reconstruction spliced in."""
    d_sae: int = 1024
    """Latents per dictionary."""
    nested_parts: tuple[int, ...] = (32, 8, 2)
    """Which parts of its latents, from one 32nd to a half, are dictionaries of their own in each (Matryoshka): general
    concepts keep a latent; none for a plain dictionary."""
    target_l0: float = 32.0
    """Active latents per token to aim for."""
    steps: int = 400
    """Updates of every dictionary."""
    batch_size: int = 2048
    """Tokens per update."""
    learning_rate: float = 6e-3
    """Of the weights: runs this short need a large one."""
    batch_tokens: int = 2048
    """Positions in one forward pass of the model, padding included."""
    seed: int = 0
    """Of the texts, the first weights and the order of the rows."""

    other_tokens: int = 60_000
    """Content tokens that the other kinds of dictionary are trained on."""
    other_steps: int = 150
    """Their updates, at most ``steps``."""
    other_batch_size: int = 1024
    """Their tokens per update, at most ``batch_size``."""
    other_l0_factor: float = 3.0
    """Target L0 of a CLT or crosscoder, over all its layers, in ``target_l0``."""

    index_tokens: int = 30_000
    """Content tokens that the feature index is made over, at most ``tokens``."""

    def train_config(self, site: Site) -> TrainConfig:
        """How the dictionary at one site is trained."""
        return TrainConfig(
            site=site,
            d_sae=self.d_sae,
            target_l0=self.target_l0,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            prefixes=tuple(self.d_sae // part for part in self.nested_parts if part <= self.d_sae),
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"nested_parts": list(self.nested_parts)}
