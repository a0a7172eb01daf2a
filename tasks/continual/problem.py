"""Continual learning as a bilevel problem: a network, and what it depends on the task by.

    min_x  CE of y(x) on the semantic memory   s.t.  y adapts to new and replayed examples

Shape letters: n examples, C classes, W width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import check, require_integer, require_number
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.network import call, check_model, trainable, without_parameters
from metadist.trees import Params


class ContextualNetwork(nn.Module):
    """A fully connected network whose hidden layers are modulated by an embedding of the task.

        e = embedding[task];   s, b = controller(e), each scaled to length 1
        h = relu(z) + relu(s * z + b),   z the outputs of a hidden layer before its activation

    Args:
        in_features: The size of an input.
        width: Of each hidden layer.
        num_classes: Outputs of a head.
        num_tasks: Rows of the embedding.
        embedding: The size of a row.
        depth: Hidden layers, >= 1.
        heads: 1: all tasks share the outputs; num_tasks: each task has its own.

    Source: Pham et al., Contextual Transformation Networks for Online Continual Learning (ICLR
    2021), with FiLM of Perez et al. (2018).
    """

    def __init__(
        self,
        in_features: int = 784,
        width: int = 256,
        num_classes: int = 10,
        num_tasks: int = 20,
        embedding: int = 16,
        depth: int = 2,
        heads: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("width", width),
            ("num_tasks", num_tasks),
            ("embedding", embedding),
            ("depth", depth),
        ):
            require_integer(name, value, 1)
        require_integer("num_classes", num_classes, 2)
        require_number(heads=heads)
        if heads not in (1, num_tasks):
            raise ValueError(f"heads must be 1 or num_tasks ({num_tasks}), got {heads}")
        self.num_heads, self.num_classes = heads, num_classes
        sizes = [in_features, *[width] * depth]
        layers = [nn.Linear(size, width) for size in sizes[:-1]]
        self.base = nn.ModuleList([*layers, nn.Linear(width, heads * num_classes)])
        self.embedding = nn.Embedding(num_tasks, embedding)
        self.controllers = nn.ModuleList(nn.Linear(embedding, 2 * width) for _ in range(depth))
        for controller in self.controllers.modules():
            if isinstance(controller, nn.Linear):
                nn.init.xavier_uniform_(controller.weight)
                nn.init.zeros_(controller.bias)

    def forward(self, inputs: Tensor, stages: Tensor) -> Tensor:
        """Logits (n, num_classes) of inputs (n, ...) of the tasks `stages`, int64 (n,)."""
        embedded = self.embedding(stages)
        hidden = inputs.flatten(1)
        for layer, controller in zip(self.base, self.controllers, strict=False):
            scale, shift = controller(embedded).chunk(2, -1)
            z = layer(hidden)
            modulated = F.normalize(scale, dim=-1) * z + F.normalize(shift, dim=-1)
            hidden = z.relu() + modulated.relu()
        logits: Tensor = self.base[-1](hidden)
        if self.num_heads == 1:
            return logits
        of_heads = logits.unflatten(-1, (self.num_heads, self.num_classes))
        own = stages[:, None, None].expand(-1, 1, self.num_classes)
        return of_heads.gather(1, own)[:, 0]


class ContinualLearning(Problem):
    """Continual learning from an `ImageStream`: y are the weights in `model.base`, x all others.

        g = CE on the new examples + CE on the replayed ones + distillation * D
        f = CE on the semantic memory,   both as means
        D = temperature^2 KL(softmax of targets / temperature, softmax of logits / temperature),
            a mean over the replayed examples of earlier stages

    What holds for one task alone is left to x, which is learned on what the learner has put apart.
    The targets of D are the logits that an example had when it was stored, after the step; the
    problem carries them. A step that brings nothing to replay lacks the second term and D.

        stream = PermutedImages("mnist", num_tasks=20)
        problem = ContinualLearning(ContextualNetwork(num_tasks=20))
        sgd = OuterOptimizer("sgd", lr=0.1)
        trainer = Trainer(problem, stream, ITD(inner_steps=1, inner_lr=0.1, first_order=True),
                          outer_optimizer=sgd)
        trainer.fit(stream.num_steps)

    Args:
        model: A module with a submodule `base`, called with (inputs, stages).
        distillation: The weight of D, >= 0.
        temperature: > 0.
        num_slots: The `num_slots` of the stream; needed for distillation.

    Source: Pham et al., Contextual Transformation Networks for Online Continual Learning (ICLR
    2021); an experiment of Liu et al., BOME! Bilevel Optimization Made Easy (NeurIPS 2022).
    Differs from it in: targets are those of the moment an example is stored, as in Dark Experience
    Replay (Buzzega et al., 2020), not those of the end of its stage.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        distillation: float = 0.0,
        temperature: float = 5.0,
        num_slots: int = 0,
    ) -> None:
        check("distillation", distillation, ge=0)
        check("temperature", temperature, gt=0)
        require_integer("num_slots", num_slots, 1 if distillation else 0)
        model = ContextualNetwork() if model is None else model
        check_model(model)
        self._start = trainable(model)
        if not {name.startswith("base.") for name in self._start} == {True, False}:
            raise ValueError(
                "model must have trainable parameters in a submodule `base` and others beside it, "
                f"got {', '.join(self._start)}"
            )
        self._model = without_parameters(model)
        self.distillation, self.temperature, self.num_slots = distillation, temperature, num_slots

    def init_outer(self, generator: torch.Generator) -> Params:
        """The initial values of the model; nothing is drawn."""
        return {name: leaf.clone() for name, leaf in self._start.items() if not _is_base(name)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        like = next(iter(outer.values()))
        return {name: leaf.to(like) for name, leaf in self._start.items() if _is_base(name)}

    def logits(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """The outputs of the model for a batch of the stream, shape (n, C)."""
        fields = _fields(batch)
        return call(self._model, {**context, **inner}, fields["inputs"], fields["stages"])

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        fields = _fields(batch)
        is_new = fields["is_new"]
        logits = self.logits(context, inner, batch)
        losses = F.cross_entropy(logits, fields["targets"], reduction="none")
        loss = _mean(losses, is_new) + _mean(losses, ~is_new)
        if self.distillation:
            stored = context["targets"][fields["slots"] + 1]
            loss = loss + self.distillation * self._distance(logits, stored, fields)
        return loss

    def _distance(self, logits: Tensor, stored: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """D."""
        ours = (logits / self.temperature).log_softmax(-1)
        theirs = (stored / self.temperature).log_softmax(-1)
        distances = (theirs.exp() * (theirs - ours)).sum(-1)
        is_old = ~fields["is_new"] & (fields["slots"] >= 0)
        return self.temperature**2 * _mean(distances, is_old)

    def init_carried(self, outer: Params, task: Task) -> Params:
        """The logits of each stored example; the first row is for examples that are not stored."""
        if not self.distillation:
            return {}
        like = self.init_inner(outer, task)
        num_outputs = self.logits(outer, like, task.support).shape[-1]
        size = (self.num_slots + 1, num_outputs)
        return {"targets": next(iter(outer.values())).new_zeros(size)}

    def carry(self, outer: Params, inner: Params, task: Task, carried: Params) -> Params:
        if not carried:
            return {}
        fields = _fields(task.support)
        # The first row takes what is stored nowhere and stays 0. As the last one it would be shared
        # without a word with a slot beyond `num_slots`, which is an error of the index like this.
        rows = fields["slots"].where(fields["is_new"], -1) + 1
        logits = self.logits(outer, inner, task.support)
        logits = logits * (rows > 0)[:, None]
        return {"targets": carried["targets"].index_put((rows,), logits)}

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(context, inner, batch), _fields(batch)["targets"])

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        right = self.logits(context, inner, batch).argmax(-1) == _fields(batch)["targets"]
        return {"accuracy": right.double().mean()}

    def describe(self) -> dict[str, str]:
        described = {"model": type(self._model).__name__}
        if self.distillation:
            described["distillation"] = f"{self.distillation}, temperature {self.temperature}"
        return described


def _is_base(name: str) -> bool:
    return name.startswith("base.")


FIELDS = ("inputs", "stages", "is_new", "slots", "targets")


def _fields(batch: Batch) -> Mapping[str, Tensor]:
    return dict(zip(FIELDS, batch.fields(*FIELDS), strict=True))


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen ones; 0 of none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
