"""The parts of `lerobot_jax.compare`: runs, statistics, motion, latency, and what is written about them."""
