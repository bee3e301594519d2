"""End-to-end training: the model is run again on a batch's contexts, with reconstructions in the place of the site.

The objective is (error + alpha beta KL) / (1 + beta), alpha = error / KL held constant (``objectives.end_to_end``; the
KL + MSE loss of Karvonen 2025, "Revisiting end-to-end sparse autoencoder training", balanced anew in every step; Gemma
Scope 2 technical paper, section 3.4). Both use it for a short finetuning of a trained dictionary.
"""

from gemscope.core.arrays import Float, Tensor
from gemscope.training.config import TrainConfig
from gemscope.training.data import BatchReader, SplicedStream
from gemscope.training.objectives import Splice


def splice_of(reader: BatchReader, config: TrainConfig) -> Splice | None:
    """The splice of the batch that ``reader`` gave last; None where none is wanted, or its source has no contexts."""
    if config.end_to_end == 0 or not isinstance(reader.stream, SplicedStream):
        return None

    def splice(recon: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
        stream = reader.stream
        assert isinstance(stream, SplicedStream)
        return stream.divergence(config.writes[0], recon)

    return splice
