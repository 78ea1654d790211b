"""Put a trained policy on the Hugging Face Hub, where stock LeRobot and this project load it by its name.

    python -m lerobot_jax.push_to_hub outputs/act_pusht_state --repo_id=USER/NAME --private=True

The folder is a run (its last checkpoint, or that of --step), a checkpoint, or a pretrained_model folder. All files
go up in one commit: weights, processors, settings, and a model card with the recipe that repeats the run. Log in
first with `hf auth login`, or set HF_TOKEN. Mirrors LeRobot's `PreTrainedPolicy.push_model_to_hub`.
"""

import dataclasses
import fnmatch
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.utils
import tyro
from absl import logging

from lerobot_jax import hub, state_dict
from lerobot_jax.checkpoint import TRAIN_CONFIG_NAME, find_checkpoint
from lerobot_jax.config import TrainConfig, parse
from lerobot_jax.data.metadata import INFO_PATH, LeRobotDatasetMetadata
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.files import read_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.model_card import write_card
from lerobot_jax.policies.config import CONFIG_NAME, read_config

UPLOADED = (CONFIG_NAME, "*.safetensors", state_dict.INDEX_NAME, "policy_*.json", TRAIN_CONFIG_NAME)


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """What to upload, and where to."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = ""
    """A run's folder, a checkpoint's folder, or a pretrained_model folder."""
    repo_id: str | None = None
    """Its name on the Hub, USER/NAME; the repository is made if there is none."""
    step: int | None = None
    """Which checkpoint of a run; None: the last."""
    private: bool | None = None
    """Whether a new repository is private; None: as your account's settings say."""
    revision: str | None = None
    """The branch to upload to, made if there is none; None: main."""
    license: str | None = None
    """Its license, e.g. apache-2.0 or cc-by-4.0; None: as the policy's config.json says."""
    tags: tuple[str, ...] | None = None
    """More tags; None: as the policy's config.json says."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    step: int | None = None,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    token: str | None = None,
    dataset: LeRobotDatasetMetadata | None = None,
) -> str:
    """Upload a policy in one commit, and write its model card; return the repository's address.

    Policy files that the repository has from an earlier upload and that do not belong to this policy are removed in
    the same commit; its README.md is replaced.

    Args:
        folder: a run's folder, a checkpoint's, or a pretrained_model folder.
        repo_id: `user/name`.
        step: which checkpoint of a run, by default the last.
        private: whether a new repository is private, by default as the account's settings say.
        revision: the branch, made if there is none, by default main.
        license: by default as config.json says.
        tags: by default as config.json says.
        token: by default $HF_TOKEN or the saved login.
        dataset: what the policy was trained on, by default looked for where train_config.json says.

    Raises:
        InputError: before anything is sent, when files or the token are missing or the name cannot be; when the Hub
            refuses, or cannot be reached.
    """
    check_name(repo_id, "repo_id")
    checkpoint = find_checkpoint(Path(folder), step)
    config = read_config(checkpoint.folder)
    state_dict.read(checkpoint.folder)
    if token is None and huggingface_hub.get_token() is None:
        raise InputError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
    card = write_card(
        checkpoint,
        repo_id,
        license=license or config.get("license"),
        tags=config.get("tags") or () if tags is None else tags,
        revision=revision,
        dataset=dataset or find_dataset(checkpoint.folder),
    )
    paths = [p for p in sorted(checkpoint.folder.iterdir()) if _is_uploaded(p.name)]
    operations: list = [huggingface_hub.CommitOperationAdd(p.name, str(p)) for p in paths]
    operations.append(huggingface_hub.CommitOperationAdd("README.md", card.encode()))
    api = huggingface_hub.HfApi(token=token)
    with _explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repo_id).private)
    if private is not None and is_private != private:
        now, wanted = ("private", "public") if is_private else ("public", "private")
        raise InputError(
            f"repo_id: '{repo_id}' is there already and is {now}; make it {wanted} in its settings on the Hub, "
            "leave out 'private', or choose another name"
        )
    with _explained(repo_id):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        names = {operation.path_in_repo for operation in operations}
        old = [
            n for n in api.list_repo_files(repo_id, revision=revision) if _is_uploaded(n) and n not in names
        ]
        operations += [huggingface_hub.CommitOperationDelete(name) for name in old]
        what = f"{config['type']} policy" + (f" after {checkpoint.step} steps" if checkpoint.step else "")
        commit = api.create_commit(repo_id, operations, commit_message=f"Upload {what}", revision=revision)
    if old:
        logging.info("removed from %s, since not of this policy: %s", repo_id, ", ".join(old))
    return commit.repo_url.url if revision is None else f"{commit.repo_url.url}/tree/{revision}"


def check_before_training(config: TrainConfig) -> None:
    """Raise `InputError` unless the policy can be uploaded at the end of the run, as far as that can be known."""
    if config.policy.repo_id is None:
        raise InputError(
            "policy.repo_id is missing: policy.push_to_hub uploads the policy there after training"
        )
    check_name(config.policy.repo_id, "policy.repo_id")
    if not config.save_checkpoint:
        raise InputError("policy.push_to_hub uploads the last checkpoint: it needs save_checkpoint")
    if huggingface_hub.get_token() is None:
        raise InputError(
            "policy.push_to_hub: no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"
        )
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError("policy.push_to_hub: the Hub cannot be reached because HF_HUB_OFFLINE is set")


def check_name(repo_id: str, field: str) -> None:
    """Raise `InputError` unless `repo_id` can be a name on the Hub."""
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except huggingface_hub.errors.HFValidationError as error:
        raise InputError(f"{field}: {error}") from None
    if "/" not in repo_id:
        raise InputError(f"{field}: '{repo_id}' must be USER/NAME")


def find_dataset(folder: Path) -> LeRobotDatasetMetadata | None:
    """Find the metadata of the (first) dataset that a policy was trained on, None unless as it was then."""
    path = folder / TRAIN_CONFIG_NAME
    settings = (read_json(path) if path.exists() else {}).get("dataset") or {}
    source = next(iter(settings.get("mixture") or ()), settings)
    name, root, revision = (source.get(key) for key in ("repo_id", "root", "revision"))
    if name is None or (revision is None and not Path(root or hub.lerobot_home() / name, INFO_PATH).exists()):
        return None  # what a name without a revision is on the Hub today is not what was trained on
    try:
        dataset = LeRobotDatasetMetadata.find(name, root, revision)
    except InputError:
        return None
    return dataset if dataset.revision == revision else None


def _is_uploaded(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in UPLOADED) and "/" not in name


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what a call of the Hub raises into an `InputError` that says what to do."""
    try:
        yield
    # The library makes a RuntimeError of a failed upload of a file, and a ValueError of what the Hub finds wrong.
    except (*hub.CALL_ERRORS, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = "; ".join(filter(None, hub.explain(cause or error)))
        raise InputError(f"'{repo_id}' could not be uploaded: {reason}") from None


def main(argv: Sequence[str]) -> None:
    config = parse(PushConfig, PushConfig(), argv, "lerobot_jax.push_to_hub", __doc__ or "")
    if not config.folder or config.repo_id is None:
        missing = "--repo_id=USER/NAME" if config.folder else "the folder"
        raise InputError(
            f"{missing} is missing: python -m lerobot_jax.push_to_hub FOLDER --repo_id=USER/NAME"
        )
    settings = {name: value for name, value in vars(config).items() if name not in ("folder", "repo_id")}
    url = push_to_hub(config.folder, config.repo_id, **settings)
    logging.info("Model pushed to %s", url)


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
