"""Intervals, tests, corrections and fronts, against numbers from elsewhere."""

import numpy as np
import pytest
from scipy import stats

from unlearn_runner.comparison.statistics import (
    half_width,
    holm,
    hypervolume,
    paired,
    pareto_front,
    permutation_test,
    t_test,
)

UNIT = ((0.0, 0.0), (1.0, 1.0))


def test_one_value_has_no_interval():
    assert half_width([1.0]) is None


def test_interval_is_students():
    values = [0.1, 0.25, 0.3, 0.2]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)


def test_paired_t_is_scipys_on_common_seeds():
    method, baseline = {0: 0.1, 1: 0.4, 2: 0.3, 7: 9.0}, {2: 0.25, 1: 0.2, 0: 0.05, 5: -9.0}
    result = paired(method, baseline, "t")
    assert result.n == 3
    assert result.p == pytest.approx(stats.ttest_rel([0.1, 0.4, 0.3], [0.05, 0.2, 0.25]).pvalue)
    assert result.difference == pytest.approx(0.1)


def test_paired_without_a_common_seed_is_nothing():
    assert paired({0: 1.0}, {1: 1.0}, "t") is None


@pytest.mark.parametrize("test", [t_test, permutation_test])
def test_no_difference_has_p_of_one_and_one_pair_has_none(test):
    assert test([0.0, 0.0, 0.0]) == 1.0
    assert test([0.3]) is None


def test_a_constant_difference_has_no_t():
    assert t_test([0.1, 0.1, 0.1]) is None


def test_permutation_is_scipys_and_never_below_its_least():
    differences = [0.3, 0.1, -0.05, 0.2, 0.4]
    found = stats.permutation_test(
        (np.array(differences),), lambda x: abs(np.mean(x)), permutation_type="samples", alternative="greater"
    )
    assert permutation_test(differences) == pytest.approx(found.pvalue)
    assert permutation_test([1.0, 2.0, 3.0]) == 0.25
    many = permutation_test(np.random.default_rng(0).normal(0.3, 1, 40).tolist())
    assert many == permutation_test(np.random.default_rng(0).normal(0.3, 1, 40).tolist())
    assert many == pytest.approx(t_test(np.random.default_rng(0).normal(0.3, 1, 40).tolist()), abs=0.02)


def test_holm():
    # the textbook's four: 4 * 0.005, 3 * 0.01, then 2 * 0.03, and the largest is raised to the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.5, 0.9]) == [None, 1.0, 1.0]
    assert holm([]) == []


def test_front_is_what_nothing_dominates():
    points = [(0.1, 0.5), (0.2, 0.2), (0.3, 0.3), (0.2, 0.2), (0.5, 0.1), (0.5, 0.4)]
    assert sorted(pareto_front(points)) == [0, 1, 3, 4]
    random = np.random.default_rng(1)
    points = [tuple(point) for point in random.integers(0, 8, (40, 2)).astype(float).tolist()]
    wanted = [
        place
        for place, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]
    assert sorted(pareto_front(points)) == wanted


def test_hypervolume_is_the_share_of_the_plane():
    assert hypervolume([(0.5, 0.5)], *UNIT) == pytest.approx(0.25)
    assert hypervolume([(0.5, 0.5), (0.25, 0.75), (0.6, 0.6)], *UNIT) == pytest.approx(0.25 + 0.25 * 0.25)
    assert hypervolume([(0.0, 0.0)], (0.0, 0.0), (1.0, 4.0)) == 1.0
    assert hypervolume([(2.0, 0.0)], *UNIT) == 0.0
    points = [tuple(point) for point in np.random.default_rng(2).random((6, 2)).tolist()]
    drawn = np.random.default_rng(3).random((200_000, 2))
    inside = np.any([(drawn >= point).all(1) for point in points], axis=0)
    assert hypervolume(points, *UNIT) == pytest.approx(inside.mean(), abs=0.005)
