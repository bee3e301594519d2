"""Which weights a result was made from."""

import hashlib

import torch

from gemscope.models.gemma import Gemma


def weights_hash(gemma: Gemma) -> str:
    """sha256 over the model's parameters: names, shapes, number types and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(gemma.model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
