"""openpi's pi0 and pi0.5 written down once more in numpy, in openpi's conventions, at a tiny size.

Arrays have openpi's names and axes: layers first, einsums over heads, products from the right. Nothing here is
shared with the package, so that a checkpoint that is converted can be compared with what it computed before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

Arrays = Mapping[str, np.ndarray]
LLM, IMG = "PaliGemma/llm", "PaliGemma/img"
DEPTH, HEADS, HEAD_DIM, VOCAB, ACTION_DIM, RANK = 3, 8, 8, 512, 8, 16
WIDTHS = {"": (32, 48), "_1": (24, 40)}  # of tokens and of the MLP: language, expert
VISION_DEPTH, VISION_WIDTH, VISION_HEADS, VISION_MLP, PATCH, PATCHES = 2, 16, 2, 24, 14, 4


def shapes(policy_type: str) -> dict[str, tuple[int, ...]]:
    """Give the shape of every array."""
    expert = WIDTHS["_1"][0]
    sizes = {"action_in_proj": (ACTION_DIM, expert), "action_out_proj": (expert, ACTION_DIM)}
    if policy_type == "pi05":
        sizes |= {"time_mlp_in": (expert, expert), "time_mlp_out": (expert, expert)}
    else:
        sizes |= {"state_proj": (ACTION_DIM, expert), "action_time_mlp_in": (2 * expert, expert)}
        sizes |= {"action_time_mlp_out": (expert, expert)}
    all_shapes: dict[str, tuple[int, ...]] = {f"{LLM}/embedder/input_embedding": (VOCAB, WIDTHS[""][0])}
    for suffix, (width, hidden) in WIDTHS.items():
        layers = f"{LLM}/layers"
        all_shapes |= {
            f"{layers}/attn/q_einsum{suffix}/w": (DEPTH, HEADS, width, HEAD_DIM),
            f"{layers}/attn/kv_einsum{suffix}/w": (DEPTH, 2, 1, width, HEAD_DIM),
            f"{layers}/attn/attn_vec_einsum{suffix}/w": (DEPTH, HEADS, HEAD_DIM, width),
            f"{layers}/mlp{suffix}/gating_einsum": (DEPTH, 2, width, hidden),
            f"{layers}/mlp{suffix}/linear": (DEPTH, hidden, width),
        }
        norms = {f"{layers}/pre_attention_norm{suffix}": (DEPTH,), f"{layers}/pre_ffw_norm{suffix}": (DEPTH,)}
        for name, depth in {**norms, f"{LLM}/final_norm{suffix}": ()}.items():
            if suffix and policy_type == "pi05":
                sizes[f"{name}/Dense_0"] = (*depth, width, 3 * width)
            else:
                all_shapes[f"{name}/scale"] = (*depth, width)
    block, d, heads = (
        f"{IMG}/Transformer/encoderblock",
        VISION_WIDTH,
        (VISION_HEADS, VISION_WIDTH // VISION_HEADS),
    )
    for name in ("query", "key", "value"):
        place = f"{block}/MultiHeadDotProductAttention_0/{name}"
        all_shapes |= {f"{place}/kernel": (VISION_DEPTH, d, *heads), f"{place}/bias": (VISION_DEPTH, *heads)}
    place = f"{block}/MultiHeadDotProductAttention_0/out"
    all_shapes |= {f"{place}/kernel": (VISION_DEPTH, *heads, d), f"{place}/bias": (VISION_DEPTH, d)}
    for name in ("LayerNorm_0", "LayerNorm_1"):
        all_shapes |= dict.fromkeys((f"{block}/{name}/scale", f"{block}/{name}/bias"), (VISION_DEPTH, d))
    all_shapes |= dict.fromkeys((f"{IMG}/Transformer/encoder_norm/{x}" for x in ("scale", "bias")), (d,))
    all_shapes |= {f"{IMG}/embedding/kernel": (PATCH, PATCH, 3, d), f"{IMG}/embedding/bias": (d,)}
    all_shapes[f"{IMG}/pos_embedding"] = (1, PATCHES, d)
    sizes |= {f"{block}/MlpBlock_0/Dense_0": (VISION_DEPTH, d, VISION_MLP)}
    sizes |= {f"{block}/MlpBlock_0/Dense_1": (VISION_DEPTH, VISION_MLP, d), f"{IMG}/head": (d, WIDTHS[""][0])}
    for name, size in sizes.items():
        all_shapes |= {f"{name}/kernel": size, f"{name}/bias": (*size[:-2], size[-1])}
    return all_shapes


def adapter_shapes(rank: int = RANK) -> dict[str, tuple[int, ...]]:
    """Give the shape of every factor of the LoRA variants."""
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes("pi0").items():
        start, _, last = name.rpartition("/")
        if name.startswith(f"{LLM}/layers") and last in ("w", "gating_einsum", "linear"):
            prefix = f"{start}/lora" if last == "w" else f"{start}/{last}_lora"
            factors |= {f"{prefix}_a": (*shape[:-1], rank), f"{prefix}_b": (*shape[:-2], rank, shape[-1])}
    return factors


def random_arrays(sizes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw arrays that keep activations near 1."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in sizes.items():
        is_vector = name.rsplit("/")[-1] in ("scale", "bias")
        scale = 0.1 if is_vector else 0.5 if "embed" in name and "kernel" not in name else shape[-2] ** -0.5
        arrays[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def write(arrays: Arrays, folder: Path, *, wrapped: bool = False) -> Path:
    """Write `params/` of a checkpoint; `wrapped` as training does it, with a node around each array."""
    paths = {("params", *name.split("/"), *(("value",) if wrapped else ())): x for name, x in arrays.items()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "params", unflatten_dict(paths))
    return folder


def sample(
    arrays: Arrays,
    images: Sequence[np.ndarray],
    image_masks: Sequence[np.ndarray],
    tokens: np.ndarray,
    token_mask: np.ndarray,
    state: np.ndarray,
    noise: np.ndarray,
    num_steps: int,
) -> np.ndarray:
    """Give a chunk of actions.

    Args:
        arrays: the checkpoint.
        images: of each camera, b h w c in -1..1.
        image_masks: whether there is one, b.
        tokens: of the prompt, b l.
        token_mask: which of them count, b l.
        state: padded, b action_dim; pi0.5 has it in its prompt.
        noise: what the actions begin as, b chunk action_dim.
        num_steps: how many steps Euler's method takes.
    """
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    prefix = [_see(arrays, image) for image in images]
    mask = [np.repeat(m[:, None], PATCHES, 1) for m in image_masks]
    width = WIDTHS[""][0]
    prefix.append(arrays[f"{LLM}/embedder/input_embedding"][tokens] * width**0.5)
    prefix_mask = np.concatenate([*mask, token_mask], 1)
    x, time = noise.astype(np.float64), 1.0
    for _ in range(num_steps):
        suffix, condition = _embed_suffix(arrays, state, x, time)
        length, total = prefix_mask.shape[1], prefix_mask.shape[1] + suffix.shape[1]
        valid = np.concatenate([prefix_mask, np.ones(suffix.shape[:2], bool)], 1)
        starts = np.zeros(total, int)  # a block of tokens begins, which no token before may see
        starts[length] = 1
        starts[total - noise.shape[1]] = 1
        block = np.cumsum(starts)
        seen = (block[None, :] <= block[:, None])[None] & valid[:, None] & valid[:, :, None]
        positions = np.cumsum(valid, 1) - 1
        streams = {"": np.concatenate(prefix, 1), "_1": suffix}
        out = _transform(arrays, streams, {"": None, "_1": condition}, positions, seen)
        x = x - _dense(arrays, "action_out_proj", out[:, -noise.shape[1] :]) / num_steps
        time -= 1 / num_steps
    return x


def _embed_suffix(
    arrays: Arrays, state: np.ndarray, x: np.ndarray, time: float
) -> tuple[np.ndarray, np.ndarray | None]:
    width = WIDTHS["_1"][0]
    period = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, width // 2)
    angle = time * 2 * np.pi / period
    embedded = np.broadcast_to(np.concatenate([np.sin(angle), np.cos(angle)]), (len(x), width))
    actions = _dense(arrays, "action_in_proj", x)
    if "time_mlp_in/kernel" in arrays:
        hidden = _swish(_dense(arrays, "time_mlp_in", embedded))
        return actions, _swish(_dense(arrays, "time_mlp_out", hidden))
    both = np.concatenate([actions, np.broadcast_to(embedded[:, None], actions.shape)], -1)
    hidden = _dense(arrays, "action_time_mlp_out", _swish(_dense(arrays, "action_time_mlp_in", both)))
    return np.concatenate([_dense(arrays, "state_proj", state)[:, None], hidden], 1), None


def _transform(arrays, streams, conditions, positions, seen):
    """Run both transformers; give the expert's tokens."""
    for i in range(DEPTH):
        layer = {
            name.removeprefix(f"{LLM}/layers/"): array[i]
            for name, array in arrays.items()
            if name.startswith(f"{LLM}/layers/")
        }
        queries, keys, values, gates = [], [], [], {}
        for suffix, x in streams.items():
            x, gates[suffix] = _rms_norm(layer, f"pre_attention_norm{suffix}", x, conditions[suffix])
            queries.append(_einsum(layer, f"attn/q_einsum{suffix}", "btd,ndh->btnh", x))
            key, value = _einsum(layer, f"attn/kv_einsum{suffix}", "bsd,ckdh->cbskh", x)
            keys.append(key)
            values.append(value)
        q, k = (_rope(np.concatenate(x, 1), positions) for x in (queries, keys))
        logits = np.einsum("btnh,bskh->bnts", q * HEAD_DIM**-0.5, k)
        encoded = np.einsum(
            "bnts,bskh->btnh", _softmax(np.where(seen[:, None], logits, -1e30)), np.concatenate(values, 1)
        )
        start = 0
        for suffix, x in streams.items():
            mine = encoded[:, start : start + x.shape[1]]
            start += x.shape[1]
            x = x + gates[suffix] * _einsum(layer, f"attn/attn_vec_einsum{suffix}", "btnh,nhd->btd", mine)
            hidden, gate = _rms_norm(layer, f"pre_ffw_norm{suffix}", x, conditions[suffix])
            streams = {**streams, suffix: x + gate * _feed_forward(layer, f"mlp{suffix}", hidden)}
    return _rms_norm(arrays, f"{LLM}/final_norm_1", streams["_1"], conditions["_1"])[0]


