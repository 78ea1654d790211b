"""Files from the Hugging Face Hub, and the folders where they and other things are kept."""

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors

from lerobot_jax.errors import InputError


def lerobot_home() -> Path:
    """Give LeRobot's own cache folder: $HF_LEROBOT_HOME, by default ~/.cache/huggingface/lerobot."""
    default = Path(huggingface_hub.constants.HF_HOME) / "lerobot"
    return Path(os.environ.get("HF_LEROBOT_HOME", default)).expanduser()


def cache_home() -> Path:
    """Give the folder for what can be rebuilt: $LEROBOT_JAX_CACHE, by default ~/.cache/lerobot_jax."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lerobot_jax"
    return Path(os.environ.get("LEROBOT_JAX_CACHE", default)).expanduser()


def fetch(
    repo_id: str,
    repo_type: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache: Path | None = None,
    looked_at: Path | None = None,
    advice: str = "check the name, or go online once",
) -> Path:
    """Download files of a repository, or find them in the cache; return the snapshot's folder.

    Args:
        repo_id: `user/name`.
        repo_type: "dataset" or "model".
        files: names, or patterns with `*`, of the files; the named ones must exist.
        revision: a branch, tag or commit.
        cache: the cache folder, the Hub's own by default.
        looked_at: a folder that was tried before, for the message.
        advice: what the user can do, for the message.

    Raises:
        InputError: saying what was looked for and where.
    """
    cache = cache or Path(huggingface_hub.constants.HF_HUB_CACHE)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, repo_type=repo_type, revision=revision, cache_dir=cache, allow_patterns=list(files)
            )
        )
    except huggingface_hub.errors.LocalEntryNotFoundError:
        reason = "it is not in the cache and the Hub cannot be reached"
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.HFValidationError,
        OSError,
    ) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
    else:
        missing = [name for name in files if "*" not in name and not (folder / name).exists()]
        if not missing:
            return folder
        reason = f"it has no {', '.join(missing)} (or the Hub cannot be reached)"
    places = [str(looked_at)] * (looked_at is not None) + [f"the cache {cache}", "the Hugging Face Hub"]
    version = f" (revision {revision})" if revision else ""
    raise InputError(
        f"{repo_type} '{repo_id}'{version} was not found in {', '.join(places)}: {reason}; {advice}"
    )
