"""The model card: the README.md of a policy on the Hub, with the metadata that make the Hub show it as LeRobot's.

The form is that of LeRobot's `PreTrainedPolicy.generate_model_card`; in addition it has the recipe that repeats the
run, metrics and evaluations. Every number comes from the run's files: what they do not tell is left out with a
plain sentence. No license is stated unless one is given (LeRobot states Apache 2.0).
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from lerobot_jax import __version__
from lerobot_jax.certificate import CERTIFICATE_NAME
from lerobot_jax.checkpoint import TRAIN_CONFIG_NAME, Checkpoint
from lerobot_jax.config import TrainConfig
from lerobot_jax.data.info import image_shape
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.errors import InputError
from lerobot_jax.eval import EVAL_INFO_NAME, wilson_interval
from lerobot_jax.files import read_json
from lerobot_jax.hub import is_hub_name
from lerobot_jax.metrics import METRICS_NAME, read_metrics
from lerobot_jax.optim import optimizer_settings
from lerobot_jax.policies.config import CONFIG_NAME
from lerobot_jax.recipe import rebuild_config, write_recipe

LEROBOT = "[LeRobot](https://github.com/huggingface/lerobot)"
# Type of policy -> its name and its paper.
METHODS = {
    "act": ("Action Chunking with Transformers (ACT)", "arxiv.org/abs/2304.13705"),
    "diffusion": ("Diffusion Policy", "arxiv.org/abs/2303.04137"),
    "multi_task_dit": ("Multi-Task Diffusion Transformer", "arxiv.org/abs/2507.05331"),
    "pi0": ("π₀", "arxiv.org/abs/2410.24164"),
    "pi05": ("π₀.₅", "arxiv.org/abs/2504.16054"),
    "pi0_fast": ("π₀-FAST", "arxiv.org/abs/2501.09747"),
    "smolvla": ("SmolVLA", "arxiv.org/abs/2506.01844"),
    "tdmpc": ("TD-MPC", "arxiv.org/abs/2203.04955"),
    "vqbet": ("VQ-BeT", "arxiv.org/abs/2403.03181"),
    "wall_x": ("WALL-OSS", "arxiv.org/abs/2509.11766"),
    "xvla": ("X-VLA", "arxiv.org/abs/2510.10274"),
}
NO_RESULTS = ("step", "lr", "steps_per_s", "samples_per_s", "data_wait")


class Evaluation(NamedTuple):
    """The result of evaluating a checkpoint in one environment."""

    checkpoint: str
    is_of_this_checkpoint: bool
    environment: str
    num_episodes: int
    success: float  # in percent, as its interval
    interval: tuple[float, float]
    rewards: dict[str, float]


def write_card(
    checkpoint: Checkpoint,
    repo_id: str,
    *,
    license: str | None = None,
    tags: Sequence[str] = (),
    revision: str | None = None,
    dataset: LeRobotDatasetMetadata | None = None,
) -> str:
    """Write the model card of a policy.

    Args:
        checkpoint: the policy and its run.
        repo_id: its name on the Hub.
        license: its license.
        tags: more tags.
        revision: the branch that it is on, if not the main one.
        dataset: what it was trained on.
    """
    config = read_json(checkpoint.folder / CONFIG_NAME)
    path = checkpoint.folder / TRAIN_CONFIG_NAME
    settings = read_json(path) if path.exists() else {}
    trained = rebuild_config(settings)
    evaluations, unreadable = read_evaluations(checkpoint)
    data = ModelCardData(
        license=license,
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=list(dict.fromkeys(["robotics", "lerobot", config["type"], "lerobot_jax", "jax", *tags])),
        model_name=config["type"],
        datasets=[source["repo_id"] for source in _sources(settings) if not _is_builtin(source)] or None,
        base_model=config["pretrained_path"] if _is_fine_tuned_from_hub(config) else None,
        eval_results=[result for e in evaluations if e.is_of_this_checkpoint for result in _results(e)]
        or None,
    )
    sections = [
        _introduction(config, repo_id, trained is not None),
        _details(config, checkpoint, license, dataset),
        _features(config),
        _dataset(settings, trained, dataset),
        _training(settings, trained, checkpoint),
        _evaluation(evaluations, unreadable),
        _use(config, settings, dataset, repo_id, revision),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def read_evaluations(checkpoint: Checkpoint) -> tuple[list[Evaluation], list[str]]:
    """Read the run's evaluations, and name the files that could not be read."""
    root = checkpoint.run / "eval" if checkpoint.run is not None else None
    paths = sorted(root.rglob(EVAL_INFO_NAME)) if root is not None and root.exists() else []
    found, unreadable = [], []
    for path in paths:
        name = path.parent.relative_to(root or path.parent).as_posix()
        step = re.fullmatch(r"step_(\d+)", name)
        is_this = step is not None and int(step[1]) == checkpoint.step
        label = f"step {int(step[1]):,}" if step is not None else f"not recorded (`eval/{name}`)"
        try:
            info = read_json(path)
            groups = info["per_group"]
            if len(groups) > 1:
                groups = groups | {"all of these": info["overall"]}
            found += [_read_group(label, is_this, group, result) for group, result in groups.items()]
        except (InputError, KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
            unreadable.append(f"eval/{name}/{EVAL_INFO_NAME}")
    return found, unreadable


def _read_group(label: str, is_this: bool, group: str, result: Mapping[str, Any]) -> Evaluation:
    success, num_episodes = float(result["pc_success"]), int(result["n_episodes"])
    low, high = wilson_interval(round(success * num_episodes / 100), num_episodes)
    rewards = {name: float(result[name]) for name in ("avg_max_reward", "avg_sum_reward")}
    if delay := result.get("inference_delay", 0):  # of an environment that does not wait
        group += f", inference delay {delay} steps"
    return Evaluation(label, is_this, group, num_episodes, success, (100 * low, 100 * high), rewards)


def _results(evaluation: Evaluation) -> list[EvalResult]:
    numbers = {"success_rate": ("Success (%)", evaluation.success)}
    numbers |= {k: (k.replace("avg_", "mean ").replace("_", " "), v) for k, v in evaluation.rewards.items()}
    low, high = evaluation.interval
    return [
        EvalResult(
            task_type="robotics",
            task_name="Robotics",
            dataset_type=evaluation.environment,
            dataset_name=evaluation.environment,
            metric_type=name,
            metric_name=title,
            metric_value=float(f"{value:.6g}"),
            metric_args={"n_episodes": evaluation.num_episodes}
            | ({"interval_95": [round(low, 1), round(high, 1)]} if name == "success_rate" else {}),
        )
        for name, (title, value) in numbers.items()
    ]


def _introduction(config: Mapping[str, Any], repo_id: str, is_ours: bool) -> str:
    kind = config["type"]
    name, paper = METHODS.get(kind, (None, None))
    what = f"[{name}](https://{paper})" if name else f"A policy of type `{kind}`"
    by = ", trained with lerobot_jax" if is_ours else ""
    return (
        f"# {repo_id.split('/')[1]}\n\n{what}: a robot policy in the format of {LEROBOT}{by}. Stock LeRobot "
        "(PyTorch) and lerobot_jax (JAX) both load it as it is."
    )


def _details(
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    license: str | None,
    dataset: LeRobotDatasetMetadata | None,
) -> str:
    lines = [f"- **License:** {license or 'not stated'}"]
    if _is_fine_tuned_from_hub(config):
        base = config["pretrained_path"]
        lines.append(f"- **Fine-tuned from:** [{base}](https://huggingface.co/{base})")
    elif config.get("pretrained_path"):
        lines.append("- **Fine-tuned from:** a policy in a local folder")
    if dataset is not None and dataset.info.get("robot_type"):
        lines.append(f"- **Robot:** `{dataset.info['robot_type']}`")
    cameras = [f"`{key}`" for key in _cameras(config)]
    lines.append(f"- **Cameras:** {', '.join(cameras) or 'none'}")
    if checkpoint.step is not None:
        lines.append(f"- **Checkpoint:** after {checkpoint.step:,} steps")
    if (checkpoint.folder / CERTIFICATE_NAME).exists():
        lines.append(
            f"- **Certificate:** `{CERTIFICATE_NAME}` holds a few observations and what the policy does for them"
        )
    return "## Model details\n\n" + "\n".join(lines)


def _features(config: Mapping[str, Any]) -> str:
    rows = [
        (f"`{key}`", role, feature["type"], f"`{tuple(feature['shape'])}`")
        for role in ("input", "output")
        for key, feature in (config.get(f"{role}_features") or {}).items()
    ]
    text = "## Inputs and outputs\n\n"
    if not rows:
        return text + "`config.json` names no features."
    text += _table(("Feature", "Role", "Type", "Shape"), rows)
    predicted = config.get("chunk_size") or config.get("horizon") or config.get("action_chunk_size")
    executed = config.get("n_action_steps") or config.get("action_chunk_size")
    if predicted and executed:
        text += (
            f"\n\nFrom {config.get('n_obs_steps', 1)} observation step(s) it predicts {predicted} action steps and "
            f"executes {executed} before it looks again."
        )
    return text


def _dataset(
    settings: Mapping[str, Any], trained: TrainConfig | None, dataset: LeRobotDatasetMetadata | None
) -> str:
    text, sources = "## Training data\n\n", _sources(settings)
    if not sources:
        return text + "Which dataset the policy was trained on is not recorded."
    if len(sources) > 1:
        rows = [
            (
                _link(s),
                str(s["weight"]),
                s["revision"] or "-",
                _episodes(s["episodes"]) if s["episodes"] else "all",
            )
            for s in sources
        ]
        text += _table(("Dataset", "Weight", "Revision", "Episodes"), rows)
        return text + f"\n\nImages, states and actions are normalized as for {_link(sources[0])}."
    source = sources[0]
    on_hub = not _is_builtin(source)
    lines = [f"- **Dataset:** {_link(source)}"]
    if source.get("revision"):
        lines.append(f"- **Revision:** `{source['revision']}`")
    elif on_hub and trained is not None:
        counted = "; what follows was read there when this card was written" if dataset is not None else ""
        lines.append(
            f"- **Revision:** not recorded, because the dataset was read from a local folder{counted}"
        )
    chosen = source.get("episodes")
    if dataset is None:
        lines.append(f"- **Episodes:** {_episodes(chosen) if chosen else 'all'}")
        lines.append("- Frames, frame rate, tasks and robot are not recorded in the run.")
        return text + "\n".join(lines)
    total, tasks = dataset.total_episodes, dataset.tasks
    lines.append(f"- **Episodes:** {_episodes(chosen) + f' of {total:,}' if chosen else f'all {total:,}'}")
    lengths = dataset.episodes["length"]
    frames = int(lengths[list(chosen)].sum()) if chosen else dataset.total_frames
    lines += [f"- **Frames:** {frames:,}", f"- **Frame rate:** {dataset.fps} per second"]
    more = f" and {len(tasks) - 10} more" if len(tasks) > 10 else ""
    lines.append(f"- **Tasks:** {', '.join(json.dumps(t, ensure_ascii=False) for t in tasks[:10])}{more}")
    held_out = settings["dataset"].get("eval_split")
    if held_out:
        lines.append(f"- **Held out:** the last {held_out:.0%} of each task's episodes, for validation")
    return text + "\n".join(lines)


def _episodes(chosen: Sequence[int]) -> str:
    numbers = ", ".join(map(str, chosen)) if len(chosen) <= 20 else f"from {min(chosen)} to {max(chosen)}"
    return f"{len(chosen)} (numbers {numbers})"


def _training(settings: Mapping[str, Any], trained: TrainConfig | None, checkpoint: Checkpoint) -> str:
    text = "## Training\n\n"
    if not settings:
        return text + f"How it was trained is not recorded: there is no `{TRAIN_CONFIG_NAME}`."
    optimizer = settings.get("optimizer") or {}
    schedule = (settings.get("scheduler") or {}).get("type")
    if trained is not None:
        optimizer = optimizer_settings(trained)
        schedule = schedule or (trained.policy.scheduler_preset or {}).get("type")
    batch, accumulation = settings.get("batch_size"), settings.get("gradient_accumulation_steps") or 1
    known = {
        "Steps of the run": f"{settings['steps']:,}" if settings.get("steps") else None,
        "Batch size": f"{accumulation} x {batch}" if accumulation > 1 else batch,
        "Optimizer": optimizer.get("type"),
        "Learning rate": optimizer.get("lr"),
        "Schedule": schedule or "constant",
        "Averaged weights (EMA)": settings.get("ema_decay"),
        "Averaged weights (SWA), from step": (settings.get("swa") or {}).get("start"),
        "Seed": settings.get("seed"),
    }
    text += _table(("Setting", "Value"), [(k, str(v)) for k, v in known.items() if v is not None])
    text += f"\n\nAll settings are in `{TRAIN_CONFIG_NAME}`.\n\n" + _metrics(checkpoint)
    if trained is None:
        return text + (
            f"\n\n`{TRAIN_CONFIG_NAME}` is not of lerobot_jax {__version__}, which wrote this card, so there is no "
            "recipe here that repeats the run."
        )
    notes = [
        "The version of lerobot_jax that trained it and the devices are not recorded; others round differently."
    ]
    if any(source.root is not None for source in trained.dataset.sources):
        notes.append("The dataset was read from a folder: name yours with `--config.dataset.root=FOLDER`.")
    if trained.policy.pretrained_path is not None and not is_hub_name(trained.policy.pretrained_path):
        notes.append("It began from weights in a local folder, written as `FOLDER` in the recipe.")
    if trained.sample_weighting is not None and trained.sample_weighting.has_local_path:
        notes.append("The task's progress was read from a local file, written as `FILE` in the recipe.")
    return text + (
        "\n\nTo repeat the run, save this recipe as `recipe.py`\n\n"
        f"```python\n{write_recipe(trained)}\n```\n\nand train with it:\n\n"
        "```bash\npython -m lerobot_jax.train --config=recipe.py\n```\n\n" + " ".join(notes)
    )


def _metrics(checkpoint: Checkpoint) -> str:
    records = read_metrics(checkpoint.run / METRICS_NAME) if checkpoint.run is not None else []
    limit = checkpoint.step if checkpoint.step is not None else float("inf")
    rows = []
    for key, title in (("loss", "training"), ("eval_loss", "held-out episodes")):
        record = next((r for r in reversed(records) if key in r and r["step"] <= limit), {})
        names = [k for k in sorted(record) if k not in NO_RESULTS and (key == "loss" or k == key)]
        rows += [(k, f"{record[k]:.5g}", title, f"{record['step']:,}") for k in names]
    if not rows:
        return "The metrics of the run are not known."
    return _table(("Metric", "Last value", "Of", "At step"), rows)


def _evaluation(evaluations: Sequence[Evaluation], unreadable: Sequence[str]) -> str:
    text = "## Evaluation\n\n"
    if evaluations:
        columns = ("Checkpoint", "Environment", "Episodes", "Success (95 % interval)")
        rows = [
            (
                e.checkpoint + (" (this one)" if e.is_of_this_checkpoint else ""),
                e.environment,
                str(e.num_episodes),
                f"{e.success:.1f} % ({e.interval[0]:.1f} to {e.interval[1]:.1f})",
                f"{e.rewards['avg_max_reward']:.3f}",
                f"{e.rewards['avg_sum_reward']:.1f}",
            )
            for e in evaluations
        ]
        text += _table((*columns, "Mean max reward", "Mean sum of rewards"), rows)
    else:
        text += "The policy comes without evaluation results."
    if unreadable:
        text += f"\n\nCould not be read: {', '.join(unreadable)}."
    return text


def _use(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    dataset: LeRobotDatasetMetadata | None,
    repo_id: str,
    revision: str | None,
) -> str:
    text, path, branch = "## Use\n\n", repo_id, ""
    if revision is not None:
        download = f"hf download {repo_id} --revision={revision} --local-dir=policy"
        text += f"First download this branch:\n\n```bash\n{download}\n```\n\n"
        path, branch = "policy", f', revision="{revision}"'
    text += _rollout(config, dataset, path)
    env = settings.get("env") or {}
    if env.get("type"):
        options = [f"--policy.path={path}", f"--env.type={env['type']}"]
        options += [f"--env.task={env['task']}"] if env.get("task") else []
        options += [f"--eval.n_episodes={(settings.get('eval') or {}).get('n_episodes', 50)}"]
        has_env_state = any(f["type"] == "ENV" for f in (config.get("input_features") or {}).values())
        stock = [*options, *["--env.obs_type=environment_state_agent_pos"] * has_env_state]
        text += (
            f"\n\nIn simulation, with stock LeRobot:\n\n```bash\n{_command('lerobot-eval', stock)}\n```\n\n"
            f"or with lerobot_jax:\n\n```bash\n{_command('python -m lerobot_jax.eval', options)}\n```"
        )
    return text + (
        "\n\nIn Python, with lerobot_jax:\n\n```python\nfrom lerobot_jax.policies.base import load_policy\n\n"
        f'policy = load_policy("{repo_id}"{branch})\nrunner = policy.make_runner()\n'
        "action = runner.select_action(observation)  # arrays by the names above, with a leading axis of 1\n```\n\n"
        f"If you use the policy, please cite the method's paper and {LEROBOT}."
    )


def _rollout(config: Mapping[str, Any], dataset: LeRobotDatasetMetadata | None, path: str) -> str:
    features = config.get("input_features") or {}
    strange = [k for k, f in features.items() if f["type"] == "ENV"]
    strange += [key for key in _cameras(config) if not key.startswith("observation.images.")]
    if strange:
        return f"LeRobot's robots give no `{strange[0]}`, so this policy runs in simulation only."
    sizes = {key: features[key]["shape"][1:] for key in _cameras(config)}
    if dataset is not None:  # what the robot's cameras gave; the policy may resize it
        sizes |= {key: image_shape(dataset.features[key])[:2] for key in sizes if key in dataset.features}
    fps = dataset.fps if dataset is not None else "<frame_rate_of_the_dataset>"
    cameras = ", ".join(
        f"{key.removeprefix('observation.images.')}: "
        f"{{type: opencv, index_or_path: <index_or_path>, width: {w}, height: {h}, fps: 30}}"
        for key, (h, w) in sizes.items()
    )
    robot = (dataset.info.get("robot_type") if dataset is not None else None) or "<type_of_the_robot>"
    task = dataset.tasks[0] if dataset is not None and dataset.tasks else "<what_to_do>"
    options = [
        "--strategy.type=base",
        f"--policy.path={path}",
        f"--robot.type={robot}",
        "--robot.port=<port>",
    ]
    options += [f'--robot.cameras="{{ {cameras} }}"'] if cameras else []
    options += [f"--task={shlex.quote(task)}", f"--fps={fps}", "--duration=60"]
    return (
        f"On a robot, with stock LeRobot:\n\n```bash\n{_command('lerobot-rollout', options)}\n```\n\n"
        "Put your own values where there are `<...>`; cameras keep the names that the policy knows."
    )


def _command(program: str, options: Sequence[str]) -> str:
    return " \\\n    ".join([program, *options])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cameras(config: Mapping[str, Any]) -> list[str]:
    return [key for key, f in (config.get("input_features") or {}).items() if f["type"] == "VISUAL"]


def _sources(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the settings of the datasets that a run was trained on, ours or stock LeRobot's."""
    dataset = settings.get("dataset") or {}
    return dataset.get("mixture") or ([dataset] if dataset.get("repo_id") else [])


def _is_builtin(source: Mapping[str, Any]) -> bool:
    return source["repo_id"].startswith("builtin/")


def _link(source: Mapping[str, Any]) -> str:
    name = source["repo_id"]
    if _is_builtin(source):
        return f"`{name}`, which lerobot_jax makes itself"
    return f"[{name}](https://huggingface.co/datasets/{name})"


def _is_fine_tuned_from_hub(config: Mapping[str, Any]) -> bool:
    return bool(config.get("pretrained_path")) and is_hub_name(config["pretrained_path"])
