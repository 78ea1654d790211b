"""Text tokenizers: the same tokens as `transformers.AutoTokenizer` 5.5, with the `tokenizers` library alone.

The files are those of a model on the Hub: tokenizer.json, tokenizer_config.json, the older special_tokens_map.json,
and config.json. Of some classes transformers takes only the vocabulary from tokenizer.json and builds the rest
anew. They are built in the same way here, because that can change the tokens. Code in a repository is never run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from lerobot_jax import hub
from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json

TOKENIZER_NAME = "tokenizer.json"
# The files that matter; "*" also stands for the folder in a repository.
PATTERNS = ("*tokenizer.json", "*config.json", "*special_tokens_map.json")
ADVICE = (
    "check the name, give a local folder, or go online once "
    "(some models want you to accept their terms on the Hub and to log in with `hf auth login`)"
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]  # token -> id, and BPE's merges


class TextTokenizer:
    """Turns text into token ids.

    Attributes:
        ids: the ids of the special tokens that there are, by name (`bos_token`, `pad_token`, ...).
        vocab_size: how many tokens there are, without those that were added to the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, specials: Mapping[str, str], truncation_side: str):
        self._backend, self._truncation_side = backend, truncation_side
        self.ids = {name: backend.token_to_id(content) for name, content in specials.items()}
        self.vocab_size = backend.get_vocab_size(with_added_tokens=False)

    def truncate_to(self, max_length: int) -> None:
        """Cut what does not fit into `max_length` tokens, special ones included, from now on."""
        self._backend.enable_truncation(max_length, direction=self._truncation_side)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Give the token ids of a text."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the token ids of many texts, side by side and without the global lock."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]


def find_tokenizer(name: str, needed: str = TOKENIZER_NAME) -> Path:
    """Give the folder of a tokenizer: a local one, or that of a model in the Hub's cache or on the Hub.

    Args:
        name: the folder, or the model's name.
        needed: a file that must be there.

    Raises:
        InputError: saying where it was looked for and what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    return hub.fetch(name, "model", [needed, *PATTERNS], advice=ADVICE)


def read_tokenizer(
    folder: Path, add_bos_token: bool | None = None, add_eos_token: bool | None = None
) -> TextTokenizer:
    """Read the tokenizer in a folder.

    Args:
        folder: has tokenizer.json, and mostly tokenizer_config.json and config.json.
        add_bos_token: put this token in front; None for both: as tokenizer.json says.
        add_eos_token: put this token at the end.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    path = folder / TOKENIZER_NAME
    content, config = _read_object(path), _read_object(folder / "tokenizer_config.json", optional=True)
    family = _family(config, _read_object(folder / "config.json", optional=True), folder)
    if "added_tokens_decoder" not in config:
        config |= _read_object(folder / "special_tokens_map.json", optional=True)
    try:
        specials = _special_tokens(config, content)
        if family is None:
            backend = tokenizers.Tokenizer.from_file(str(path))
        else:
            specials = {**family.specials, **specials}
            backend = _rebuild(family, content, specials, config)
        _add_tokens(backend, config, content, specials)
        names = {name: token.content for name, token in specials.items() if name in SPECIAL_NAMES}
        if family is CLIP:
            eos, bos = _with_ids(backend, names["eos_token"], names["bos_token"])
            backend.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False)
        elif (add_bos_token, add_eos_token) != (None, None):
            bos, eos = names.get("bos_token"), names.get("eos_token")
            _set_ends(backend, bos if add_bos_token else None, eos if add_eos_token else None)
        if backend.padding:
            names.setdefault("pad_token", backend.padding["pad_token"])
        side = (backend.truncation or {}).get("direction", "right")
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = config.get("split_special_tokens", False)
        return TextTokenizer(backend, names, config.get("truncation_side", side))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{path}: cannot be read as a tokenizer ({error!r})") from None


class Family(NamedTuple):
    """A class of tokenizers that transformers builds from the vocabulary, whatever else tokenizer.json says."""

    build: Callable[[Vocabulary, Mapping[str, AddedToken], Mapping[str, Any]], tokenizers.Tokenizer]
    specials: Mapping[str, AddedToken]  # those that tokenizer_config.json need not name


