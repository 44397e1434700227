"""Checkpoint and recipe to plan: trajectories of the model itself, Cache Predictor, keep counts, measurement."""
