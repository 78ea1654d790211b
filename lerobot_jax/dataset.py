"""Look into a dataset, check all of it, and make other datasets of it.

    python -m lerobot_jax.dataset info lerobot/pusht            what it is: tasks, features, cameras, sizes
    python -m lerobot_jax.dataset check FOLDER                  every file, offset and timestamp; all that is wrong
    python -m lerobot_jax.dataset stats FOLDER                  exact statistics beside the stored ones
    python -m lerobot_jax.dataset view FOLDER --episode=3       a picture of an episode
    python -m lerobot_jax.dataset convert OLD --output=NEW      v2.1 to v3.0
    python -m lerobot_jax.dataset merge A B --output=NEW        all episodes of several datasets
    python -m lerobot_jax.dataset split A --fractions train=0.8 val=0.2 --output=FOLDER
    python -m lerobot_jax.dataset delete-episodes A --episodes 3 7 --output=NEW
    python -m lerobot_jax.dataset cache                         decoded frames on disk; --evict removes them

A dataset is a folder, a name in LeRobot's cache, a name on the Hub, or built in (builtin/pusht). Nothing changes a
dataset but `stats --write`; what makes new ones writes them into a new folder. Add --help to a command for more.
"""

import dataclasses
import datetime
import inspect
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from absl import logging

from lerobot_jax import hub
from lerobot_jax.config import parse
from lerobot_jax.data import cache_folder, metadata
from lerobot_jax.data.info import STATS_PATH, V21
from lerobot_jax.data.inspection.checking import Inspection
from lerobot_jax.data.inspection.description import align, describe, size
from lerobot_jax.data.inspection.sheet import draw_episode, feature_names
from lerobot_jax.data.inspection.statistics_reading import camera_statistics, read_column
from lerobot_jax.data.inspection.statistics_table import LEGEND, Comparison, compare_images, compare_numbers
from lerobot_jax.data.inspection.table_checks import INDEX_COLUMNS
from lerobot_jax.data.metadata import LeRobotDatasetMetadata
from lerobot_jax.data.statistics import averaged_statistics, exact_statistics
from lerobot_jax.errors import InputError, reported_on_one_line
from lerobot_jax.files import write_json
from lerobot_jax.logs import setup_logging
from lerobot_jax.progress import progress_bar

MOST_EPISODES = 10_000_000

Name = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATASET ...")]


@dataclasses.dataclass(frozen=True)
class Source:
    """Which dataset."""

    dataset: Name = None
    """A folder, a name in LeRobot's cache or on the Hub, builtin/pusht or builtin/pusht_keypoints."""
    root: str | None = None
    """Its folder, if DATASET is only its name."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the tag of the newest format."""


@dataclasses.dataclass(frozen=True)
class Info(Source):
    """Tell what a dataset is: tasks, features, cameras, sizes on disk, decoded and in memory, policies it feeds."""


@dataclasses.dataclass(frozen=True)
class Stats(Source):
    """Show exact statistics of all frames beside the stored ones, and mark what is off.

    Of cameras, the stored ones alone are shown unless they are computed by --write. Timestamps and indices are left
    out, since nothing is normalized by theirs.

    Quantiles that LeRobot stores are averages of those of the episodes, and may be far from the exact ones; a
    policy that normalizes by quantiles (pi0.5) then sees another range than meant. --write stores the exact ones.
    """

    write: bool = False
    """Write meta/stats.json anew, whole or not at all: numbers exactly, cameras as LeRobot does, from some decoded
    frames of each episode. What was there at first is kept in meta/stats.json.bak."""


@dataclasses.dataclass(frozen=True)
class Check(Source):
    """Check all files, offsets, timestamps and statistics; exit with 1 if anything is wrong.

    Tells for each problem what is broken, where, and what would repair it. Works on datasets that cannot be opened.
    From the Hub, everything is downloaded first (of the tag v3.0, unless --revision=v2.1).
    """

    decode: bool = False
    """Decode every frame and image, too; without, videos are read packet by packet."""
    tolerance_s: float = 1e-4
    """How far a timestamp may be from frame_index / fps, and a video frame from its timestamp, in seconds."""


