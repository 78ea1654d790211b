"""The recipes of pi0 and pi0.5 run as they are, at toy size, on data made here and eight devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lerobot_jax import checkpoint, train
from lerobot_jax.metrics import read_metrics
from lerobot_jax.policies.base import load_policy, make_policy
from lerobot_jax.policies.config import PolicyConfig
from lerobot_jax.policies.registry import config_class
from tests.data.recordings import FEATURES, record

pytestmark = pytest.mark.usefixtures("stand_ins")

CONFIGS = Path(__file__).parent.parent / "configs"
CAMERAS = {"pi0_libero": ("image", "image2"), "pi05_so101": ("front", "wrist")}
WIDTHS = {"pi0_libero": (8, 7), "pi05_so101": (6, 6)}  # of states and actions
TOY = {
    "paligemma_variant": "dummy",
    "action_expert_variant": "dummy",
    "image_resolution": (28, 28),
    "chunk_size": 8,
    "n_action_steps": 4,
    "num_inference_steps": 2,
}


def make_dataset(root: Path, recipe: str) -> Path:
    """Record a few episodes with the features that a recipe wants; images of another size than its own."""
    camera = FEATURES["observation.images.top"]
    features = {f"observation.images.{name}": camera for name in CAMERAS[recipe]}
    for key, width in zip(("observation.state", "action"), WIDTHS[recipe], strict=True):
        features[key] = {"dtype": "float32", "shape": (width,), "names": None}
    return record(root, (9, 12), features).root


def make_base(folder: Path, kind: str) -> Path:
    """Save a toy policy with other features, as a base model has them."""
    tiny: Any = config_class(kind).tiny()
    config = type(tiny)(
        **TOY,
        input_features=tiny.input_features,
        output_features=tiny.output_features,
        tokenizer_max_length=tiny.tokenizer_max_length,
    )
    policy = make_policy(config, _statistics(config))
    params, buffers = policy.init(jax.random.key(1))
    policy.replace(params=params, buffers=buffers).save_pretrained(folder)
    return folder


def _statistics(config: PolicyConfig) -> dict[str, dict[str, np.ndarray]]:
    features = {**config.input_features, **config.output_features}
    names = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    return {
        key: {name: np.full(f.shape, x, np.float32) for name, x in names.items()}
        for key, f in features.items()
    }


@pytest.mark.parametrize(
    ("recipe", "variant"),
    [
        ("pi0_libero", "lora"),
        ("pi05_so101", ""),
        pytest.param("pi0_libero", "", marks=pytest.mark.slow),
        pytest.param("pi0_libero", "expert", marks=pytest.mark.slow),
        pytest.param("pi05_so101", "expert", marks=pytest.mark.slow),
        pytest.param("pi05_so101", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_fine_tunes_a_base_model(tmp_path: Path, recipe: str, variant: str):
    root = make_dataset(tmp_path / "data", recipe)
    kind = recipe[: recipe.index("_")]
    base = make_base(tmp_path / "base", kind)
    text = (CONFIGS / f"{recipe}.py").read_text()
    assert f'"lerobot/{kind}_base"' in text
    copy = tmp_path / f"{recipe}.py"
    copy.write_text(text.replace(f"lerobot/{kind}_base", str(base)))
    size = [f"--config.policy.{name}={value}" for name, value in TOY.items() if name != "image_resolution"]
    arguments = [
        f"--config={copy}:{variant}".removesuffix(":"),
        *size,
        "--config.policy.image_resolution=28",
        "28",
        "--config.policy.tokenizer_max_length=60",
        "--config.dataset.repo_id=test/recorded",
        f"--config.dataset.root={root}",
        f"--config.output_dir={tmp_path / 'run'}",
        "--config.mesh.min_shard_size=1",
        "--config.batch_size=8",
        "--config.steps=3",
        "--config.log_freq=1",
        "--config.optimizer.lr=1e-3",
    ]
    train.main(arguments)

    losses = [
        record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record
    ]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    folder = tmp_path / "run" / "checkpoints" / "last" / checkpoint.PRETRAINED_MODEL
    before, after = (flatten_dict(load_policy(path).params) for path in (base, folder))
    # Adapters lie on a base that is rounded to the layers' bfloat16.
    rounding = 2**-8 if variant == "lora" else 0.0
    changed = {
        ".".join(map(str, path))
        for path, x in after.items()
        if not np.allclose(x, before[path], rtol=rounding, atol=0)
    }
    assert any("gemma_expert" in name for name in changed)
    assert any("action_in_proj" in name for name in changed)
    assert not any("lm_head" in name for name in changed)
    assert any("language_model.layers" in name for name in changed) == (variant != "expert")
    assert any("vision_tower" in name for name in changed) == (variant == "")
    assert (folder.parent / checkpoint.ADAPTER).exists() == (variant == "lora")
