"""LeRobot's pre- and post-processor pipelines: the JSON format, and each step as a pure function of a batch."""

from lerobot_jax.processors.normalize import Normalizer, Unnormalizer
from lerobot_jax.processors.pipeline import (
    POSTPROCESSOR_NAME,
    PREPROCESSOR_NAME,
    Pipeline,
    default_pipelines,
    load_pipelines,
)

__all__ = [
    "POSTPROCESSOR_NAME",
    "PREPROCESSOR_NAME",
    "Normalizer",
    "Pipeline",
    "Unnormalizer",
    "default_pipelines",
    "load_pipelines",
]
