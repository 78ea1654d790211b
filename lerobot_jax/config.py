"""`TrainConfig` and its parts: frozen dataclasses with LeRobot's names; recipes and command-line overrides.

A recipe is a Python file with `get_config(variant="") -> TrainConfig`. The command line names it and overrides
single fields: `--config=configs/act_pusht.py:state --config.batch_size=8 --config.policy.chunk_size=50`.
"""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import math
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from lerobot_jax.data.sample_weights import SampleWeightingConfig
from lerobot_jax.errors import InputError
from lerobot_jax.nn.execution import Remat
from lerobot_jax.optim_config import EMAConfig, OptimizerConfig, SchedulerConfig, SWAConfig
from lerobot_jax.peft_targets import PeftConfig
from lerobot_jax.policies import base
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.sharding import MeshConfig
from lerobot_jax.transforms import ImageTransformsConfig

T = TypeVar("T")

_HELP = """Train a policy.

Give a recipe with --config=RECIPE.py[:VARIANT], e.g. --config=configs/act_pusht.py:state, and override single
fields with --config.FIELD=VALUE. With a recipe, the defaults below are the recipe's."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture."""

    repo_id: str
    """A name in LeRobot's cache or on the Hub."""
    weight: float = 1.0
    """How often it is drawn, relative to the others."""
    root: str | None = None
    """Its folder, if it is neither in LeRobot's cache nor on the Hub."""
    episodes: tuple[int, ...] | None = None
    """The episodes to use; None: all."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. The run records the commit."""
    rename_map: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """Observation key in this dataset -> in the policy, when they differ."""

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"dataset.mixture: weight of {self.repo_id} must be positive, not {self.weight}")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What to train on."""

    repo_id: str = "builtin/pusht"
    """The dataset: builtin/pusht, builtin/pusht_keypoints, a name in LeRobot's cache, or a name on the Hub."""
    root: str | None = None
    """Its folder, if it is neither in LeRobot's cache nor on the Hub; with streaming also a URL."""
    episodes: tuple[int, ...] | None = None
    """The episodes to use; None: all."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the tag v3.0, or v2.1. The run records the commit."""
    mixture: tuple[SourceConfig, ...] = ()
    """Several datasets to train on instead of repo_id; a recipe lists them. Evaluation and the saved policy use the
    normalization of the first; `convert to-torch --dataset=NAME` makes the policy for another."""
    use_imagenet_stats: bool = True
    """Normalize images with ImageNet's mean and standard deviation instead of the dataset's."""
    image_size: tuple[int, int] | None = None
    """Resize camera frames to (height, width); the saved policy then resizes what the robot sees."""
    image_transforms: ImageTransformsConfig = dataclasses.field(default_factory=ImageTransformsConfig)
    """Random changes of the images in training, on the device."""
    eval_split: float = 0.0
    """Fraction of episodes of each task that is held out for the validation loss: the last ones."""
    frame_mode: Literal["auto", "device", "cache", "decode"] = "auto"
    """Where frames come from: the device's memory, a cache of decoded frames on disk, or the videos."""
    frame_cache_gb: float = 50.0
    """The cache of decoded frames, of all datasets together, may take this many GB."""
    streaming: bool = False
    """Download the files while they are needed, and never keep them all."""
    buffer_size: int = 10_000
    """With streaming: how many frames are shuffled together."""

    def __post_init__(self):
        if not 0 <= self.eval_split < 1:
            raise ValueError(f"dataset.eval_split must be in [0, 1), not {self.eval_split}")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"dataset.image_size must be positive, not {self.image_size}")
        if self.frame_cache_gb < 0 or self.buffer_size < 1:
            raise ValueError("dataset.frame_cache_gb must not be negative, buffer_size must be positive")
        if self.mixture and self.streaming:
            raise ValueError("dataset.streaming works with one dataset, not with a mixture")
        if self.mixture and (self.root, self.episodes, self.revision) != (None, None, None):
            raise ValueError(
                "dataset.mixture: each of its datasets has root, episodes and revision of its own; "
                "dataset.root, dataset.episodes and dataset.revision must be None"
            )
        names = [source.repo_id for source in self.mixture]
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(
                    f"dataset.mixture: repo_id is a name, and '{name}' is a path; give that as root"
                )
        if len(set(names)) != len(names):
            raise ValueError(
                f"dataset.mixture: every dataset once, not {names}; weight tells how often it counts"
            )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The datasets: those of the mixture, or the only one."""
        return self.mixture or (
            SourceConfig(self.repo_id, root=self.root, episodes=self.episodes, revision=self.revision),
        )

    def pinned(self, revisions: Sequence[str | None]) -> "DatasetConfig":
        """Give the same with the commits at which the sources were found."""
        if not self.mixture:
            return dataclasses.replace(self, revision=revisions[0])
        pairs = zip(self.mixture, revisions, strict=True)
        return dataclasses.replace(
            self, mixture=tuple(dataclasses.replace(source, revision=commit) for source, commit in pairs)
        )


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The simulated environment in which the policy is evaluated."""

    type: Literal["pusht"] | None = None
    """The environment; None: no evaluation."""
    task: Literal["PushT-v0"] = "PushT-v0"
    """Its task."""
    obs_type: Literal["state", "environment_state_agent_pos", "pixels", "pixels_agent_pos"] | None = None
    """What it shows to the policy; None: what the policy's inputs ask for."""
    episode_length: int = 300
    """Steps after which an episode ends."""

    def __post_init__(self):
        if self.episode_length < 1:
            raise ValueError(f"env.episode_length must be positive, not {self.episode_length}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How the policy is evaluated in the environment."""

    n_episodes: int = 50
    """How many episodes, with seeds seed, seed + 1, ..."""
    batch_size: int = 0
    """How many environments run side by side; 0: as suits the processors. Results do not depend on it."""
    use_async_envs: bool = True
    """Run the environments in processes of their own, if there are several."""
    max_episodes_rendered: int = 10
    """How many of the first episodes become videos."""
    inference_delay: int = 0
    """How many steps it takes to predict a chunk; meanwhile, the old one is executed, and the new one's first
    actions come too late. policy.rtc_config makes them agree (real-time chunking). 0: the environment waits."""

    def __post_init__(self):
        if self.n_episodes < 1 or self.batch_size < 0 or self.max_episodes_rendered < 0:
            raise ValueError(
                "eval.n_episodes must be positive, batch_size and max_episodes_rendered not negative"
            )
        if self.inference_delay < 0:
            raise ValueError(f"eval.inference_delay must not be negative, it is {self.inference_delay}")

    @property
    def num_envs(self) -> int:
        """How many environments run side by side."""
        automatic = max(1, int((os.cpu_count() or 1) * 0.7))
        return min(
            self.batch_size or automatic, self.n_episodes, 64 if self.batch_size == 0 else self.n_episodes
        )


@dataclasses.dataclass(frozen=True)
class WandBConfig:
    """Logging to Weights & Biases (needs the extra `wandb`)."""

    enable: bool = False
    """Log the metrics there too."""
    project: str = "lerobot"
    """Project name."""
    entity: str | None = None
    """User or team."""
    notes: str | None = None
    """A description of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """None: online."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    policy: PolicyConfig = dataclasses.field(default_factory=ACTConfig)
    dataset: DatasetConfig = DatasetConfig()
    env: EnvConfig = EnvConfig()
    eval: EvalConfig = EvalConfig()
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    wandb: WandBConfig = WandBConfig()
    job_name: str | None = None
    """Name of the run; None: from the environment and the policy."""
    output_dir: str | None = None
    """The run's folder; None: outputs/<job_name>."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint, exactly."""
    seed: int = 1000
    """Everything random follows from it: initial weights, order of the data, noise, evaluation episodes."""
    num_seeds: int = 1
    """Train so many policies at once, with the seeds seed, seed + 1, ...; each is that of a run with its seed alone
    and has a folder of its own."""
    steps: int = 100_000
    """Optimizer updates."""
    batch_size: int = 8
    """Samples a forward pass, over all devices."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer update; their gradients are averaged."""
    sample_weighting: SampleWeightingConfig | None = None
    """Weigh the samples in the loss; any of its settings turns it on."""
    peft: PeftConfig | None = None
    """Fine-tune with adapters (LoRA): any of its settings turns it on."""
    freeze: tuple[str, ...] = ()
    """Regular expressions for the beginnings of dotted names of parameters that are not trained."""
    distributed: str = "auto"
    """Several processes, one a machine or more: auto finds them in the environment (SLURM, Open MPI, a TPU pod, or
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID); HOST:PORT,PROCESSES,INDEX names the address of
    process 0, how many there are and which this is; off is one process in any case."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How the devices are arranged."""
    remat: Remat | None = None
    """What the backward pass computes again instead of keeping it: none; dots: all but matrix products; full: all
    but the inputs of each block of layers. None: full in deep stacks, none elsewhere."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate and export that; e.g. 0.999."""
    ema: EMAConfig = dataclasses.field(default_factory=EMAConfig)
    """How that average follows the weights."""
    swa: SWAConfig = dataclasses.field(default_factory=SWAConfig)
    """Or keep the equal average of the weights of some steps, and evaluate and export that."""
    num_workers: int = 2
    """Threads that prepare batches."""
    prefetch_factor: int = 4
    """Batches that each of them prepares ahead."""
    tolerance_s: float = 1e-4
    """How far a video frame may be from its timestamp, in seconds."""
    rename_map: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    """Observation key in the dataset -> in the pretrained policy, when they differ."""
    log_freq: int = 200
    """Log the mean of the metrics every so many steps (0: only at the end)."""
    eval_steps: int = 0
    """Compute the loss on held-out episodes every so many steps (0: never); needs dataset.eval_split."""
    max_eval_samples: int = 0
    """Use at most so many held-out samples (0: all)."""
    env_eval_freq: int = 20_000
    """Evaluate in the environment every so many steps and at the end (0: never)."""
    save_checkpoint: bool = True
    """Save checkpoints."""
    save_freq: int = 20_000
    """Save every so many steps and at the end (0: only at the end)."""
    keep_last: int = 3
    """Keep the last so many checkpoints, and the best one (0: keep all)."""
    best_metric: Literal["pc_success", "avg_max_reward", "avg_sum_reward", "eval_loss"] | None = None
    """What makes a checkpoint the best; None: avg_max_reward with an environment, else eval_loss."""

    def __post_init__(self):
        counts = ("num_seeds", "steps", "batch_size", "gradient_accumulation_steps", "num_workers")
        for name in (*counts, "prefetch_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("log_freq", "eval_steps", "max_eval_samples", "env_eval_freq", "save_freq", "keep_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        last_seed = self.seed + self.num_seeds - 1
        if not 0 <= self.seed <= last_seed < 2**32:
            seeds = f"it is {self.seed}" if self.num_seeds == 1 else f"they are {self.seed} to {last_seed}"
            raise ValueError(f"seed must be from 0 to 2**32 - 1, {seeds}")
        for_one_seed = {
            "dataset.streaming": self.dataset.streaming,
            "wandb.enable": self.wandb.enable,
            "policy.push_to_hub": self.policy.push_to_hub,
        }
        for name, is_on in for_one_seed.items():
            if is_on and self.num_seeds > 1:
                raise ValueError(f"{name} works with one seed only; num_seeds is {self.num_seeds}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, not {self.ema_decay}")
        if self.ema_decay is None and self.ema != EMAConfig():
            raise ValueError("ema needs ema_decay, which turns it on; e.g. 0.999")
        if (self.ema.min_decay or 0.0) > (self.ema_decay or 1.0):
            raise ValueError(f"ema.min_decay={self.ema.min_decay} is more than ema_decay={self.ema_decay}")
        if self.swa.start is None and self.swa != SWAConfig():
            raise ValueError("swa.freq needs swa.start")
        if self.swa.start is not None and self.ema_decay is not None:
            raise ValueError("swa.start and ema_decay: there is one average; turn one of them off")
        if self.swa.start is not None and self.swa.start > self.steps:
            raise ValueError(f"swa.start={self.swa.start} is after the last step, {self.steps}")
        if self.eval_steps and not self.dataset.eval_split:
            raise ValueError("eval_steps needs held-out episodes: set dataset.eval_split, e.g. to 0.05")
        if self.best_metric == "eval_loss" and not self.eval_steps:
            raise ValueError("best_metric=eval_loss needs eval_steps")
        if self.rename_map and self.policy.pretrained_path is None:
            raise ValueError(
                "rename_map needs policy.pretrained_path: a new policy takes the dataset's names"
            )
        if self.rename_map and self.dataset.mixture:
            raise ValueError("with dataset.mixture, each dataset has a rename_map of its own")

    @property
    def name(self) -> str:
        """The run's name."""
        return self.job_name or "_".join(filter(None, [self.env.type, self.policy.type]))

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir or f"outputs/{self.name}")

    @property
    def runs(self) -> "list[TrainConfig]":
        """The runs that are trained together, one a seed; with one seed, this config itself."""
        if self.num_seeds == 1:
            return [self]
        seeds = range(self.seed, self.seed + self.num_seeds)
        alone = dataclasses.replace(self, num_seeds=1)
        return [
            dataclasses.replace(alone, seed=seed, output_dir=str(self.run_dir / f"seed_{seed}"))
            for seed in seeds
        ]

    def to_dict(self) -> dict[str, Any]:
        """Give the content of train_config.json."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {k: v for k, v in data.items() if dataclasses.is_dataclass(v) and not isinstance(v, type)}
        data |= {name: dataclasses.asdict(part) for name, part in parts.items()}
        return data | {"policy": self.policy.to_dict() | self.policy.own_settings()}


def load_config(argv: Sequence[str]) -> TrainConfig:
    """Read `--config=recipe.py[:variant]`, then apply `--config.a.b=value` overrides.

    With `--config.policy.pretrained_path=...`, the policy's settings are those of that policy instead of the
    recipe's, as with LeRobot's `--policy.path`; overrides still apply.

    Raises:
        InputError: naming the field and the nearest right name, or the value that cannot be.
    """
    recipe = next(iter(option_values(argv, "--config")), None)
    if recipe is None and not {"-h", "--help"} & set(argv):
        known = ", ".join(_recipes()) or "no recipe is in ./configs"
        raise InputError(f"--config=RECIPE is missing ({known}); --help tells more")
    config = TrainConfig() if recipe is None else load_recipe(recipe)
    for path in option_values(argv, "--config.policy.pretrained_path"):
        revision = next(iter(option_values(argv, "--config.policy.pretrained_revision")), None)
        policy = base.load_config(base.find_policy(path, revision))
        # Where the result is published is this run's business, not that of the policy it starts from.
        own = {
            name: getattr(config.policy, name)
            for name in ("push_to_hub", "repo_id", "private", "tags", "license")
        }
        policy = dataclasses.replace(policy, pretrained_path=path, **own)
        config = dataclasses.replace(config, policy=policy)
    config = with_mentioned_parts(config, "--config", argv)
    policy = with_mentioned_parts(config.policy, "--config.policy", argv)
    config = dataclasses.replace(config, policy=policy)
    overrides = list(argv)
    if recipe is not None:
        overrides = [a for a in argv if a not in ("--config", recipe, f"--config={recipe}")]
    flags = dataclasses.make_dataclass("Flags", [("config", TrainConfig, config)], frozen=True)
    return parse(flags, flags(), overrides, "lerobot_jax.train", _HELP).config  # type: ignore[attr-defined]


def with_mentioned_parts(config: T, option: str, argv: Sequence[str]) -> T:
    """Put defaults in the place of the parts that are None and have settings among the arguments.

    tyro has no options for what is None.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        kind = next((part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)), None)
        mentions = (f"{option}.{name}.", "-h", "--help")
        if kind is not None and getattr(config, name) is None and any(a.startswith(mentions) for a in argv):
            config = dataclasses.replace(config, **{name: typing.cast(type, kind)()})  # type: ignore[type-var]
    return config


