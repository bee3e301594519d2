"""The options of commands that may run on Ray."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from gemscope.activations.cluster import RayConfig

_ADDRESSES = ("auto", "local")

Ray = Annotated[str | None, typer.Option(help="Run on Ray: alone, or with an address.", metavar="[ADDRESS]")]
Workers = Annotated[int, typer.Option(help="Ray's workers.", min=1)]


class RayCommand(TyperCommand):
    """Lets ``--ray`` stand alone: Ray is then started on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--ray") + 1 if "--ray" in args else None
        if at is not None and (at == len(args) or not (args[at] in _ADDRESSES or ":" in args[at])):
            args = [*args[:at], "local", *args[at:]]
        return super().parse_args(ctx, args)


def ray_config(address: str, workers: int) -> "RayConfig":
    """Where the units run."""
    from gemscope.activations.cluster import RayConfig

    return RayConfig(address=None if address == "local" else address, workers=workers)
