"""Distributed meta-learning and bilevel optimisation with PyTorch and Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.algorithm import Algorithm, Estimate, InnerState
    from metadist.autograd import AutogradOracle
    from metadist.checks.hypergradient import HypergradientReport, check_hypergradient
    from metadist.compute import Compute
    from metadist.evaluation import EvaluationResult, Interval, evaluate
    from metadist.executor import Executor, LocalExecutor, StepReport
    from metadist.hypergradient import HypergradientSum, task_hypergradients
    from metadist.optimizer import OuterOptimizer
    from metadist.oracle import CountingOracle, Draw, Oracle
    from metadist.problem import Problem
    from metadist.run.checkpoint import Checkpoint, CheckpointError, CheckpointStore
    from metadist.task import Batch, Task, TaskSampler
    from metadist.trainer import Trainer, TrainingDiverged, TrainingResult
    from metadist.trees import Params

# A literal, which the build reads too: a checkout needs no installation, and a worker that was sent
# this folder has none.
__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "AutogradOracle",
    "Batch",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "Compute",
    "CountingOracle",
    "Draw",
    "Estimate",
    "EvaluationResult",
    "Executor",
    "HypergradientReport",
    "HypergradientSum",
    "InnerState",
    "Interval",
    "LocalExecutor",
    "Oracle",
    "OuterOptimizer",
    "Params",
    "Problem",
    "StepReport",
    "Task",
    "TaskSampler",
    "Trainer",
    "TrainingDiverged",
    "TrainingResult",
    "check_hypergradient",
    "evaluate",
    "task_hypergradients",
]

_MODULES = (
    "metadist.algorithm",
    "metadist.autograd",
    "metadist.checks.hypergradient",
    "metadist.compute",
    "metadist.evaluation",
    "metadist.executor",
    "metadist.hypergradient",
    "metadist.oracle",
    "metadist.optimizer",
    "metadist.problem",
    "metadist.run.checkpoint",
    "metadist.task",
    "metadist.trainer",
    "metadist.trees",
)
"""Where the names of `__all__` are defined."""


if not TYPE_CHECKING:  # so that type checkers do not believe in names that are not in `__all__`

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first used.

        Importing torch takes seconds, and every `import metadist.cli` passes through here.
        """
        if name in __all__:
            for module in map(import_module, _MODULES):
                if name in vars(module):
                    return globals().setdefault(name, vars(module)[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
