import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from lerobot_jax.errors import InputError
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import FunctionalPolicy, make_policy
from lerobot_jax.policies.diffusion import DiffusionConfig
from lerobot_jax.policies.rtc import RTCConfig
from lerobot_jax.processors import ActionTarget, default_pipelines
from lerobot_jax.processors.actions import Representation
from lerobot_jax.processors.steps import RenameObservations
from lerobot_jax.processors.text import TokenizeTask
from lerobot_jax.rollout import ActionQueue, TemporalEnsembler
from tests.policies import flow_policy

TOKENIZERS = Path(__file__).parent / "processors/golden/tokenizers"


@pytest.fixture(scope="module")
def policy() -> FunctionalPolicy:
    config = ACTConfig.tiny()
    vectors = {"observation.state": 3, "action": 2}
    stats = {k: {"mean": np.zeros(n, np.float32), "std": np.ones(n, np.float32)} for k, n in vectors.items()}
    stats["observation.images.top"] = {"mean": np.zeros((3, 1, 1)), "std": np.ones((3, 1, 1))}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    return policy.replace(params=params, buffers=buffers)


def observations(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=(num, 3)).astype(np.float32),
        "observation.images.top": rng.integers(0, 256, (num, 32, 32, 3)).astype(np.uint8),
    }


def test_the_queue_asks_again_after_n_action_steps():
    queue = ActionQueue(2)
    queue.add(np.arange(8.0).reshape(4, 2))
    assert not queue.needs_chunk()
    np.testing.assert_array_equal([queue.next_action(), queue.next_action()], [[0, 1], [2, 3]])
    assert queue.needs_chunk()


def test_the_ensembler_averages_with_exponential_weights():
    """Against the definition: the mean of all predictions for a step, the oldest weighs 1, the next exp(-m), ..."""
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(9, 4, 2)).astype(np.float32)
    ensembler = TemporalEnsembler(0.3, 4)
    for t, chunk in enumerate(chunks):
        ensembler.add(chunk)
        predictions = [chunks[s, t - s] for s in range(max(0, t - 3), t + 1)]
        weights = np.exp(-0.3 * np.arange(len(predictions)))
        np.testing.assert_allclose(
            ensembler.next_action(), np.average(predictions, axis=0, weights=weights), rtol=1e-5
        )


def test_tasks_become_tokens_on_the_way(policy: FunctionalPolicy, monkeypatch: pytest.MonkeyPatch):
    tokenizer = next(TOKENIZERS.glob("*SmolVLM2*/snapshots/*"))
    tokenize = TokenizeTask(tokenizer_name=str(tokenizer), max_length=6)
    told = policy.replace(
        preprocessor=dataclasses.replace(policy.preprocessor, steps=(*policy.preprocessor.steps, tokenize))
    )
    seen = []
    original = FunctionalPolicy.sample_actions
    monkeypatch.setattr(
        FunctionalPolicy, "sample_actions", lambda *args: seen.append(args[3]) or original(*args)
    )
    rows, tasks = observations(2), ["push", "pull it back"]
    told.make_runner(2).select_action(rows | {"task": tasks})
    assert seen[0]["observation.language.tokens"].shape == (1, 6)
    with pytest.raises(InputError, match=r"wants to be told what to do: 'task'"):
        told.make_runner(2).select_action(rows)


def test_an_episode_does_not_depend_on_its_neighbours(policy: FunctionalPolicy):
    alone, together = policy.make_runner(1), policy.make_runner(3)
    for t in range(5):
        rows = observations(3, seed=t)
        among = together.select_action(rows)
        single = alone.select_action({k: v[1:2] for k, v in rows.items()})
        np.testing.assert_array_equal(among[1:2], single)


def test_slots_are_reset_one_by_one(policy: FunctionalPolicy):
    runner = policy.make_runner(2)
    first = runner.select_action(observations(2, seed=0))
    runner.reset(1)
    second = runner.select_action(observations(2, seed=1))  # slot 0 is in its queue, slot 1 asks again
    fresh = policy.make_runner(2).select_action(observations(2, seed=1))
    np.testing.assert_array_equal(second[1], fresh[1])
    assert not np.array_equal(second[0], fresh[0])
    assert not np.array_equal(second[0], first[0])


def test_idle_slots_cost_nothing(policy: FunctionalPolicy):
    runner = policy.make_runner(2)
    actions = runner.select_action(observations(2), slots=[1])
    np.testing.assert_array_equal(actions[0], 0)
    assert np.any(actions[1] != 0)


