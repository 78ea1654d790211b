"""Files from the Hugging Face Hub, and the folders where they and other things are kept."""

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors

from lerobot_jax.errors import InputError
from lerobot_jax.state_dict import ADAPTER_NAME, INDEX_NAME, MODEL_NAME, PICKLE_SUFFIXES

# The Hub's library lets through what its HTTP client raises; which client that is depends on its version.
_HTTP_ERROR = cast(type[Exception], huggingface_hub.errors.HfHubHTTPError.__mro__[1])
CALL_ERRORS = (_HTTP_ERROR, OSError, huggingface_hub.errors.HFValidationError)
ADVICE = "check the name, or go online once"


def lerobot_home() -> Path:
    """Give LeRobot's own cache folder: $HF_LEROBOT_HOME, by default ~/.cache/huggingface/lerobot."""
    default = Path(huggingface_hub.constants.HF_HOME) / "lerobot"
    return Path(os.environ.get("HF_LEROBOT_HOME", default)).expanduser()


def cache_home() -> Path:
    """Give the folder for what can be rebuilt: $LEROBOT_JAX_CACHE, by default ~/.cache/lerobot_jax."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lerobot_jax"
    return Path(os.environ.get("LEROBOT_JAX_CACHE", default)).expanduser()


def is_hub_name(path: str) -> bool:
    """Tell whether `path` is meant as `user/name` on the Hub, and not as a local folder."""
    return not Path(path).is_dir() and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def fetch(
    repo_id: str,
    repo_type: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache: Path | None = None,
    looked_at: Path | None = None,
    advice: str | None = None,
) -> Path:
    """Download files of a repository, or find them in the cache; return the snapshot's folder.

    Private and gated repositories are read with the user's token ($HF_TOKEN, or the saved login).

    Args:
        repo_id: `user/name`.
        repo_type: "dataset" or "model".
        files: names, or patterns with `*`, of the files; the named ones must exist, but instead of
            `model.safetensors` its index or adapters will do. If none has a `/`, only the top folder is looked at.
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
                repo_id,
                repo_type=repo_type,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(files),
                ignore_patterns=None if any("/" in name for name in files) else ["*/*"],
            )
        )
    except CALL_ERRORS as error:
        reason, remedy = explain(error)
    else:
        missing = [name for name in files if "*" not in name and not (folder / name).exists()]
        instead = [
            name for name in (INDEX_NAME, ADAPTER_NAME) if any(fnmatch.fnmatch(name, p) for p in files)
        ]
        if MODEL_NAME in missing and any((folder / name).exists() for name in instead):
            missing.remove(MODEL_NAME)
        if not missing:
            return folder
        pickle = _pickled_weights(repo_id, folder.name) if MODEL_NAME in missing else None
        reason, remedy = f"it has no {', '.join(missing)} (or the Hub cannot be reached)", None
        if pickle is not None:
            reason = (
                f"it has no {MODEL_NAME}, only {pickle}: a pickle, which can run code and is never unpickled"
            )
            remedy = "ask for safetensors, or save it as such with the program that made it"
            remedy += f"; {advice}" if advice else ""
    places = [str(looked_at)] * (looked_at is not None) + [f"the cache {cache}", "the Hugging Face Hub"]
    version = f" (revision {revision})" if revision else ""
    raise InputError(
        f"{repo_type} '{repo_id}'{version} was not found in {', '.join(places)}: {reason}; "
        f"{remedy or advice or ADVICE}"
    )


def _pickled_weights(repo_id: str, commit: str) -> str | None:
    """Give the name of a model's pickled weights on the Hub, None if there are none or it cannot be reached."""
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo_id, revision=commit)
    except CALL_ERRORS:
        return None
    return next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)


def explain(error: BaseException) -> tuple[str, str | None]:
    """Say what a failed call of the Hub means, and what to do about it (None: it depends on the call)."""
    errors = huggingface_hub.errors
    has_token = huggingface_hub.get_token() is not None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    detail = " ".join(str(error).strip().split("\n", maxsplit=1)[0].split())
    if isinstance(error, errors.GatedRepoError):
        return "its owner must grant you access", f"ask for it on the repository's page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        why = "your token (see `hf auth whoami`) may not see it" if has_token else f"you must {log_in}"
        return f"there is no such repository, or it is private and {why}", None
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such branch, tag or commit", "check the revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "the Hub cannot be reached because HF_HUB_OFFLINE is set", None
        return "the cache lacks it, or a part of it, and the Hub cannot be reached", None
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept your token" if has_token else "the Hub wants a token", log_in
        if status == 403:
            return "your token may not do this", f"check its permissions and `hf auth whoami` ({detail})"
        return f"the Hub answered with error {status} ({detail})", "try again later"
    # Errors of the operating system that have a number, such as a full disk, are not the network's.
    has_no_number = isinstance(error, OSError) and error.errno is None
    if has_no_number or isinstance(error, (_HTTP_ERROR, ConnectionError, TimeoutError)):
        return f"the connection to the Hub failed ({type(error).__name__}: {detail})", "try again"
    return detail, None
