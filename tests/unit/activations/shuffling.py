"""Is a shuffle a shuffle? Each number is about standard normal for a random permutation, and large otherwise."""

import numpy as np


def spread(doc: np.ndarray) -> float:
    """Rows of one document spread as a random permutation would: Kruskal and Wallis' H over documents, normalised.

    The between-document sum of squares of the places has mean D - 1 and variance about 2 (D - 1) under the
    permutation of N places.
    """
    n = len(doc)
    _, which, counts = np.unique(doc, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=np.arange(n)) / counts
    h = 12 / (n * (n + 1)) * (counts * (means - (n - 1) / 2) ** 2).sum()
    d = len(counts)
    return float((h - (d - 1)) / np.sqrt(2 * (d - 1)))


def neighbours(doc: np.ndarray) -> float:
    """Neighbouring rows of one document: about Poisson under a permutation, many more without a shuffle."""
    n = len(doc)
    counts = np.unique(doc, return_counts=True)[1].astype(float)
    expected = (counts * (counts - 1)).sum() / n
    return float(((doc[1:] == doc[:-1]).sum() - expected) / np.sqrt(expected))


def batch_means(batches: list[np.ndarray]) -> float:
    """Means of equal batches differ by sampling error: the chi-squared statistic of their deviations, normalised."""
    size = len(batches[0])
    whole = np.concatenate(batches)
    error = whole.var() / size * (1 - size / len(whole))
    chi = ((np.array([one.mean() for one in batches]) - whole.mean()) ** 2).sum() / error
    count = len(batches)
    return float((chi - count) / np.sqrt(2 * count))