def test_the_policy_sees_the_last_steps_of_its_own_episode():
    """Before the first step, everything was as it was then; other episodes leave no trace."""
    config = DiffusionConfig.tiny()
    ones = {"min": -np.ones(3, np.float32), "max": np.ones(3, np.float32)}
    stats = {"observation.state": ones, "action": {name: value[:2] for name, value in ones.items()}}
    stats["observation.images.top"] = {"mean": np.zeros((3, 1, 1)), "std": np.ones((3, 1, 1))}
    policy = make_policy(config, stats)
    params, buffers = policy.init(jax.random.key(0))
    runner = policy.replace(params=params, buffers=buffers).make_runner(2, seed=5)
    seen = [observations(2, seed=t) for t in range(config.n_action_steps + 1)]
    reused, actions = observations(2), []
    for rows in seen:
        for key, value in rows.items():
            reused[key][...] = value  # as environments do that give the same arrays at each step
        actions.append(runner.select_action(reused)[1])

    def predict(past: dict, now: dict, episode: int, step: int) -> np.ndarray:
        window = {key: np.stack([past[key], now[key]], axis=1)[1:] for key in now}
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), episode), step)
        chunk = jax.jit(policy.sample_actions)(params, buffers, policy.preprocess(window), key)
        return np.asarray(policy.postprocess(chunk))[0]

    np.testing.assert_allclose(actions[:-1], predict(seen[0], seen[0], 1, 0), rtol=1e-4, atol=1e-5)
    expected = predict(seen[-2], seen[-1], 1, config.n_action_steps)
    np.testing.assert_allclose(actions[-1], expected[0], rtol=1e-4, atol=1e-5)

    runner.reset(1, episode=7)
    again = runner.select_action(seen[2], slots=[1])[1]
    np.testing.assert_allclose(again, predict(seen[2], seen[2], 7, 0)[0], rtol=1e-4, atol=1e-5)


def test_the_names_outside_may_differ(policy: FunctionalPolicy):
    renaming = policy.preprocessor.replace(
        RenameObservations({"observation.image": "observation.images.top"})
    )
    renamed = policy.replace(preprocessor=renaming)
    rows = observations(1)
    expected = policy.make_runner(1).select_action(rows)
    rows["observation.image"] = rows.pop("observation.images.top")
    np.testing.assert_array_equal(renamed.make_runner(1).select_action(rows), expected)


def test_missing_and_misshapen_inputs_are_reported(policy: FunctionalPolicy):
    runner = policy.make_runner(1)
    with pytest.raises(InputError, match=r"the policy needs 'observation.state', the observation has"):
        runner.select_action({k: v for k, v in observations(1).items() if "image" in k})
    wide = observations(1) | {"observation.state": np.zeros((1, 5), np.float32)}
    with pytest.raises(InputError, match=r"needs 'observation.state' of shape \(1, 3\), it has \(1, 5\)"):
        runner.select_action(wide)
    with pytest.raises(InputError, match=r"of shape \(1, 3, 32, 32\)"):
        runner.select_action(observations(1) | {"observation.images.top": np.zeros((1, 16, 16, 3), np.uint8)})


def test_ensembling_is_used_when_configured(policy: FunctionalPolicy):
    config = dataclasses.replace(policy.config, n_action_steps=1, temporal_ensemble_coeff=0.01)
    runner = policy.replace(config=config).make_runner(1)
    found = [runner.select_action(observations(1, seed=t)) for t in range(3)]
    queued = policy.replace(config=dataclasses.replace(policy.config, n_action_steps=1)).make_runner(1)
    plain = [queued.select_action(observations(1, seed=t)) for t in range(3)]
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
    assert not np.allclose(found[2], plain[2])


def moving_policy(policy: FunctionalPolicy, target: ActionTarget, **settings) -> FunctionalPolicy:
    """Give a policy with other targets; with statistics of each step, zeros mean one unit further at every step."""
    means = np.zeros((2,), np.float32)
    if target.statistics_per_step:
        further = [1, 2, 3, 4] if target.representation == "relative" else [1, 1, 1, 1]
        means = np.array(further, np.float32)[:, None] * np.ones((4, 2), np.float32)
    stats = policy.preprocessor.steps[-1].stats | {"action": {"mean": means, "std": np.ones_like(means)}}
    config = dataclasses.replace(policy.config, **settings)
    features = config.input_features, config.output_features
    pre, post = default_pipelines(*features, config.normalization_mapping, stats, "cpu", target=target)
    return policy.replace(config=config, preprocessor=pre, postprocessor=post)


