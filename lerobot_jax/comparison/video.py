"""compare.mp4: the first episodes side by side, one row a policy, one column an episode."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lerobot_jax.data.video import decode_video, write_video
from lerobot_jax.eval import Episode
from lerobot_jax.progress import progress_bar

_WIDTH = 1280  # of all columns together, about
_LARGEST_TILE = 320
_MOST_COLUMNS = 10  # the other episodes have videos of their own only
_LABEL = 26  # height of a line of text
_GAP = 6
_BORDER = 5
_BACKGROUND, _TEXT = "#ffffff", "#222222"
_SUCCESS, _FAILURE = "#2a9d5c", "#d1495b"


def write_grid(results: Mapping[str, Any], episodes: Sequence[Sequence[Episode]], path: Path) -> None:
    """Compose the videos of episodes; a finished one stays with a frame that tells how it ended.

    Args:
        results: the comparison, for names and rates.
        episodes: of each policy; the first ones with videos are shown.
        path: where to.
    """
    shown = [[e for e in of_one if e.video_path][:_MOST_COLUMNS] for of_one in episodes]
    columns = len(shown[0])
    tile = min(_LARGEST_TILE, _WIDTH // columns - _GAP) // 2 * 2
    background = _make_background(results, shown[0], tile)
    fps = shown[0][0].fps
    num_frames = 1 + max(episode.length for of_one in shown for episode in of_one) + fps  # a second longer
    with progress_bar("composing the video", num_frames, "frame") as bar:
        tiles = [[_tile_frames(episode, tile, results["score"]) for episode in of_one] for of_one in shown]

        def frames() -> Iterator[np.ndarray]:
            for _ in range(num_frames):
                picture = background.copy()
                for row, of_one in enumerate(tiles):
                    for column, frame in enumerate(of_one):
                        picture.paste(next(frame), _place(row, column, tile))
                bar.update()
                yield np.asarray(picture)

        write_video(path, frames(), fps)


def _tile_frames(episode: Episode, size: int, score: str) -> Iterator[Image.Image]:
    """Give an episode's frames without end: at last, again and again, the frame that tells the result."""
    assert episode.video_path is not None
    picture = Image.new("RGB", (size, size))
    for number, (_, frame) in enumerate(decode_video(Path(episode.video_path))):
        picture = Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR)
        if number < episode.length:
            yield picture
    best = episode.best_info.get(score, episode.max_reward)
    marked = _mark(picture, episode, f"best {score} {best:.2f}")
    while True:
        yield marked


def _mark(picture: Image.Image, episode: Episode, result: str) -> Image.Image:
    """Frame the last picture of an episode and write below how it ended."""
    marked = picture.copy()
    draw = ImageDraw.Draw(marked)
    size = picture.width
    color = _SUCCESS if episode.success else _FAILURE
    text = f"success, {episode.steps_to_success} steps" if episode.success else f"failed, {result}"
    draw.rectangle((0, 0, size - 1, size - 1), outline=color, width=_BORDER)
    draw.rectangle((0, size - _LABEL, size, size), fill=color)
    _write(draw, (size // 2, size - _LABEL // 2), text, size - 2 * _BORDER, "mm", "#ffffff")
    return marked


def _make_background(results: Mapping[str, Any], episodes: Sequence[Episode], tile: int) -> Image.Image:
    """Draw what does not move: the seeds above the columns, names and rates above the rows."""
    policies, num = results["policies"], results["n_episodes"]
    width = len(episodes) * (tile + _GAP) + _GAP
    left, top = _place(len(policies), 0, tile)
    picture = Image.new("RGB", (width // 2 * 2, (top - _LABEL) // 2 * 2), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for column, episode in enumerate(episodes):
        x = _place(0, column, tile)[0] + tile // 2
        _write(draw, (x, _LABEL // 2), f"seed {episode.seed}", tile, "mm", _TEXT)
    for row, policy in enumerate(policies):
        y = _place(row, 0, tile)[1] - _LABEL // 2
        success, score = policy["success"], policy["max_score"]["mean"]
        text = (
            f"{policy['name']}: {success['count']} of {num} solved, mean max {results['score']} {score:.2f}"
        )
        _write(draw, (left, y), text, width - 2 * left, "lm", _TEXT)
    return picture


def _place(row: int, column: int, tile: int) -> tuple[int, int]:
    """Give the upper left corner of a tile: below the line of seeds, each row with its own line above."""
    return _GAP + column * (tile + _GAP), _LABEL + row * (_LABEL + tile + _GAP) + _LABEL


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, anchor: str, color: str
) -> None:
    """Write a line as large as fits."""
    size = 16
    while size > 6 and draw.textlength(text, ImageFont.load_default(size)) > width:
        size -= 1
    draw.text(place, text, color, ImageFont.load_default(size), anchor)
