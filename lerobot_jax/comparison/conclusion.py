"""What a comparison shows, in plain words: which policy is better by which test, or that nobody can tell yet."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping[str, Any]

_MARGIN = 0.05  # to within which a difference should be known
_AS_FAST = 1.25  # times as long still counts as equally fast


class Measure(NamedTuple):
    """Something by which policies are compared, and how it is told."""

    title: str
    test: str
    means: dict[str, float]  # of each policy
    differences: list[dict[str, Any]]  # of each pair
    scale: int
    value: str  # formats of a mean, of a difference, of a margin
    difference: str
    margin: str


def conclude(results: Results) -> list[str]:
    """Say in a few sentences who is best by success, by score and by speed, and what that does not mean."""
    policies, num = results["policies"], results["n_episodes"]
    success = Measure(
        title="success",
        test="McNemar's exact test",
        means={policy["name"]: policy["success"]["rate"] for policy in policies},
        differences=results["success_differences"],
        scale=100,
        value="{:.0f} %",
        difference="{:+.0f}",
        margin="{:.0f} points",
    )
    score = Measure(
        title=f"mean max {results['score']}",
        test="permutation test",
        means={policy["name"]: policy["max_score"]["mean"] for policy in policies},
        differences=results["score_differences"],
        scale=1,
        value="{:.3f}",
        difference="{:+.3f}",
        margin="{:.2f}",
    )
    if any(success.means.values()):
        sentences = [_rank(success, num)]
    else:
        high = 100 * policies[0]["success"]["interval"][1]
        nobody = (
            f"nobody solved one of the {num} episodes, but success rates of up to {high:.0f} % are possible"
        )
        sentences = [f"By success, **none is better**: {nobody}."]
    sentences.append(_rank(score, num))
    if results["latency"]:
        sentences.append(_compare_speed(results))
    trained_on = {policy["name"]: " + ".join(policy["datasets"] or ["unknown data"]) for policy in policies}
    if len(set(trained_on.values())) > 1:
        told = ", ".join(f"{name} from {datasets}" for name, datasets in trained_on.items())
        sentences.append(f"They did not learn from the same data ({told}): that may make the difference.")
    sentences.append(
        "This is about these checkpoints, not about their recipes: with another seed for its training, each would "
        "be another policy."
    )
    return sentences


def show_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def show_number(value: float) -> str:
    """Show a positive number with at least two digits."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def show_count(n: int | None) -> str:
    """Show a number of episodes with the two digits that count."""
    if n is None:
        return "n/a"
    digits = len(str(n)) - 2
    return f"{round(n, -digits) if digits > 0 else n:,}"


def _rank(measure: Measure, num_episodes: int) -> str:
    """Say who is best, or who of the best cannot be told apart by so many episodes."""
    best, *others = sorted(measure.means, key=lambda name: -measure.means[name])
    pairs = {name: _pair(measure, best, name) for name in others}
    rivals = [name for name in others if pairs[name]["better"] is None]
    beaten = [name for name in others if name not in rivals]
    num_pairs = len(measure.differences)
    test = measure.test + (f", corrected for {num_pairs} pairs" if num_pairs > 1 else "")

    def told(names: Sequence[str]) -> str:
        return _listed(
            [f"{_value(measure, name)} of {name} ({show_p(pairs[name]['p_holm'])})" for name in names]
        )

    if not rivals:
        return (
            f"By {measure.title}, **{best} is best**: {_value(measure, best)}, against {told(beaten)} by {test}. "
            f"{_lead(measure, pairs[beaten[0]], best, beaten[0])}."
        )
    sentence = (
        f"By {measure.title}, **{num_episodes} episodes do not tell {best} from {_listed(rivals)}**: "
        f"{_value(measure, best)}, against {told(rivals)} by {test}."
    )
    if beaten:
        sentence += f" {best} is better than the {told(beaten)}."
    closest = pairs[rivals[0]]
    sentence += f" {_lead(measure, closest, best, rivals[0])}"
    if (needed := closest["episodes_for"][_MARGIN]) is not None:
        margin = measure.margin.format(measure.scale * _MARGIN)
        sentence += f"; about {show_count(needed)} episodes would tell it to within {margin}"
    return sentence + "."


def _lead(measure: Measure, pair: Mapping[str, Any], best: str, other: str) -> str:
    """Tell the difference between two policies, with its interval."""
    if not any(pair["interval"]):
        return "They reach the same in every episode"
    sign = measure.scale if pair["a"] == best else -measure.scale
    numbers = sorted(sign * number for number in (pair["difference"], *pair["interval"]))
    low, difference, high = (measure.difference.format(number) for number in numbers)
    unit = " points" if measure.scale == 100 else ""
    return f"The difference to {other} is {difference}{unit} (95 % interval {low} to {high})"


def _compare_speed(results: Results) -> str:
    """Say who acts fastest, and who takes longer than a step lasts."""
    own = {x["name"]: x for x in results["latency"] if x["is_configured"]}
    order = sorted(own, key=lambda name: own[name]["p50_ms"])
    least = own[order[0]]["p50_ms"]
    fastest = [name for name in order if own[name]["p50_ms"] <= _AS_FAST * least]
    others = order[len(fastest) :]
    times = " to ".join(dict.fromkeys(show_number(own[name]["p50_ms"]) for name in (fastest[0], fastest[-1])))
    chunk = f"{times} ms for a chunk on {results['machine']} (median)"
    if others:
        factors = [f"{show_number(own[name]['p50_ms'] / least)} times as long for {name}" for name in others]
        verb = "acts" if len(fastest) == 1 else "act"
        sentence = f"**{_listed(fastest)} {verb} fastest**: {chunk}, {_listed(factors)}."
    else:
        sentence = f"**{_listed(fastest)} act about equally fast**: {chunk}."
    step_ms = 1000 / results["fps"]
    late = [name for name in order if own[name]["p99_ms"] > step_ms]
    if late:
        sentence += f" Sometimes it takes {_listed(late)} longer than a step lasts ({step_ms:.0f} ms)."
    return sentence


def _pair(measure: Measure, a: str, b: str) -> dict[str, Any]:
    return next(pair for pair in measure.differences if {pair["a"], pair["b"]} == {a, b})


def _value(measure: Measure, name: str) -> str:
    return measure.value.format(measure.scale * measure.means[name])


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
