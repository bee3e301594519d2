"""Going on from a finished dictionary on other rows: from the pretrained model's text to the tuned model's chats.

Gemma Scope 2 began every dictionary of an instruction-tuned model as that of the pretrained one (section 3.2 of its
paper) and trained it on the tuned model's own replies. Sizes, kind, activation, sites and target L0 are the
dictionary's own; nothing is annealed, for its latents are sparse already.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemscope.artifacts.config import MULTI, DictionaryConfig
from gemscope.core.errors import InputError
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig


def finetune_config(
    about: DictionaryConfig,
    *,
    skip: bool = False,
    l0: float | None = None,
    frozen: Sequence[str] = (),
    **more: Any,
) -> TrainConfig:
    """How to go on with the dictionary that ``about`` describes; ``skip`` says whether it has a skip connection.

    ``l0`` is needed where the artefact does not state its own; ``more`` are other fields of the config. Raises
    InputError when the L0 is unknown, and for a dictionary that reads a norm without its gain.
    """
    if not about.read_gain:
        raise InputError(
            f"the dictionary reads {about.site} without the norm's gain, which is in the rows; fold the gain in first"
            " (fold_input_gain), as gemscope train --from does."
        )
    target = l0 if l0 is not None else about.activation.k if about.activation.k is not None else about.l0
    if target is None:
        raise InputError("the dictionary does not say which L0 it was trained for; give --l0.")
    layers = tuple(site.layer or 0 for site in about.reads) if about.kind in MULTI else ()
    special = {"skip": skip and about.kind == "clt"} if layers else {}
    make: Any = MultiLayerConfig if layers else TrainConfig
    config: TrainConfig = make(
        site=about.site,
        target_site=None if about.reads == about.writes else about.writes[0],
        kind=about.kind,
        layers=layers,
        d_sae=about.d_sae,
        target_l0=float(target),
        activation=about.activation.kind,
        prefixes=about.prefixes,
        first_l0_factor=1.0,
        annealing=0.0,
        sparsity_warmup=0.0,
        frozen=tuple(frozen),
        **special,
    )
    return replace(config, **more)