def load_recipe(recipe: str) -> TrainConfig:
    """Run `get_config` of a recipe file: `path.py` or `path.py:variant`."""
    path, _, variant = recipe.partition(":")
    if not Path(path).is_file():
        raise InputError(
            f"--config: no recipe '{path}'; there are {', '.join(_recipes()) or 'none in configs/'}"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(*filter(None, [variant]))
    except (ValueError, TypeError) as error:
        raise InputError(f"--config={recipe}: {error}") from None


def parse(kind: type[T], default: T, args: Sequence[str], program: str, description: str) -> T:
    """Parse command-line arguments into a dataclass with tyro; say what is wrong on one line."""
    settings: dict[str, Any] = {
        "default": default,
        "args": args,
        "prog": f"python -m {program}",
        "description": description,
        "config": (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        "use_underscores": True,
    }
    if {"-h", "--help"} & set(args):
        return tyro.cli(kind, **settings)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _wide_terminal():
            return tyro.cli(kind, **settings)
    except SystemExit:
        raise InputError(_one_line(complaint.getvalue())) from None


def _one_line(message: str) -> str:
    """Turn tyro's box into a line: what is wrong, and the nearest right name."""
    sections: list[list[str]] = [[]]
    for line in (line.strip(" │") for line in message.splitlines()):
        if line.startswith("──"):
            sections.append([])
        elif line and line[0] not in "╭╰":
            sections[-1].append(line)
    text = " ".join(sections[0])
    for section in sections[1:]:
        if section and section[0] == "Perhaps you meant:":
            text += f"; perhaps you meant {section[1].split()[0]}"
    return text


@contextlib.contextmanager
def _wide_terminal():
    """Keep tyro from breaking its messages into lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def option_values(argv: Sequence[str], name: str) -> list[str]:
    """Find the values of an option, given as `--name=value` or `--name value`."""
    joined = [a.partition("=")[2] for a in argv if a.startswith(f"{name}=")]
    return joined + [b for a, b in itertools.pairwise(argv) if a == name]


def _recipes() -> list[str]:
    return sorted(str(path) for path in Path("configs").glob("*.py"))
