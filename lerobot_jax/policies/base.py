"""The policy contract, and a policy as pure functions of plain nested dicts.

A policy is an `nnx.Module` with `loss` and `sample_actions`. It is split once into shapes and arrays; from then on
`FunctionalPolicy` gives `loss_fn` and `sample_actions` as functions of `params` and `buffers`, which train.py,
eval.py and tests jit, shard and differentiate.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from lerobot_jax import (
    adapter_folder,
    certificate,
    hub,
    migration,
    processors,
    rollout,
    state_dict,
    torch_state,
)
from lerobot_jax.certificate import Certifier
from lerobot_jax.errors import InputError
from lerobot_jax.features import ACTION, OBS_STATE, TASK, TASK_INDEX, NormalizationMode
from lerobot_jax.nn.variables import Buffer, Progress
from lerobot_jax.nn.weights import cast_types, ready
from lerobot_jax.policies.config import CONFIG_NAME, PolicyConfig, read_config
from lerobot_jax.policies.registry import config_class, policy_class
from lerobot_jax.policy_weights import PolicyWeights
from lerobot_jax.state_dict import MODEL_NAME, StateDict

Batch = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
Tree = dict[str, Any]


class PretrainedPart(NamedTuple):
    """A part of a policy that starts from the weights of another model."""

    path: tuple[str | int, ...]  # names and list positions from the policy down to the part
    source: str  # a safetensors file, a folder that has one, or a model on the Hub that does
    ignore: str  # regular expression of the keys in it that the part does not have
    advice: str  # what to do when it cannot be found
    names: Mapping[str, str] = {}  # first words of the source's keys -> in the part, where they differ


class Policy(nnx.Module):
    """What a policy must be able to do. `draws` are its named random tensors, drawn from `key` unless given."""

    config: PolicyConfig

    def __init__(self, config: PolicyConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def loss(
        self, batch: Batch, *, key: PRNGKeyArray, train: bool, reduction: str = "mean", **draws: Array
    ) -> tuple[Float[Array, "..."], Metrics]:
        """Give LeRobot's loss of a normalized batch ("mean"), or one loss a sample ("none"), and its metrics.

        A metric that some steps do not have is NaN in these.
        """
        raise NotImplementedError

    def sample_actions(
        self, batch: Batch, *, key: PRNGKeyArray, **draws: Array
    ) -> Float[Array, "b chunk act"]:
        """Give a chunk of normalized actions for normalized observations."""
        raise NotImplementedError

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        """Give the random tensors that `sample_actions` draws from `key`; a policy without any has none."""
        return {}

    @classmethod
    def pretrained_parts(cls, config: Any) -> list[PretrainedPart]:
        """Name the parts of a new policy that start from weights of their own."""
        return []


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionalPolicy:
    """A policy as pure functions, with its processors and, once it is initialized or loaded, its arrays.

    In training it has `task_tokens`: a dataset's tasks as its tokenizer has them, a row for each `task_index`; none
    if its text tells more than the task.
    """

    config: PolicyConfig
    graphdef: Any
    preprocessor: processors.Pipeline
    postprocessor: processors.Pipeline
    params: Tree = dataclasses.field(default_factory=dict)
    buffers: Tree = dataclasses.field(default_factory=dict)
    task_tokens: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Draw fresh (params, buffers); pure, so that it can be jitted with shardings."""
        module = policy_class(self.config.type)(self.config, rngs=nnx.Rngs(params=key))
        _, params, buffers = nnx.split(module, nnx.Param, Buffer)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)

    def loss_fn(
        self,
        params: Tree,
        buffers: Tree,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        train: bool = True,
        reduction: str = "mean",
        **draws: Array,
    ) -> tuple[Float[Array, "..."], tuple[Metrics, Tree]]:
        """Give (loss, (metrics, buffers after the pass)) of a preprocessed batch."""
        module = self._merge(params, buffers)
        loss, metrics = module.loss(batch, key=key, train=train, reduction=reduction, **draws)
        return loss, (metrics, nnx.to_pure_dict(nnx.state(module, Buffer)))

    def sample_actions(
        self, params: Tree, buffers: Tree, batch: Batch, key: PRNGKeyArray, **draws: Any
    ) -> Float[Array, "b chunk act"]:
        """Give a chunk of normalized actions for preprocessed observations, and what else the policy takes."""
        module = self._merge(params, buffers)
        return module.sample_actions(batch, key=key, **draws)

    def _merge(self, params: Tree, buffers: Tree) -> Policy:
        types = cast_types(self.module)
        states = (nnx.State(ready(tree, types)) for tree in (params, buffers))
        return nnx.merge(self.graphdef, *states)

    def sampling_draws(self, batch_size: int, key: PRNGKeyArray) -> dict[str, Array]:
        """Give the random tensors that `sample_actions` draws from `key`, by their names."""
        return self.module.sampling_draws(batch_size, key)

    def tokenize(self, batch: Batch) -> Batch:
        """Replace texts in a raw batch by what the policy's tokenizer makes of them; on the host, before jit."""
        return self.preprocessor.tokenize(batch)

    def preprocess(self, batch: Batch) -> Batch:
        """Turn raw observations (and actions) into what the policy takes; works inside jit if there is no text.

        Images are uint8, or float in 0..1; channel-last, or channel-first as stock LeRobot has them. A task is a
        text, or, if the policy has `task_tokens`, the `task_index` of one.
        """
        if TASK in batch:
            batch = self.tokenize(batch)
        elif TASK_INDEX in batch:
            rows = {key: jnp.asarray(table)[batch[TASK_INDEX]] for key, table in self.task_tokens.items()}
            batch = {**batch, **rows}
        features, renamed = self.config.image_features, self.preprocessor.rename_map
        images = {
            key: _to_float_image(
                key, value, features[renamed.get(key, key)].shape, any_size=self.resizes_images
            )
            for key, value in batch.items()
            if renamed.get(key, key) in features
        }
        if features and not images and self.config.optional_cameras:
            raise InputError(f"the policy needs one of {sorted(features)}, the batch has {sorted(batch)}")
        return self.preprocessor({**batch, **images})

    def postprocess(
        self, actions: Float[Array, "..."], observation: Batch | None = None
    ) -> Float[Array, "..."]:
        """Turn the policy's actions into the robot's or environment's units; works inside jit.

        A policy of relative actions adds them to the state in the raw `observation`, and needs it.
        """
        renamed = self.preprocessor.rename_map
        inside = {renamed.get(key, key): value for key, value in (observation or {}).items()}
        state = {key: inside[key] for key in (OBS_STATE,) if key in inside}
        return self.postprocessor({ACTION: actions, **state})[ACTION]

    def make_runner(self, batch_size: int = 1, seed: int = 0, inference_delay: int = 0) -> rollout.Runner:
        """Give an object that turns a stream of observations into actions: queue, history, ensembling, RTC."""
        return rollout.Runner(self, batch_size, seed, inference_delay)

    def replace(self, **changes: Any) -> "FunctionalPolicy":
        return dataclasses.replace(self, **changes)

    def with_settings(self, **settings: Any) -> "FunctionalPolicy":
        """Give the same arrays under other settings, which must not change their shapes.

        Raises:
            ValueError: when the settings cannot be.
        """
        config = dataclasses.replace(self.config, **settings)
        return self.replace(config=config, graphdef=_graphdef(config))

    @property
    def resizes_images(self) -> bool:
        """Whether images may have any height and width."""
        return self.config.resizes_images or self.preprocessor.resizes_images

    @property
    def module(self) -> Policy:
        """The module tree with shapes instead of arrays."""
        return _module(self.config)

    @property
    def progress(self) -> set[tuple[Any, ...]]:
        """The paths of the buffers that change once an optimizer step, however many forward passes it takes."""
        return set(flatten_dict(nnx.to_pure_dict(nnx.state(self.module, Progress))))

    def save_pretrained(
        self, folder: Path, certified: Mapping[str, np.ndarray] | None = None, *, widen: bool = False
    ) -> None:
        """Write the folder that stock LeRobot loads: config.json, model.safetensors, processors; and a certificate.

        Args:
            folder: where to.
            certified: what a `certificate.Certifier` gave for these weights, if that is known already.
            widen: whether weights that are in bfloat16 are written in float32.
        """
        if certified is None:
            certified = Certifier(self).act(self.params, self.buffers)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.exported().save(folder)
        state = torch_state.to_torch(self.module, self.params, self.buffers, widen=widen)
        state_dict.write(state, folder / MODEL_NAME)
        self.save_processors(folder)
        certificate.write(folder, certified)

    def save_processors(self, folder: Path) -> None:
        """Write the policy's pre- and post-processor as LeRobot does."""
        folder.mkdir(parents=True, exist_ok=True)
        self.preprocessor.save(folder)
        self.postprocessor.save(folder)


