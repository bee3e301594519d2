"""Packages that only some uses need: imported by name when asked for, with the command that installs them."""

import importlib
from typing import Any

from gemscope.core.errors import InputError


def need(module: str, extra: str) -> Any:
    """The imported module; raises InputError, naming the extra of gemscope that brings it, when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"the package {module!r} is not installed; run: pip install 'gemscope[{extra}]'") from error
