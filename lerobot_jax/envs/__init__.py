"""Simulated environments, scripted experts and the demonstrations that they gave."""
