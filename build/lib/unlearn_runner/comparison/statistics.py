"""What can be said of a few seeds: intervals, paired tests with Holm's correction, Pareto fronts and hypervolumes."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

EXACT_UP_TO = 16  # pairs: 65,536 sign patterns
PATTERNS = 20_000  # drawn for more pairs than that
LEVEL = 0.05
Z = 1.959963984540054  # the normal distribution's 97.5 % quantile

TESTS = {
    "t": "two-sided paired t test (for independent, normal differences)",
    "permutation": "two-sided paired permutation test (signs of the differences flipped: before correction p is at "
    "least 0.25 with 3 pairs, 0.06 with 5)",
}


class Paired(NamedTuple):
    """A method against the baseline on the same seeds."""

    difference: float  # mean of method minus baseline
    half_width: float | None  # of the difference's 95 % interval, Student's t
    n: int  # seeds that both have
    p: float | None  # None where the test says nothing: under two pairs, or equal differences that are not 0
    adjusted: float | None  # p after Holm's correction


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % confidence interval of the mean, Student's t; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # scipy.stats has the same behind a second of imports

    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


def interval(
    values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf), num_samples: int | None = None
) -> tuple[float, float] | None:
    """95 % confidence interval of the mean over seeds, by Student's t, cut at the `bounds` of what is measured.

    Cutting loses no coverage, for no true mean lies beyond them. A single value, and values that are all the same,
    have no spread to go by: of a share of `num_samples` samples they get `wilson`'s interval, which says how much
    other samples would change it and nothing of other seeds; all else gets None.
    """
    half, centre = half_width(values), mean(values)
    if half:
        return max(bounds[0], centre - half), min(bounds[1], centre + half)
    return wilson(centre, num_samples) if num_samples is not None and 0 <= centre <= 1 else None


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a probability, from the `share` in [0, 1] of `n` independent samples that had it.

    Wilson's score interval (J. Am. Stat. Assoc. 22:209, 1927): within [0, 1], and of some width at 0 and at 1.
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(method: dict[int, float], baseline: dict[int, float], test: str) -> Paired | None:
    """`test` (a key of TESTS) on values by seed, uncorrected; None without a common seed."""
    differences = [method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys())]
    if not differences:
        return None
    (p,) = p_values(np.array([differences]), test)
    return Paired(mean(differences), half_width(differences), len(differences), p, None)


def p_values(differences: np.ndarray, test: str) -> list[float | None]:
    """Of each row of differences [m n] of n pairs, the p of `test` (a key of TESTS); None where it has none."""
    if test == "t":
        return t_test(differences)
    return [permutation_test(row) for row in differences.tolist()]


def t_test(differences: np.ndarray) -> list[float | None]:
    """Two-sided p of a mean of 0 for each row of differences [m n]; None where the t statistic is not defined."""
    n = differences.shape[1]
    if n < 2:
        return [None] * len(differences)
    from scipy.special import stdtr

    centre, spread = np.abs(differences.mean(1)), differences.std(1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(n - 1, -centre / (spread / math.sqrt(n)))
    p[spread <= 1e-12 * centre] = math.nan  # equal up to rounding
    p[(differences == 0).all(1)] = 1.0
    return [None if math.isnan(value) else value for value in p.tolist()]


def permutation_test(differences: Sequence[float], seed: int = 0) -> float | None:
    """Two-sided p of differences that are symmetric about 0: exact up to 16 pairs, by 20,000 patterns beyond.

    Its least value is 2 / 2^n: three pairs never get below 0.25.
    """
    values, n = np.asarray(differences, dtype=float), len(differences)
    if n < 2:
        return None
    if n <= EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (PATTERNS, n))
        signs = np.concatenate([np.ones((1, n), dtype=int), 1 - 2 * drawn])  # what was observed is a pattern too
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the values that are there; the others stay None."""
    there = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(there):
        largest = max(largest, min(1.0, p * (len(there) - rank)))
        adjusted[place] = largest
    return adjusted


def corrected(tested: Sequence[tuple[int, float | None]]) -> list[float | None]:
    """Holm's correction of tests of so many pairs with this p, None where a test has none.

    Too few pairs were so before anything was measured, and do not count as a test. That a difference is constant was
    seen in the data, and counts.
    """
    adjusted = holm([1.0 if p is None and n > 1 else p for n, p in tested])
    return [None if p is None else after for (_, p), after in zip(tested, adjusted, strict=True)]


def against_best(
    values: Mapping[str, Mapping[int, float]], best: str, test: str
) -> dict[str, tuple[int, float | None]]:
    """Of every method but the one with the best mean, which was picked from these very values by seed: how many seeds
    both have, and the corrected p of their difference, None where the test has none.

    Holm's correction is over ALL pairs of methods, whichever was picked: then some difference that is not there is
    found with a probability of at most 0.05 even so, whatever the methods' variances and however their seeds go
    together. Hsu's comparisons with the best (Ann. Stat. 9:1026, 1981) have the same aim and more power, but pool one
    variance over all methods, which here differ by orders of magnitude.
    """
    together: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for pair in combinations(values, 2):
        together.setdefault(tuple(sorted(values[pair[0]].keys() & values[pair[1]].keys())), []).append(pair)
    found: dict[tuple[str, str], tuple[int, float | None]] = {}
    for seeds, pairs in together.items():
        at = {label: np.array([values[label][seed] for seed in seeds]) for label in {*sum(pairs, ())}}
        tested = p_values(np.array([at[one] - at[two] for one, two in pairs]), test)
        found |= {pair: (len(seeds), p) for pair, p in zip(pairs, tested, strict=True)}
    return {
        two if one == best else one: (n, adjusted)
        for ((one, two), (n, _)), adjusted in zip(found.items(), corrected(list(found.values())), strict=True)
        if best in (one, two)
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other one dominates; both coordinates are costs."""
    front: list[int] = []
    least = math.inf
    last: tuple[float, float] | None = None
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if points[place][1] < least or points[place] == last:  # equal points share their place on the front
            front.append(place)
            least, last = points[place][1], points[place]
    return front


def hypervolume(points: Sequence[tuple[float, float]], ideal: tuple[float, float], worst: tuple[float, float]) -> float:
    """Share of the rectangle from `ideal` to `worst` that the points dominate; both coordinates are costs."""
    clipped = [(max(x, ideal[0]), max(y, ideal[1])) for x, y in points if x < worst[0] and y < worst[1]]
    area, below = 0.0, worst[1]
    for x, y in sorted(clipped):
        if y < below:
            area += (worst[0] - x) * (below - y)
            below = y
    return area / ((worst[0] - ideal[0]) * (worst[1] - ideal[1]))
