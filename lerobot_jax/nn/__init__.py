"""Layers that policies share, under the names that their PyTorch counterparts give to parameters."""
