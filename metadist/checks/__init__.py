"""Checks made before a run: of a sampler, of a whole set-up, of a hypergradient."""
