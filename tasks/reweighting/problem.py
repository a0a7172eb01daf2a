"""Classification whose training examples are weighted by the outer variable.

    min_x  mean over validation of CE(y)   s.t.  y = argmin  mean_i w_i CE_i(y) + decay/2 |y|^2

The problems differ in what the weights w depend on. Every loss is a mean over examples (plus the
decay), so data may be cut into shards.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import check, require_integer
from metadist.layers.linear import Linear
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.network import call, check_model, plain_module, trainable, without_parameters
from metadist.trees import Params, dot


class LinearClassifier(nn.Module):
    """Multinomial logistic regression on flattened inputs, from weights 0.

    Args:
        in_features: The size of an input.
        out_features: The number of classes.
    """

    def __init__(self, in_features: int = 784, out_features: int = 10) -> None:
        super().__init__()
        require_integer("in_features", in_features, 1)
        require_integer("out_features", out_features, 1)
        self.in_features, self.out_features = in_features, out_features
        self.head: nn.Linear = Linear(in_features, out_features)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (R, out_features), of inputs of shape (R, ...)."""
        logits: Tensor = self.head(x.flatten(1))
        return logits


class ExampleWeighting(Problem):
    """The base of problems that weight examples: the model y, both losses, the accuracy.

    Examples are (input, label). Adaptation starts from the initial weights of the model.

    Args:
        model: None: `LinearClassifier()`. With batch norm the loss is no mean over examples, and
            shards would matter.
        weight_decay: Adds weight_decay / 2 * |y|^2 to the inner loss, >= 0; implicit methods need
            it.
    """

    def __init__(self, model: nn.Module | None = None, weight_decay: float = 1e-3) -> None:
        check("weight_decay", weight_decay, ge=0)
        model = LinearClassifier() if model is None else model
        check_model(model)
        self.weight_decay = weight_decay
        self._start = trainable(model)
        self._model = without_parameters(model)

    @abstractmethod
    def weights(self, context: Params, losses: Tensor, batch: Batch) -> Tensor:
        """w >= 0 of the support examples of `batch`, whose `losses` are given; (examples,)."""

    def example_weights(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """w of the support examples of `batch` at y, shape (examples,)."""
        return self.weights(context, self.losses(inner, batch), batch)

    def weighted(self, context: Params, losses: Tensor, batch: Batch) -> Tensor:
        """The term of each example in the inner loss: a function with derivative w in `losses`."""
        return self.weights(context, losses, batch) * losses

    def init_inner(self, outer: Params, task: Task) -> Params:
        like = next(iter(outer.values()))
        return {name: leaf.to(like) for name, leaf in self._start.items()}

    def logits(self, inner: Params, inputs: Tensor) -> Tensor:
        """The outputs of the model for `inputs`, shape (examples, classes)."""
        return call(self._model, inner, inputs)

    def predict(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """The model's outputs on `batch`, shape (examples, classes)."""
        return self.logits(inner, batch.fields("inputs", "targets")[0])

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        """The model with the weights `inner`, see `metadist.export`."""
        return plain_module(self._model, inner, task.support.fields("inputs", "targets")[0])

    def losses(self, inner: Params, batch: Batch) -> Tensor:
        """The cross entropy of each example, shape (examples,)."""
        inputs, labels = batch.fields("inputs", "targets")
        if labels.ndim != 1:
            raise ValueError(
                f"targets must be one class for each example, shape ({len(labels)},), got "
                f"{tuple(labels.shape)}: a weight belongs to a whole example"
            )
        # As `F.cross_entropy`, along columns: they have room for vectors where rows are of few
        # classes, and in this layout the products of second order are faster, too.
        log_probabilities = F.log_softmax(self.logits(inner, inputs).mT, 0).mT
        return F.nll_loss(log_probabilities, labels, reduction="none")

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        weighted = self.weighted(context, self.losses(inner, batch), batch)
        return weighted.mean() + self.weight_decay / 2 * dot(inner, inner)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.losses(inner, batch).mean()

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        inputs, labels = batch.fields("inputs", "targets")
        return {"accuracy": (self.logits(inner, inputs).argmax(-1) == labels).double().mean()}

    def describe(self) -> dict[str, str]:
        return {"model": type(self._model).__name__, "weight_decay": str(self.weight_decay)}


class HyperCleaning(ExampleWeighting):
    """Data hyper-cleaning: a weight for each training example, some of which are wrongly labelled.

        w_i = sigmoid(x_i),   x has one entry for each example

    Training labels may be wrong, validation labels are right; an example is suspected of a wrong
    label where w_i < 1/2.

        data = CorruptedImages("mnist", num_train=5000, num_val=5000, corruption=0.5)
        problem = HyperCleaning(num_examples=5000)
        sgd = OuterOptimizer("sgd", lr=100.0)
        trainer = Trainer(problem, data, LancBiO(inner_steps=5, inner_lr=0.1),
                          outer_optimizer=sgd)
        trainer.fit(1000)
        data.solution_metrics(problem, trainer.outer, trainer.inner(0))

    A hypergradient has the scale 1 / num_examples, so outer rates are large.

    Args:
        num_examples: The number of support examples.
        model, weight_decay: See `ExampleWeighting`; 0.002 is the .001 |y|^2 of stocBiO's code.
        initial_logit: The value of every x_i at the start.

    Source: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization
    (2017), section 5.1, with the sigmoid of Ji et al. (stocBiO, 2021).
    """

    def __init__(
        self,
        num_examples: int = 5000,
        model: nn.Module | None = None,
        weight_decay: float = 2e-3,
        initial_logit: float = 0.0,
    ) -> None:
        require_integer("num_examples", num_examples, 1)
        check("initial_logit", initial_logit)
        super().__init__(model, weight_decay)
        self.num_examples = num_examples
        self.initial_logit = initial_logit

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"logits": torch.full((self.num_examples,), float(self.initial_logit))}

    def per_example(self, outer: Params) -> set[str]:
        """Names of the outer variables that hold one entry for each support example."""
        return {"logits"}

    def weights(self, context: Params, losses: Tensor, batch: Batch) -> Tensor:
        return context["logits"][batch.index].sigmoid()

    def suspected(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """Whether the weight of each example is below 1/2."""
        return self.example_weights(context, inner, batch) < 0.5

    def artifacts(self, outer: Params, inner: Params | None) -> dict[str, bytes]:
        """`weights.csv`: the weight of each training example, in the order of the data."""
        weights = outer["logits"].sigmoid().tolist()
        lines = [f"{position},{weight:.6g}\n" for position, weight in enumerate(weights)]
        return {"weights.csv": ("position,weight\n" + "".join(lines)).encode()}

    def scores(self, outer: Params, task: Task) -> Iterator[dict[str, Any]]:
        """The weight of each training example."""
        for row, weight in enumerate(outer["logits"].sigmoid().tolist()):
            yield {"row": row, "weight": weight}


class ClassWeights(ExampleWeighting):
    """A weight for each class, for training data in which some classes are rare.

        w_i = exp(x_c),   c the label of example i

    Validation data is balanced. The same problem weights the parts of any mixture, with the number
    of the part as the label.

        data = LongTail("fashion_mnist", imbalance=100)
        trainer = Trainer(ClassWeights(num_classes=10), data, AID())

    Args:
        num_classes: >= 2.
        model, weight_decay: See `ExampleWeighting`.
    """

    def __init__(
        self, num_classes: int = 10, model: nn.Module | None = None, weight_decay: float = 1e-3
    ) -> None:
        require_integer("num_classes", num_classes, 2)
        super().__init__(model, weight_decay)
        self.num_classes = num_classes

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"log_weights": torch.zeros(self.num_classes)}

    def weights(self, context: Params, losses: Tensor, batch: Batch) -> Tensor:
        return context["log_weights"].exp()[batch.fields("inputs", "targets")[1]]


class LossWeighting(ExampleWeighting):
    """Meta-Weight-Net: the weight of an example is a learned function of its loss.

        w_i = V(CE_i),   V(l) = sum_k a_k sigmoid(b_k (l - t_k)),   a = softmax of x["mixture"],
        g = mean_i of the integral of V from 0 to CE_i, so that  grad_y g = mean_i w_i grad CE_i

    It learns to take large losses less seriously where labels are wrong, and more seriously where
    classes are rare, and does so with a few dozen parameters for data of any size. Half of the
    slopes b are positive, half negative.

        data = CorruptedImages("fashion_mnist")
        trainer = Trainer(LossWeighting(), data, ITD(inner_steps=5, inner_lr=0.1), batch_size=100)

    Args:
        num_sigmoids: k, >= 2.
        model, weight_decay: See `ExampleWeighting`.

    Source: Shu et al., Meta-Weight-Net (NeurIPS 2019).
    Differs from it in: V is a mixture of sigmoids, whose integral is known, and not a small MLP. So
    their inner gradient, which holds weights constant, is the gradient of an inner loss.
    """

    def __init__(
        self, num_sigmoids: int = 16, model: nn.Module | None = None, weight_decay: float = 1e-3
    ) -> None:
        require_integer("num_sigmoids", num_sigmoids, 2)
        super().__init__(model, weight_decay)
        self.num_sigmoids = num_sigmoids

    def init_outer(self, generator: torch.Generator) -> Params:
        size = self.num_sigmoids
        return {
            "mixture": torch.zeros(size),
            "log_slopes": torch.randn(size, generator=generator) / 2,
            "thresholds": 4 * torch.rand(size, generator=generator),  # where cross entropies are
        }

    def _slopes(self, context: Params) -> Tensor:
        sizes = context["log_slopes"].exp()
        rising = torch.arange(len(sizes), device=sizes.device) % 2 == 1
        return torch.where(rising, sizes, -sizes)

    def weights(self, context: Params, losses: Tensor, batch: Batch) -> Tensor:
        shifted = losses[:, None] - context["thresholds"]
        return (self._slopes(context) * shifted).sigmoid() @ context["mixture"].softmax(0)

    def suspected(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """Whether the weight of each example is below 1/2."""
        return self.example_weights(context, inner, batch) < 0.5

    def weighted(self, context: Params, losses: Tensor, batch: Batch) -> Tensor:
        slopes, thresholds = self._slopes(context), context["thresholds"]
        upper = F.softplus(slopes * (losses[:, None] - thresholds))
        lower = F.softplus(-slopes * thresholds)
        return ((upper - lower) / slopes) @ context["mixture"].softmax(0)
