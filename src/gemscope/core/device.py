"""Which device and number type to use."""

import torch

from gemscope.core.errors import InputError

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def choose_device(wanted: str | torch.device | None = None) -> torch.device:
    """``wanted`` if it is usable, else the best at hand: CUDA, then Apple's MPS, then the CPU.

    Raises InputError when the named device does not exist here.
    """
    if wanted is None or wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(wanted)!r} is not usable on this machine; use 'cpu', 'cuda' or 'auto'."
        ) from error
    return device


def choose_dtype(wanted: str | torch.dtype | None = None, device: torch.device | None = None) -> torch.dtype:
    """``wanted`` as a torch dtype; by default bf16 on CUDA and fp32 elsewhere. Raises InputError for other names."""
    if wanted is None or wanted == "auto":
        return torch.bfloat16 if device is not None and device.type == "cuda" else torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in _DTYPES:
        raise InputError(f"unknown dtype {wanted!r}; use one of {', '.join(_DTYPES)}.")
    return _DTYPES[wanted]
