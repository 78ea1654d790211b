"""What stock LeRobot does (see tests/lerobot_peer.py), and its converter of datasets.

$LEROBOT_PYTHON tests/stock/conversion_peer.py
"""

import sys
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from lerobot_peer import COMMANDS, Arrays, main


def convert(root: str, data_files_size_in_mb: float, video_files_size_in_mb: float) -> Arrays:
    """Convert the v2.1 dataset in a folder, in place; the old one is beside it with `_old` added to its name."""
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    convert_dataset(
        "test/recorded",
        data_file_size_in_mb=data_files_size_in_mb,
        video_file_size_in_mb=video_files_size_in_mb,
        root=root,
        push_to_hub=False,
    )
    return {}


if __name__ == "__main__":
    cast(dict[str, Any], COMMANDS)["convert"] = convert
    main()
