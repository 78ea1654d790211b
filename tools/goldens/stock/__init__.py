"""Stock LeRobot, driven by tools/make_golden.py: needs torch and lerobot==0.6.1, and no other part of this project
than the reader of the goldens.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
