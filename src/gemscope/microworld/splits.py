"""Which combinations are held out: decided by a hash of the combination, so that no list has to be kept.

A combination is, for instance, a country with a template, or a pair of summands. The training split never holds a
held-out combination; the held-out split holds nothing else; validation is like training, from another random stream.
"""

import random
import zlib
from typing import Literal

Split = Literal["train", "validation", "heldout"]
_STREAM: dict[Split, int] = {"train": 1, "validation": 2, "heldout": 3}


def is_held_out(*combination: object, share: int = 10) -> bool:
    """True for one combination in ``share``, always the same ones."""
    return zlib.crc32("|".join(map(str, combination)).encode()) % share == 0


def allowed(split: Split, *combination: object, share: int = 10) -> bool:
    """Whether a document of ``split`` may show this combination."""
    return is_held_out(*combination, share=share) == (split == "heldout")


def stream(split: Split, seed: int, *names: object) -> random.Random:
    """The random stream of a split; streams of different splits, seeds and names have nothing in common."""
    return random.Random("|".join(map(str, (_STREAM[split], seed, *names))))
