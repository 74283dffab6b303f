"""Recipes, checkpoints and the training loop."""
