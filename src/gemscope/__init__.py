"""gemscope: an open microscope for the Gemma 3 family.

The few names here are loaded on first use, so that importing the package is fast and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemscope.core.errors import GemscopeError as GemscopeError
    from gemscope.core.sites import Site as Site
    from gemscope.models.gemma import Gemma as Gemma

_HOME = {
    "GemscopeError": "gemscope.core.errors",
    "Site": "gemscope.core.sites",
    "Gemma": "gemscope.models.gemma",
}

__all__ = ["Gemma", "GemscopeError", "Site"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemscope' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
