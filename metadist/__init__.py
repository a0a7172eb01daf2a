"""Distributed meta-learning and bilevel optimisation with PyTorch and Ray."""

from metadist.algorithm import Algorithm, Estimate, InnerState
from metadist.checks.hypergradient import HypergradientReport, check_hypergradient
from metadist.evaluation import EvaluationResult, Interval, evaluate
from metadist.executor import Executor, LocalExecutor, StepReport
from metadist.hypergradient import HypergradientSum, task_hypergradients
from metadist.oracle import AutogradOracle, CountingOracle, Draw, Oracle
from metadist.outer import OuterOptimizer
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
