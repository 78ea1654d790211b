import json
import logging
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from lerobot_jax.errors import InputError
from lerobot_jax.processors import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    FastTokenizer,
    Pi0FastStatePrompt,
    Pi0NewLine,
    Pi05StatePrompt,
    TokenizeActions,
    TokenizeTask,
    load_pipelines,
)
from lerobot_jax.processors.tokenizer import find_tokenizer, read_tokenizer

GOLDEN = Path(__file__).parent / "golden"
PALIGEMMA = "google/paligemma-3b-pt-224"
SMOLVLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
FAST = "lerobot/fast-action-tokenizer"
TASKS = ["pick up the red cubes", "stack x"]
STATE = np.array([[-2.0, -1.0, 0.0], [0.999, 1.0, 2.0]], np.float32)


@pytest.fixture(autouse=True)
def _tokenizers(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(GOLDEN / "tokenizers"))


def copy_tokenizer(name: str, folder: Path) -> Path:
    return shutil.copytree(find_tokenizer(name, "*"), folder)


def test_tasks_end_with_one_newline():
    assert Pi0NewLine()({"task": ["a", "b\n", "c\n\n"]})["task"] == ["a\n", "b\n", "c\n\n"]


def test_prompts_hold_the_state_in_256_bins():
    batch = {"task": [" pick_up\nit ", "stack"], "observation.state": STATE}
    assert Pi05StatePrompt()(batch)["task"] == [
        "Task: pick up it, State: -1 0 128;\nAction: ",
        "Task: stack, State: 255 255 255;\nAction: ",
    ]
    assert Pi0FastStatePrompt()(batch)["task"][1] == "Task: stack, State: 255 255 255;\n"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"observation.state": STATE}, r"'task' must be .*; the batch has only \['observation.state'\]"),
        ({"task": [], "observation.state": STATE}, r"'task' must be a text or a list of texts"),
        ({"task": [1, 2], "observation.state": STATE}, r"the batch has \[1, 2\]"),
        ({"task": TASKS[:1], "observation.state": STATE}, r"2 samples but 1 texts in 'task'"),
        ({"task": TASKS}, r"needs an 'observation.state' of shape \(batch, dimensions\), the batch has none"),
        ({"task": TASKS, "observation.state": STATE[:, None]}, r"has one of shape \(2, 1, 3\)"),
    ],
)
def test_unusable_batches_are_reported(batch: dict, message: str):
    with pytest.raises(InputError, match=message):
        Pi05StatePrompt()(batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_cutting(side: str):
    def run(**settings):
        result = TokenizeTask(tokenizer_name=PALIGEMMA, padding_side=side, **settings)({"task": TASKS})
        return result[OBS_LANGUAGE_TOKENS], result[OBS_LANGUAGE_ATTENTION_MASK]

    rows = [read_tokenizer(find_tokenizer(PALIGEMMA)).encode(task) for task in TASKS]
    lengths = [len(row) for row in rows]
    assert lengths[0] > lengths[1] > 2
    for settings, width in [({"padding": "longest"}, lengths[0]), ({"max_length": 50}, 50)]:
        tokens, mask = run(**settings)
        assert tokens.shape == mask.shape == (2, width)
        np.testing.assert_array_equal(mask.sum(1), lengths)
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(tokens[i, mask[i]], row)
            assert mask[i, -1 if side == "left" else 0]
        assert (tokens[~mask] == 0).all()  # <pad>
    tokens, mask = run(max_length=3)
    assert tokens[0].tolist() == rows[0][:3]
    assert mask.all()
    with pytest.raises(InputError, match=r"a task has .* tokens, max_length is 3; set truncation"):
        run(max_length=3, truncation=False)
    with pytest.raises(InputError, match="different numbers of tokens; set the tokenizer's padding"):
        run(padding=False)


def test_the_side_that_is_cut_is_the_tokenizers():
    (whole,) = TokenizeTask(tokenizer_name=SMOLVLM, padding="longest")({"task": TASKS[:1]})[
        OBS_LANGUAGE_TOKENS
    ]
    (cut,) = TokenizeTask(tokenizer_name=SMOLVLM, max_length=4)({"task": TASKS[:1]})[OBS_LANGUAGE_TOKENS]
    assert cut.tolist() == whole[-4:].tolist()


def test_actions_become_tokens(caplog):
    step = TokenizeActions(max_action_tokens=64, action_tokenizer_name=FAST)
    text, fast = read_tokenizer(find_tokenizer(PALIGEMMA)), FastTokenizer.read(find_tokenizer(FAST, "*"))
    action = np.zeros((2, 8, 3), np.float32)
    action[1] = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
    result = step({"action": action})
    for i, chunk in enumerate(action):
        row = result[ACTION_TOKENS][i, result[ACTION_TOKEN_MASK][i]].tolist()
        start = [text.ids["bos_token"], *text.encode("Action: ")[1:]]
        end = [*text.encode("|")[1:], text.ids["eos_token"]]
        assert row[: len(start)] == start
        assert row[-len(end) :] == end
        middle = row[len(start) : -len(end)]
        assert [text.vocab_size - 1 - 128 - token for token in middle] == fast.encode(chunk)
    assert (result[ACTION_TOKENS][~result[ACTION_TOKEN_MASK]] == 0).all()
    with caplog.at_level(logging.WARNING):
        short = TokenizeActions(max_action_tokens=5, action_tokenizer_name=FAST)({"action": action})
    np.testing.assert_array_equal(short[ACTION_TOKENS], result[ACTION_TOKENS][:, :5])
    assert "cut to max_action_tokens = 5" in caplog.text
    assert step({"observation.state": STATE}) == {"observation.state": STATE}


def test_impossible_actions_are_reported():
    step = TokenizeActions(action_tokenizer_name=FAST)
    with pytest.raises(InputError, match="needs finite actions"):
        step({"action": np.full((1, 2, 3), np.nan, np.float32)})
    with pytest.raises(InputError, match=r"actions up to 1e\+08 are too large for FAST"):
        step({"action": np.full((1, 2, 3), 1e8, np.float32)})
    with pytest.raises(InputError, match="has no action_tokenizer_name"):
        TokenizeActions()({"action": np.ones((1, 2, 3), np.float32)})


def test_calling_without_tokens_says_what_to_do():
    pre, _ = load_pipelines(GOLDEN / "pi0_fast")
    batch = {"observation.state": np.zeros((1, 4), np.float32), "task": ["go"]}
    with pytest.raises(InputError, match=r"no observation.language.tokens.*call tokenize of 'policy_prep"):
        pre(batch)
    tokenized = pre.tokenize(batch)
    assert "task" not in tokenized
    assert tokenized["observation.state"] is batch["observation.state"]  # stays raw
    assert set(jax.jit(pre)(tokenized)) == set(tokenized)
    with pytest.raises(InputError, match=r"no action.tokens, action.token_mask: call tokenize"):
        pre(tokenized | {"action": np.zeros((1, 8, 4), np.float32)})


def test_pipelines_without_text_leave_batches_alone():
    pre, _ = load_pipelines(GOLDEN / "act")
    batch = {"observation.state": STATE, "task": TASKS}
    assert not pre.has_text
    assert pre.tokenize(batch) is batch


def test_pipelines_go_to_other_processes():
    pre, _ = load_pipelines(GOLDEN / "pi0_fast")
    batch = {"observation.state": np.zeros((1, 4), np.float32), "task": ["go"]}
    tokens = pre.tokenize(batch)[OBS_LANGUAGE_TOKENS]  # loads the tokenizer
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(pre)).tokenize(batch)[OBS_LANGUAGE_TOKENS], tokens
    )


