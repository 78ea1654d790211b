"""CLIP's towers and tokenizer give what transformers gave (tools/make_clip_golden.py)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from lerobot_jax import state_dict, torch_state
from lerobot_jax.errors import InputError
from lerobot_jax.nn.clip import CLIPTextModel, CLIPVisionModel
from lerobot_jax.nn.clip_settings import (
    CLIPSettings,
    CLIPTextSettings,
    CLIPVisionSettings,
    read_clip_settings,
)
from lerobot_jax.nn.variables import Buffer, freeze
from lerobot_jax.processors import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, TokenizeTask
from lerobot_jax.processors.tokenizer import find_tokenizer
from tests.goldens import CLIP

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "clip.npz"))
TEXTS = json.loads(str(GOLDEN["texts"]))
FLOAT32 = np.dtype(np.float32)
GELU = {"hidden_act": "gelu", "layer_norm_eps": 1e-3}

pytestmark = pytest.mark.usefixtures("stand_ins")


def load(kind: Any, settings: CLIPSettings) -> nnx.Module:
    """Build a tower with the stand-in's weights."""
    module = kind(settings, dtype=FLOAT32, rngs=nnx.Rngs(params=0))
    weights = state_dict.read(find_tokenizer(CLIP, state_dict.MODEL_NAME))
    params, _ = torch_state.from_torch(
        module, weights, ignore=r"(vision|text)_model\..*|.*_projection\..*|logit_scale"
    )
    nnx.update(module, nnx.State(params))
    return module


@pytest.mark.parametrize(("name", "changes"), [("tiny", {}), ("gelu", GELU)])
def test_images(name: str, changes: dict[str, Any]):
    settings = dataclasses.replace(read_clip_settings(CLIPVisionSettings, CLIP), **changes)
    tower = load(CLIPVisionModel, settings)
    found = nnx.jit(lambda tower, x: tower(x))(tower, GOLDEN["images"])
    np.testing.assert_allclose(found, GOLDEN[f"{name}/vision"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side", "changes"),
    [("tiny", "right", {}), ("left", "left", {}), ("gelu", "right", {"eos_token_id": 585, **GELU})],
)
def test_texts(name: str, side: str, changes: dict[str, Any]):
    """Where the text ends is told by the largest token, or by the number of the end; padding has it too."""
    settings = dataclasses.replace(read_clip_settings(CLIPTextSettings, CLIP), **changes)
    tower = load(CLIPTextModel, settings)
    found = nnx.jit(lambda tower, *x: tower(*x))(tower, GOLDEN[f"{side}/tokens"], GOLDEN[f"{side}/mask"])
    np.testing.assert_allclose(found, GOLDEN[f"{name}/text"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_those_of_transformers(side: str):
    step = TokenizeTask(tokenizer_name=CLIP, max_length=24, padding_side=side)
    batch = step({"task": TEXTS})
    np.testing.assert_array_equal(batch[OBS_LANGUAGE_TOKENS], GOLDEN[f"{side}/tokens"])
    np.testing.assert_array_equal(batch[OBS_LANGUAGE_ATTENTION_MASK], GOLDEN[f"{side}/mask"])
    lengths = GOLDEN[f"{side}/mask"].sum(1)
    assert lengths.min() == 2  # nothing but the ends
    assert lengths.max() == 24  # cut
    folder = TokenizeTask(tokenizer_name=str(find_tokenizer(CLIP)), max_length=24, padding_side=side)
    np.testing.assert_array_equal(folder({"task": TEXTS})[OBS_LANGUAGE_TOKENS], GOLDEN[f"{side}/tokens"])


def test_a_frozen_tower_has_buffers_only():
    settings = read_clip_settings(CLIPTextSettings, CLIP)
    tower = CLIPTextModel(settings, dtype=FLOAT32, rngs=nnx.Rngs(params=0))
    names = {entry.keys for entry in torch_state.entries(tower)}
    num = len(jax.tree.leaves(nnx.state(tower, nnx.Param)))
    freeze(tower)
    assert len(jax.tree.leaves(nnx.state(tower, Buffer))) == num
    assert not jax.tree.leaves(nnx.state(tower, nnx.Param))
    assert {entry.keys for entry in torch_state.entries(tower)} == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"vision_config": {"hidden_act": "relu"}},
            "vision_config: hidden_act must be one of quick_gelu, gelu",
        ),
        (
            {"vision_config": {"hidden_size": 10}},
            "hidden_size 10 must be a multiple of num_attention_heads 12",
        ),
        ({"vision_config": {"patch_size": "8"}}, "patch_size must be of type int"),
        ({"vision_config": {"attention_dropout": 0.1}}, "attention_dropout must be 0"),
        ([], "must describe a CLIP model"),
    ],
)
def test_models_that_are_no_clip_are_refused(content: Any, message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_clip_settings(CLIPVisionSettings, str(tmp_path))


def test_a_model_that_cannot_be_found_is_reported():
    with pytest.raises(
        InputError, match=r"'openai/clip-x' was not found .* or give a folder that has CLIP's"
    ):
        read_clip_settings(CLIPVisionSettings, "openai/clip-x")