def make_policy(
    config: PolicyConfig,
    stats: Mapping[str, Mapping[str, np.ndarray]],
    rename_map: Mapping[str, str] | None = None,
    target_stats: Mapping[str, np.ndarray] | None = None,
    image_size: tuple[int, int] | None = None,
) -> FunctionalPolicy:
    """Build a policy without arrays from its settings and a dataset's statistics.

    Args:
        config: the settings, with features.
        stats: feature -> its statistics.
        rename_map: observation key outside -> in the policy, when they differ.
        target_stats: the statistics of what `config.action_target` makes of the action, if it is another thing.
        image_size: (height, width) to which the policy's processor resizes images of any size.

    Raises:
        InputError: when the features do not suit the policy or statistics are missing.
    """
    config.check_features()
    if config.action_target.is_transformed != (target_stats is not None):
        raise InputError(
            f"target_stats must be given if, and only if, the policy does not predict actions as they are: "
            f"{config.action_target}; data.target_statistics computes them"
        )
    if target_stats is not None:
        stats = {**stats, ACTION: target_stats}
    is_by_step = config.action_target.representation == "delta" or config.action_target.statistics_per_step
    if is_by_step and config.sampled_delta_indices != config.action_delta_indices:
        raise InputError(
            f"action_target: a {config.type} policy gives only a part of the actions that it is trained on, so "
            "there can be no deltas and no statistics for each step; use absolute or relative actions"
        )
    device = config.device or ("cuda" if jax.default_backend() == "gpu" else "cpu")
    config = dataclasses.replace(config, device=device)
    pre, post = processors.default_pipelines(
        config.input_features,
        config.output_features,
        config.normalization_mapping,
        stats,
        device,
        rename_map,
        config.action_target,
        image_size,
        config.text_steps,
        config.disabled_relative_step,
    )
    return FunctionalPolicy(config, _graphdef(config), pre, post)


