"""Make a tiny CLIP model that stands for those on the Hub, and record what transformers computes with it.

    HF_HUB_OFFLINE=1 $LEROBOT_PYTHON tools/make_clip_golden.py

Runs in the environment of `lerobot==0.6.1` (with transformers). Writes

    tests/golden/hub           the model `tests/clip-tiny`, laid out as in the Hub's cache; its tokenizer's files
                               are like those of openai/clip-vit-base-patch16
    tests/nn/golden/clip.npz   texts (json), their tokens and masks, images, and what both towers make of them, also
                               with other settings: `NAME/vision`, `NAME/text`
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from make_processor_golden import train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (  # pyright: ignore[reportMissingImports]
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
)

TESTS = Path(__file__).resolve().parent.parent / "tests"
REPOSITORY = TESTS / "golden" / "hub" / "models--tests--clip-tiny"
LENGTH = 24
TEXTS = [
    "pick up the red cube",
    "",
    "  Open the\tDRAWER,\nthen push the block!!  ",
    "naïve Größe — it's the towel's 3rd corner, can't won't 'quoted'",
    "🤖 put 👩‍🚀 into the box 🟥",
    "日本語のタスク ½ ² ﬁ Å",
    "e\u0301 \u200bzero\u00a0width İ ẞ",
    "<|endoftext|> and <|startoftext|> in a task",
    "12345 stack_3 bowls/plates: 7.5 kg #1",
    "and put it into the box and open the drawer and push the block and stack 3 bowls on 12 plates, then again",
]
OTHERS = {"gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}}


def write_tokenizer(folder: Path) -> int:
    """Write the files of a CLIP tokenizer; give the size of its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    _, merges = train(pre_tokenizers.Sequence(words), 380, alphabet, "</w>")
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), *ends]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=ends[1], end_of_word_suffix="</w>"))
    tokenizer.add_special_tokens(ends)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    start, end = ({"content": token, **flags} for token in ends)
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": ends[1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    special = {k: v | {"__type": "AddedToken"} if isinstance(v, dict) else v for k, v in special.items()}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True}
    config |= {"add_prefix_space": False, "errors": "replace", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)


def make_config(num_tokens: int, eos_token_id: int, **settings: object) -> CLIPConfig:
    """Give small dimensions; the towers differ, so that they cannot be mixed up."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": num_tokens, "max_position_embeddings": LENGTH, "eos_token_id": eos_token_id}
    vision = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    return CLIPConfig(text_config=text | settings, vision_config=vision | settings, projection_dim=8)


def new_model(config: CLIPConfig) -> CLIPModel:
    """Give a model with all its weights, biases too, drawn at random."""
    model, generator = CLIPModel(config), torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        value.data = is_norm + 0.25 * torch.randn(value.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def run(
    folder: Path, texts: tuple[torch.Tensor, torch.Tensor], images: torch.Tensor
) -> dict[str, np.ndarray]:
    """Give what the towers in a folder make of texts (tokens and mask) and images."""
    vision, text = CLIPVisionModel.from_pretrained(folder), CLIPTextModel.from_pretrained(folder)
    seen = vision(pixel_values=images).last_hidden_state
    read = text(input_ids=texts[0], attention_mask=texts[1]).pooler_output
    return {"vision": seen.numpy(), "text": read.numpy()}


def main() -> None:
    shutil.rmtree(REPOSITORY, ignore_errors=True)
    commit = "0" * 39 + "1"
    folder = REPOSITORY / "snapshots" / commit
    folder.mkdir(parents=True)
    (REPOSITORY / "refs").mkdir()
    (REPOSITORY / "refs" / "main").write_text(commit)
    num_tokens = write_tokenizer(folder)
    new_model(make_config(num_tokens, eos_token_id=2)).save_pretrained(folder)  # as OpenAI's
    tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
    for side in ("right", "left"):
        settings = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "padding_side": side}
        encoded = tokenizer(TEXTS, return_tensors="pt", **settings)
        found[side] = encoded["input_ids"], encoded["attention_mask"].bool()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    arrays = {f"tiny/{k}": v for k, v in run(folder, found["right"], images).items()}
    arrays["left/text"] = run(folder, found["left"], images)["text"]
    for name, settings in OTHERS.items():
        other = folder / name
        new_model(make_config(num_tokens, eos_token_id=num_tokens - 1, **settings)).save_pretrained(other)
        arrays |= {f"{name}/{k}": v for k, v in run(other, found["right"], images).items()}
        shutil.rmtree(other)
    arrays["images"] = images.movedim(1, -1).numpy()
    for side, (tokens, mask) in found.items():
        arrays |= {f"{side}/tokens": tokens.numpy().astype(np.int32), f"{side}/mask": mask.numpy()}
    arrays["texts"] = np.array(json.dumps(TEXTS))
    np.savez_compressed(TESTS / "nn" / "golden" / "clip.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
