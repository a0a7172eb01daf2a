"""Weights for training examples or classes: `problem.py`, and samplers of one task of images."""
