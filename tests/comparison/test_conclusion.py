"""What is said about made-up results of which everybody would say so."""

import numpy as np
import pytest

from lerobot_jax.comparison import report
from lerobot_jax.comparison.conclusion import conclude, show_count, show_number, show_p
from lerobot_jax.comparison.results import compare_pairs, summarize_episodes
from lerobot_jax.eval import Episode


def make_results(**solved: int) -> dict:
    """Give results of policies that solve the first so many of 40 episodes, and cover half in the others."""
    policies = []
    for i, (name, num) in enumerate(solved.items()):
        episodes = []
        for n in range(40):
            episode = Episode(n, 1000 + n, fps=10, length=50, max_reward=1.0)
            episode.success, episode.steps_to_success = n < num, 50 + i if n < num else None
            episode.best_info = {"coverage": 0.97 if n < num else 0.5 + n / 1000}
            episode.positions = [np.array([0.0, 0.0]), np.array([3.0, 4.0])]
            episode.commands = [np.array([0.0, 0.0])]
            episodes.append(episode)
        policies.append(
            {
                "name": name,
                "datasets": ["user/data"],
                "step": None,
                "batch_size": None,
                "training_s": 3720 * i,
            }
            | {"type": "act", "num_parameters": 1000, "n_action_steps": 8, "source": name}
            | summarize_episodes(episodes, "coverage")
        )
    latency = [
        {
            "name": name,
            "denoising_steps": None,
            "is_configured": True,
            "p50_ms": 2.0**i,
            "p99_ms": 80.0 * 2**i,
        }
        for i, name in enumerate(solved)
    ]
    results = {
        "policies": policies,
        "n_episodes": 40,
        "inference_delay": 0,
        "score": "coverage",
        "fps": 10,
        "latency": latency,
    }
    results |= {"machine": "2 CPU cores", "seed": 1000, "latency_rounds": 9, "env": {"task": "PushT-v0"}}
    return results | compare_pairs(policies)


def test_a_clear_winner():
    success, score, speed, caveat = conclude(make_results(act=36, diffusion=10))
    assert success == (
        "By success, **act is best**: 90 %, against 25 % of diffusion (p < 0.001) by McNemar's exact test. The "
        "difference to diffusion is +65 points (95 % interval +46 to +77)."
    )
    assert score.startswith(
        "By mean max coverage, **act is best**: 0.927, against 0.636 of diffusion (p < 0.001)"
    )
    assert speed == (
        "**act acts fastest**: 1 ms for a chunk on 2 CPU cores (median), 2 times as long for diffusion. Sometimes "
        "it takes diffusion longer than a step lasts (100 ms)."
    )
    assert caveat.startswith("This is about these checkpoints")


def test_the_order_of_the_policies_does_not_matter():
    success, *_ = conclude(make_results(diffusion=10, act=36))
    assert "**act is best**: 90 %, against 25 % of diffusion (p < 0.001)" in success
    assert "+65 points (95 % interval +46 to +77)" in success


def test_too_few_episodes():
    success, *_ = conclude(make_results(act=12, diffusion=10))
    assert success.startswith(
        "By success, **40 episodes do not tell act from diffusion**: 30 %, against 25 % of "
    )
    assert (
        "(p = 0.50) by McNemar's exact test. The difference to diffusion is +5 points (95 % interval "
        in success
    )
    assert success.endswith("; about 110 episodes would tell it to within 5 points.")


def test_two_of_three_are_ahead():
    success, *_ = conclude(make_results(a=30, b=2, c=31))
    assert "**40 episodes do not tell c from a**: 78 %, against 75 % of a (p = 1.00) by " in success
    assert (
        "McNemar's exact test, corrected for 3 pairs. c is better than the 5 % of b (p < 0.001)." in success
    )


def test_nobody_succeeds():
    success, score, *_ = conclude(make_results(a=0, b=0))
    assert success == (
        "By success, **none is better**: nobody solved one of the 40 episodes, but success rates of up to 9 % are "
        "possible."
    )
    assert score == (
        "By mean max coverage, **40 episodes do not tell a from b**: 0.520, against 0.520 of b (p = 1.00) by "
        "permutation test. They reach the same in every episode."
    )


def test_who_is_about_as_fast_is_not_called_slower():
    results = make_results(a=1, b=1, c=1)
    for x, ms in zip(results["latency"], (2.2, 2.0, 5.0), strict=True):
        x |= {"p50_ms": ms, "p99_ms": 9.0}
    *_, speed, _ = conclude(results)
    expected = (
        "**b and a act fastest**: 2 to 2.2 ms for a chunk on 2 CPU cores (median), 2.5 times as long for c."
    )
    assert speed == expected
    results["latency"][2]["p50_ms"] = 2.2
    *_, speed, _ = conclude(results)
    expected = "**b, a and c act about equally fast**: 2 to 2.2 ms for a chunk on 2 CPU cores (median)."
    assert speed == expected


def test_other_data_is_told():
    results = make_results(a=3, b=2)
    results["policies"][1]["datasets"] = ["user/one", "user/two"]
    assert (
        "They did not learn from the same data (a from user/data, b from user/one + user/two): that may make the "
        "difference." in conclude(results)
    )
    results["policies"][1]["datasets"] = None
    assert any("b from unknown data" in sentence for sentence in conclude(results))


def test_pairs_are_compared_where_both_succeed():
    page = report.write(make_results(a=30, b=2) | {"conclusion": ["c"]}, has_video=False)
    pair = next(line for line in page.splitlines() if line.startswith("| a - b |"))
    assert "| 2 / 28 / 0 / 10 | +70 points (+51 to +81) | p < 0.001: **a** is better |" in pair
    assert pair.endswith("| -1 (2 episodes) |")
    assert "| **a** | 75 % (60 to 86) | " in page
    assert "| 50 | 5 | n/a | n/a |" in page  # steps, path, too short for accelerations
    assert "| 1 h 2 min | `b` |" in page
    assert "compare.mp4" not in page
    assert "## 40 episodes of PushT-v0 (seeds 1000 to 1039)" in page
    late = make_results(a=30, b=2) | {"conclusion": ["c"], "inference_delay": 3}
    assert "(seeds 1000 to 1039, inference delay 3 steps)" in report.write(late, has_video=False)


@pytest.mark.parametrize(
    ("n", "shown"), [(None, "n/a"), (7, "7"), (47, "47"), (1249, "1,200"), (98765, "99,000")]
)
def test_numbers_of_episodes(n: int | None, shown: str):
    assert show_count(n) == shown


def test_times():
    assert [show_number(ms) for ms in (0.0123, 2.0, 99.4, 99.6, 1234.5)] == [
        "0.012",
        "2",
        "99",
        "100",
        "1,234",
    ]


def test_p_values():
    assert [show_p(p) for p in (1e-9, 0.04321, 0.5)] == ["p < 0.001", "p = 0.043", "p = 0.50"]
