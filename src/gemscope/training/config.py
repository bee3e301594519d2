"""What to train and how: one frozen config per dictionary."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.activation import Kind as ActivationKind

DictionaryKind = Literal["sae", "transcoder", "skip_transcoder", "crosscoder", "clt"]
Sparsity = Literal["quadratic", "linear", "tanh", "l1"]
Decay = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]

MULTI_LAYER: tuple[DictionaryKind, ...] = ("crosscoder", "clt")
"""Kinds that read several layers."""
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
"""What ``frozen`` may name."""


@dataclass(frozen=True)
class TrainConfig:
    """One dictionary of any kind. Raises InputError when a value cannot be.

    Lengths in activation space are relative, so that one config suits every site: the *spread* is the mean
    squared distance of the scaled activations from their mean (the squared error of a dictionary that does
    nothing), the *pre-activation scale* the standard deviation of the pre-activations before the first step.
    """

    site: Site
    """Where the activations that are read come from; for multi-layer kinds the site of the first of ``layers``."""
    d_sae: int
    """Number of latents, per layer for the multi-layer kinds."""
    target_l0: float
    """Active latents per row to aim for, in the mean; over all layers for the multi-layer kinds. It is the k of
    ``topk`` and ``batchtopk``."""
    kind: DictionaryKind = "sae"
    """Which dictionary."""
    target_site: Site | None = None
    """What is reconstructed; None means what is read. A transcoder needs it."""
    layers: tuple[int, ...] = ()
    """Multi-layer kinds: the layers of ``site`` and ``target_site``, ascending; empty for the others."""
    activation: ActivationKind = "jumprelu"
    """Which latents are active."""

    steps: int = 2000
    """Updates; the same for all dictionaries of a pass."""
    batch_size: int = 2048
    """Rows per update; the same for all dictionaries of a pass."""
    seed: int = 0
    """Decides the initial weights and the order of the rows; the same for all dictionaries of a pass."""
    calibration_rows: int = 16_384
    """Training rows that mean, scale and thresholds are measured on, before the first and after the last step."""

    learning_rate: float = 2e-3
    """Adam's, for weights of rows of norm 1. For biases of single-layer kinds it counts in units of what they are added
    to: pre-activation scales, and standard deviations of what is reconstructed."""
    threshold_learning_rate: float = 2e-3
    """Adam's, for the thresholds, in pre-activation scales."""
    warmup: float = 0.05
    """Share of the steps over which the learning rates rise along a cosine from a tenth."""
    decay: float | None = 0.2
    """Share of the steps over which the learning rates fall to zero at the end; None means not at all."""
    decay_shape: Decay = "linear"
    """How they fall."""
    beta1: float = 0.0
    """Adam's decay of the first moment; Gemma Scope trains without momentum."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    product_dtype: Precision = "auto"
    """Of the product that finds the active latents. With ``bfloat16`` it lets through all that may be active, and
    their pre-activations are then computed in fp32: the result is that of ``float32``, and faster where the
    processor multiplies bf16 natively, which is when ``auto`` takes it. Weights, moments and everything else are
    fp32."""

    sparsity: Sparsity = "quadratic"
    """The penalty of ``relu`` and ``jumprelu``: ``quadratic`` (2/L)(l0 - L)^2 per row (Gemma Scope 2), ``linear`` l0,
    ``tanh`` of the activations times decoder norms, ``l1`` of the same. All but the first are steered to the target
    L0 by moving their weight."""
    sparsity_weight: float = 0.3
    """Weight of that penalty, in spreads; where it is steered, its first value."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which that weight rises linearly from zero."""
    tanh_scale: float = 4.0
    """``tanh``: the slope at zero, per pre-activation scale."""
    frequency_weight: float = 0.0
    """Weight, in spreads, of the penalty sum_i p_i (1 + p_i / frequency_scale) on how often each latent fires."""
    frequency_scale: float = 0.1
    """Frequency at which that penalty turns from linear to quadratic; with the penalty no latent of the finished
    dictionary is active on a larger share of the rows that thresholds are set on."""
    first_l0_factor: float = 4.0
    """The target begins this many times higher: latents learn a direction before they have to be rare."""
    first_k_factor: float = 1.0
    """``batchtopk``: the same of its k."""
    annealing: float = 0.5
    """Share of the steps over which the target falls, in equal ratios, to ``target_l0``."""
    bandwidth: float = 0.5
    """Width of the window that a threshold's gradient is estimated from, in pre-activation scales."""
    ste_to_input: bool = False
    """Let the straight-through estimates reach the pre-activations too, with the opposite sign."""

    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first so many latents have to reconstruct alone too; ascending, each below ``d_sae``."""
    sampled_prefixes: int = 0
    """Matryoshka: so many prefixes drawn anew every step from a power law, instead of ``prefixes``."""

    dead_after_rows: int = 20_000
    """A latent that has not been active for this many rows counts as dead."""
    dead_weight: float = 0.1
    """``jumprelu`` and ``relu``: weight of the penalty that draws dead latents back to their thresholds, in spreads."""
    aux_weight: float = 1 / 32
    """``topk`` and ``batchtopk``: weight of the error that dead latents leave of the error (AuxK)."""
    aux_k: int | None = None
    """Dead latents per row that AuxK uses; None means half the width of what is reconstructed, at most all of them."""
    end_to_end: float = 0.0
    """Weight beta of the KL divergence of the spliced model, for single-layer kinds; needs a ``LiveContexts`` to train
    on, which runs the model."""
    frozen: tuple[str, ...] = ()
    """Weights that training leaves alone, such as ``W_dec``."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_sites()
        self._check_choices()
        if not 0 < self.target_l0 < self.d_sae * max(1, len(self.layers)):
            raise InputError(
                f"target_l0 {self.target_l0} must lie between 0 and the number of latents, {self.d_sae};"
                " typical is 10 to 100."
            )
        if self.activation == "topk" and self.target_l0 != int(self.target_l0):
            raise InputError(f"topk keeps a whole number of latents per row, not {self.target_l0}.")
        if list(self.prefixes) != sorted({p for p in self.prefixes if 0 < p < self.d_sae}):
            raise InputError(f"prefixes {self.prefixes} must ascend between 0 and the number of latents, {self.d_sae}.")
        if self.prefixes and self.sampled_prefixes:
            raise InputError("prefixes are either fixed or sampled; give prefixes or sampled_prefixes, not both.")

    def _check_sizes(self) -> None:
        if self.d_sae < 1 or self.steps < 1 or self.batch_size < 1 or self.calibration_rows < 2:
            raise InputError("d_sae, steps and batch_size must be at least 1, calibration_rows at least 2.")
        if self.aux_k is not None and self.aux_k < 1:
            raise InputError(f"aux_k is {self.aux_k}; it must be at least 1.")
        above = ("learning_rate", "threshold_learning_rate", "bandwidth", "first_l0_factor", "first_k_factor")
        for name in (*above, "frequency_scale", "tanh_scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("warmup", "decay", "sparsity_warmup", "annealing"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share of the steps, from 0 to 1.")
        weights = ("sparsity_weight", "frequency_weight", "dead_weight", "aux_weight", "end_to_end", "sampled_prefixes")
        for name in weights:
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1.")

    def _check_sites(self) -> None:
        if self.kind in MULTI_LAYER:
            if len(self.layers) < 2 or list(self.layers) != sorted(set(self.layers)):
                raise InputError(f"a {self.kind} reads two or more layers, ascending; layers is {self.layers}.")
            if self.site.layer != self.layers[0]:
                raise InputError(f"site {self.site} must be in the first of the layers, {self.layers[0]}.")
        elif self.layers:
            raise InputError(f"a {self.kind} reads one layer, that of its site; leave layers {self.layers} out.")
        if self.kind in ("transcoder", "skip_transcoder", "clt"):
            if self.target_site is None:
                raise InputError(f"a {self.kind} needs a target_site, what it has to write.")
        elif self.target_site not in (None, self.site):
            raise InputError(f"a {self.kind} reconstructs what it reads; leave target_site {self.target_site} out.")

    def _check_choices(self) -> None:
        choices = {
            "kind": DictionaryKind,
            "activation": ActivationKind,
            "sparsity": Sparsity,
            "decay_shape": Decay,
            "product_dtype": Precision,
        }
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise InputError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(get_args(known))}.")
        unknown = sorted(set(self.frozen) - set(PARTS))
        if unknown:
            raise InputError(f"frozen names {unknown[0]!r}; the weights are {', '.join(PARTS)}.")
        if self.activation == "relu" and self.sparsity in ("quadratic", "linear"):
            raise InputError(
                f"sparsity {self.sparsity!r} acts on thresholds, which relu has not; use 'tanh' or 'l1', or jumprelu."
            )

    @property
    def reads(self) -> tuple[Site, ...]:
        """All sites that are read, one per layer."""
        return tuple(Site(self.site.name, layer) for layer in self.layers) or (self.site,)

    @property
    def writes(self) -> tuple[Site, ...]:
        """All sites that are reconstructed, one per layer."""
        target = self.target_site or self.site
        return tuple(Site(target.name, layer) for layer in self.layers) or (target,)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that a batch must hold, each once."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    @property
    def finished_activation(self) -> Activation:
        """Of the dictionary that comes out."""
        return Activation(self.activation, self.target_l0 if self.activation in ("topk", "batchtopk") else None)

    @property
    def penalised(self) -> bool:
        """Whether a penalty makes it sparse; ``topk`` and ``batchtopk`` are sparse by construction."""
        return self.activation in ("relu", "jumprelu")

    @property
    def first_l0(self) -> float:
        """Where the target begins: at most half of the latents; ``topk`` keeps its k."""
        most = self.d_sae * max(1, len(self.layers)) / 2
        factor = self.first_l0_factor if self.penalised else self.first_k_factor
        factor = 1.0 if self.activation == "topk" else factor
        return max(self.target_l0, min(self.target_l0 * factor, most))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; sites as ``resid_post.3``."""
        target = None if self.target_site is None else str(self.target_site)
        return asdict(self) | {"site": str(self.site), "target_site": target}