@dataclasses.dataclass(frozen=True)
class View(Source):
    """Draw an episode: frames of every camera, state and action over time, reward and success."""

    episode: int = 0
    """Which episode."""
    num_frames: int = 8
    """How many frames of each camera."""
    output: str | None = None
    """The picture, PNG or PDF; None: NAME_episode_NUMBER.png in the current folder."""

    def __post_init__(self):
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, not {self.num_frames}")


@dataclasses.dataclass(frozen=True)
class Convert(Source):
    """Convert a v2.1 dataset to v3.0, without encoding videos anew."""

    output: str = tyro.MISSING
    """The new folder."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Put all episodes of several datasets of equal features into a new one."""

    datasets: Names = ()
    """Folders or names, two or more; their episodes follow each other in this order."""
    output: str = tyro.MISSING
    """The new folder."""


@dataclasses.dataclass(frozen=True)
class Split(Source):
    """Divide the episodes of a dataset among new ones.

    Examples:
      --fractions train=0.8 val=0.2       the first 80 % of the episodes, and the rest
      --episodes train=0-79 val=80,85-99  these episodes
    """

    fractions: tuple[str, ...] = ()
    """NAME=FRACTION of the episodes, in order."""
    episodes: tuple[str, ...] = ()
    """NAME=EPISODES, such as 0-4,7."""
    output: str = tyro.MISSING
    """The folder in which each new dataset gets a folder of its name."""


@dataclasses.dataclass(frozen=True)
class DeleteEpisodes(Source):
    """Make a new dataset without some episodes; the others are numbered anew."""

    episodes: tuple[int, ...] = ()
    """The episodes to leave out."""
    output: str = tyro.MISSING
    """The new folder."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Show the decoded frames that are kept on disk, so that videos are decoded only once.

    They are in $LEROBOT_JAX_CACHE/frames, by default ~/.cache/lerobot_jax/frames. What was not used for longest is
    removed by itself when training needs room (dataset.frame_cache_gb).
    """

    evict: bool = False
    """Remove all that no process uses."""


def info(config: Info) -> None:
    print(describe(_find(config, with_files=False)))


def stats(config: Stats) -> None:
    meta = _find(config)
    if config.write:
        _check_writable(meta)
    episode_index = read_column(meta, "episode_index")
    computed = {key: meta.stats[key] for key in INDEX_COLUMNS if key in meta.stats}
    if config.write:  # what they have stays, what they lack is added
        computed = {key: exact_statistics(read_column(meta, key)) | had for key, had in computed.items()}
    comparisons: dict[str, Comparison] = {}
    for key, feature in meta.features.items():
        if feature["dtype"] == "string" or key in INDEX_COLUMNS:
            continue
        stored = meta.stats.get(key, {})
        print(
            f"\n{key}  {feature['dtype']}, count {stored['count'][0] if 'count' in stored else 'not stored'}"
        )
        if key in meta.camera_keys:
            if config.write:
                with progress_bar(f"looking at {key}", meta.total_episodes, "episode", delay=1) as bar:
                    computed[key] = camera_statistics(meta, key, bar.update)
            print("\n".join(compare_images(stored, computed.get(key))))
            continue
        values = read_column(meta, key)
        computed[key] = exact_statistics(values)
        names = feature_names(key, feature | {"shape": feature["shape"][-1:]})
        averaged = averaged_statistics(values, episode_index)
        comparisons[key] = compare_numbers(names, computed[key], averaged, stored)
        print("\n".join(comparisons[key].lines))
    print(f"\n{LEGEND}\n")
    for key, comparison in comparisons.items():
        for what, names in (("wrong", comparison.wrong), ("missing", comparison.missing)):
            if names:
                print(f"{key}: {', '.join(names)} {what}")
    if config.write:
        _write_stats(meta, computed)


