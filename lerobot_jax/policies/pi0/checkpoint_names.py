"""Checkpoints of pi0 and pi0.5 as they are found, under the names that LeRobot's policies have today.

Mirrors what `from_pretrained` and `_fix_pytorch_state_dict_keys` of `lerobot.policies.pi0.modeling_pi0` and of
`pi05.modeling_pi05` rename and repeat. One difference, on purpose: there, keys that fit nothing are dropped, and a
policy whose weights do not load is used as it was initialized; here, all keys are kept for the loader to refuse.
"""

from lerobot_jax.errors import InputError
from lerobot_jax.state_dict import StateDict

PREFIX = "model."  # which openpi's port, and lerobot/pi0_base with it, does not have
PALIGEMMA = f"{PREFIX}paligemma_with_expert.paligemma."
# PaliGemma's logits are made with its embeddings; safetensors stores what two names share under one of them.
TIED = (f"{PALIGEMMA}model.language_model.embed_tokens.weight", f"{PALIGEMMA}lm_head.weight")
# Both policies have a network of this role, under names that checkpoints mix up.
TIME_NETWORK = {"pi0": ("time_mlp_", "action_time_mlp_"), "pi05": ("action_time_mlp_", "time_mlp_")}


def with_todays_names(state: StateDict, policy_type: str) -> StateDict:
    """Give the same arrays under today's names, and tied ones under both of theirs; nothing is read.

    Args:
        state: the checkpoint.
        policy_type: pi0 or pi05.

    Raises:
        InputError: naming two keys that are the same today.
    """
    names: dict[str, str] = {}
    for key in state:
        name = _todays_name(key, policy_type)
        if name in names.values():
            other = next(old for old, new in names.items() if new == name)
            raise InputError(f"{state.source}: {other} and {key} are two names of {name}")
        names[key] = name
    tensors = state.renamed(names).tensors
    for missing, stored in (TIED, TIED[::-1]):
        if missing not in tensors and stored in tensors:
            tensors[missing] = tensors[stored]
    return StateDict(tensors, state.metadata, state.source)


def _todays_name(key: str, policy_type: str) -> str:
    name = key.removeprefix(PREFIX)
    other, ours = TIME_NETWORK[policy_type]
    return PREFIX + (ours + name.removeprefix(other) if name.startswith(other) else name)