def test_missing_tokenizers_are_reported_when_they_are_used(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pre, _ = load_pipelines(GOLDEN / "pi05")
    pre.save(tmp_path)
    with pytest.raises(
        InputError, match=f"'{PALIGEMMA}' was not found in the cache {tmp_path}, .*`hf auth login`"
    ):
        pre.tokenize({"observation.state": np.zeros((1, 4), np.float32), "task": "go"})
    with pytest.raises(InputError, match="has no tokenizer_name"):
        TokenizeTask()({"task": TASKS})


def test_damaged_tokenizers_are_reported(tmp_path: Path):
    folder = copy_tokenizer(PALIGEMMA, tmp_path / "tokenizer")
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    whole, settings = path.read_text(), json.loads(config.read_text())
    for content, message in {
        "[]": "tokenizer.json: must hold a JSON object, it holds list",
        "{": "tokenizer.json: not valid JSON",
        "{}": "tokenizer.json: cannot be read as a tokenizer",
        json.dumps(
            json.loads(whole) | {"model": {"vocab": 3, "merges": []}}
        ): "cannot be read as a tokenizer",
    }.items():
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_tokenizer(folder)
    path.write_text(whole)
    config.write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(
        InputError, match="a 'LlamaTokenizer' of a model of type 'paligemma' is not supported"
    ):
        read_tokenizer(folder)
    config.write_text(json.dumps({k: v for k, v in settings.items() if k != "bos_token"}))
    assert read_tokenizer(folder).ids["bos_token"] == 2  # a Gemma tokenizer has one in any case
    config.write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None})
    )
    with pytest.raises(InputError, match="has no pad_token, but padding is on"):
        TokenizeTask(tokenizer_name=str(folder))({"task": TASKS})
    path.unlink()
    with pytest.raises(InputError, match=r"tokenizer.json: no such file"):
        read_tokenizer(folder)


def test_gemma_tokenizers_are_built_from_the_vocabulary_alone(tmp_path: Path):
    folder = copy_tokenizer(PALIGEMMA, tmp_path / "tokenizer")
    tokens = read_tokenizer(folder).encode(TASKS[0])
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None, "pre_tokenizer": None}))
    assert read_tokenizer(folder).encode(TASKS[0]) == tokens
    config = folder / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert read_tokenizer(folder).encode(TASKS[0]) != tokens


def test_unfit_settings_of_fast_are_reported(tmp_path: Path):
    folder = copy_tokenizer(FAST, tmp_path / "fast")
    (folder / "processor_config.json").write_text('{"scale": "big"}')
    with pytest.raises(InputError, match=r"processor_config.json: a FAST tokenizer needs a number 'scale'"):
        FastTokenizer.read(folder)
    (folder / "processor_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"needs a number 'scale', not None"):
        FastTokenizer.read(folder)


def test_settings_that_stock_does_not_save_are_kept_when_they_are_unusual():
    assert Pi05StatePrompt().to_config() == {}
    assert Pi05StatePrompt(task_key="instruction").to_config() == {"task_key": "instruction"}
    step = TokenizeActions(action_tokenizer_name=FAST, paligemma_tokenizer_name="mine")
    assert step.to_config() == {
        "trust_remote_code": True,
        "max_action_tokens": 256,
        "action_tokenizer_name": FAST,
        "paligemma_tokenizer_name": "mine",
    }
    assert TokenizeActions.from_config(step.to_config(), {}).to_config() == step.to_config()
