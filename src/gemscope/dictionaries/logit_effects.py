"""What a latent's decoder direction does to the logits, read straight through the unembedding."""

from gemscope.core.arrays import Float, Tensor


def logit_effects(
    directions: Float[Tensor, "latents d_model"],
    gain: Float[Tensor, " d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
) -> Float[Tensor, "latents vocab"]:
    """Logit per unit of activation, up to one positive factor per token: (W_dec * gain) @ unembedding.T.

    ``directions`` are rows of W_dec at a residual site; ``gain`` is the final norm's gain (1 + w in Gemma).
    The factor is the final norm's 1/rms, the same for every token of the vocabulary; a soft cap on the logits
    keeps their order.
    """
    return (directions.to(gain.dtype) * gain) @ unembedding.to(gain.dtype).T
