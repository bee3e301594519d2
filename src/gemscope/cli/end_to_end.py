"""gemscope train --end-to-end: rows come as whole contexts, so that the model can be run on them again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemscope.cli.rows import Rows
    from gemscope.training.config import TrainConfig


def for_end_to_end(rows: "Rows", configs: "Sequence[TrainConfig]") -> "Rows":
    """The same rows, context by context where a config asks for the divergence of the spliced model.

    Raises InputError when they are not made by a model while training.
    """
    from gemscope.activations.contexts import LiveContexts
    from gemscope.activations.streaming import LiveActivations
    from gemscope.core.errors import InputError

    if all(config.end_to_end == 0 for config in configs):
        return rows
    if not isinstance(rows.data, LiveActivations):
        raise InputError("--end-to-end runs the model on whole contexts; give --live MODEL instead of harvested rows.")
    return replace(rows, data=LiveContexts(rows.data))