def _build_gemma(
    vocabulary: Vocabulary, specials: Mapping[str, AddedToken], _config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    unknown = specials["unk_token"].content
    backend = tokenizers.Tokenizer(
        models.BPE(*vocabulary, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return backend


def _build_gpt2(
    vocabulary: Vocabulary, _specials: Mapping[str, AddedToken], config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(*vocabulary, continuing_subword_prefix="", end_of_word_suffix="")
    )
    prefix = config.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return backend


def _build_clip(
    vocabulary: Vocabulary, specials: Mapping[str, AddedToken], _config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    unknown = specials["unk_token"].content
    model = models.BPE(
        *vocabulary, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _specials(**contents: str) -> dict[str, AddedToken]:
    return {f"{name}_token": AddedToken(content, special=True) for name, content in contents.items()}


_END = "<|endoftext|>"
GEMMA = Family(_build_gemma, _specials(bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>", mask="<mask>"))
GPT2 = Family(_build_gpt2, _specials(bos=_END, eos=_END, unk=_END))
CLIP = Family(_build_clip, _specials(bos="<|startoftext|>", eos=_END, unk=_END, pad=_END))
FAMILIES = {"GemmaTokenizer": GEMMA, "GPT2Tokenizer": GPT2, "CLIPTokenizer": CLIP}
# The tokenizer class that transformers expects of a type of model; any other is read from tokenizer.json as it is.
EXPECTED = {
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "clip": "CLIPTokenizer",
}
# Types of models of which it expects none.
ANY_CLASS = ("", "paligemma", "smolvlm", "idefics3", "llama", "clip_text_model")


def _family(config: Mapping[str, Any], model: Mapping[str, Any], folder: Path) -> Family | None:
    """Tell how transformers makes the tokenizer; None: as tokenizer.json says."""
    model_type = model.get("model_type", "")
    expected = EXPECTED.get(model_type)
    name = str(config.get("tokenizer_class") or expected or "TokenizersBackend").removesuffix("Fast")
    if (expected and name != expected) or name in ("TokenizersBackend", "PreTrainedTokenizer"):
        return None
    if name not in FAMILIES or (expected is None and model_type not in ANY_CLASS):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: a '{name}' of a model of type '{model_type}' is not supported; "
            f"supported are {', '.join(FAMILIES)} and PreTrainedTokenizerFast"
        )
    return FAMILIES[name]


def _rebuild(
    family: Family, content: Mapping[str, Any], specials: Mapping[str, AddedToken], config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Build a family's tokenizer from the vocabulary; of the rest of tokenizer.json, take what frames a text."""
    model = content["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [(first, second) for first, second in pairs]
    backend = family.build((model["vocab"], merges), specials, config)
    shell = {**content, "model": {**model, "vocab": {}, "merges": []}, "added_tokens": []}
    frame = tokenizers.Tokenizer.from_str(json.dumps(shell))
    backend.post_processor = frame.post_processor
    if frame.truncation:
        backend.enable_truncation(**frame.truncation)
    if frame.padding:
        backend.enable_padding(**frame.padding)
    return backend


def _added_tokens(config: Mapping[str, Any], content: Mapping[str, Any]) -> list[AddedToken]:
    """List the tokens beside the vocabulary in the order of their ids."""
    if "added_tokens_decoder" in config:
        added = {int(index): token for index, token in config["added_tokens_decoder"].items()}
    else:
        added = {token["id"]: token for token in content["added_tokens"]}
    return [_as_token(added[index]) for index in sorted(added)]


def _special_tokens(config: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Give the special tokens that have a name."""
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens"))
    named = {**config, **extra} if isinstance(extra, dict) else config
    ordered = [*SPECIAL_NAMES, *(name for name in named if name not in SPECIAL_NAMES)]
    added = {token.content: token for token in _added_tokens(config, content)}
    specials = {}
    for name in ordered:
        value = named.get(name)
        if isinstance(value, str | dict) and (name.endswith("_token") or name in (extra or ())):
            token = _as_token(value, special=True)
            specials[name] = added.get(token.content, token)
    return specials


def _add_tokens(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    content: Mapping[str, Any],
    specials: Mapping[str, AddedToken],
) -> None:
    """Add the tokens that the vocabulary lacks or that are described otherwise in it."""
    present = list(backend.get_added_tokens_decoder().values())
    described = {repr(token) for token in present}
    new = [token for token in _added_tokens(config, content) if repr(token) not in described]
    known = {token.content for token in [*present, *new]}
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    others = [] if isinstance(extra, dict) else [_as_token(token, special=True) for token in extra]
    for token in [*specials.values(), *others]:
        if token.content not in known:
            new.append(token)
            known.add(token.content)
    backend.add_tokens(new)


def _as_token(value: str | Mapping[str, Any], **changes: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, **changes)
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: value[name] for name in flags if name in value} | changes)


def _set_ends(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    single = " ".join(part for part in (bos, "$A", eos) if part)
    ends = _with_ids(backend, *(token for token in (bos, eos) if token))
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)


def _with_ids(backend: tokenizers.Tokenizer, *tokens: str) -> list[tuple[str, int]]:
    return [(token, i) for token in tokens if (i := backend.token_to_id(token)) is not None]


def _read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, it holds {type(content).__name__}")
    return content
