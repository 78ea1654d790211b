"""LeRobot's policies in JAX: train on GPUs and TPU pods, run the checkpoints through stock LeRobot."""

__version__ = "0.1.0"
