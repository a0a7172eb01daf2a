"""`FewShotProblem`: any nn.Module, with some of its parameters adapted to each task.

Shape letters: B tasks, S support examples, Q query examples, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import vjp

from metadist.checks.values import check
from metadist.factory import ModelFactory
from metadist.models import TaskBatchNorm
from metadist.problem import Problem
from metadist.rows import rows
from metadist.task import Batch, Task
from metadist.tasks.few_shot.heads import prototypes
from metadist.tasks.network import (
    Head,
    call,
    last_executed,
    last_registered,
    names_of,
    plain_module,
)
from metadist.tasks.opened import SentAsText, opened
from metadist.trees import Params, dot, stack

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


class FewShotProblem(SentAsText, Problem):
    """A model whose parameters are the outer variable, some of them adapted to each task.

    Examples of a task are pairs of `inputs` and `targets`. `adapt` decides which method this is:

    * "all": every parameter is adapted from a learned start (MAML, Reptile).
    * "head": the layer whose output is the model's is adapted (ANIL). What comes before it runs
      once forward and once backward per outer step; the inner loop sees its features only.
    * a pattern such as "features.*" or a list of names and patterns (BOIL, layer by layer):
      matching parameters are adapted, the others are learned and shared by the tasks. A
      parameter that layers share is found by each of its names, and adapted in all of them; a
      parametrized weight stands for the parameters it is computed from.

    Parameters with `requires_grad=False` are constants, and so are running statistics of batch
    norm in a module that is in eval mode. Parameters that the loss does not depend on get a zero
    gradient.

    Args:
        model: The network; its current weights are the start of training. Or a `ModelFactory`,
            which is sent to workers as text.
        adapt: Which parameters are adapted, see above.
        loss: "cross_entropy" (integer targets; reports accuracy), "mse", or a function of
            (output, target) that returns the mean over examples, shape ().
        batch_encode: Run the part before the head for all tasks in one call ("auto": on a GPU;
            on a CPU one task at a time is faster). With batch norm this needs `TaskBatchNorm`.
        weight_decay: Adds weight_decay / 2 * |y|^2 to the inner loss, >= 0. Implicit methods need
            it: the loss of a head alone has no strict minimum, and often none at all.
        head_start: Where a head that is adapted starts. "learned": it is a part of x, of n_way
            outputs. "prototypes": at 2 c and -|c|^2 of the means c of the features of each class of
            the support set, so that without a step it predicts the class whose mean is nearest
            (`ProtoNet`), and with steps it is Proto-MAML for a head. The head is then no part of x,
            and n_way may differ between training and test. Costs a second pass of the support set
            through the body.

    Raises:
        ValueError: a pattern that matches nothing; a layer that the inner loop cannot replay
            (dropout, batch norm that updates running statistics); a compiled model.
    """

    def __init__(
        self,
        model: nn.Module | ModelFactory,
        adapt: str | Sequence[str] = "all",
        loss: Literal["cross_entropy", "mse"] | Loss = "cross_entropy",
        batch_encode: Literal["auto"] | bool = "auto",
        weight_decay: float = 0.0,
        head_start: Literal["learned", "prototypes"] = "learned",
    ) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss must be one of {sorted(LOSSES)} or a function, got {loss!r}")
        check("weight_decay", weight_decay, ge=0)
        found = opened(model)
        if isinstance(model, ModelFactory):
            self.model = model
        self.weight_decay = weight_decay
        self.loss = loss
        self.adapt = adapt
        self.batch_encode = batch_encode
        self._loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.few_shot_classes = loss == "cross_entropy"
        self._start, self._model = found.start, found.module
        modules = list(self._model.modules())
        self._inductive = any(
            isinstance(module, TaskBatchNorm) and module.policy == "inductive" for module in modules
        )
        self._has_rnn = any(isinstance(module, nn.RNNBase) for module in modules)
        self._split: Head | None = None
        self._split_is_checked = False
        self._head_is_found = False
        self._runs_once = True
        if adapt == "head":
            # What comes last is known for sure when the first inputs are there.
            self._split = Head(self._model, last_registered(self._model))
            self._adapted = list(self._split.of_head(self._start))
        else:
            self._adapted = _adapted_names(self._model, list(self._start), adapt)
        self.head_start = head_start
        if head_start != "learned":
            self._check_head_start()
        if batch_encode is True:
            self._check_batch_encode()

    def init_outer(self, generator: torch.Generator) -> Params:
        """The initial weights of the model; nothing is drawn."""
        start = self._start if self.head_start == "learned" else self._shared(self._start)
        return {name: leaf.clone() for name, leaf in start.items()}

    def init_inner(self, outer: Params, task: Task) -> Params:
        if self._split is not None:
            self._find_head(_inputs(task.support))
        if self._split is not None and self.head_start != "learned":
            inputs, targets = task.support.fields("inputs", "targets")
            features = self._call(
                self._split.body, self._split.of_body(self._shared(outer)), inputs
            )
            weight, bias = self.head_of(outer, features, targets)
            return dict(zip(self._adapted, (weight, bias), strict=True))
        return {name: outer[name] for name in self._adapted}

    def head_of(self, outer: Params, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the head that adaptation starts from, given the support features."""
        return prototypes(features, targets)

    def encode(self, outer: Params, task: Task) -> Params:
        if self._split is not None:
            self._find_head(_inputs(task.support))
        shared = self._shared(outer)
        if self._split is None:
            if self._inductive:
                # The statistics of the query set are those of the support set, so a query pass
                # needs the support inputs too.
                shared[INPUTS] = _inputs(task.support)
            return shared
        support, query = _inputs(task.support), _inputs(task.query)
        self._check_split(support, query)
        features = self._features(self._split, shared, support, query)
        return {**self._split.of_head(shared), SUPPORT: features[0], QUERY: features[1]}

    def _features(
        self, split: Head, shared: Params, support: Tensor, query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the body makes of both sets: in one pass, or in two where that is not the same."""
        params, sizes = split.of_body(shared), (len(support), len(query))
        if self._runs_once and support.shape[1:] == query.shape[1:]:
            with rows(sets=sizes):
                found = self._call(split.body, params, torch.cat([support, query]))
            first, second = found.split(sizes)
            return first, second
        if self._inductive:
            raise ValueError(
                "inputs of support and query must have one shape where batch norm is 'inductive', "
                f"got {tuple(support.shape)} and {tuple(query.shape)}: the query set needs the "
                "statistics of the support set; pad both to one length"
            )
        return self._call(split.body, params, support), self._call(split.body, params, query)

    def encode_tasks(self, outer: Params, tasks: Task) -> Params:
        num_tasks = len(cast(Tensor, tasks.id))
        if self._split is not None:
            self._find_head(_inputs(tasks.support)[0])
            self._check_split(_inputs(tasks.support)[0], _inputs(tasks.query)[0])
        if self._split is None and not self._shared(outer):
            return self.encode(outer, tasks)  # nothing but inputs at most, which have their axis
        if self._split is None or not self._encodes_together(outer, tasks):
            contexts = [self.encode(outer, _task(tasks, b)) for b in range(num_tasks)]
            return stack(contexts)
        shared = self._shared(outer)
        inputs_BRx = torch.cat([_inputs(tasks.support), _inputs(tasks.query)], dim=1)
        sizes = (tasks.support.index.shape[1], tasks.query.index.shape[1])
        # Example-major, task-minor: each channel of each task is then a channel of batch norm.
        inputs = inputs_BRx.transpose(0, 1).flatten(0, 1)
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
        return self._loss(self.predict(context, inner, batch), _targets(batch))

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        if self.loss != "cross_entropy":
            return {}
        return {"accuracy": _accuracy(self.predict(context, inner, batch), _targets(batch))}

    def loss_and_metrics(
        self, context: Params, inner: Params, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, targets = self.predict(context, inner, batch), _targets(batch)
        loss = self._loss(outputs, targets)
        if self.loss != "cross_entropy":
            return loss, {}
        return loss, {"accuracy": _accuracy(outputs, targets)}

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

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        """The model with the weights adapted to `task`, see `metadist.export`."""
        weights = {**self._shared(outer), **inner}
        return plain_module(self._model, weights, _inputs(task.support))

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
        if self.head_start != "learned":
            described["head start"] = self.head_start
        if self.weight_decay:
            described["weight_decay"] = str(self.weight_decay)
        return described

    def _call(self, module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
        if not self._has_rnn:
            return call(module, params, inputs)
        # The fused RNN kernels have no double backward, the plain ones have. vmap has no rule for
        # an RNN as a whole; inside vjp it falls into parts that vmap has rules for. Elsewhere vjp
        # is left out, since packed sequences do not run inside.
        with torch.backends.cudnn.flags(enabled=False), _without_mkldnn():
            if not any(map(is_functorch_wrapped_tensor, (inputs, *params.values()))):
                return call(module, params, inputs)
            return vjp(lambda p: call(module, p, inputs), params)[0]

    def _start_at(self, inputs: Tensor) -> Params:
        dtype = inputs.dtype if inputs.is_floating_point() else None
        return {name: leaf.to(inputs.device, dtype) for name, leaf in self._start.items()}

    def _find_head(self, inputs: Tensor) -> None:
        """Find, once, the layer that is the head by a pass through the model."""
        if self._split is None or self._head_is_found:
            return
        # Of ones, since inputs may be those of all tasks under vmap; the order of layers is asked.
        probe = torch.ones(inputs[:8].shape, dtype=inputs.dtype, device=inputs.device)
        with torch.no_grad():
            name = last_executed(
                self._model, lambda: call(self._model, self._start_at(probe), probe)
            )
        if name != self._split.name:
            if self.head_start != "learned":
                raise ValueError(
                    f"head_start={self.head_start!r} needs a model whose last layer is registered "
                    f"last, {name!r} runs last and {self._split.name!r} is registered last: assign "
                    "it last in __init__"
                )
            self._split = Head(self._model, name)
            self._adapted = list(self._split.of_head(self._start))
        self._head_is_found = True

    def _check_split(self, support: Tensor, query: Tensor) -> None:
        """Raise ValueError, once, if the model is not its head after its body.

        Also finds out whether the body may run once for both sets.
        """
        if self._split is None or self._split_is_checked:
            return
        split, start = self._split, self._start_at(support)
        inputs = support[:8]  # each call has a copy, since a layer may work in place
        with torch.no_grad():
            whole = self._call(self._model, start, inputs.clone())
            try:
                features = self._call(split.body, split.of_body(start), inputs.clone())
                has_rows = isinstance(features, Tensor) and len(features) == len(inputs)
                if has_rows:
                    parts = self._call(split.head, split.to_head(start), features)
            except Exception as error:  # of the user's code, which has run as a whole
                raise ValueError(
                    f"adapt must not be 'head' for a model whose last layer {split.name!r} does "
                    f"not run without the rest, or the rest without it, got 'head' and "
                    f"{type(error).__name__}: {error}: name the parameters instead, "
                    f"adapt='{split.name}.*'"
                ) from error
            if not has_rows:
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features)
                raise ValueError(
                    f"adapt must not be 'head' where the last layer {split.name!r} is not given a "
                    f"tensor with a row for each of {len(inputs)} examples, got {got}: name the "
                    f"parameters instead, adapt='{split.name}.*'"
                )
        # NaN is equal to NaN: a task with broken data says nothing against the model.
        if not torch.allclose(whole, parts, rtol=0, atol=0, equal_nan=True):
            with torch.no_grad():
                again = self._call(self._model, start, inputs.clone())
            if not torch.allclose(whole, again, rtol=0, atol=0, equal_nan=True):
                return  # no function of its inputs, which `check_pure` says better
            raise ValueError(
                f"adapt must not be 'head' for a model that is not its last layer {split.name!r} "
                "after everything else, got 'head' (the outputs differ): name the parameters "
                f"instead, adapt='{split.name}.*'"
            )
        self._runs_once = self._inductive or self._rows_stand_alone(split, start, support, query)
        self._split_is_checked = True

    def _rows_stand_alone(self, split: Head, start: Params, support: Tensor, query: Tensor) -> bool:
        """Whether the body gives the same for both sets together as for each alone.

        It does not where it looks at other rows, or at the longest of them.
        """
        if support.shape[1:] != query.shape[1:]:
            return True  # asked for sets of one shape only, of other tasks
        inputs = torch.cat([support, query])
        sizes: tuple[int, ...] = (len(support), len(query))
        if not any(_is_norm(module) for module in split.body.modules()):
            inputs = inputs[:16]
            sizes = (2,) * (len(inputs) // 2) + (1,) * (len(inputs) % 2)
        params = split.of_body(start)
        with torch.no_grad():
            with rows(sets=sizes):
                together = self._call(split.body, params, inputs.clone())
            alone = [self._call(split.body, params, part) for part in inputs.split(sizes)]
        if any(part.shape[1:] != together.shape[1:] for part in alone):
            return False
        difference = torch.cat(alone) - together
        # By far more than rounding, which batch norm may magnify.
        return bool(difference.norm() <= 1e-2 * together.norm()) or not together.isfinite().all()

    def _encodes_together(self, outer: Params, tasks: Task) -> bool:
        if self.batch_encode is False or not self._runs_once:
            return False
        if _inputs(tasks.support).shape[2:] != _inputs(tasks.query).shape[2:]:
            return False
        if self.batch_encode is True:
            return True
        return next(iter(outer.values())).device.type != "cpu" and not self._foreign_norms()

    def _foreign_norms(self) -> list[str]:
        """Layers that would mix the statistics of tasks that pass together."""
        return [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not module.track_running_stats
        ]

    def _check_head_start(self) -> None:
        if self.head_start != "prototypes":
            raise ValueError(
                f"head_start must be 'learned' or 'prototypes', got {self.head_start!r}"
            )
        if self._split is None or not self.few_shot_classes:
            raise ValueError(
                "head_start='prototypes' needs adapt='head' and loss='cross_entropy', got "
                f"adapt={self.adapt!r} and loss={self.loss!r}"
            )
        head = self._split.head
        if type(head) is not nn.Linear or list(self._split.of_head(self._start)) != [
            f"{self._split.name}.weight",
            f"{self._split.name}.bias",
        ]:
            raise ValueError(
                "head_start='prototypes' needs a last layer that is an nn.Linear with a trainable "
                f"weight and bias, got {head}: replace the last layer"
            )

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


def _adapted_names(model: nn.Module, names: list[str], adapt: str | Sequence[str]) -> list[str]:
    if not names:
        raise ValueError("model must have a trainable parameter, got none with requires_grad=True")
    if adapt == "all":
        return names
    patterns = [adapt] if isinstance(adapt, str) else list(adapt)
    if not patterns:
        raise ValueError("adapt must name at least one parameter, got an empty list")
    known = names_of(model)
    frozen = [name for name, leaf in model.named_parameters() if not leaf.requires_grad]
    adapted: set[str] = set()
    for pattern in patterns:
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched and any(fnmatchcase(name, pattern) for name in frozen):
            raise ValueError(
                f"adapt must match trainable parameters, {pattern!r} matches frozen ones only: "
                "set requires_grad_(True) on them"
            )
        if not matched:
            raise ValueError(
                f"adapt must be 'all', 'head' or patterns of parameter names, {pattern!r} matches "
                f"none of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            )
        for name in matched:
            adapted.update(known[name])
    return [name for name in names if name in adapted]


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    hits = outputs.argmax(CLASS_AXIS) == targets
    counted = targets != IGNORED
    return (hits & counted).double().sum() / counted.sum()


def _inputs(batch: Batch) -> Tensor:
    return batch.fields("inputs", "targets")[0]


def _targets(batch: Batch) -> Tensor:
    return batch.fields("inputs", "targets")[1]


def _task(tasks: Task, b: int) -> Task:
    def at(batch: Batch) -> Batch:
        return batch.map(lambda tensor: tensor[b])._replace(index=batch.index[b])

    return Task(at(tasks.support), at(tasks.query), cast(Tensor, tasks.id)[b])


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, TaskBatchNorm | nn.modules.batchnorm._BatchNorm)


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    # torch.backends.mkldnn.flags also sets what warns where there is no Intel GPU.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
