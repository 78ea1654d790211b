"""compare.md: a comparison's conclusion and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from lerobot_jax.comparison.conclusion import show_count, show_number, show_p
from lerobot_jax.comparison.results import AVERAGED
from lerobot_jax.comparison.statistics import HALF_WIDTHS, SIGNIFICANCE

Results = Mapping[str, Any]

_EXPLANATIONS = """\
- **The same episodes.** Every policy begins each episode from the same state. So differences are taken episode by
  episode, which shows smaller ones than separate evaluations would.
- **p** is how often policies that are equally good would differ by as much or more by chance. It is corrected for
  the number of pairs (Holm, 1979; success and {score} each by themselves). Below {level}, one policy is called
  better. A larger p does not show that two are equal: the interval tells how different they may be.
- **Intervals** hold the true value about 95 times out of 100. They are not corrected for the number of pairs, and
  somewhat too narrow for few episodes: where one leaves out 0 and the test cannot tell, believe the test.
- **Success**: interval of Wilson (1927). Differences: McNemar's exact test, which asks who wins the episodes that
  only one of the two solves, and Newcombe's interval for paired data (1998, method 10).
- **Max {score}**: the largest {score} of an episode, averaged over the episodes. Intervals: bootstrap (BCa).
  Differences: the permutation test that flips the signs of the episodes' differences.
- **Episodes it takes**: until a difference is known to within that margin with 95 % confidence, as far as the
  episodes seen so far can tell.
- **Steps to success**: averaged over the episodes that the policy solved. Those need not be the same for two
  policies, so pairs are compared in the episodes that both of them solved.
- **Path**: how far the agent went in an episode. Units are the environment's; in Push-T, pixels of its 512 x 512
  world.
- **Acceleration**: root of the mean squared acceleration in an episode, averaged over the episodes: the
  smoother the smaller. Of the agent's positions, and of the commands, the policy's actions.
- **Training time**: of all steps up to the checkpoint, with waiting for data; without compilation, evaluations and
  saving. From the run's metrics.jsonl; "n/a" without a run."""


_LATENCY = """\
That is the time from an observation to the actions of a chunk, for one robot, after compilation, with pre- and
postprocessing; p50 is the median, p99 is exceeded once in 100 times. The policies took turns, {rounds} times. All
else on this page belongs to each policy's own number of denoising steps."""


def write(results: Results, *, has_video: bool) -> str:
    """Write compare.md."""
    policies, env, num = results["policies"], results["env"], results["n_episodes"]
    names = [policy["name"] for policy in policies]
    pictures = "![successes, differences, latency and every episode](compare.png)"
    if has_video:
        pictures += "\n\nThe first episodes side by side: [compare.mp4](compare.mp4)"
    last_seed, delay = results["seed"] + num - 1, results["inference_delay"]
    waiting = f", inference delay {delay} steps" if delay else ""
    sections = [
        f"# {', '.join(names[:-1])} or {names[-1]}?",
        "\n".join(f"- {sentence}" for sentence in results["conclusion"]),
        pictures,
        f"## {num} episodes of {env['task']} (seeds {results['seed']} to {last_seed}{waiting})",
        _policies_table(results),
        "## Pair by pair",
        _pairs_table(results),
        "How many episodes it takes to know the differences to within a margin, about:",
        _episodes_table(results),
        *_latency_section(results),
        "## Size and training",
        _training_table(policies),
        "## How to read this",
        _EXPLANATIONS.format(score=results["score"], level=SIGNIFICANCE),
    ]
    return "\n\n".join(sections) + "\n"


def _policies_table(results: Results) -> str:
    head = (
        "Policy",
        "Success",
        f"Mean max {results['score']}",
        "Steps to success",
        "Path, units",
        "Acceleration of the agent, units/s²",
        "of the commands",
    )
    rows = []
    for policy in results["policies"]:
        success, score = policy["success"], policy["max_score"]
        low, high = (100 * bound for bound in success["interval"])
        rows.append(
            (
                f"**{policy['name']}**",
                f"{100 * success['rate']:.0f} % ({low:.0f} to {high:.0f})",
                "{:.3f} ({:.3f} to {:.3f})".format(score["mean"], *score["interval"]),
                *(_number(policy[name]) for name in AVERAGED),
            )
        )
    return _table(head, rows)


def _pairs_table(results: Results) -> str:
    head = (
        "Pair",
        "Solved by both / only the first / only the second / neither",
        "Success: difference",
        "McNemar",
        f"Mean max {results['score']}: difference",
        "Permutation",
        "Steps, where both succeed",
    )
    rows = []
    for success, score, steps in zip(
        results["success_differences"],
        results["score_differences"],
        results["steps_differences"],
        strict=True,
    ):
        low, high = (100 * bound for bound in success["interval"])
        rows.append(
            (
                _pair_name(success),
                " / ".join(str(count) for count in success["table"].values()),
                f"{100 * success['difference']:+.0f} points ({low:+.0f} to {high:+.0f})",
                _test(success),
                "{:+.3f} ({:+.3f} to {:+.3f})".format(score["difference"], *score["interval"]),
                _test(score),
                "n/a"
                if steps["difference"] is None
                else f"{steps['difference']:+.0f} ({steps['n']} episode{'s' * (steps['n'] > 1)})",
            )
        )
    return _table(head, rows)


def _episodes_table(results: Results) -> str:
    head = [
        "Pair",
        *(f"success ±{100 * x:.0f} points" for x in HALF_WIDTHS),
        *(f"{results['score']} ±{x:g}" for x in HALF_WIDTHS),
    ]
    rows = [
        (
            _pair_name(success),
            *(show_count(pair["episodes_for"][x]) for pair in (success, score) for x in HALF_WIDTHS),
        )
        for success, score in zip(results["success_differences"], results["score_differences"], strict=True)
    ]
    return _table(head, rows)


def _latency_section(results: Results) -> list[str]:
    if not results["latency"]:
        return []
    actions = {policy["name"]: policy["n_action_steps"] for policy in results["policies"]}
    rows = [
        (
            x["name"],
            "none"
            if x["denoising_steps"] is None
            else f"{x['denoising_steps']}" + (" (its own)" if x["is_configured"] else ""),
            f"{show_number(x['p50_ms'])} ms",
            f"{show_number(x['p99_ms'])} ms",
            f"{actions[x['name']] * 1000 / results['fps']:,.0f} ms",
        )
        for x in results["latency"]
    ]
    head = ("Policy", "Denoising steps", "p50 of a chunk", "p99", "after which it acts for")
    explanation = _LATENCY.format(rounds=results["latency_rounds"])
    return [f"## Latency on {results['machine']}", _table(head, rows), explanation]


def _training_table(policies: Sequence[Results]) -> str:
    rows = []
    for policy in policies:
        batch, step = policy["batch_size"], policy["step"]
        rows.append(
            (
                policy["name"],
                policy["type"],
                f"{policy['num_parameters']:,}",
                " + ".join(policy["datasets"] or ["n/a"]),
                "n/a" if step is None else f"{step:,}" + (f" of batch {batch}" if batch else ""),
                _duration(policy["training_s"]),
                f"`{policy['source']}`",
            )
        )
    return _table(("Policy", "Type", "Parameters", "Trained on", "Steps", "Training time", "From"), rows)


def _pair_name(pair: Mapping[str, Any]) -> str:
    return f"{pair['a']} - {pair['b']}"


def _test(pair: Mapping[str, Any]) -> str:
    verdict = "cannot tell" if pair["better"] is None else f"**{pair['better']}** is better"
    return f"{show_p(pair['p_holm'])}: {verdict}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
