"""Policies: one folder each, found by its name. `base.py` is the contract that they share."""