def unnormalized_inputs(config: PolicyConfig) -> list[str]:
    """List the inputs that stay as they are because the settings do not say how their type is normalized."""
    return [key for key, f in config.input_features.items() if f.type not in config.normalization_mapping]


def load_pretrained_parts(policy: FunctionalPolicy, params: Tree, buffers: Tree) -> tuple[Tree, Tree]:
    """Put pretrained weights into the parts of a new policy for which its config names some."""
    for part in policy_class(policy.config.type).pretrained_parts(policy.config):
        source = Path(part.source)
        if not source.exists():
            source = hub.fetch(part.source, "model", [MODEL_NAME], advice=part.advice) / MODEL_NAME
        module: Any = policy.module
        for name in part.path:
            module = module[name] if isinstance(name, int) else getattr(module, name)
        weights = _in_words_of(part, module, state_dict.read(source))
        for tree, new in zip(
            (params, buffers), torch_state.from_torch(module, weights, ignore=part.ignore), strict=True
        ):
            if not new:
                continue  # a part without parameters, or without buffers
            around: Any = tree
            for name in part.path[:-1]:
                around = around[name]
            around[part.path[-1]] = new
    return params, buffers


def _in_words_of(part: PretrainedPart, module: nnx.Module, weights: StateDict) -> StateDict:
    """Name weights as the part does; batch counts, which PyTorch did not always keep, begin at 0."""
    names = {}
    for key in weights:
        first, dot, rest = key.partition(".")
        names[key] = part.names.get(first, first) + dot + rest
    weights = weights.renamed(names)
    keys = [entry.keys[0] for entry in torch_state.entries(module)]
    counts = [key for key in keys if key.endswith("num_batches_tracked") and key not in weights]
    zeros = StateDict.of(dict.fromkeys(counts, np.zeros((), np.int64)))
    return StateDict(weights.tensors | zeros.tensors, weights.metadata, weights.source)


