"""What a trained outer variable is for: adapt to a task, predict, export a plain torch module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metadist.algorithm import Algorithm, split_own
from metadist.autograd import AutogradOracle
from metadist.compute import AS_TORCH_IS_SET, Compute, pick_device
from metadist.draws import Source
from metadist.evaluation import with_inner_steps
from metadist.flat_states import counters_of, split_carried, unflatten_state
from metadist.problem import HasModel, Problem, context_of, has_few_shot_classes, start_carried
from metadist.sampler import TaskSampler, sample_task
from metadist.task import Batch, Task, shape_signature, targets_of, to_device
from metadist.trees import Params, detach

EXPORT_TOLERANCE = 1e-3
"""Of the relative difference between the outputs of an exported module and of its problem."""


def adapt(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    task: Task | Batch,
    *,
    inner_steps: int | None = None,
    state: Tensor | None = None,
    compute: Compute = AS_TORCH_IS_SET,
) -> Params:
    """The inner variable of `algorithm` after adaptation to a task.

    Args:
        problem: The problem.
        algorithm: As trained.
        outer: The outer variable, the algorithm's own variables included.
        task: The task, or its support set alone.
        inner_steps: Steps of adaptation; None: as in training.
        state: The flat state that training has kept of this task, whose inner variable is the
            result, with no step taken; None: adapt from the start.
        compute: On which device and how; its batch_size is that of the support set.

    Raises:
        ValueError: Adaptation looks at the query set, which is not given.
        FloatingPointError: The result is not finite.
    """
    return _Adapted(problem, algorithm, outer, task, None, inner_steps, state, compute).inner


def predict(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    task: Task | Batch,
    inputs: Tensor | Batch | None = None,
    *,
    inner_steps: int | None = None,
    state: Tensor | None = None,
    compute: Compute = AS_TORCH_IS_SET,
) -> Tensor:
    """The outputs of the problem's model (logits) after adaptation, shape (examples, ...).

    Args:
        problem: The problem.
        algorithm: As trained.
        outer: The outer variable.
        task: The task, or its support set alone.
        inputs: What to predict, as the problem reads inputs: a tensor, or a batch where examples
            have more than inputs and targets. Their targets are not looked at. None: the query set
            of `task`.
        inner_steps: As for `adapt`.
        state: As for `adapt`.
        compute: As for `adapt`.

    Raises:
        ValueError: The problem has no model, or no inputs are given; and as `adapt`.
        FloatingPointError: The adapted inner variable is not finite.
    """
    model = _model_of(problem)
    adapted = _Adapted(problem, algorithm, outer, task, inputs, inner_steps, state, compute)
    with torch.no_grad(), compute.applied():
        try:
            return model.predict(adapted.context, adapted.inner, adapted.task.query)
        except RuntimeError as error:
            shapes = [
                [tuple(tensor.shape[1:]) for tensor in batch.tensors]
                for batch in (adapted.task.support, adapted.task.query)
            ]
            if shapes[0] == shapes[1]:
                raise
            raise ValueError(
                f"inputs must be examples of the shapes {shapes[0]} of the support set for this "
                f"model, got {shapes[1]}: resize them"
            ) from error


def export(
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    task: Task | Batch,
    *,
    inner_steps: int | None = None,
    state: Tensor | None = None,
    compute: Compute = AS_TORCH_IS_SET,
) -> nn.Module:
    """The problem's model with the adapted weights in it: plain torch, in eval mode.

    It gives the outputs of `predict` and knows nothing of problems or tasks; its weights are
    copies. Batch norm that looks at each set by itself ("transductive") becomes torch's without
    running statistics, so the outputs of an example depend on the batch that it is in; that of the
    support set ("inductive") becomes torch's with those statistics.

    Args:
        problem: The problem.
        algorithm: As trained.
        outer: The outer variable.
        task: The task, or its support set alone.
        inner_steps: As for `adapt`.
        state: As for `adapt`.
        compute: As for `adapt`.

    Raises:
        ValueError: The problem has no model, or the module would compute something else than the
            problem, which is tried on the support set.
        FloatingPointError: The adapted inner variable is not finite.
    """
    model = _model_of(problem)
    support = task.support if isinstance(task, Task) else task
    adapted = _Adapted(problem, algorithm, outer, task, support, inner_steps, state, compute)
    with torch.no_grad(), compute.applied():
        module = model.module(adapted.outer, adapted.inner, adapted.task).eval()
        expected = model.predict(adapted.context, adapted.inner, adapted.task.query)
        inputs = inputs_of(adapted.task.support)
        found = module(inputs)
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not difference <= EXPORT_TOLERANCE:
        raise ValueError(
            f"export needs a model that computes the same in eval mode, got outputs that differ by "
            f"{difference:.1%} from those of {type(problem).__name__} on the support set: call "
            ".eval() on the model before training, or use predict"
        )
    return module


def kept_state(
    states: Mapping[int, Tensor], sampler: TaskSampler, task: Task | Batch, step: int = 0
) -> Tensor | None:
    """The state among `states` that belongs to this very task of `sampler`; None: it has none.

    Of a `Stream`, the task at the outer step `step`.
    """
    if not isinstance(task, Task) or int(task.id) not in states:
        return None
    ours = sample_task(sampler, int(task.id), step)
    pairs = zip(
        (*ours.support.tensors, *ours.query.tensors),
        (*task.support.tensors, *task.query.tensors),
        strict=False,
    )
    is_same = shape_signature(ours) == shape_signature(task) and all(
        torch.equal(first.cpu(), second.cpu()) for first, second in pairs
    )
    return states[int(task.id)] if is_same else None


class _Adapted:
    """A task on the device of `compute`, and what adaptation makes of it.

    Args:
        query: The query set, in place of that of the task, or its inputs; None: that of the task.

    The others are those of `adapt`.
    """

    def __init__(
        self,
        problem: Problem,
        algorithm: Algorithm,
        outer: Params,
        task: Task | Batch,
        query: Tensor | Batch | None,
        inner_steps: int | None,
        state: Tensor | None,
        compute: Compute,
    ) -> None:
        device = pick_device(compute.device)
        outer = {name: leaf.detach().to(device) for name, leaf in outer.items()}
        if inner_steps is not None:
            algorithm = with_inner_steps(algorithm, inner_steps)
        if isinstance(task, Batch):
            task = Task(task, task, 0)
        if query is not None:
            task = task._replace(query=_batch(query, task.support))
        self.task = to_device(task, device, next(iter(outer.values())).dtype)
        self.outer, own = split_own(outer)
        with compute.applied():
            with torch.no_grad():
                carried = start_carried(problem, self.outer, self.task)
                if state is not None:
                    state, carried = split_carried(state.to(device), carried)
                context = context_of(problem, self.outer, self.task, carried, compute)
                self.context = detach(context)
                start = problem.init_inner(self.outer, self.task)
            oracle = _OfSupport(problem, self.task, compute.batch_size, compute.seed, eager=True)
            context = {**self.context, **own}
            if state is None:
                self.inner = detach(algorithm.adapt(oracle, context, start))
            else:
                like = algorithm.init(oracle, context, start)
                kept = unflatten_state(state, like, counters_of(state))
                self.inner = detach(kept.inner)
                return
        broken = [name for name, leaf in self.inner.items() if not bool(leaf.isfinite().all())]
        if broken:
            _require_every_class(problem, self.task.support)
            raise FloatingPointError(
                f"the adapted inner variable must be finite, got NaN or infinity in {broken[0]}: "
                "adaptation diverges; try a smaller inner_lr or fewer inner_steps"
            )


class _OfSupport(AutogradOracle):
    """An oracle that refuses to look at the query set, whose targets are those to be found."""

    def _set(self, source: Source) -> Batch:
        if source == "query":
            raise ValueError(
                "the algorithm must adapt on the support set alone to predict, got one whose adapt "
                "asks for the outer loss: evaluate it with `evaluate`, which has the query set"
            )
        return super()._set(source)


def _model_of(problem: Problem) -> HasModel:
    if isinstance(problem, HasModel):
        return problem
    raise ValueError(
        "problem must have a model (methods predict and module, see metadist.problem.HasModel) to "
        f"predict or to export, got {type(problem).__name__}: `adapt` gives its inner variable"
    )


def _require_every_class(problem: Problem, support: Batch) -> None:
    """Raise ValueError where a class has no example, whose mean is then not finite."""
    targets = targets_of(support)
    if not has_few_shot_classes(problem) or targets is None or targets.is_floating_point():
        return
    missing = sorted(set(range(int(targets.max()) + 1)) - set(targets.flatten().tolist()))
    if missing:
        raise ValueError(
            f"the support set must hold an example of each class 0 .. {int(targets.max())}, got "
            f"none of {', '.join(map(str, missing[:5]))}: number the classes without gaps"
        )


def _batch(query: Tensor | Batch, like: Batch) -> Batch:
    """Inputs as a batch in the form of the support set, with targets of zeros."""
    if isinstance(query, Batch):
        return query
    targets = targets_of(like)
    if targets is None or len(like.tensors) != 2:
        raise ValueError(
            "inputs must be a Batch like the support set where that has more than inputs and "
            f"targets, got a tensor beside {len(like.tensors)} tensors"
        )
    blank = targets.new_zeros((len(query), *targets.shape[1:]))
    tensors = [blank if tensor is targets else query for tensor in like.tensors]
    return Batch.of(*tensors)._replace(names=like.names)


def inputs_of(batch: Batch) -> Tensor:
    """The one tensor of a batch beside its targets."""
    targets = targets_of(batch)
    inputs = [tensor for tensor in batch.tensors if tensor is not targets]
    if len(inputs) != 1:
        raise ValueError(
            "export needs examples of one tensor of inputs, which the module is called with, got "
            f"{len(inputs)}: use predict"
        )
    return inputs[0]
