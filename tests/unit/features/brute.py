"""What an index must hold, counted the slow way: number by number, in plain Python."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from typing import Any

import numpy as np
import torch


def bin_number(value: float) -> int:
    """Eight bins an octave from 2**-12, by the value's exponent and fraction."""
    fraction, exponent = math.frexp(value)  # value = fraction * 2**exponent, fraction in [0.5, 1)
    return min(max((exponent - 1 + 12) * 8 + int((fraction * 2 - 1) * 8), 0), 255)


def bfloat(value: float) -> float:
    """Rounded to bfloat16, ties to even."""
    return torch.tensor(value).bfloat16().float().item()


def step_range(step: int) -> int:
    return min(int(math.log2(step + 1)), 15)


def counted(
    acts: torch.Tensor, doc: list[int], pos: list[int], piece: list[int], special: list[bool], top: int, window: int
) -> list[dict[str, Any]]:
    """One entry a latent, from dense activations [rows, latents] of rows in the order of documents."""
    found: list[dict[str, Any]] = []
    for latent in range(acts.shape[1]):
        value = {row: acts[row, latent].item() for row in range(len(doc)) if acts[row, latent] > 0}
        content = {row: v for row, v in value.items() if not special[row]}
        histogram: dict[int, int] = defaultdict(int)
        steps: dict[int, int] = defaultdict(int)
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for row, v in content.items():
            histogram[bin_number(v)] += 1
            steps[step_range(pos[row])] += 1
            key = (doc[row], piece[row])
            if key not in best or v > best[key][0]:
                best[key] = (v, row)
        order = sorted(best.values(), key=lambda one: (-one[0], doc[one[1]], pos[one[1]]))[:top]
        near = [
            {
                other - row: bfloat(content[other])
                for other in range(row - window, row + window + 1)
                if other != row and other in content and (doc[other], piece[other]) == (doc[row], piece[row])
            }
            for _, row in order
        ]
        theirs = [v for row, v in value.items() if special[row]]
        found.append(
            {
                "count": len(content),
                "peak": max(content.values(), default=0.0),
                "special_count": len(theirs),
                "special_peak": max(theirs, default=0.0),
                "histogram": dict(sorted(histogram.items())),
                "steps": dict(steps),
                "top": [(v, doc[row], pos[row]) for v, row in order],
                "near": near,
            }
        )
    return found


def groups_of(values: list[float], groups: int) -> dict[float, int]:
    """Quantile group of each activation among all: where the middle of those that equal it stands."""
    order, found = sorted(values), {}
    for value in set(values):
        middle = (bisect_left(order, value) + bisect_right(order, value)) * groups
        found[value] = min(middle // (2 * len(order)), groups - 1)
    return found


def jaccard(active: np.ndarray, k: int) -> list[list[tuple[int, int, float]]]:
    """(latent, tokens with both, Jaccard) of the k best partners, from a dense boolean matrix."""
    found: list[list[tuple[int, int, float]]] = []
    for a in range(active.shape[1]):
        scores = []
        for b in range(active.shape[1]):
            both = int((active[:, a] & active[:, b]).sum())
            if b != a and both:
                scores.append((b, both, both / int((active[:, a] | active[:, b]).sum())))
        found.append(sorted(scores, key=lambda one: (-one[2], one[0]))[:k])
    return found