def check(config: Check) -> None:
    root = _find_folder(config)
    inspection = Inspection(root, config.decode, config.tolerance_s)
    problems = inspection.run()
    for problem in problems:
        print(f"{problem.place}: {problem.what}\n    repair: {problem.repair}")
    if problems:
        raise InputError(f"{root}: {len(problems)} problem{'s' * (len(problems) > 1)}")
    depth = "every frame was decoded" if config.decode else "frames were not decoded, see --decode"
    print(
        f"{root}: no problem in {inspection.num_files} files with {inspection.num_frames:,} frames; {depth}"
    )


def view(config: View) -> None:
    from lerobot_jax.data.dataset import LeRobotDataset

    meta = _find(config, with_files=False)
    dataset = LeRobotDataset(meta.repo_id, _root(config), [config.episode], revision=config.revision)
    figure = draw_episode(dataset, config.num_frames)
    name = f"{meta.repo_id.rpartition('/')[2]}_episode_{config.episode:06d}.png"
    path = Path(config.output or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=100)
    except (ValueError, OSError) as error:
        raise InputError(f"--output={path}: {error}") from None
    print(path)


def convert(config: Convert) -> None:
    from lerobot_jax.data.conversion import convert_to_v30

    _tell(convert_to_v30(_find(config), Path(config.output)))


def merge(config: Merge) -> None:
    from lerobot_jax.data.editing import merge_datasets

    if len(config.datasets) < 2:
        raise InputError("merge: name two or more datasets, see --help")
    _tell(merge_datasets([_find(Source(name)) for name in config.datasets], Path(config.output)))


def split(config: Split) -> None:
    from lerobot_jax.data.editing import split_dataset

    if bool(config.fractions) == bool(config.episodes):
        raise InputError("split: give either --fractions or --episodes, see --help")
    splits: Mapping[str, Any] = _assignments("--fractions", config.fractions, float)
    splits = splits or _assignments("--episodes", config.episodes, _episode_numbers)
    for meta in split_dataset(_find(config), splits, Path(config.output)).values():
        _tell(meta)


def delete(config: DeleteEpisodes) -> None:
    from lerobot_jax.data.editing import delete_episodes

    if not config.episodes:
        raise InputError("delete-episodes: name the --episodes to leave out")
    _tell(delete_episodes(_find(config), config.episodes, Path(config.output)))


def cache(config: Cache) -> None:
    folder = hub.cache_home() / "frames"
    removed = cache_folder.remove_entries(folder) if config.evict else []
    left = cache_folder.list_entries(folder)
    rows = [["size", "last use", "", "source"]]
    for entry in sorted(left, key=lambda entry: -entry.last_use):
        last_use = datetime.datetime.fromtimestamp(entry.last_use).strftime("%Y-%m-%d %H:%M")
        state = "in use" if entry.in_use else "" if entry.is_whole else "incomplete"
        rows.append([size(entry.num_bytes), last_use, state, entry.source or entry.name])
    print("\n".join(align(rows)))
    print(f"{folder}: {size(sum(entry.num_bytes for entry in left))} in {len(left)} files' frames")
    if config.evict:
        print(f"removed: {size(sum(entry.num_bytes for entry in removed))} of {len(removed)} files' frames")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "info": (Info, info),
    "stats": (Stats, stats),
    "check": (Check, check),
    "view": (View, view),
    "convert": (Convert, convert),
    "merge": (Merge, merge),
    "split": (Split, split),
    "delete-episodes": (DeleteEpisodes, delete),
    "cache": (Cache, cache),
}


def _root(source: Source) -> str | None:
    """Give the dataset's folder, if it was given."""
    is_folder = source.root is None and source.dataset is not None and Path(source.dataset).is_dir()
    return source.dataset if is_folder else source.root


def _repo_id(source: Source) -> str:
    root = _root(source)
    if source.dataset is None and root is None:
        raise InputError("name a dataset: a folder, or USER/NAME; --help tells more")
    is_name = source.dataset is not None and root != source.dataset
    return str(source.dataset) if is_name else Path(str(root)).resolve().name


