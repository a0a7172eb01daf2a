"""Synthetic problems of the papers."""
