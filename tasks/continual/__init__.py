"""Continual learning: examples that come once, task after task, and a memory of some of them."""
