from pathlib import Path

import numpy as np

from lerobot_jax.comparison.video import write_grid
from lerobot_jax.data.video import decode_video, write_video
from lerobot_jax.eval import Episode

GREEN, RED = np.array([42, 157, 92]), np.array([209, 73, 91])


def make_episode(path: Path, length: int, shade: int, *, success: bool) -> Episode:
    write_video(path, [np.full((64, 64, 3), shade, np.uint8)] * (length + 1), 10)
    episode = Episode(0, 1000, fps=10, length=length, success=success, video_path=str(path))
    episode.steps_to_success = length if success else None
    episode.max_reward = 0.4
    return episode


def is_marked(tile: np.ndarray, color: np.ndarray) -> bool:
    banner = tile[-16:-8, 12:40].astype(int)  # below, left of the text
    return bool((np.abs(banner - color).sum(-1) < 40).mean() > 0.9)


def test_finished_episodes_stay_and_tell_how_they_ended(tmp_path: Path):
    short = make_episode(tmp_path / "a.mp4", 4, 120, success=True)
    long = make_episode(tmp_path / "b.mp4", 9, 200, success=False)
    policy = {"success": {"count": 1}, "max_score": {"mean": 0.5}}
    results = {"policies": [policy | {"name": "a"}, policy | {"name": "b" * 300}], "n_episodes": 1}
    write_grid(results | {"score": "reward"}, [[short], [long]], tmp_path / "grid.mp4")
    frames = [frame for _, frame in decode_video(tmp_path / "grid.mp4")]
    assert len(frames) == 9 + 1 + 10
    tile = 320
    tops = [26 + 26, 26 + 26 + tile + 6 + 26]
    places = [slice(top, top + tile) for top in tops]
    assert frames[0].shape[:2] == (tops[1] + tile + 6, tile + 12)
    first, second = ([frame[place, 6 : 6 + tile] for frame in frames] for place in places)
    assert [is_marked(picture, GREEN) for picture in first] == [False] * 4 + [True] * 16
    assert [is_marked(picture, RED) for picture in second] == [False] * 9 + [True] * 11
    for pictures, shade in ((first, 120), (second, 200)):
        assert all(abs(float(picture[100:200, 100:200].mean()) - shade) < 4 for picture in pictures)


def test_ten_episodes_are_enough(tmp_path: Path):
    episodes = [make_episode(tmp_path / f"{i}.mp4", 2, 20 * i, success=False) for i in range(12)]
    policy = {"name": "a", "success": {"count": 0}, "max_score": {"mean": 0.4}}
    results = {"policies": [policy], "n_episodes": 12, "score": "reward"}
    write_grid(results, [episodes], tmp_path / "grid.mp4")
    frame = next(decode_video(tmp_path / "grid.mp4"))[1]
    tile = 122
    assert frame.shape[:2] == (26 + 26 + tile + 6, 10 * (tile + 6) + 6)
    centers = frame[26 + 26 + 40, 6 + tile // 2 :: tile + 6].mean(-1)
    assert np.abs(centers - 20 * np.arange(10)).max() < 6
