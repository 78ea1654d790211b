"""Which differences are real? Intervals and tests for policies that ran the same episodes, one by one.

All intervals are 95 % intervals, all tests are two-sided. What is random is drawn from a fixed seed, so the same
episodes always give the same numbers.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from lerobot_jax.eval import wilson_interval

SIGNIFICANCE = 0.05
HALF_WIDTHS = (0.1, 0.05, 0.02)  # for which it is told how many episodes they take
_NUM_PERMUTATIONS = 99_999  # up to 16 episodes, these are all that there are, and the test is exact
_NUM_BOOTSTRAPS = 9_999
_Z = 1.96

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much more policy `a` reaches than policy `b` in the same episodes."""

    a: str
    b: str
    difference: float
    interval: Interval
    p: float
    episodes_for: dict[float, int | None]  # half width of an interval -> about how many episodes it takes
    table: dict[str, int] | None = None  # how many episodes were solved by both, only a, only b, neither
    p_holm: float | None = None  # corrected for the number of pairs, by `decide`
    better: str | None = None  # who, if the difference is significant


def compare_successes(
    a: str, b: str, success_a: Bool[np.ndarray, " n"], success_b: Bool[np.ndarray, " n"]
) -> Difference:
    """Compare two policies' successes episode by episode: McNemar's exact test, Newcombe's interval.

    Args:
        a: a policy's name.
        b: another's.
        success_a: which episodes the first one solved.
        success_b: which of the same episodes the second one solved.
    """
    n = len(success_a)
    both, only_a = int(np.sum(success_a & success_b)), int(np.sum(success_a & ~success_b))
    only_b, neither = int(np.sum(~success_a & success_b)), int(np.sum(~success_a & ~success_b))
    # Half an episode more in each cell (Agresti and Min, 2005), lest a few equal episodes seem certain.
    share, shift = (only_a + only_b + 1) / (n + 2), (only_a - only_b) / (n + 2)
    return Difference(
        a,
        b,
        difference=(only_a - only_b) / n,
        interval=newcombe_interval(both, only_a, only_b, neither),
        p=mcnemar_test(only_a, only_b),
        episodes_for=_episodes_for(share - shift**2),
        table={"both": both, "only_a": only_a, "only_b": only_b, "neither": neither},
    )


def compare_scores(
    a: str, b: str, score_a: Float[np.ndarray, " n"], score_b: Float[np.ndarray, " n"]
) -> Difference:
    """Compare two policies' scores episode by episode: sign-flip permutation test, bootstrap interval."""
    differences = score_a - score_b
    variance = float(differences.var(ddof=1)) if len(differences) > 1 else 0.0
    return Difference(
        a,
        b,
        difference=float(differences.mean()),
        interval=mean_interval(differences),
        p=sign_flip_test(differences),
        episodes_for=_episodes_for(variance),
    )


def decide(pairs: Sequence[Difference]) -> list[Difference]:
    """Correct the p values of all pairs for their number, and tell who is better."""
    decided = []
    for pair, p in zip(pairs, holm([pair.p for pair in pairs]), strict=True):
        ahead = pair.a if pair.difference > 0 else pair.b
        decided.append(dataclasses.replace(pair, p_holm=p, better=ahead if p < SIGNIFICANCE else None))
    return decided


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm, 1979): the chance of any false finding stays at the level."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def mcnemar_test(only_a: int, only_b: int) -> float:
    """Give the p value of McNemar's exact test: who wins the episodes that only one of two policies solves?"""
    num = only_a + only_b
    return float(stats.binomtest(only_a, num).pvalue) if num else 1.0


def newcombe_interval(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """Give the interval of the difference of two success rates in the same episodes.

    Newcombe (1998), Improved confidence intervals for the difference between binomial proportions based on paired
    data, Statistics in Medicine 17, method 10: Wilson's intervals, joined by the correlation φ of the successes.
    """
    n = both + only_a + only_b + neither
    successes_a, successes_b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = (wilson_interval(k, n) for k in (successes_a, successes_b))
    rate_a, rate_b = successes_a / n, successes_b / n
    margins = successes_a * (n - successes_a) * successes_b * (n - successes_b)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)  # correction for continuity
    φ = covariance / math.sqrt(margins) if margins else 0.0

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(x**2 - 2 * φ * x * y + y**2, 0.0))

    difference = rate_a - rate_b
    return (
        max(-1.0, difference - joined(rate_a - low_a, high_b - rate_b)),
        min(1.0, difference + joined(high_a - rate_a, rate_b - low_b)),
    )


def sign_flip_test(differences: Float[np.ndarray, " n"]) -> float:
    """Give the p value of the permutation test that flips the signs of paired differences (Fisher, 1935)."""
    result = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_NUM_PERMUTATIONS,
        batch=1_000,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def mean_interval(values: Float[np.ndarray, " n"]) -> Interval:
    """Give the bootstrap interval (BCa; Efron, 1987) of a mean; without any spread, the value itself."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_NUM_BOOTSTRAPS,
        batch=1_000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _episodes_for(variance: float) -> dict[float, int | None]:
    """Tell how many episodes it takes to know a mean difference to +-x, from the variance of one; None: unknown."""
    return {x: math.ceil(variance * (_Z / x) ** 2) or None for x in HALF_WIDTHS}