def load_policy(
    path: str | Path,
    revision: str | None = None,
    config: PolicyConfig | None = None,
    *,
    check_certificate: bool = True,
    merge_adapters: bool = True,
) -> FunctionalPolicy:
    """Load a policy from a LeRobot folder (config.json, model.safetensors, processors) or from the Hub.

    A policy from before LeRobot's processors, with its normalization among the weights, is migrated as it is read.
    Of a folder with PEFT adapters, the policy is the one that they change, with the adapters merged into it.

    Args:
        path: the folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        config: settings to use instead of config.json's.
        check_certificate: whether the folder must be what its certificate says, if it has one.
        merge_adapters: False: leave them as `LoraWeight`s.

    Raises:
        InputError: naming what is missing, does not fit, or is not what its certificate says.
    """
    folder = find_policy(path, revision)
    saved_config = load_config(folder)
    if check_certificate:
        certificate.check_files(folder)
    if saved_config.use_peft:
        check_certificate = False  # of the policy that it is about, the adapters change the actions
    policy, weights = open_policy(folder, config or saved_config)
    params, buffers = weights.read(merge_adapters=merge_adapters)
    policy = policy.replace(params=params, buffers=buffers)
    if check_certificate and config in (None, saved_config):
        certificate.check_actions(policy, folder)
    return policy


def open_policy(folder: Path, config: PolicyConfig) -> tuple[FunctionalPolicy, PolicyWeights]:
    """Open a policy's folder: the policy without its arrays, and what they will be read from.

    Args:
        folder: what `find_policy` gave.
        config: its settings.

    Raises:
        InputError: naming what is missing or does not fit.
    """
    if not load_config(folder).use_peft:
        policy, state = _open_folder(folder, config)
        return policy, PolicyWeights(policy.module, state)
    config = dataclasses.replace(config, use_peft=False)  # once loaded, it is a policy like any other
    policy = _assemble(folder, config, *processors.load_pipelines(folder))
    adapters = adapter_folder.read(folder, policy.module)
    base, revision = adapters.settings["base_model_name_or_path"], adapters.settings.get("revision")
    try:
        state = _open_weights(find_policy(base, revision), config)
    except InputError as error:
        raise InputError(f"{folder} has adapters on the policy {base}: {error}") from None
    state = StateDict(state.tensors | adapters.whole.tensors, state.metadata, state.source)
    return policy, PolicyWeights(policy.module, state, adapters)


def _open_weights(folder: Path, config: PolicyConfig) -> StateDict:
    return migration.migrate(folder, config)[-1] if migration.is_old(folder) else state_dict.read(folder)


def load_structure(folder: Path) -> FunctionalPolicy:
    """Load a policy's settings and processors from its folder, without its arrays."""
    return _assemble(folder, load_config(folder), *processors.load_pipelines(folder))


