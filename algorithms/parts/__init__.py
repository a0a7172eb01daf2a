"""What methods share: descent on y, linear solvers, implicit gradients, the engine of `higher`."""
