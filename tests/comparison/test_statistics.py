"""Numbers from the literature, and from R, as they are written there."""

import numpy as np
import pytest

from lerobot_jax.comparison import statistics
from lerobot_jax.comparison.statistics import (
    compare_scores,
    compare_successes,
    decide,
    holm,
    mcnemar_test,
    mean_interval,
    newcombe_interval,
    sign_flip_test,
)

# Darwin's maize, crossed minus self-fertilized, in eighths of an inch (Fisher, The design of experiments, 1935).
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], float)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval(successes: int, trials: int, low: float, high: float):
    assert statistics.wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "low", "high"),
    # Newcombe (1998), ... based on paired data, table III, method 10; the last is the AHR study in Fagerland,
    # Lydersen and Laake (2014), Recommended tests and confidence intervals for paired binomial proportions.
    [
        (36, 12, 2, 0, 0.0569, 0.3404),
        (18, 12, 2, 18, 0.0562, 0.3290),
        (53, 0, 0, 1, -0.0729, 0.0729),
        (0, 30, 0, 0, 0.8395, 1.0),
        (1, 1, 7, 12, -0.507, -0.026),
    ],
)
def test_newcombes_interval(both: int, only_a: int, only_b: int, neither: int, low: float, high: float):
    found = newcombe_interval(both, only_a, only_b, neither)
    assert found == pytest.approx((low, high), abs=5e-4 if both == 1 else 5e-5)
    swapped = newcombe_interval(both, only_b, only_a, neither)
    assert swapped == pytest.approx((-found[1], -found[0]))


def test_mcnemars_test():
    assert mcnemar_test(1, 7) == pytest.approx(18 / 256)  # Fagerland, Lydersen and Laake: 0.0703
    assert mcnemar_test(12, 2) == pytest.approx(0.0129, abs=5e-5)  # Armitage and Berry (1994), cultures
    assert mcnemar_test(2, 12) == mcnemar_test(12, 2)
    assert mcnemar_test(150, 86) == pytest.approx(3.716e-5, rel=1e-3)  # Agresti (1990), approval ratings
    assert mcnemar_test(0, 0) == mcnemar_test(3, 3) == 1.0


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_the_sign_flip_test():
    # Fisher counted 863 of the 32768 sign patterns at one end.
    assert sign_flip_test(DARWIN) == pytest.approx(2 * 863 / 2**15)
    assert sign_flip_test(-DARWIN) == sign_flip_test(DARWIN)
    assert sign_flip_test(np.ones(5)) == 2 / 2**5
    assert sign_flip_test(np.zeros(40)) == 1.0
    many = np.concatenate([DARWIN, DARWIN])  # more patterns than are drawn
    assert sign_flip_test(many) == sign_flip_test(many) < 0.01


def test_the_bootstrap_interval():
    low, high = mean_interval(DARWIN)
    # About the mean +- 2 standard errors (20.93, 9.41), longer on the side where the tail is.
    assert low == pytest.approx(20.93 - 2 * 9.41, abs=5)
    assert high == pytest.approx(20.93 + 2 * 9.41, abs=5)
    assert 20.93 - low > high - 20.93
    assert mean_interval(DARWIN) == (low, high)
    assert mean_interval(np.full(9, 0.3)) == (0.3, 0.3)
    assert mean_interval(np.array([0.7])) == (0.7, 0.7)


def test_the_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    draws = [mean_interval(rng.uniform(size=30)) for _ in range(60)]
    assert 0.85 < np.mean([low < 0.5 < high for low, high in draws]) <= 1


def test_successes_are_compared_episode_by_episode():
    a = np.array([1, 1, 1, 0, 1, 0, 1, 1, 1, 1], bool)
    b = np.array([1, 0, 0, 0, 0, 1, 0, 0, 0, 0], bool)
    pair = compare_successes("a", "b", a, b)
    assert pair.table == {"both": 1, "only_a": 7, "only_b": 1, "neither": 1}
    assert pair.difference == pytest.approx(0.6)
    assert pair.p == mcnemar_test(7, 1)
    assert pair.interval == newcombe_interval(1, 7, 1, 1)
    assert pair.better is None


def test_episodes_that_it_takes():
    """100 episodes that differ in 20 to 10: a standard error of 5.4 points, so 4.6 times as many for +-5."""
    a, b = np.zeros(100, bool), np.zeros(100, bool)
    a[:20], b[20:30] = True, True
    needed = compare_successes("a", "b", a, b).episodes_for
    variance = 31 / 102 - (10 / 102) ** 2
    assert needed == {x: int(np.ceil(variance * (1.96 / x) ** 2)) for x in (0.1, 0.05, 0.02)}
    assert 440 < (needed[0.05] or 0) < 470
    # Equal in all episodes seen: that does not make a difference impossible.
    same = compare_successes("a", "b", a, a).episodes_for
    assert 0 < (same[0.02] or 0) < 100
    assert compare_scores("a", "b", np.ones(5), np.ones(5)).episodes_for[0.1] is None
    scores = compare_scores("a", "b", DARWIN / 100, np.zeros(15)).episodes_for
    assert scores[0.1] == int(np.ceil(DARWIN.var(ddof=1) / 100**2 * (1.96 / 0.1) ** 2))


def test_only_corrected_p_values_decide():
    n = 15
    clear = compare_scores("a", "b", np.arange(n) / n + 1, np.zeros(n))
    close = compare_scores("a", "c", DARWIN, np.zeros(n))
    reverse = compare_scores("b", "c", np.zeros(n), np.arange(n) / n + 1)
    one, two, three = decide([clear, close, reverse])
    assert (one.better, two.better, three.better) == ("a", None, "c")
    assert one.p_holm == pytest.approx(3 * clear.p)
    assert two.p_holm == close.p > 0.05
    barely = compare_successes("a", "b", np.ones(6, bool), np.zeros(6, bool))  # p = 2 / 64
    assert decide([barely])[0].better == "a"
    assert [pair.better for pair in decide([barely, barely])] == [None, None]
