"""Several methods on one problem, each on the same budget.

    plan.py     `Comparison`: its runs, its grids, and the choice of a point
    run.py      `run_on_budget`: one training that is evaluated on the way
    metrics.py  `kept_metrics`: the metrics of the solution of a trainer
    report.py   tables and curves of the outcomes

The command is `metadist compare`, see docs/compare.md.
"""

from metadist.compare.metrics import kept_metrics, solution_metrics
from metadist.compare.plan import Comparison, Outcome, Run
from metadist.compare.run import Budget, Contender, Record, Spent, run_on_budget

__all__ = [
    "Budget",
    "Comparison",
    "Contender",
    "Outcome",
    "Record",
    "Run",
    "Spent",
    "kept_metrics",
    "run_on_budget",
    "solution_metrics",
]
