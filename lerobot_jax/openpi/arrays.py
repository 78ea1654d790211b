"""The arrays of openpi's pi0 and pi0.5, and what LeRobot's are made of them.

openpi's are those of flax.linen with a leading axis of layers. They are multiplied from the right (`x @ w`, or an
einsum over heads), PyTorch's from the left.
"""

from typing import NamedTuple

_MODEL = "model.paligemma_with_expert."
LANGUAGE, EXPERT = f"{_MODEL}paligemma.model.language_model.", f"{_MODEL}gemma_expert.model."
EMBEDDING, LM_HEAD = f"{LANGUAGE}embed_tokens.weight", f"{_MODEL}paligemma.lm_head.weight"
EXPERT_LM_HEAD = f"{_MODEL}gemma_expert.lm_head.weight"
_VISION = f"{_MODEL}paligemma.model.vision_tower.vision_model."
_PROJECTOR = f"{_MODEL}paligemma.model.multi_modal_projector.linear"
# Sizes that follow from another one.
MULTIPLES = {"expert_width": {"hidden": 1, "action_and_time": 2, "modulation": 3}}


def is_rounded_by_lerobot(key: str) -> bool:
    """Tell whether a policy of LeRobot's whose dtype is bfloat16 has an array in it; the others are float32."""
    is_norm = "layernorm" in key or key.startswith((f"{LANGUAGE}norm.", f"{EXPERT}norm."))
    return key in (LM_HEAD, EXPERT_LM_HEAD) or (key.startswith((LANGUAGE, EXPERT)) and not is_norm)


class StoredArray(NamedTuple):
    """One of openpi's arrays: its axes, and those of what LeRobot has instead.

    If there are several `keys`, each has a part along an axis before `axes`; `{}` in them is the layer's number.
    """

    path: str
    axes: str  # without those of layers and parts
    order: str
    keys: tuple[str, ...]
    layers: str | None = None  # the name of the first axis, if it is that of layers

    @property
    def all_axes(self) -> list[str]:
        layers = [] if self.layers is None else [self.layers]
        parts = [] if len(self.keys) == 1 else [str(len(self.keys))]
        return [*layers, *parts, *self.axes.split()]

    @property
    def adapters(self) -> tuple[str, str] | None:
        """The paths of its LoRA factors, if openpi's variants have some for it."""
        start, _, name = self.path.rpartition("/")
        if not self.path.startswith("PaliGemma/llm/layers/") or name not in ("w", "gating_einsum", "linear"):
            return None
        prefix = f"{start}/lora" if name == "w" else f"{start}/{name}_lora"
        return f"{prefix}_a", f"{prefix}_b"

    @property
    def is_of_attention(self) -> bool:
        return "/attn/" in self.path


def list_arrays(policy_type: str) -> list[StoredArray]:
    """List the arrays of a checkpoint."""
    is_adaptive = policy_type == "pi05"
    rows = [
        *_dense("action_in_proj", "action_dim", "expert_width", "model.action_in_proj"),
        *_dense("action_out_proj", "expert_width", "action_dim", "model.action_out_proj"),
    ]
    time, inputs = ("time_mlp", "hidden") if is_adaptive else ("action_time_mlp", "action_and_time")
    rows += _dense(f"{time}_in", inputs, "expert_width", f"model.{time}_in")
    rows += _dense(f"{time}_out", "hidden", "expert_width", f"model.{time}_out")
    if not is_adaptive:
        rows += _dense("state_proj", "action_dim", "expert_width", "model.state_proj")
    embedding = "PaliGemma/llm/embedder/input_embedding"
    rows.append(StoredArray(embedding, "vocab width", "vocab width", (EMBEDDING,)))
    rows += _gemma("", "", LANGUAGE, is_adaptive=False)
    rows += _gemma("_1", "expert_", EXPERT, is_adaptive=is_adaptive)
    return rows + _siglip()


def _dense(path: str, inputs: str, outputs: str, key: str, layers: str | None = None) -> list[StoredArray]:
    return [
        StoredArray(
            f"{path}/kernel", f"{inputs} {outputs}", f"{outputs} {inputs}", (f"{key}.weight",), layers
        ),
        StoredArray(f"{path}/bias", outputs, outputs, (f"{key}.bias",), layers),
    ]


