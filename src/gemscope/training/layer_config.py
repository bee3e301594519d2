"""What to train over several layers, and how: a ``TrainConfig`` with more options."""

from dataclasses import dataclass
from typing import Any, Literal

from gemscope.core.errors import InputError
from gemscope.training.config import TrainConfig


@dataclass(frozen=True)
class MultiLayerConfig(TrainConfig):
    """A ``TrainConfig`` for dictionaries over several layers, or sharded ones of any kind.

    Only the quadratic sparsity term, fixed prefixes, ``beta1`` 0 and fp32 products are known here. ``aux_k`` counts the
    dead latents of all layers; None means half the width of one layer's target.
    """

    skip: bool = False
    """A linear path from what a layer reads to what it writes (the ``affine`` CLTs of Gemma Scope 2)."""
    from_data: bool = False
    """Transcoders and CLTs: decoders begin as the mean of the targets weighted by the latents' first activations, not
    at random. It finds more features in long runs and costs loss in short ones."""
    tied: bool = False
    """One decoder per source layer instead of one per pair of layers."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of Adam's second moments; ``bfloat16`` halves them, rounded stochastically."""
    offload: bool = False
    """Keep decoders and their moments in the host's memory, one at a time on the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity != "quadratic" or self.activation == "relu":
            raise InputError(
                f"{self.kind} is trained here with the quadratic sparsity term of jumprelu, or topk or batchtopk,"
                f" not with {self.activation!r} and {self.sparsity!r}."
            )
        if self.sampled_prefixes or self.beta1 or self.end_to_end:
            raise InputError(f"sampled_prefixes, beta1 and end_to_end are not for a {self.kind}; leave them at 0.")
        if self.product_dtype == "bfloat16":
            raise InputError(f"a {self.kind} is trained here with products in fp32; leave product_dtype at 'auto'.")
        if self.activation == "batchtopk" and "threshold" in self.frozen:
            raise InputError(
                "batchtopk has no threshold before its end; leave 'threshold' out of frozen, or use jumprelu."
            )
        if self.skip and self.kind not in ("clt", "skip_transcoder"):
            raise InputError(f"a {self.kind} has no skip connection; it belongs to a clt or skip_transcoder.")
        if self.tied and not self.layers:
            raise InputError(f"a {self.kind} has one decoder; 'tied' is for several layers.")

    @property
    def reconstructs(self) -> bool:
        """Whether what is written is what is read."""
        return self.kind in ("sae", "crosscoder")

    @property
    def has_skip(self) -> bool:
        """Whether there is a ``W_skip``."""
        return self.skip or self.kind == "skip_transcoder"


def as_multilayer(config: TrainConfig, **more: Any) -> MultiLayerConfig:
    """The same config with the options of this module; raises InputError for what it does not know."""
    given = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    return MultiLayerConfig(**{**given, **more})
