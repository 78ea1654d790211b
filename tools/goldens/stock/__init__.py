"""Stock LeRobot, driven by tools/make_golden.py: needs torch and lerobot==0.6.1, and no other part of this project
than the reader of the goldens.
"""

import os
from pathlib import Path

HUB = (
    Path(__file__).resolve().parents[3] / "tests" / "golden" / "hub"
)  # small models that stand for large ones
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(HUB), "CUDA_VISIBLE_DEVICES": ""}
