"""The `meta/info.json` of a LeRobotDataset v3.0 or v2.1, and where a dataset keeps its files.

Mirrors `lerobot.datasets.utils.DatasetInfo`, with checks, so that what passes them holds no surprise later.
"""

import math
import re
import reprlib
import string
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lerobot_jax.errors import InputError
from lerobot_jax.files import read_json

V30, V21 = "v3.0", "v2.1"
CODEBASE_VERSION = V30
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

# What the templates of info.json call the folder and the file. Files count from 0 in each folder, episodes do not.
PATH_FIELDS = {V30: ("chunk_index", "file_index"), V21: ("episode_chunk", "episode_index")}
EPISODES_IN = {V30: "meta/episodes", V21: "meta/episodes.jsonl"}
TASKS_IN = {V30: TASKS_PATH, V21: "meta/tasks.jsonl"}

# The columns that every dataset has and that the writer fills in by itself.
DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": (1,), "names": None},
    "frame_index": {"dtype": "int64", "shape": (1,), "names": None},
    "episode_index": {"dtype": "int64", "shape": (1,), "names": None},
    "index": {"dtype": "int64", "shape": (1,), "names": None},
    "task_index": {"dtype": "int64", "shape": (1,), "names": None},
}
CAMERA_DTYPES = ("image", "video")
CHANNELS = ("channel", "channels", "rgb", "c")
DTYPES = (
    *CAMERA_DTYPES,
    "string",
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *(f"float{bits}" for bits in (16, 32, 64)),
)

# Beyond these a number is a mistake, and would only fail later, for want of memory.
MAX_FPS = 100_000
MAX_VALUES = 2**31  # of a feature in one frame
MAX_COUNT = 2**53

Stats = dict[str, dict[str, np.ndarray]]


def load_info(root: Path) -> dict[str, Any]:
    """Read and check info.json; shapes become tuples, a whole fps an int.

    Raises:
        InputError: naming the field that is missing or wrong, or the format that cannot be read.
    """
    path = root / INFO_PATH
    info = read_json_object(path)
    required = ["codebase_version", "fps", "features", "total_episodes", "total_frames", "data_path"]
    version = info.get("codebase_version", V30)
    required += ["chunks_size"] if version == V21 else []
    missing = [name for name in required if name not in info]
    if missing:
        raise InputError(f"{path}: missing {', '.join(missing)}")
    _check_version(path, version)
    for name, least in (("total_episodes", 0), ("total_frames", 0), ("total_tasks", 0), ("chunks_size", 1)):
        if name in info and (type(info[name]) is not int or not least <= info[name] <= MAX_COUNT):
            raise InputError(f"{path}: {name} must be a whole number from {least}, it is {shown(info[name])}")
    _check_number(path, info, "fps", MAX_FPS)
    if info["fps"] == 0:
        raise InputError(f"{path}: fps must be positive, it is 0")
    for name in ("data_files_size_in_mb", "video_files_size_in_mb"):
        _check_number(path, info, name, MAX_COUNT)
    if info["fps"] == int(info["fps"]):
        info["fps"] = int(info["fps"])
    _check_features(path, info["features"])
    folder, file = PATH_FIELDS[version]
    _check_template(path, "data_path", info["data_path"], (folder, file))
    if any(feature["dtype"] == "video" for feature in info["features"].values()):
        _check_template(path, "video_path", info.get("video_path"), ("video_key", folder, file))
    return info


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise `InputError` naming it when it does not."""
    try:
        data = read_json(path)
    except InputError:
        raise
    except (ValueError, RecursionError, OSError) as error:  # a number of thousands of digits; a folder
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {shown(data)}")
    return data


def shown(value: Any) -> str:
    """Show a value that may be of any size or type in an error."""
    return reprlib.repr(value)


def image_shape(feature: Mapping[str, Any]) -> tuple[int, int, int]:
    """Give a camera's (height, width, channels); some old datasets declare the channels first."""
    a, b, c = feature["shape"]
    return (b, c, a) if feature["names"][0] in CHANNELS else (a, b, c)


def _check_version(path: Path, version: Any) -> None:
    if version in (V30, V21):
        return
    advice = "bring lerobot_jax up to date"
    if version == "v2.0":
        advice = "convert it with LeRobot 0.3.3's `python -m lerobot.datasets.v21.convert_dataset_v20_to_v21`"
    elif isinstance(version, str) and re.fullmatch(r"v?1\.\d+", version):
        advice = (
            "convert it with LeRobot 0.3.3's `convert_dataset_v1_to_v2`, then `convert_dataset_v20_to_v21`"
        )
    elif not isinstance(version, str) or not re.fullmatch(r"v\d+\.\d+", version):
        advice = "no such format is known"
    raise InputError(
        f"{path}: the dataset is in format {version if isinstance(version, str) else shown(version)} "
        f"(codebase_version), this version reads {V30} and {V21}; {advice}"
    )


