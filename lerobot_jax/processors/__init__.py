"""LeRobot's pre- and post-processor pipelines: the JSON format, and each step as a function of a batch."""

from lerobot_jax.processors.actions import (
    AbsoluteActions,
    ActionTarget,
    DeltaActions,
    RelativeActions,
    SummedActions,
)
from lerobot_jax.processors.fast import ACTION_TOKEN_MASK, ACTION_TOKENS, FastTokenizer, TokenizeActions
from lerobot_jax.processors.normalize import Normalizer, Unnormalizer, make_normalizers
from lerobot_jax.processors.pipeline import (
    POSTPROCESSOR_NAME,
    PREPROCESSOR_NAME,
    Pipeline,
    default_pipelines,
    load_pipelines,
)
from lerobot_jax.processors.resize import CropResizeImages
from lerobot_jax.processors.steps import AddBatchDimension, Device, RenameObservations
from lerobot_jax.processors.text import (
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    Pi0FastStatePrompt,
    Pi0NewLine,
    Pi05StatePrompt,
    SmolVLANewLine,
    TokenizeTask,
)

__all__ = [
    "ACTION_TOKENS",
    "ACTION_TOKEN_MASK",
    "OBS_LANGUAGE_ATTENTION_MASK",
    "OBS_LANGUAGE_TOKENS",
    "POSTPROCESSOR_NAME",
    "PREPROCESSOR_NAME",
    "AbsoluteActions",
    "ActionTarget",
    "AddBatchDimension",
    "CropResizeImages",
    "DeltaActions",
    "Device",
    "FastTokenizer",
    "Normalizer",
    "Pi0FastStatePrompt",
    "Pi0NewLine",
    "Pi05StatePrompt",
    "Pipeline",
    "RelativeActions",
    "RenameObservations",
    "SmolVLANewLine",
    "SummedActions",
    "TokenizeActions",
    "TokenizeTask",
    "Unnormalizer",
    "default_pipelines",
    "load_pipelines",
    "make_normalizers",
]