def _open_folder(folder: Path, config: PolicyConfig) -> tuple[FunctionalPolicy, StateDict]:
    if migration.is_old(folder):
        config, pre, post, weights = migration.migrate(folder, config)
        return _assemble(folder, config, pre, post), weights
    return _assemble(folder, config, *processors.load_pipelines(folder)), state_dict.read(folder)


def _assemble(
    folder: Path, config: PolicyConfig, pre: processors.Pipeline, post: processors.Pipeline
) -> FunctionalPolicy:
    try:
        config.check_features()
    except InputError as error:
        raise InputError(f"{folder / CONFIG_NAME}: {error}") from None
    _check_normalized(config, pre, post, folder)
    return FunctionalPolicy(config, _graphdef(config), pre, post)


def find_policy(path: str | Path, revision: str | None = None) -> Path:
    """Give the folder of a policy, downloaded from the Hub if `path` is no local folder."""
    if Path(path).is_dir():
        return Path(path)
    if not hub.is_hub_name(str(path)):
        raise InputError(f"{path}: no such folder")
    return hub.fetch(
        str(path), "model", [CONFIG_NAME, MODEL_NAME, "*.json", "*.safetensors"], revision=revision
    )


def load_config(folder: Path) -> PolicyConfig:
    """Read a policy folder's config.json, and what it predicts from its preprocessor, into its settings class."""
    data = read_config(folder)
    name, path = data["type"], folder / CONFIG_NAME
    if "." in name and name not in sys.modules:
        raise InputError(
            f"{path}: type '{name}' is not imported because a checkpoint must not decide which code runs; import "
            "it first, or install it as a plugin"
        )
    config = config_class(name).from_dict(data, str(path))
    if not (folder / f"{processors.PREPROCESSOR_NAME}.json").exists():
        return config
    target = processors.Pipeline.load(folder, processors.PREPROCESSOR_NAME).action_target
    return dataclasses.replace(config, action_target=target)


def _check_normalized(
    config: PolicyConfig, pre: processors.Pipeline, post: processors.Pipeline, folder: Path
) -> None:
    """Raise `InputError` if there is a feature that the processors would leave unnormalized."""
    inputs = {**config.input_features, **config.output_features}
    for pipeline, features in ((pre, inputs), (post, config.output_features)):
        path, known = folder / f"{pipeline.name}.json", set()
        for step in pipeline.steps:
            if isinstance(step, processors.Normalizer | processors.Unnormalizer):
                known |= step.features.keys()
                try:
                    step.check_statistics()
                except InputError as error:
                    raise InputError(f"{path}: {error}") from None
        for key, feature in features.items():
            mode = config.normalization_mapping.get(feature.type, NormalizationMode.IDENTITY)
            if mode != NormalizationMode.IDENTITY and key not in known:
                raise InputError(
                    f"{folder / CONFIG_NAME} declares '{key}' (normalized with {mode}), but {path.name} has no "
                    "statistics for it"
                )


@functools.lru_cache(maxsize=16)
def _module(config: PolicyConfig) -> Policy:
    return nnx.eval_shape(lambda: policy_class(config.type)(config, rngs=nnx.Rngs(params=0)))


def _graphdef(config: PolicyConfig) -> Any:
    return nnx.split(_module(config), nnx.Param, Buffer)[0]  # raises if the module holds any other state


def _to_float_image(
    key: str, image: Any, shape: tuple[int, ...], *, any_size: bool
) -> Float[Array, "... h w c"]:
    channels, *size = shape
    if image.shape[-1] == channels and (any_size or image.shape[-3:-1] == tuple(size)):
        image = jnp.asarray(image)
    elif image.shape[-3:-2] == (channels,) and (any_size or image.shape[-2:] == tuple(size)):
        image = jnp.moveaxis(jnp.asarray(image), -3, -1)
    else:
        raise InputError(
            f"'{key}' must be an image of {size[0]} x {size[1]} x {channels}, it has shape {image.shape}"
        )
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
