"""Record what stock LeRobot's processor pipelines write and compute, for tests/processors/golden/.

    HF_HUB_OFFLINE=1 HF_HUB_CACHE=tests/processors/golden/tokenizers $LEROBOT_PYTHON tools/make_processor_golden.py

Runs in the environment of `lerobot==0.6.1` (with transformers). The tokenizers are tiny ones, trained here and laid
out as the Hub's cache under their real names, so that LeRobot loads them with transformers' own AutoTokenizer. One
stand-in: the code of the FAST tokenizer comes from its repository on the Hub; `FAST_CODE` does the same.

A folder holds what LeRobot saved (policy_*.json, statistics), raw.safetensors with the inputs (`predicted`: actions
for the postprocessor), tasks.json, and the results: expected.safetensors, expected_post.safetensors.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from lerobot.configs import (  # pyright: ignore[reportMissingImports]
    FeatureType,
    NormalizationMode,
    PolicyFeature,
    PreTrainedConfig,
)
from lerobot.policies.factory import make_pre_post_processors  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

OUT = Path(__file__).resolve().parent.parent / "tests" / "processors" / "golden"
CACHE = OUT / "tokenizers"
CORPUS = [
    "pick up the red cube and put it into the box",
    "open the drawer, then push the block",
    "stack 3 bowls on 12 plates",
    "Task: fold the towel, State: 0 1 2 25 127 128 200 255 -1;",
    "Action: ",
]
TASKS = [
    " pick_up the red cube\n",
    "stack 12 bowls, then push the drawer and open the box, and fold the towel and put it on the red block",
    "Fold <image> the   towel's 3rd corner – schön\nnow",
]
FAST_CODE = """
import numpy as np
from scipy.fft import dct
from transformers.processing_utils import ProcessorMixin

class UniversalActionProcessor(ProcessorMixin):
    attributes = ["bpe_tokenizer"]
    bpe_tokenizer_class = "AutoTokenizer"

    def __init__(self, bpe_tokenizer, scale=10, min_token=0):
        self.scale, self.min_token = scale, min_token
        super().__init__(bpe_tokenizer)

    def __call__(self, chunks):
        chunks = chunks[None] if chunks.ndim == 2 else chunks
        steps = np.around(dct(chunks, axis=1, norm="ortho") * self.scale) - self.min_token
        texts = ["".join(map(chr, np.maximum(x.flatten(), 0).astype(int))) for x in steps]
        return [self.bpe_tokenizer(text)["input_ids"] for text in texts]
