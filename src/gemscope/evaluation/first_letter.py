"""Splitting and absorption of first letters, for any tokenizer (Chanin et al. 2024; "A is for Absorption").

A model that spells knows the first letter of a word at the word's last token. Words come from the tokenizer's own
vocabulary; a prompt shows some of them with their first letter and ends with one more; the activation is read at that
word's last token, found by its characters and not by counting tokens from the end. Each letter is then a label like any
other, and ``study`` does the rest; letters whose dense probe is too weak are left out, for what the model does not know
no latent can absorb.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gemscope.activations.positions import bucketed
from gemscope.core.arrays import Bool, Tensor
from gemscope.core.errors import InputError
from gemscope.evaluation.concepts import ConceptLabels
from gemscope.evaluation.labelled import LabelledRows
from gemscope.evaluation.probes import Probed, ProbeReport
from gemscope.evaluation.study import Study, study
from gemscope.evaluation.subject import Subject
from gemscope.models.gemma import Gemma
from gemscope.models.tokens import Role, Tokens

PROBE_F1 = 0.6
"""Letters whose dense probe has a smaller F1 are left out."""

SHOWN = 10
"""Words with their letter before the one that is read."""

_WORD = re.compile(r"▁[a-zA-Z]{2,}")


@dataclass(frozen=True)
class FirstLetters:
    """Of one dictionary."""

    name: str
    words: int
    letters: tuple[Probed, ...]
    """Those whose dense probe is good enough."""
    left_out: tuple[str, ...]
    """Those whose is not."""

    def _mean(self, values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    @property
    def full(self) -> float | None:
        """Mean full absorption over letters; None where no letter is left."""
        return self._mean([one.absorption.full for one in self.letters if one.absorption is not None])

    @property
    def partial(self) -> float | None:
        """Mean partial absorption."""
        return self._mean([one.absorption.partial for one in self.letters if one.absorption is not None])

    @property
    def splits(self) -> float | None:
        """Mean number of latents that a letter is split into."""
        return self._mean([float(one.splits) for one in self.letters if one.splits is not None])


def words_of(gemma: Gemma, most: int, seed: int = 0) -> list[str]:
    """Alphabetic words of the vocabulary that begin with a space, at most ``most``, drawn at random."""
    pieces = gemma.tokenizer.convert_ids_to_tokens(list(range(gemma.shape.vocab_size)))
    found = sorted({piece[1:] for piece in pieces if _WORD.fullmatch(piece or "")})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in order[:most]]


def prompts(gemma: Gemma, words: Sequence[str], seed: int = 0) -> tuple[list[Tokens], list[int]]:
    """One prompt per word, ``... dog has the first letter: D\\n cat``, and the position of the word's last token."""
    generator = torch.Generator().manual_seed(seed)
    items: list[Tokens] = []
    for word in words:
        picked = torch.randint(len(words), (SHOWN,), generator=generator).tolist()
        shown = "".join(f" {words[i]} has the first letter: {words[i][0].upper()}\n" for i in picked)
        items.append(gemma.tokens(f"{shown} {word}"))
    return items, [last_token(item) for item in items]


def last_token(tokens: Tokens) -> int:
    """The position that holds the last character of the text."""
    end = len(tokens.text)
    return next(i for i in reversed(range(len(tokens))) if tokens.offsets[i][0] < end <= tokens.offsets[i][1])


@torch.no_grad()
def first_letters(
    gemma: Gemma,
    subjects: Sequence[Subject],
    *,
    most: int = 5000,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> list[FirstLetters]:
    """Splitting and absorption of every dictionary; raises InputError when the vocabulary has too few words."""
    words = words_of(gemma, most, seed)
    if len(words) < 200:
        raise InputError(f"the tokenizer of {gemma.name} has {len(words)} alphabetic words; first letters need 200.")
    items, at = prompts(gemma, words, seed)
    labels = ConceptLabels(tuple(string.ascii_lowercase), [_letters(word) for word in words])
    rows = LabelledRows(len(subjects), frozenset(range(len(items))))
    sites = tuple(dict.fromkeys(site for subject in subjects for site in subject.sites))
    for chosen, batch in bucketed(gemma, items, batch_tokens):
        seen = gemma.capture(batch, sites)
        place = torch.tensor([at[i] for i in chosen])
        x = {site: seen[site][torch.arange(len(chosen)), place.to(seen[site].device)].float() for site in sites}
        codes = [subject.codes(subject.stack(x)) for subject in subjects]
        rows.add(codes, x, torch.cat([labels.marks[i] for i in chosen]), torch.tensor(chosen))
    alone = tuple(_alone(item, place) for item, place in zip(items, at, strict=True))
    reports = study(gemma, Study(tuple(subjects), rows, labels, alone, batch_tokens, seed, True), random_model=False)
    return [_kept(subject, report, len(words)) for subject, report in zip(subjects, reports, strict=True)]


def _letters(word: str) -> Bool[Tensor, "1 letters"]:
    return torch.tensor([[letter == word[0].lower() for letter in string.ascii_lowercase]])


def _alone(tokens: Tokens, at: int) -> Tokens:
    """The prompt with its last word as the only content: the one row that is probed."""
    roles = tuple(Role.CONTENT if i == at else Role.TEMPLATE for i in range(len(tokens)))
    return replace(tokens, roles=roles)


def _kept(subject: Subject, report: ProbeReport, words: int) -> FirstLetters:
    good = {one.concept: (score := one.score("dense")) is not None and score.f1 > PROBE_F1 for one in report.concepts}
    letters = tuple(one for one in report.concepts if good[one.concept])
    left_out = tuple(letter for letter in string.ascii_lowercase if not good.get(letter, False))
    return FirstLetters(subject.name, words, letters, left_out)