def roll(policy: FunctionalPolicy, monkeypatch: pytest.MonkeyPatch, predicted: list[float]) -> np.ndarray:
    """Run two robots that move by one unit a step, 100 units apart; give their actions (step, robot)."""
    chunk = np.array(predicted, np.float32)[None, :, None] * np.ones((1, 4, 2), np.float32)
    monkeypatch.setattr(FunctionalPolicy, "sample_actions", lambda *_: jax.numpy.asarray(chunk))
    runner, actions = policy.make_runner(2), []
    for t in range(7):
        rows = observations(2)
        rows["observation.state"] = np.array([[t] * 3, [100 + t] * 3], np.float32)
        actions.append(runner.select_action(rows))
    return np.stack(actions)[..., 0]


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("representation", ["relative", "delta"])
@pytest.mark.parametrize("n_action_steps", [1, 3, 4])
def test_a_chunk_is_relative_to_the_state_that_it_was_predicted_from(
    policy: FunctionalPolicy,
    monkeypatch: pytest.MonkeyPatch,
    representation: Representation,
    per_step: bool,
    n_action_steps: int,
):
    """A robot that moves by one unit a step is told the next unit at every step, however old the chunk is.

    With the state at the time of execution instead, as in LeRobot's `select_action`, the steps would grow.
    """
    target = ActionTarget(representation, statistics_per_step=per_step)
    moving = moving_policy(policy, target, n_action_steps=n_action_steps)
    predicted = [0, 0, 0, 0] if per_step else {"relative": [1, 2, 3, 4]}.get(representation, [1, 1, 1, 1])
    actions = roll(moving, monkeypatch, predicted)
    np.testing.assert_allclose(actions, np.arange(1, 8)[:, None] + [[0, 100]], rtol=1e-6)


@pytest.mark.parametrize("representation", ["relative", "delta"])
def test_ensembling_averages_absolute_actions(
    policy: FunctionalPolicy, monkeypatch: pytest.MonkeyPatch, representation: Representation
):
    """All chunks agree on where the robot should be, so their average is that place."""
    settings = {"n_action_steps": 1, "temporal_ensemble_coeff": 0.5}
    moving = moving_policy(policy, ActionTarget(representation), **settings)
    predicted = [1.0, 2, 3, 4] if representation == "relative" else [1.0, 1, 1, 1]
    actions = roll(moving, monkeypatch, predicted)
    np.testing.assert_allclose(actions, np.arange(1, 8)[:, None] + [[0, 100]], rtol=1e-6)


def states(num: int, t: int) -> dict[str, np.ndarray]:
    return {"observation.state": np.random.default_rng(t).normal(size=(num, 2)).astype(np.float32)}


@pytest.mark.parametrize("guidance", ["lerobot", "vjp", "trained"])
def test_chunks_are_predicted_along_what_is_left_of_the_old_one(guidance):
    """Chunk by chunk as LeRobot's engine would, whose delay is 2 steps and which asks when 4 actions are left."""
    rtc = RTCConfig(guidance=guidance, execution_horizon=3)
    policy = flow_policy.make(mean=1.0, std=2.0, rtc_config=rtc)
    runner = policy.make_runner(2, seed=5, inference_delay=2)
    runner.compile()
    rows = [states(2, t) for t in range(14)]
    actions = np.stack([runner.select_action(row)[1] for row in rows])

    def predict(t: int, **old) -> tuple[jax.Array, np.ndarray]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), t)
        now = policy.preprocess({key: value[1:] for key, value in rows[t].items()})
        chunk = policy.sample_actions(policy.params, policy.buffers, now, key, **old)
        return chunk, np.asarray(policy.postprocess(chunk))[0]

    first, executed = predict(0)
    np.testing.assert_allclose(actions[:6], executed[:6], rtol=1e-5, atol=1e-5)
    second, executed = predict(4, prev_chunk_left_over=first[:, 4:], inference_delay=2)
    np.testing.assert_allclose(actions[6:10], executed[2:6], rtol=1e-5, atol=1e-5)
    _, executed = predict(8, prev_chunk_left_over=second[:, 4:], inference_delay=2)
    np.testing.assert_allclose(actions[10:], executed[2:6], rtol=1e-5, atol=1e-5)
    assert runner._predict._cache_size() == 1  # pyright: ignore
    free = flow_policy.make(mean=1.0, std=2.0).make_runner(2, seed=5, inference_delay=2)
    others = np.stack([free.select_action(row)[1] for row in rows])
    np.testing.assert_allclose(actions[:6], others[:6], rtol=1e-5, atol=1e-5)
    assert np.abs(actions[6:] - others[6:]).max() > 0.1


@pytest.mark.parametrize("representation", ["absolute", "relative", "delta"])
def test_the_old_chunk_is_seen_from_the_new_state(
    monkeypatch: pytest.MonkeyPatch, representation: Representation
):
    """A policy that repeats what it is told of the old chunk goes on to the same places, wherever it is by then."""
    target = ActionTarget(representation)
    policy = flow_policy.make(1.0, 2.0, rtc_config=RTCConfig(), action_target=target)

    def repeat(*_, prev_chunk_left_over, execution_horizon, inference_delay):
        first = jax.numpy.arange(16.0).reshape(1, 8, 2)
        return jax.numpy.where(execution_horizon == 0, first, prev_chunk_left_over)

    monkeypatch.setattr(FunctionalPolicy, "sample_actions", repeat)
    runner = policy.make_runner(1)
    actions = np.concatenate([runner.select_action(states(1, t)) for t in range(8)])
    expected = policy.postprocess(jax.numpy.arange(16.0).reshape(1, 8, 2), states(1, 0))[0]
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-4)