"""
JOINTS = ["shoulder.pos", "elbow.pos", "wrist.pos", "Gripper.pos"]
MEAN_STD = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
MIN_MAX = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}
QUANTILES = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
ONLY_STATE = {"VISUAL": "IDENTITY", "STATE": "QUANTILE10", "ACTION": "MEAN_STD"}
# statistic: how much of the span it lies above the lowest value; of "std", how much of the span it is
STATISTICS = dict(mean=0.5, std=0.3, min=0.0, max=1.0, q01=0.1, q10=0.2, q90=0.8, q99=0.9)  # noqa: C408
RELATIVE = {"use_relative_actions": True, "action_feature_names": JOINTS}
CASES = {  # name: (type of policy, how it normalizes, settings of its config, changes of preprocessor steps)
    "act": ("act", MEAN_STD, {}, {0: {"rename_map": {"observation.images.front": "observation.images.a"}}}),
    "diffusion": ("diffusion", MIN_MAX, {}, {2: {"float_dtype": "float32"}}),
    "vqbet": ("vqbet", QUANTILES, {}, {}),
    "tdmpc": ("tdmpc", {"ACTION": "MIN_MAX"}, {"use_mpc": True, "n_action_steps": 1}, {}),
    "gaussian_actor": (
        "gaussian_actor",
        MIN_MAX,
        {},
        {3: {"eps": 1e-6, "normalize_observation_keys": {"observation.state"}}},
    ),
    "pi0": ("pi0", MEAN_STD | {"VISUAL": "IDENTITY"}, {"tokenizer_max_length": 24}, {}),
    "pi0_relative": ("pi0", ONLY_STATE, RELATIVE | {"relative_exclude_joints": ["gripper"]}, {}),
    "pi05": ("pi05", QUANTILES, {"tokenizer_max_length": 45}, {}),
    "pi05_relative": ("pi05", ONLY_STATE, RELATIVE | {"relative_exclude_joints": []}, {}),
    "pi0_fast": ("pi0_fast", QUANTILES, {"max_action_tokens": 48, "tokenizer_max_length": 80}, {}),
    "pi0_fast_relative": (
        "pi0_fast",
        MEAN_STD | {"VISUAL": "IDENTITY"},
        RELATIVE | {"max_action_tokens": 20},
        {},
    ),
    "smolvla": ("smolvla", QUANTILES, {"tokenizer_max_length": 20}, {}),
    "smolvla_padded": ("smolvla", QUANTILES, {"pad_language_to": "max_length"}, {}),
    "multi_task_dit": ("multi_task_dit", MIN_MAX, {"tokenizer_max_length": 30}, {}),
}


def train(before, vocab_size: int, alphabet=(), suffix: str = "") -> tuple[dict[str, int], list]:
    """Give a byte-pair encoding's tokens and merges learnt from the corpus."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = before
    settings = {"initial_alphabet": list(alphabet), "end_of_word_suffix": suffix, "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write_repository(name: str, files: dict, tokenizer: Tokenizer | None = None, folder: str = "") -> None:
    """Lay files out as the Hub's cache has them."""
    commit = "0" * 39 + "1"
    root = CACHE / f"models--{name.replace('/', '--')}"
    target = root / "snapshots" / commit / folder
    target.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    if tokenizer is not None:
        (target / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    for file, content in files.items():
        (target / file).write_text(content if isinstance(content, str) else json.dumps(content))


def write_paligemma() -> None:
    split = pre_tokenizers.Split(" ", "merged_with_next")
    pieces, merges = train(split, 150)
    space = str.maketrans(" ", "▁")
    merges = [(a.translate(space), b.translate(space)) for a, b in merges]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), "\n", "|", "<loc0000>", "<loc0001>"]
    tokens += [piece.translate(space) for piece in pieces]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([*special, "<image>"])
    names = ("pad", "eos", "bos", "unk", "mask")
    config = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    added = {i: token.__getstate__() for i, token in tokenizer.get_added_tokens_decoder().items()}
    config |= {"added_tokens_decoder": added, "additional_special_tokens": ["<image>"], "add_bos_token": True}
    config |= {"tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor"}
    files = {"tokenizer_config.json": config, "config.json": {"model_type": "paligemma"}}
    write_repository("google/paligemma-3b-pt-224", files, tokenizer)


def write_smolvlm() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    before = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    vocab, merges = train(before, 360, pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = before
    end = "<end_of_utterance>"
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", end])
    config = {"bos_token": "<|im_start|>", "eos_token": end, "pad_token": "<|im_end|>"}
    config |= {"tokenizer_class": "GPT2Tokenizer", "truncation_side": "left", "add_prefix_space": False}
    config |= {"extra_special_tokens": {"image_token": "<image>", "end_of_utterance_token": end}}
    files = {"tokenizer_config.json": config, "config.json": {"model_type": "smolvlm"}}
    write_repository("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", files, tokenizer)


def write_clip() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    _, merges = train(pre_tokenizers.Sequence(words), 380, alphabet, "</w>")
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), *ends]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=ends[1], end_of_word_suffix="</w>"))
    tokenizer.add_special_tokens(ends)
    special = {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1], "pad_token": ends[1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 30}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    write_repository(
        "openai/clip-vit-base-patch16", {**files, "config.json": {"model_type": "clip"}}, tokenizer
    )


