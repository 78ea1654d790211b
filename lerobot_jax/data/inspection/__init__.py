"""What is in a dataset and what is wrong with it: behind `python -m lerobot_jax.dataset`."""
