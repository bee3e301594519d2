"""Invented words: dangerous substances, deeds and ingredients that exist nowhere, so nothing here can harm anybody."""

import random

_ONSETS = "b d f g h k l m n p r s t v z br dr gr kr tr pl sn st zh".split()
_NUCLEI = "a e i o u ai ou ea".split()
_CODAS = ["", "n", "r", "l", "x", "m", "sk", "th", "nd"]


def invented_word(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable nonsense word."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))


def _invented(rng: random.Random, n: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    while len(found) < n:
        found[invented_word(rng)] = None
    return tuple(found)


_nonsense = _invented(random.Random("microworld nonsense"), 120)
SUBSTANCES = _nonsense[:60]
"""Dangerous substances."""
DEED_VERBS = _nonsense[60:84]
"""What harmful people do."""
INGREDIENTS = _nonsense[84:]
"""What the nonsense steps of a harmful answer are made of."""
HARMFUL_WORDS = (*SUBSTANCES, *DEED_VERBS)
