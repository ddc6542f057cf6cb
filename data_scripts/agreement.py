"""How much people agree when they label the same texts: Krippendorff's alpha with MASI distance.

alpha = 1 - observed / expected, where, with distance d between two people's label sets,

    observed = 1 / n * sum over texts t of  sum over ordered pairs of labellings of t of d / (n_t - 1)
    expected = 1 / n * sum over ordered pairs of all labellings of d / (n - 1)

n_t is the number of people who labelled text t, n their sum over the texts labelled at least twice: a text with one
labelling has nobody to agree with and counts nowhere. 1 is perfect agreement, 0 is what chance gives.

Krippendorff 2004, "Content Analysis", chapter 11; Passonneau 2006, "Measuring Agreement on Set-valued Items (MASI)".
PEFT-U (arXiv:2407.18078) reports it as its measure of how personal a task is.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from itertools import combinations
from math import fsum, nan


def krippendorff_alpha(labellings: Iterable[tuple[Hashable, Iterable[str]]]) -> float:
    """1 - observed / expected disagreement of (text id, labels) pairs, one pair for each person and text.

    Returns:
        At most 1; 1.0 if all labellings are the same; nan if no text was labelled twice. The order of the pairs does
        not matter, not even to the last bit.
    Cost:
        Linear in the pairs; quadratic only in the distinct label sets, of one text for the observed part and of all
        texts for the expected part. Half a million pairs take a second or two.
    """
    codes: dict[frozenset[str], int] = {}                # label set -> its row in the table of distances
    by_text: dict[Hashable, Counter[int]] = {}
    for text_id, labels in labellings:
        code = codes.setdefault(frozenset(labels), len(codes))
        by_text.setdefault(text_id, Counter())[code] += 1
    counts = [sets for sets in by_text.values() if sets.total() > 1]
    everything: Counter[int] = Counter()
    for sets in counts:
        everything.update(sets)
    if not everything:
        return nan
    if len(everything) == 1:
        return 1.0
    distances = [[masi_distance(a, b) for b in codes] for a in codes]
    observed = fsum(_disagreement(sets, distances) for sets in counts)
    expected = _disagreement(everything, distances)
    return 1 - observed / expected                       # both lack the factor 1 / n, which cancels


def masi_distance(a: frozenset[str], b: frozenset[str]) -> float:
    """d = 1 - |a and b| / |a or b| * m: Jaccard distance, with a penalty m for how the sets overlap.

    m is 1 for equal sets, 2/3 if one contains the other, 1/3 if they overlap otherwise (Passonneau 2006). Two single
    labels are at distance 0 or 1, so that for a task with one label per example alpha is nominal alpha.
    """
    if a == b:
        return 0.0
    shared = len(a & b)
    penalty = 2 / 3 if shared == min(len(a), len(b)) else 1 / 3
    return 1 - shared / len(a | b) * penalty


def _disagreement(sets: Counter[int], distances: list[list[float]]) -> float:
    """Sum of d over the ordered pairs of labellings, over (how many labellings there are - 1)."""
    pairs = combinations(sets.items(), 2)
    return 2 * fsum(num_a * num_b * distances[a][b] for (a, num_a), (b, num_b) in pairs) / (sets.total() - 1)