def _check_number(path: Path, info: Mapping[str, Any], name: str, largest: float) -> None:
    value = info.get(name, 0)
    if type(value) not in (int, float) or not 0 <= value <= largest:
        raise InputError(f"{path}: {name} must be a number from 0 to {largest}, it is {shown(value)}")


def _check_features(path: Path, features: Any) -> None:
    if not isinstance(features, dict):
        raise InputError(f"{path}: features must map names to descriptions, it is {shown(features)}")
    for key, feature in features.items():
        where = f"{path}: feature {shown(key)}"
        if not key.isprintable() or "/" in key or key in ("", ".", ".."):
            raise InputError(f"{where}: names must be printable and without '/'")
        if not isinstance(feature, dict) or "dtype" not in feature or "shape" not in feature:
            raise InputError(f"{where} needs dtype and shape")
        if not isinstance(feature["dtype"], str) or feature["dtype"] not in DTYPES:
            raise InputError(f"{where} has dtype {shown(feature['dtype'])}; there are {', '.join(DTYPES)}")
        feature["shape"] = _checked_shape(where, feature["shape"])
        if feature["dtype"] == "string" and feature["shape"] != (1,):
            raise InputError(f"{where}: a text has shape [1], it is {shown(feature['shape'])}")
        if feature["dtype"] in CAMERA_DTYPES:
            _check_camera(where, feature)
        elif not isinstance(feature.setdefault("names", None), (list, dict, type(None))):
            raise InputError(f"{where}: names must be a list, it is {shown(feature['names'])}")
    for key, expected in DEFAULT_FEATURES.items():
        found = {name: features.get(key, {}).get(name) for name in ("dtype", "shape")}
        if any(found[name] != expected[name] for name in found):
            raise InputError(
                f"{path}: every dataset has the feature '{key}' of dtype {expected['dtype']} and shape "
                f"{expected['shape']}; here it has {found}"
            )


def _checked_shape(where: str, shape: Any) -> tuple[int, ...]:
    is_list = isinstance(shape, list) and len(shape) > 0
    if not is_list or not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) > MAX_VALUES:
        raise InputError(f"{where}: shape must be a list of sizes, it is {shown(shape)}")
    return tuple(shape)


def _check_camera(where: str, feature: Mapping[str, Any]) -> None:
    names: Any = feature.get("names")
    is_list = isinstance(names, list) and len(names) == 3 and all(isinstance(name, str) for name in names)
    if not is_list or not any(name in CHANNELS for name in (names[0], names[2])):
        raise InputError(f"{where}: names must be ['height', 'width', 'channels'], it is {shown(names)}")
    if len(feature["shape"]) != 3:
        raise InputError(f"{where}: an image has 3 dimensions, its shape is {feature['shape']}")
    for name in ("info", "video_info"):
        details = feature.get(name)
        if details is not None and not isinstance(details, dict):
            raise InputError(f"{where}: {name} must describe the video, it is {shown(details)}")
        if details and (details.get("is_depth_map") or details.get("video.is_depth_map")):
            raise InputError(f"{where} is a depth map, which is not supported")


def _check_template(path: Path, name: str, template: Any, fields: tuple[str, ...]) -> None:
    wanted = ", ".join(f"{{{field}}}" for field in fields)
    wrong = f"{path}: {name} must be a path inside the dataset with {wanted}, it is {shown(template)}"
    if not isinstance(template, str) or not template.isprintable():
        raise InputError(wrong)
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        raise InputError(wrong) from None
    # Only a width, as in {file_index:03d}: other formats fail, or turn two numbers into one path.
    formats = {field: "" if field == "video_key" else r"(0?\d)?d?" for field in fields}
    if {field for _, field, _, _ in parts} != set(fields) or any(
        conversion is not None or not re.fullmatch(formats[field or ""], format_spec or "")
        for _, field, format_spec, conversion in parts
    ):
        raise InputError(wrong)
    example = PurePosixPath(template.format(**dict.fromkeys(fields, 0)))
    if example.is_absolute() or ".." in example.parts or "\\" in template:
        raise InputError(wrong)