def _einsum(layer: Arrays, name: str, equation: str, x: np.ndarray) -> np.ndarray:
    """Multiply by a weight, and add what its adapters give: factor by factor, with `l` for the rank."""
    result = np.einsum(equation, x, layer[f"{name}/w"])
    if f"{name}/lora_a" in layer:
        inputs, rest = equation.split(",")
        weight, output = rest.split("->")
        into, out_of = weight[-2], weight[-1]
        between = output.replace(out_of, "l")
        first = np.einsum(f"{inputs},{weight.replace(out_of, 'l')}->{between}", x, layer[f"{name}/lora_a"])
        second = layer[f"{name}/lora_b"]
        result = result + np.einsum(f"{between},{weight.replace(into, 'l')}->{output}", first, second)
    return result


def _feed_forward(layer: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    def multiply(x, weight, part):
        result = x @ layer[f"{name}/{weight}"][part]
        if f"{name}/{weight}_lora_a" in layer:
            result = (
                result + x @ layer[f"{name}/{weight}_lora_a"][part] @ layer[f"{name}/{weight}_lora_b"][part]
            )
        return result

    gate, up = (multiply(x, "gating_einsum", part) for part in (0, 1))
    return multiply(_gelu(gate) * up, "linear", ...)


def _see(arrays: Arrays, image: np.ndarray) -> np.ndarray:
    """Give the vectors of an image's patches."""
    b, size = len(image), image.shape[1] // PATCH
    patches = image.reshape(b, size, PATCH, size, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("bxypqc,pqcd->bxyd", patches, arrays[f"{IMG}/embedding/kernel"]).reshape(b, size**2, -1)
    x = x + arrays[f"{IMG}/embedding/bias"] + arrays[f"{IMG}/pos_embedding"]
    prefix = f"{IMG}/Transformer/encoderblock/"
    for i in range(VISION_DEPTH):
        layer = {n.removeprefix(prefix): array[i] for n, array in arrays.items() if n.startswith(prefix)}
        attention = "MultiHeadDotProductAttention_0/"
        y = _layer_norm(layer, "LayerNorm_0", x)
        q, k, v = (
            np.einsum("bld,dnh->blnh", y, layer[f"{attention}{name}/kernel"])
            + layer[f"{attention}{name}/bias"]
            for name in ("query", "key", "value")
        )
        weights = _softmax(np.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5)
        attended = np.einsum("bnts,bsnh->btnh", weights, v)
        kernel, bias = layer[f"{attention}out/kernel"], layer[f"{attention}out/bias"]
        x = x + np.einsum("btnh,nhd->btd", attended, kernel) + bias
        hidden = _gelu(_dense(layer, "MlpBlock_0/Dense_0", _layer_norm(layer, "LayerNorm_1", x)))
        x = x + _dense(layer, "MlpBlock_0/Dense_1", hidden)
    return _dense(arrays, f"{IMG}/head", _layer_norm(arrays, f"{IMG}/Transformer/encoder_norm", x))


def _rms_norm(arrays: Arrays, name: str, x: np.ndarray, condition: np.ndarray | None):
    """Give (the normalized tokens, the gate of what is made of them)."""
    normal = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    if condition is None:
        return normal * (1 + arrays[f"{name}/scale"]), 1.0
    scale, shift, gate = np.split(_dense(arrays, f"{name}/Dense_0", condition)[:, None], 3, -1)
    return normal * (1 + scale) + shift, gate


def _layer_norm(arrays: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def _rope(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    radians = (positions[..., None] / 10_000 ** (np.arange(half) / half))[:, :, None]
    first, second = np.split(x, 2, -1)
    cos, sin = np.cos(radians), np.sin(radians)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _dense(arrays: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
