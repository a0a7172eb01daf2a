"""Synthetic problems of the papers, in vectors x and y."""
