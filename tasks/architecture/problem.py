"""Architecture search as a bilevel problem.

min_x  CE(x, y; validation)   s.t.  y = argmin  CE(x, y; training) + decay/2 |y|^2
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.checks.values import check
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.architecture.genotype import Genotype
from metadist.tasks.architecture.supernet import OUTER, Supernet
from metadist.tasks.network import call, trainable, without_parameters
from metadist.trees import Params, dot


class ArchitectureSearch(Problem):
    """The choice of operations in the cells of a network: x are its logits, y its weights.

        data = ImageData("fashion_mnist", num_train=2000, num_val=2000)
        problem = ArchitectureSearch(Supernet(channels=8, cells="NRN", nodes=2))
        trainer = Trainer(problem, data, MEHA(...), batch_size=64)
        trainer.fit(1500)
        accuracy = retrain(problem.genotype(trainer.outer), data)

    Examples are (image, label). Batch norm goes by the statistics of each batch, in reports too.
    The cells are written beside each evaluation, as JSON and, with matplotlib, as a drawing.

    Args:
        supernet: The network; None: `Supernet()`.
        weight_decay: Adds weight_decay / 2 * |y|^2 to the inner loss, >= 0.

    Source: Liu, Simonyan, Yang, DARTS (ICLR 2019).
    Differs from it in: the stem has stride 2 by default, for speed.
    """

    def __init__(self, supernet: Supernet | None = None, weight_decay: float = 3e-4) -> None:
        check("weight_decay", weight_decay, ge=0)
        supernet = Supernet() if supernet is None else supernet
        self.weight_decay = weight_decay
        start = trainable(supernet)
        self._shape = start[OUTER[0]].shape
        self._start = {name: leaf for name, leaf in start.items() if name not in OUTER}
        self._supernet = without_parameters(supernet)

    def init_outer(self, generator: torch.Generator) -> Params:
        return {name: 1e-3 * torch.randn(self._shape, generator=generator) for name in OUTER}

    def init_inner(self, outer: Params, task: Task) -> Params:
        like = outer[OUTER[0]]
        return {name: leaf.to(like) for name, leaf in self._start.items()}

    def logits(self, context: Params, inner: Params, images: Tensor) -> Tensor:
        """The outputs of the supernet, shape (images, classes)."""
        return call(self._supernet, {**inner, **context}, images)

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.outer_loss(context, inner, batch) + self.weight_decay / 2 * dot(inner, inner)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        images, labels = batch.fields("inputs", "targets")
        return F.cross_entropy(self.logits(context, inner, images), labels)

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        return self.loss_and_metrics(context, inner, batch)[1]

    def loss_and_metrics(
        self, context: Params, inner: Params, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch.fields("inputs", "targets")
        logits = self.logits(context, inner, images)
        accuracy = (logits.argmax(-1) == labels).to(logits.dtype).mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    def genotype(self, outer: Params) -> Genotype:
        """The cells of `outer`, see `Genotype.derive`."""
        return Genotype.derive(outer)

    def artifacts(self, outer: Params, inner: Params | None) -> dict[str, bytes]:
        """The cells as `genotype.json` and, with matplotlib, as `genotype.png`."""
        genotype = self.genotype(outer)
        files = {"genotype.json": genotype.to_json().encode()}
        if importlib.util.find_spec("matplotlib") is not None:
            files["genotype.png"] = genotype.png()
        return files

    def describe(self) -> dict[str, str]:
        return {"batch_norm": "the statistics of each batch"}
