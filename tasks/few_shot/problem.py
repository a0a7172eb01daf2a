"""`FewShotProblem`: any nn.Module, with some of its parameters adapted to each task.

Shape letters: B tasks, S support examples, Q query examples, C channels, F features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp

from metadist.models import TaskBatchNorm, rows
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.network import (
    check_model,
    constants,
    move_constants,
    trainable,
    without_parameters,
)
from metadist.trees import Params, dot

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """`F.mse_loss`, whose own backward pass has no forward derivative."""
    if output.shape != target.shape:
        raise ValueError(
            "targets must have the shape of the model's outputs with loss='mse', which is "
            f"{tuple(output.shape)}, got {tuple(target.shape)}"
        )
    return (output - target).square().mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """`F.cross_entropy` of classes; torch would read floating targets as probabilities."""
    if target.is_floating_point():
        raise ValueError(
            "targets must be integers (classes) with loss='cross_entropy', got "
            f"{target.dtype}: pass loss='mse', or for probabilities torch's own function"
        )
    return F.cross_entropy(output, target)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mean_squared_error}

SUPPORT, QUERY = "features.support", "features.query"
INPUTS = "inputs.support"
CLASS_AXIS, IGNORED = 1, -100  # of F.cross_entropy, also where each pixel has a class


class FewShotProblem(Problem):
    """A model whose parameters are the outer variable, some of them adapted to each task.

    Examples of a task are pairs of `inputs` and `targets`. `adapt` decides which method this is:

    * "all": every parameter is adapted from a learned start (MAML, Reptile).
    * "head": the last module with parameters is adapted (ANIL). What comes before it runs once
      forward and once backward per outer step; the inner loop sees its features only.
    * a pattern such as "features.*" or a list of names and patterns (BOIL, layer by layer):
      matching parameters are adapted, the others are learned and shared by the tasks.

    Parameters with `requires_grad=False` are constants, and so are running statistics of batch
    norm in a module that is in eval mode. Parameters that the loss does not depend on get a zero
    gradient.

    Args:
        model: The network; its current weights are the start of training.
        adapt: Which parameters are adapted, see above.
        loss: "cross_entropy" (integer targets; reports accuracy), "mse", or a function of
            (output, target) that returns the mean over examples, shape ().
        batch_encode: Run the part before the head for all tasks in one call ("auto": on a GPU;
            on a CPU one task at a time is faster). With batch norm this needs `TaskBatchNorm`.
        weight_decay: Adds weight_decay / 2 * |y|^2 to the inner loss, >= 0. Implicit methods need
            it: the loss of a head alone has no strict minimum, and often none at all.

    Raises:
        ValueError: a pattern that matches nothing; a layer that the inner loop cannot replay
            (dropout, batch norm that updates running statistics).
    """

    def __init__(
        self,
        model: nn.Module,
        adapt: str | Sequence[str] = "all",
        loss: Literal["cross_entropy", "mse"] | Loss = "cross_entropy",
        batch_encode: Literal["auto"] | bool = "auto",
        weight_decay: float = 0.0,
    ) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss must be one of {sorted(LOSSES)} or a function, got {loss!r}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0 and finite, got {weight_decay}")
        check_model(model)
        self.weight_decay = weight_decay
        self.loss = loss
        self.adapt = adapt
        self.batch_encode = batch_encode
        self._loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.few_shot_classes = loss == "cross_entropy"
        self._start = trainable(model)
        self._adapted = _adapted_names(model, list(self._start), adapt)
        modules = list(model.modules())
        self._inductive = any(
            isinstance(module, TaskBatchNorm) and module.policy == "inductive" for module in modules
        )
        self._has_rnn = any(isinstance(module, nn.RNNBase) for module in modules)
        self._model = without_parameters(model)
        self._split = _Split(self._model, head_name(model)) if adapt == "head" else None
        self._split_is_checked = False
        if batch_encode is True:
            self._check_batch_encode()

    def init_outer(self, generator: torch.Generator) -> Params:
        """The initial weights of the model; nothing is drawn."""
        return {name: leaf.clone() for name, leaf in self._start.items()}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {name: outer[name] for name in self._adapted}

    def encode(self, outer: Params, task: Task) -> Params:
        shared = self._shared(outer)
        if self._split is None:
            if self._inductive:
                # The statistics of the query set are those of the support set, so a query pass
                # needs the support inputs too.
                shared[INPUTS] = _inputs(task.support)
            return shared
        inputs = torch.cat([_inputs(task.support), _inputs(task.query)])
        self._check_split(inputs)
        sizes = (len(task.support.index), len(task.query.index))
        with rows(sets=sizes):
            features = self._call(self._split.body, self._split.of_body(shared), inputs)
        support, query = features.split(sizes)
        return {**self._split.of_head(shared), SUPPORT: support, QUERY: query}

    def encode_tasks(self, outer: Params, tasks: Task) -> Params:
        num_tasks = len(cast(Tensor, tasks.id))
        if self._split is None or not self._encodes_together(outer):
            contexts = [self.encode(outer, _task(tasks, b)) for b in range(num_tasks)]
            return {name: torch.stack([c[name] for c in contexts]) for name in contexts[0]}
        shared = self._shared(outer)
        inputs_BRx = torch.cat([_inputs(tasks.support), _inputs(tasks.query)], dim=1)
        sizes = (tasks.support.index.shape[1], tasks.query.index.shape[1])
        # Example-major, task-minor: each channel of each task is then a channel of batch norm.
        inputs = inputs_BRx.transpose(0, 1).flatten(0, 1)
        self._check_split(inputs_BRx[0])
        with rows(num_tasks, sizes):
            features = self._call(self._split.body, self._split.of_body(shared), inputs)
        features_BRx = features.unflatten(0, (-1, num_tasks)).transpose(0, 1)
        support, query = features_BRx.split(sizes, dim=1)
        together = {}
        for name, leaf in self._split.of_head(shared).items():
            together[name] = leaf.expand(num_tasks, *leaf.shape)
        return {**together, SUPPORT: support, QUERY: query}

    def _shared(self, outer: Params) -> Params:
        """The parameters that are learned but not adapted."""
        return {name: leaf for name, leaf in outer.items() if name not in self._adapted}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        loss = self._loss(self.predict(context, inner, batch, SUPPORT), _targets(batch))
        return loss + self.weight_decay / 2 * dot(inner, inner) if self.weight_decay else loss

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._loss(self.predict(context, inner, batch, QUERY), _targets(batch))

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        if self.loss != "cross_entropy":
            return {}
        targets = _targets(batch)
        hits = self.predict(context, inner, batch, QUERY).argmax(CLASS_AXIS) == targets
        counted = targets != IGNORED
        return {"accuracy": (hits & counted).double().sum() / counted.sum()}

    def predict(self, context: Params, inner: Params, batch: Batch, source: str = QUERY) -> Tensor:
        """The model's outputs on `batch` with adapted parameters `inner`, shape (examples, ...).

        `context` is what `encode` returned; `source` says which set `batch` is from, `SUPPORT` or
        `QUERY`.
        """
        if self._split is not None:
            features = context[source][batch.index]
            shared = {n: leaf for n, leaf in context.items() if n not in (SUPPORT, QUERY)}
            return self._call(self._split.head, self._split.to_head({**shared, **inner}), features)
        context = dict(context)
        support = context.pop(INPUTS, None)
        inputs = _inputs(batch)
        if support is None or source == SUPPORT:
            return self._call(self._model, {**context, **inner}, inputs)
        sizes = (len(support), len(inputs))
        with rows(sets=sizes):
            out = self._call(self._model, {**context, **inner}, torch.cat([support, inputs]))
        return out[sizes[0] :]

    def describe(self) -> dict[str, str]:
        norms = set()
        for module in self._model.modules():
            if isinstance(module, TaskBatchNorm):
                norms.add(str(module.policy))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                is_frozen = module.track_running_stats
                norms.add("running statistics, frozen" if is_frozen else "transductive")
        adapt = self.adapt if isinstance(self.adapt, str) else ", ".join(self.adapt)
        own_name = getattr(self.loss, "__name__", type(self.loss).__name__)
        described = {
            "model": type(self._model).__name__,
            "adapt": f"{adapt} ({len(self._adapted)} of {len(self._start)} tensors)",
            "batch norm": ", ".join(sorted(norms)) or "none",
            "loss": self.loss if isinstance(self.loss, str) else own_name,
        }
        if self.weight_decay:
            described["weight_decay"] = str(self.weight_decay)
        return described

    def _call(self, module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
        if any(True for _ in constants(module)):
            move_constants(module, inputs.device)
        if not self._has_rnn:
            return functional_call(module, params, (inputs,))
        # The fused RNN kernels have no double backward, the plain ones have. vmap has no rule for
        # an RNN as a whole; inside vjp it falls into parts that vmap has rules for.
        with torch.backends.cudnn.flags(enabled=False), _without_mkldnn():
            return vjp(lambda p: functional_call(module, p, (inputs,)), params)[0]

    def _check_split(self, inputs: Tensor) -> None:
        """Raise ValueError, once, if the model is not its head after its body."""
        if self._split is None or self._split_is_checked:
            return
        inputs = inputs[:8]
        dtype = inputs.dtype if inputs.is_floating_point() else None
        start = {n: leaf.to(inputs.device, dtype) for n, leaf in self._start.items()}
        with torch.no_grad():
            whole = self._call(self._model, start, inputs)
            features = self._call(self._split.body, self._split.of_body(start), inputs)
            parts = self._call(self._split.head, self._split.to_head(start), features)
        # NaN is equal to NaN: a task with broken data says nothing against the model.
        if not torch.allclose(whole, parts, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"adapt must not be 'head' for a model that computes further after its last "
                f"layer {self._split.name!r}, got 'head': name the parameters instead, "
                f"adapt='{self._split.name}.*'"
            )
        self._split_is_checked = True

    def _encodes_together(self, outer: Params) -> bool:
        if self.batch_encode != "auto":
            return self.batch_encode
        return next(iter(outer.values())).device.type != "cpu" and not self._foreign_norms()

    def _foreign_norms(self) -> list[str]:
        """Layers that would mix the statistics of tasks that pass together."""
        return [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not module.track_running_stats
        ]

    def _check_batch_encode(self) -> None:
        if self._split is None:
            raise ValueError(
                "batch_encode must be 'auto' or False unless exactly the head is adapted, got "
                f"True with adapt={self.adapt!r}"
            )
        if self._foreign_norms():
            raise ValueError(
                "batch_encode must be 'auto' or False with batch norm that mixes tasks "
                f"({', '.join(self._foreign_norms()[:3])}), got True: convert the model with "
                "metadist.models.with_task_batch_norm"
            )


class _Split:
    """A model cut into the body before the head, and the head."""

    def __init__(self, model: nn.Module, head_name: str) -> None:
        self.name = head_name
        self.head = model.get_submodule(head_name)
        memo = {id(leaf): leaf for leaf in constants(model)}
        self.body = copy.deepcopy(model, memo)
        parent, _, child = head_name.rpartition(".")
        setattr(self.body.get_submodule(parent), child, nn.Identity())
        self._prefix = head_name + "."

    def of_body(self, params: Params) -> Params:
        return {name: leaf for name, leaf in params.items() if not name.startswith(self._prefix)}

    def of_head(self, params: Params) -> Params:
        return {name: leaf for name, leaf in params.items() if name.startswith(self._prefix)}

    def to_head(self, params: Params) -> Params:
        """The head's own parameters, by the names the head itself has for them."""
        return {
            name.removeprefix(self._prefix): leaf for name, leaf in self.of_head(params).items()
        }


