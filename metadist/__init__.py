"""Distributed meta-learning and bilevel optimisation with PyTorch and Ray."""

from typing import TYPE_CHECKING

from metadist.exports import lazy

if TYPE_CHECKING:
    from metadist.algorithm import Algorithm as Algorithm
    from metadist.algorithm import Estimate as Estimate
    from metadist.algorithm import InnerState as InnerState
    from metadist.autograd import AutogradOracle as AutogradOracle
    from metadist.callbacks import Callback as Callback
    from metadist.callbacks import CallbackError as CallbackError
    from metadist.callbacks import EvaluationReport as EvaluationReport
    from metadist.checks.hypergradient import HypergradientReport as HypergradientReport
    from metadist.checks.hypergradient import check_hypergradient as check_hypergradient
    from metadist.compute import Compute as Compute
    from metadist.draws import Draw as Draw
    from metadist.evaluation import EvaluationResult as EvaluationResult
    from metadist.evaluation import best_inner_steps as best_inner_steps
    from metadist.evaluation import evaluate as evaluate
    from metadist.executor import Executor as Executor
    from metadist.executor import LocalExecutor as LocalExecutor
    from metadist.executor import StepReport as StepReport
    from metadist.hypergradient import HypergradientSum as HypergradientSum
    from metadist.hypergradient import task_hypergradients as task_hypergradients
    from metadist.inference import adapt as adapt
    from metadist.inference import export as export
    from metadist.inference import predict as predict
    from metadist.intervals import Interval as Interval
    from metadist.micro_batches import sum_of_micro_batches as sum_of_micro_batches
    from metadist.optimizer import OuterOptimizer as OuterOptimizer
    from metadist.oracle import CountingOracle as CountingOracle
    from metadist.oracle import Oracle as Oracle
    from metadist.problem import Problem as Problem
    from metadist.run.checkpoint import Checkpoint as Checkpoint
    from metadist.run.checkpoint import CheckpointError as CheckpointError
    from metadist.run.checkpoint import CheckpointStore as CheckpointStore
    from metadist.run.fitting import TrainingDiverged as TrainingDiverged
    from metadist.sampler import TaskSampler as TaskSampler
    from metadist.step_rules import SGD as SGD
    from metadist.step_rules import Adam as Adam
    from metadist.step_rules import AdamW as AdamW
    from metadist.step_rules import StepRule as StepRule
    from metadist.task import Batch as Batch
    from metadist.task import Task as Task
    from metadist.trainer import Trainer as Trainer
    from metadist.trainer import TrainingResult as TrainingResult
    from metadist.trees import Params as Params

# A literal, which the build reads too: a checkout needs no installation, and a worker that was sent
# this folder has none.
__version__ = "0.1.0"

if not TYPE_CHECKING:  # so that type checkers believe in no other names
    __all__, __getattr__, __dir__ = lazy(__name__)