def write_fast() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(200, 24, generator=generator) * 6 + 40).round().clip(0, 80).int()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=160, initial_alphabet=[chr(i) for i in range(81)])
    tokenizer.train_from_iterator(["".join(map(chr, row)) for row in noise.tolist()], trainer)
    name, inner = "lerobot/fast-action-tokenizer", {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_repository(name, {"tokenizer_config.json": inner, "config.json": {}}, tokenizer, "bpe_tokenizer")
    code = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
    config = {"processor_class": "UniversalActionProcessor", "auto_map": code, "scale": 10, "min_token": -40}
    write_repository(name, {"processor_config.json": config, "processing_action_tokenizer.py": FAST_CODE})


def record(name: str, kind: str, normalization: dict, settings: dict, changes: dict) -> None:
    """Write one folder."""
    generator = torch.Generator().manual_seed(len(name))
    state_dim = 6 if "relative" in name else 4  # more than the actions have
    shapes = {"observation.state": (state_dim,), "action": (4,)}
    shapes |= {f"observation.images.{camera}": (3, 4, 6) for camera in "ab"[: 1 if kind == "tdmpc" else 2]}
    kinds = {key: "ACTION" if key == "action" else "VISUAL" if "image" in key else "STATE" for key in shapes}
    features = {key: PolicyFeature(FeatureType(kinds[key]), shape) for key, shape in shapes.items()}
    stats = {}
    for key, shape in shapes.items():
        low, span = torch.randn(2, *((3, 1, 1) if kinds[key] == "VISUAL" else shape), generator=generator)
        span = span.abs() + 0.5
        if kinds[key] == "STATE":
            span[0] = 0.0  # something that never moves
        stats[key] = {s: low * (s != "std") + span * part for s, part in STATISTICS.items()}
        stats[key]["count"] = torch.tensor([120])
    config = PreTrainedConfig.get_choice_class(kind)(
        input_features={key: f for key, f in features.items() if key != "action"},
        output_features={"action": features["action"]},
        normalization_mapping={key: NormalizationMode(mode) for key, mode in normalization.items()},
        device="cpu",
        **settings,
    )
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    for index, values in changes.items():
        for setting, value in values.items():
            setattr(pre.steps[index], setting, value)
    folder = OUT / name
    pre.save_pretrained(folder)
    post.save_pretrained(folder)
    raw = {key: torch.randn(3, *shape, generator=generator) for key, shape in shapes.items()}
    raw["action"], predicted = torch.randn(2, 3, 8, 4, generator=generator)
    old_names = {new: old for old, new in pre.steps[0].rename_map.items()}
    raw = {old_names.get(key, key): value for key, value in raw.items()}
    raw["action_is_pad"] = torch.rand(3, 8, generator=generator) < 0.3
    result = pre({**raw, "task": list(TASKS)})
    expected = {key: value.contiguous() for key, value in result.items() if isinstance(value, torch.Tensor)}
    save_file(raw | {"predicted": predicted}, folder / "raw.safetensors")
    save_file(expected, folder / "expected.safetensors")
    save_file({"action": post(predicted.clone()).contiguous()}, folder / "expected_post.safetensors")
    (folder / "tasks.json").write_text(json.dumps(TASKS))


if __name__ == "__main__":
    if os.environ.get("HF_HUB_OFFLINE") != "1" or Path(os.environ.get("HF_HUB_CACHE", "")).resolve() != CACHE:
        sys.exit(f"set HF_HUB_OFFLINE=1 and HF_HUB_CACHE={CACHE}")
    shutil.rmtree(OUT, ignore_errors=True)
    for write in (write_paligemma, write_smolvlm, write_clip, write_fast):
        write()
    for name, case in CASES.items():
        record(name, *case)
    for path in OUT.rglob("processing_action_tokenizer.py"):
        path.unlink()  # only LeRobot needs it