def _gemma(suffix: str, part: str, key: str, *, is_adaptive: bool) -> list[StoredArray]:
    """List the arrays of one of the two transformers, whose names end in a suffix and whose widths are a part's."""
    width, hidden, layer = f"{part}width", f"{part}mlp_dim", f"{key}layers.{{}}."
    attention, mlp = "PaliGemma/llm/layers/attn/", f"PaliGemma/llm/layers/mlp{suffix}/"
    key_and_value = (f"{layer}self_attn.k_proj.weight", f"{layer}self_attn.v_proj.weight")
    gate_and_up = (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight")
    rows = [
        (f"{attention}q_einsum{suffix}/w", f"heads {width} head_dim", f"(heads head_dim) {width}",
         (f"{layer}self_attn.q_proj.weight",)),
        (f"{attention}kv_einsum{suffix}/w", f"1 {width} head_dim", f"head_dim {width}", key_and_value),
        (f"{attention}attn_vec_einsum{suffix}/w", f"heads head_dim {width}", f"{width} (heads head_dim)",
         (f"{layer}self_attn.o_proj.weight",)),
        (f"{mlp}gating_einsum", f"{width} {hidden}", f"{hidden} {width}", gate_and_up),
        (f"{mlp}linear", f"{hidden} {width}", f"{width} {hidden}", (f"{layer}mlp.down_proj.weight",)),
    ]  # fmt: skip
    norms = [
        ("PaliGemma/llm/layers/pre_attention_norm", f"{layer}input_layernorm", "depth"),
        ("PaliGemma/llm/layers/pre_ffw_norm", f"{layer}post_attention_layernorm", "depth"),
        ("PaliGemma/llm/final_norm", f"{key}norm", None),
    ]
    arrays = [StoredArray(path, axes, order, keys, "depth") for path, axes, order, keys in rows]
    for path, name, layers in norms:
        if is_adaptive:
            arrays += _dense(f"{path}{suffix}/Dense_0", width, "modulation", f"{name}.dense", layers)
        else:
            arrays.append(StoredArray(f"{path}{suffix}/scale", width, width, (f"{name}.weight",), layers))
    return arrays


def _siglip() -> list[StoredArray]:
    """List the arrays of the image tower and of the projector behind it."""
    embeddings, layer = f"{_VISION}embeddings.", f"{_VISION}encoder.layers.{{}}."
    block = "PaliGemma/img/Transformer/encoderblock/"
    attention, heads = f"{block}MultiHeadDotProductAttention_0/", "vision_heads vision_head_dim"
    rows = [
        *_dense("PaliGemma/img/head", "vision_width", "width", _PROJECTOR),
        StoredArray("PaliGemma/img/embedding/kernel", "patch_height patch_width channels vision_width",
                    "vision_width channels patch_height patch_width", (f"{embeddings}patch_embedding.weight",)),
        StoredArray("PaliGemma/img/embedding/bias", "vision_width", "vision_width",
                    (f"{embeddings}patch_embedding.bias",)),
        StoredArray("PaliGemma/img/pos_embedding", "1 patches vision_width", "patches vision_width",
                    (f"{embeddings}position_embedding.weight",)),
        *_norm("PaliGemma/img/Transformer/encoder_norm", f"{_VISION}post_layernorm"),
        *_norm(f"{block}LayerNorm_0", f"{layer}layer_norm1", "vision_depth"),
        *_norm(f"{block}LayerNorm_1", f"{layer}layer_norm2", "vision_depth"),
        *_dense(f"{block}MlpBlock_0/Dense_0", "vision_width", "vision_mlp_dim", f"{layer}mlp.fc1", "vision_depth"),
        *_dense(f"{block}MlpBlock_0/Dense_1", "vision_mlp_dim", "vision_width", f"{layer}mlp.fc2", "vision_depth"),
        StoredArray(f"{attention}out/kernel", f"{heads} vision_width", f"vision_width ({heads})",
                    (f"{layer}self_attn.out_proj.weight",), "vision_depth"),
        StoredArray(f"{attention}out/bias", "vision_width", "vision_width", (f"{layer}self_attn.out_proj.bias",),
                    "vision_depth"),
    ]  # fmt: skip
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        key = f"{layer}self_attn.{short}_proj"
        rows += [
            StoredArray(f"{attention}{name}/kernel", f"vision_width {heads}", f"({heads}) vision_width",
                        (f"{key}.weight",), "vision_depth"),
            StoredArray(f"{attention}{name}/bias", heads, f"({heads})", (f"{key}.bias",), "vision_depth"),
        ]  # fmt: skip
    return rows


def _norm(path: str, key: str, layers: str | None = None) -> list[StoredArray]:
    width = "vision_width"
    return [
        StoredArray(f"{path}/scale", width, width, (f"{key}.weight",), layers),
        StoredArray(f"{path}/bias", width, width, (f"{key}.bias",), layers),
    ]
