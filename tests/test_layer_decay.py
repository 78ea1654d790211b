"""Layer-wise decay of the learning rate: orders of layers, factors, and the updates that follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lerobot_jax import optim
from lerobot_jax.config import TrainConfig
from lerobot_jax.errors import InputError
from lerobot_jax.features import OBS_ENV_STATE, OBS_STATE, FeatureType, PolicyFeature
from lerobot_jax.layer_decay import describe_layers, layer_factors
from lerobot_jax.optim_config import OptimizerConfig
from lerobot_jax.policies.act import ACTConfig
from lerobot_jax.policies.base import config_class, policy_class
from lerobot_jax.policies.config import ParamGroup, PolicyConfig
from tests.policies.test_contract import NAMES

pytestmark = pytest.mark.usefixtures("stand_ins")

ENV = {OBS_ENV_STATE: PolicyFeature(FeatureType.ENV, (4,))}
STATE = {OBS_STATE: PolicyFeature(FeatureType.STATE, (3,))}
CAMERA = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
# Settings with which policies have other parameters; `inputs` are added to those of `tiny`, `only` replace them.
SETTINGS = {
    "act": [
        {"use_vae": False, "n_encoder_layers": 3, "n_decoder_layers": 2},
        {"pre_norm": True, "inputs": ENV, "n_vae_encoder_layers": 2, "vision_backbone": "resnet34w4"},
        {"only": ENV},
    ],
    "diffusion": [
        {"only": STATE | ENV},
        {"inputs": ENV | {"observation.images.side": CAMERA}, "use_separate_rgb_encoder_per_camera": True},
        {"inputs": {"observation.images.side": CAMERA}, "use_separate_rgb_encoder_per_camera": False},
        {"down_dims": (8, 16, 32), "use_film_scale_modulation": False},
    ],
    "multi_task_dit": [
        {"inputs": {"observation.images.side": CAMERA}, "use_separate_rgb_encoder_per_camera": True},
        {"use_rope": False, "use_positional_encoding": True, "inputs": ENV},
        {"num_layers": 5},
    ],
    "pi0": [{"train_expert_only": True}],
    "pi05": [],
    "vqbet": [{"gpt_n_layer": 5}, {"vision_backbone": "resnet34w4"}],
}


def shapes(config: PolicyConfig) -> dict:
    """Give the parameters of a policy as shapes."""
    module = nnx.eval_shape(lambda: policy_class(config.type)(config, rngs=nnx.Rngs(params=0)))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def changed(name: str, settings: dict) -> PolicyConfig:
    tiny, settings = config_class(name).tiny(), dict(settings)
    inputs = settings.pop("only", None) or tiny.input_features | settings.pop("inputs", {})
    return dataclasses.replace(tiny, input_features=inputs, **settings)


@pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name in NAMES for settings in [{}, *SETTINGS[name]]]
)
def test_orders_of_layers_leave_no_parameter_out(name: str, settings: dict):
    config = changed(name, settings)
    params = shapes(config)
    factors = [np.ravel(factor) for factor in jax.tree.leaves(layer_factors(0.5, config, params))]
    found = sorted(set(np.concatenate(factors)), reverse=True)
    assert found == [0.5**i for i in range(len(found))]  # one factor for each layer, the last one's is 1
    assert describe_layers(0.5, config, params).count("\n") == len(found)


def test_a_policys_layers_are_in_order():
    config = dataclasses.replace(ACTConfig.tiny(), n_encoder_layers=2, n_decoder_layers=1)
    table = describe_layers(0.5, config, shapes(config)).splitlines()
    assert table[0] == "factors on the learning rates of the layers:"
    tokens = ("decoder_pos_embed", "encoder_1d_feature_pos_embed", "encoder_img_feat_input_proj")
    tokens += ("encoder_latent_input_proj", "encoder_robot_state_input_proj", "vae_encoder")
    tokens += ("vae_encoder_action_input_proj", "vae_encoder_cls_embed", "vae_encoder_latent_output_proj")
    tokens += ("vae_encoder_robot_state_input_proj",)
    rows = [tuple(line.split(None, 1)) for line in table[1:]]
    assert [name for _, name in rows] == [
        "model.backbone.conv1",
        *(f"model.backbone.layer{i}" for i in range(1, 5)),
        ", ".join(f"model.{name}" for name in tokens),
        "model.encoder.layers.0",
        "model.encoder.layers.1",
        "model.decoder.layers.0",
        "model.action_head, model.decoder.norm",
    ]
    assert [float(factor) for factor, _ in rows] == pytest.approx(
        [0.5**i for i in range(9, -1, -1)], rel=1e-3
    )


def test_the_layers_of_a_stack_are_counted():
    config = config_class("multi_task_dit").tiny()
    params = shapes(config)
    factors = layer_factors(0.5, config, params)
    stack = factors["observation_encoder"]["vision_encoder"]["model"]["vision_model"]["encoder"]["layers"]
    kernel = stack["block"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (3, 1, 1)
    # After the stack: what is made of both encoders, the transformer's inputs, its two blocks, its output.
    np.testing.assert_allclose(np.ravel(kernel), [0.5**7, 0.5**6, 0.5**5])
    assert "encoder.layers.block[2]" in describe_layers(0.5, config, params)


def test_layers_that_are_not_trained_count_too():
    config = dataclasses.replace(ACTConfig.tiny(), n_encoder_layers=2)
    params = shapes(config)
    trained = {"model": {"backbone": params["model"]["backbone"]}}
    expected = layer_factors(0.5, config, params)["model"]["backbone"]
    assert layer_factors(0.5, config, trained, params)["model"]["backbone"] == expected
    assert layer_factors(0.5, config, trained)["model"]["backbone"] != expected


class Stacked(ACTConfig):
    layer_order = (r"embed\.", r"layers\.block\.", r"head\.")
    param_groups = (ParamGroup(r"head\.", lr=0.01),)


PARAMS = {
    "embed": {"w": jnp.ones((4, 6))},
    "layers": {"block": {"w": jnp.ones((3, 4, 6)), "b": jnp.ones((3, 6))}},
    "head": {"w": jnp.ones((6, 2))},
}


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "adafactor"])
def test_updates_have_the_ratios_of_the_factors(kind: str):
    """Also the decay of adamw and adafactor; the head has a learning rate of its own, which is decayed as well."""
    settings = {"type": kind, "lr": 0.1, "grad_clip_norm": 0.0, "weight_decay": 0.1}
    policy = Stacked(optimizer_lr=0.1)
    found = []
    for decay in (None, 0.5):
        config = TrainConfig(policy=policy, optimizer=OptimizerConfig(**settings, layer_decay=decay))
        optimizer = optim.make_optimizer(config, PARAMS)
        params, state = PARAMS, optimizer.init(PARAMS)
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
        assert jax.tree.map(jnp.shape, optax.apply_updates(params, updates)) == jax.tree.map(
            jnp.shape, PARAMS
        )
        found.append(updates)
    ratios = jax.tree.map(lambda a, b: b / a, *found)
    np.testing.assert_allclose(ratios["embed"]["w"], 1 / 16, rtol=1e-6)
    for i, factor in enumerate((1 / 8, 1 / 4, 1 / 2)):
        np.testing.assert_allclose(ratios["layers"]["block"]["w"][i], factor, rtol=1e-6)
        np.testing.assert_allclose(ratios["layers"]["block"]["b"][i], factor, rtol=1e-6)
    np.testing.assert_allclose(ratios["head"]["w"], 1, rtol=1e-6)
    np.testing.assert_allclose(found[0]["head"]["w"], found[0]["embed"]["w"][0, 0] / 10, rtol=1e-6)


def test_what_cannot_be_is_refused():
    class Silent(ACTConfig):
        layer_order = ()

    class Incomplete(ACTConfig):
        layer_order = (r"embed\.", r"layers\.")

    for kind, message in (
        (
            Silent,
            r"optimizer.layer_decay: Silent does not say the order of its layers; .* property layer_order",
        ),
        (Incomplete, r"optimizer.layer_decay: Incomplete.layer_order leaves out head.w"),
    ):
        config = TrainConfig(policy=kind(), optimizer=OptimizerConfig(layer_decay=0.5))
        with pytest.raises(InputError, match=message):
            optim.make_optimizer(config, PARAMS)
    with pytest.raises(ValueError, match=r"optimizer.layer_decay must be in \(0, 1\], not 1.5"):
        OptimizerConfig(layer_decay=1.5)