def head_name(model: nn.Module) -> str:
    """The name of the module that owns the last trainable parameter."""
    names = [name for name, leaf in model.named_parameters() if leaf.requires_grad]
    if not names:
        raise ValueError("model must have a trainable parameter, got none with requires_grad=True")
    head = names[-1].rpartition(".")[0]
    if not head:
        raise ValueError(
            "adapt must be 'all' or names of parameters for a model whose last parameter "
            f"{names[-1]!r} is in no submodule, got 'head'"
        )
    return head


def _adapted_names(model: nn.Module, names: list[str], adapt: str | Sequence[str]) -> list[str]:
    if not names:
        raise ValueError("model must have a trainable parameter, got none with requires_grad=True")
    if adapt == "all":
        return names
    if adapt == "head":
        return [name for name in names if name.startswith(head_name(model) + ".")]
    patterns = [adapt] if isinstance(adapt, str) else list(adapt)
    if not patterns:
        raise ValueError("adapt must name at least one parameter, got an empty list")
    frozen = [name for name, leaf in model.named_parameters() if not leaf.requires_grad]
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if any(fnmatchcase(name, pattern) for name in frozen):
            raise ValueError(
                f"adapt must match trainable parameters, {pattern!r} matches frozen ones only: "
                "set requires_grad_(True) on them"
            )
        raise ValueError(
            f"adapt must be 'all', 'head' or patterns of parameter names, {pattern!r} matches "
            f"none of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        )
    adapted = []
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            adapted.append(name)
    return adapted


def _inputs(batch: Batch) -> Tensor:
    return batch.fields("inputs", "targets")[0]


def _targets(batch: Batch) -> Tensor:
    return batch.fields("inputs", "targets")[1]


def _task(tasks: Task, b: int) -> Task:
    def at(batch: Batch) -> Batch:
        return batch.map(lambda tensor: tensor[b])._replace(index=batch.index[b])

    return Task(at(tasks.support), at(tasks.query), cast(Tensor, tasks.id)[b])


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    # torch.backends.mkldnn.flags also sets what warns where there is no Intel GPU.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
