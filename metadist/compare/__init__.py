"""Several methods on one problem, each on the same budget: plan, runs, report."""
