"""Whole trainings as jobs: submitted, side by side, and searched over."""
