"""Weights of examples and classes: hyper-cleaning, class weights, learned weighting."""