def _find(source: Source, with_files: bool = True) -> LeRobotDatasetMetadata:
    """Find a dataset; make it if it is built in; download all files from the Hub if they are wanted."""
    repo_id, root = _repo_id(source), _root(source)
    _make_if_builtin(repo_id, root)
    meta = LeRobotDatasetMetadata.find(repo_id, root, source.revision)
    if with_files and meta.revision is not None:
        metadata.fetch_dataset(repo_id, meta.revision, meta.episode_files(None))
    return meta


def _find_folder(source: Source) -> Path:
    """Find a dataset's folder, whatever is in it; download all of it if it is on the Hub."""
    repo_id, root = _repo_id(source), _root(source)
    _make_if_builtin(repo_id, root)
    folder = Path(root) if root is not None else hub.lerobot_home() / repo_id
    if root is not None and not folder.is_dir():
        raise InputError(f"--root={folder}: no such folder")
    if folder.is_dir():
        return folder
    revision = source.revision or metadata.CODEBASE_VERSION
    return metadata.fetch_dataset(repo_id, revision, ["meta/*", "data/*", "videos/*"])


def _make_if_builtin(repo_id: str, root: str | None) -> None:
    if root is None and repo_id.startswith("builtin/"):
        from lerobot_jax.envs.demonstrations import make_builtin_dataset

        make_builtin_dataset(repo_id)


def _check_writable(meta: LeRobotDatasetMetadata) -> None:
    if meta.revision is not None:
        raise InputError(
            f"{meta.root}: --write would change the Hub's copy; download it into a folder before"
        )
    if meta.info["codebase_version"] == V21:
        raise InputError(f"{meta.root}: {V21} has no {STATS_PATH}; convert it to v3.0 before --write")


def _write_stats(meta: LeRobotDatasetMetadata, computed: metadata.Stats) -> None:
    path = meta.root / STATS_PATH
    backup = path.with_name(f"{path.name}.bak")
    if path.exists() and not backup.exists():
        partial = path.with_name(f".{backup.name}.partial")
        shutil.copyfile(path, partial)
        os.replace(partial, backup)
    write_json({key: {name: v.tolist() for name, v in s.items()} for key, s in computed.items()}, path)
    print(f"written: {path}; what was there at first is {backup}")


def _assignments(flag: str, texts: Sequence[str], read: Callable[[str], Any]) -> dict[str, Any]:
    """Read NAME=VALUE; each name once."""
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            values[name] = read(value)
        except InputError as error:
            raise InputError(f"{flag}: {error}") from None
        except ValueError:
            raise InputError(f"{flag}: expected NAME=VALUE, as --help shows, not '{text}'") from None
    if len(values) < len(texts):
        raise InputError(f"{flag}: each name can be given once")
    return values


def _episode_numbers(text: str) -> list[int]:
    """Read 0-4,7 as [0, 1, 2, 3, 4, 7]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        episodes = range(int(first), int(last if dash else first) + 1)
        if not episodes:
            raise InputError(f"{part} has no episode; the lower number comes first")
        if episodes.stop > MOST_EPISODES:  # before they fill the memory
            raise InputError(f"{part}: no dataset has more than {MOST_EPISODES:,} episodes")
        numbers += episodes
    return numbers


def _with_values(kind: type, argv: Sequence[str]) -> list[str]:
    """Let `--write` mean `--write=True`."""
    flags = {f"--{field.name}" for field in dataclasses.fields(kind) if field.type is bool}
    pairs = itertools.pairwise([*argv, ""])
    return [f"{a}=True" if a in flags and after not in ("True", "False") else a for a, after in pairs]


def _tell(meta: LeRobotDatasetMetadata) -> None:
    logging.info("written: %s, %d episodes, %d frames", meta.root, meta.total_episodes, meta.total_frames)


def main(argv: Sequence[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise InputError(f"there is no command '{name}'; there are {', '.join(COMMANDS)}")
    kind, run = COMMANDS[name]
    arguments = _with_values(kind, rest)
    run(parse(kind, kind(), arguments, f"lerobot_jax.dataset {name}", inspect.getdoc(kind) or ""))


if __name__ == "__main__":
    setup_logging()
    with reported_on_one_line():
        main(sys.argv[1:])
