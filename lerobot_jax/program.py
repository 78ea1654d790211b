"""A run's train state and the step that changes it, as a program for a mesh of devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from lerobot_jax import adapter_folder, averaging, distributed, lora, optim, sharding, torch_state, trainable
from lerobot_jax.compilation import compile_quickly
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.nn.execution import Execution
from lerobot_jax.nn.weights import is_adapted
from lerobot_jax.policies import base
from lerobot_jax.policies.base import FunctionalPolicy
from lerobot_jax.policy_weights import PolicyWeights
from lerobot_jax.seeds import SeedLayout
from lerobot_jax.train_step import make_eval_loss, make_loss, make_preprocess, make_train_step

Tree = dict[str, Any]


class Program:
    """What a run computes and where; it holds no arrays, so it can be compiled for devices that are not here.

    Attributes:
        config: the run's; `runs` its seeds.
        policy: the policy, without arrays.
        layout: how the seeds lie on the mesh.
        lora: the adapters that are trained, if any.
        execution: the mesh and how layers use it.
        seed_state: shapes and shardings of the train state of one seed.
        state: those of all seeds.
    """

    def __init__(
        self,
        config: TrainConfig,
        policies: Sequence[FunctionalPolicy],
        names: Sequence[str],
        mesh: Mesh,
        pretrained: PolicyWeights | None = None,
    ):
        """Args:
        config: the run's.
        policies: for each dataset, the policy with its processors.
        names: of the datasets.
        mesh: the devices.
        pretrained: where training begins, unless with new weights.

        Raises:
            InputError: when the batch, the seeds or the tensor axes do not fit the mesh.
        """
        self.config, self.runs = config, config.runs
        self.policy, self._pretrained = policies[0], pretrained
        self.layout = SeedLayout(len(self.runs), mesh)
        _check_mesh(config, self.policy, mesh)
        whole_seeds = len(self.runs) > 1  # a device computes all of a seed, or all devices hold every seed
        self.execution = Execution(
            None if whole_seeds else mesh,
            config.policy.tensor_axes,
            config.mesh.min_shard_size,
            config.remat,
        )
        accumulation = config.gradient_accumulation_steps
        self.batch_sharding = self.layout.batches(config.batch_size, axis=int(accumulation > 1))
        self.samples_sharding = self.layout.batches(self.samples_per_step)

        self.lora = _find_lora(config, self.policy)
        self.init_shapes = jax.eval_shape(self.policy.init, jax.random.key(0))
        if self.lora is not None:
            params = jax.eval_shape(self.lora.attach, self.init_shapes[0], jax.random.key(0))
            self.init_shapes = params, self.init_shapes[1]
        trained, frozen = self._split(self.init_shapes[0])
        frozen = trainable.halve(frozen, pretrained, self.lora)
        self.init_shapes = trainable.combine(trained, frozen), self.init_shapes[1]
        self.optimizer = optim.make_optimizer(config, trained, lora.as_dicts(self.init_shapes[0]))
        self.seed_state = self._placed(jax.eval_shape(self.make_state, *self.init_shapes))
        self.state = self.layout.stacked_shapes(self.seed_state)

        preprocess = make_preprocess(policies, is_mixture=bool(config.dataset.mixture))
        step = make_train_step(
            make_loss(self.policy, preprocess, names, config.sample_weighting),
            self.optimizer,
            config,
            self.policy.progress,
        )
        self._step = self.execution(self.layout.over_seeds(step, (0, 0, 0)))
        self._eval_loss = self.execution(
            self.layout.over_seeds(make_eval_loss(self.policy, preprocess), (0, None, 0, None))
        )

    @property
    def batch_placement(self) -> sharding.BatchPlacement:
        """Where batches lie on the devices, and what this process reads of each forward pass's samples."""
        return sharding.BatchPlacement.of(self.batch_sharding, self.config.batch_size)

    @property
    def samples_per_step(self) -> int:
        """How many samples of each seed an update takes."""
        return self.config.batch_size * self.config.gradient_accumulation_steps

    def make_state(self, params: Tree, buffers: Tree) -> Tree:
        """Make the train state of one seed: all that a step reads and changes."""
        trained, frozen = self._split(params)
        state = {"params": trained, "buffers": buffers, **self._make_rest(trained, buffers)}
        return state | ({"frozen": frozen} if frozen else {})

    def _make_rest(self, trained: Tree, buffers: Tree) -> Tree:
        state = {"step": jnp.zeros((), jnp.int32), "opt_state": self.optimizer.init(trained)}
        if averaging.is_averaged(self.config):
            state["ema"] = jax.tree.map(jnp.copy, {"params": trained, "buffers": buffers})
        return state

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """Give the keys of the steps and of the validation loss, for all seeds."""
        split = [jax.random.key_data(jax.random.split(jax.random.key(run.seed), 3)) for run in self.runs]
        data = np.stack([np.asarray(each) for each in split], axis=1).reshape(3, *self.layout.lead, -1)
        wrap = jax.jit(lambda data: tuple(jax.random.wrap_key_data(data)), out_shardings=self.layout.state)
        step_key, eval_key = wrap(data[1:])
        return step_key, eval_key

    def first_state(self) -> Tree:
        """Make the state before the first step, on its devices."""
        keys = [jax.random.split(jax.random.key(run.seed), 3)[0] for run in self.runs]
        if self._pretrained is not None:
            arrays = [self._read(self._pretrained)] * len(self.runs)
        else:
            arrays = [base.load_pretrained_parts(self.policy, *each) for each in self._draw(keys)]
        if self.lora is not None:
            arrays = [
                (self.lora.attach(each[0], key), each[1]) for each, key in zip(arrays, keys, strict=True)
            ]
        where = jax.tree.map(lambda x: x.sharding, self._placed(self.init_shapes))
        params, buffers = self.layout.stack([sharding.place(each, where) for each in arrays])
        # What is made from the parameters is made beside them; they are the state's as they are.
        trained, frozen = self._split(params)
        state = {"params": trained, "buffers": buffers} | ({"frozen": frozen} if frozen else {})
        shardings = {
            key: jax.tree.map(lambda x: x.sharding, self.state[key]) for key in self.state.keys() - state
        }
        make_rest = self.layout.over_seeds(self._make_rest, (0, 0))
        return state | jax.jit(make_rest, out_shardings=shardings)(trained, buffers)

    def _draw(self, keys: Sequence[jax.Array]) -> list[tuple[Tree, Tree]]:
        """Draw new parameters and buffers from each key, where they belong."""

        def init(key_data: jax.Array) -> tuple[Tree, Tree]:
            return self.policy.init(jax.random.wrap_key_data(key_data))

        where = jax.tree.map(lambda x: x.sharding, self._placed(self.init_shapes))
        data = [np.asarray(jax.random.key_data(key)) for key in keys]
        compiled = compile_quickly(init, data[0], out_shardings=where)
        return [compiled(each) for each in data]

    def _read(self, pretrained: PolicyWeights) -> tuple[Tree, Tree]:
        """Read parameters and buffers, each array in the state's type and to where it belongs."""
        params, buffers = (flatten_dict(shapes) for shapes in self._placed(self.init_shapes))
        like: dict[Any, Any] = params | buffers

        def put(path: torch_state.Path, array: np.ndarray) -> jax.Array:
            shape = like[path].base if is_adapted(like[path]) else like[path]
            return sharding.place_as(array, shape)

        return pretrained.read(put, merge_adapters=False)

    def trace_step(self, batch: Tree) -> jax.stages.Traced:
        """Trace `step(state, batch, key) -> (state, metrics)` for batches of these shapes.

        Args:
            batch: arrays, or shapes with shardings, of all seeds.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, self.layout.metrics))
        return step.trace(self.state, _shapes(batch), self._key_shape())

    def eval_loss(self) -> Any:
        """Give `loss(weights, batch, key, i)`, a number for each seed."""
        return jax.jit(self._eval_loss, out_shardings=self.layout.metrics)

    def _split(self, params: Tree) -> tuple[Tree, Tree]:
        return trainable.split(self.config, params, None if self.lora is None else self.lora.whole)

    def _placed(self, shapes: Any) -> Any:
        """Give the shapes of one seed's arrays with their shardings."""
        if self.execution.mesh is None:
            where = jax.tree.map(lambda _: self.layout.replicated, shapes)
        else:
            where = sharding.state_shardings(self.execution, shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    def _key_shape(self) -> jax.ShapeDtypeStruct:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(self.layout.lead, key.dtype, sharding=self.layout.state)


def _find_lora(config: TrainConfig, policy: FunctionalPolicy) -> lora.Lora | None:
    if config.peft is not None:
        return lora.plan(config.peft, config.policy, policy.module)
    if not config.policy.use_peft:
        return None
    assert config.policy.pretrained_path is not None
    folder = base.find_policy(config.policy.pretrained_path, config.policy.pretrained_revision)
    adapters = adapter_folder.read(folder, policy.module)
    if adapters.settings.get("lora_dropout"):
        raise InputError(f"{folder}: adapters with lora_dropout cannot be trained on")
    return lora.Lora.of(policy.module, adapters.settings, adapters.targets)


def _shapes(batch: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)


def _check_mesh(config: TrainConfig, policy: FunctionalPolicy, mesh: Mesh) -> None:
    if config.num_seeds > 1 and distributed.group is not None:
        raise InputError(
            f"num_seeds={config.num_seeds} works with one process only; start a run for each seed instead"
        )
    if config.num_seeds > 1 and (mesh.shape["fsdp"], mesh.shape["tensor"]) != (1, 1):
        raise InputError(
            f"num_seeds={config.num_seeds} works with mesh.fsdp=1 and mesh.tensor=1 only: several seeds are split "
            "over the devices"
        )
    if mesh.shape["tensor"] > 1 and not policy.config.tensor_axes:
        raise InputError(
            f"mesh.tensor={mesh.shape['tensor']}: {policy.config.type} has no tensor_axes to split"
        )
