"""`StepRule`: how the inner variable moves along a direction, as a pure function.

`SGD`, `Adam` and `AdamW` make the steps of the classes of torch.optim that bear their names. A
method applies them to whatever moves its y, and differentiates through them where its theory does:
a step takes y, what the rule remembers and a gradient, and gives y and what it remembers next.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metadist.checks.values import check_fields, is_number, rule
from metadist.followed import call
from metadist.trees import Params, add, dot, multiply, scale, sub, tree_map, zeros_like

Means = tuple[Params, ...]


class Memory(NamedTuple):
    """What a rule remembers of `num_steps` steps: running means, each shaped like y."""

    means: Means
    num_steps: int


class Pulled(NamedTuple):
    """The derivatives of a step, as of `StepRule.pull`: with respect to y, means and gradient."""

    y: Params
    means: Means
    gradient: Params


CLIP_EPSILON = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to a norm before it divides by it."""


@dataclass(frozen=True)
class StepRule(ABC):
    """A base for the rules.

    The schedule goes by the outer step: all inner steps of one outer step have the same rate.
    Evaluation has no outer step and adapts with `lr` itself, whatever warm-up and schedule are.

    Args:
        lr: The rate, > 0.
        weight_decay: >= 0. It is added to the gradient, as weight_decay * y, by SGD and Adam, and
            shrinks y by the factor 1 - lr * weight_decay in AdamW.
        no_decay: Names of inner tensors without weight decay, such as "*.bias"; `*`, `?` and `[]`
            are those of file names. A pattern must match a name.
        clip_norm: Gradients are scaled down to this Euclidean norm, over all tensors of a task;
            None: never. As in torch.nn.utils.clip_grad_norm_, before weight decay is added.
        schedule: The rate is "constant", or at outer step k lr times (k+1)^-exponent ("power"), or
            it falls to floor * lr over `num_steps` outer steps ("linear", "cosine").
        exponent: That of "power", in (0, 1].
        num_steps: The length of "linear" and "cosine", which need it.
        floor: The smallest rate of a schedule over lr, in [0, 1]; "power" stops there.
        warmup_steps: Outer steps of linear growth of the rate, from lr / warmup_steps.
        carry: Velocity or moments continue from one outer step to the next, as part of a kept
            state; otherwise every inner loop starts anew. Evaluation starts anew.
    """

    lr: float = rule(0.1, gt=0)
    weight_decay: float = rule(0.0, ge=0)
    no_decay: tuple[str, ...] = ()
    clip_norm: float | None = rule(None, gt=0, none="for no clipping")
    schedule: Literal["constant", "power", "cosine", "linear"] = rule(
        "constant", one_of=("constant", "power", "cosine", "linear")
    )
    exponent: float = rule(0.5, gt=0, le=1)
    num_steps: int | None = rule(None, ge=1, none="")
    floor: float = rule(0.0, ge=0, le=1)
    warmup_steps: int = rule(0, ge=0)
    carry: bool = False

    def __post_init__(self) -> None:
        given: object = self.no_decay
        if isinstance(given, str):
            raise ValueError(
                f"no_decay must be a list of patterns, got {given!r}: write ({given!r},)"
            )
        if not isinstance(given, list | tuple) or not all(isinstance(p, str) for p in given):
            raise ValueError(f"no_decay must be a list of patterns, got {given!r}")
        object.__setattr__(self, "no_decay", tuple(given))
        check_fields(self)
        if self.no_decay and not self.weight_decay:
            raise ValueError(
                f"no_decay must be empty with weight_decay=0, which shrinks nothing, got "
                f"{self.no_decay}"
            )
        has_length = self.schedule in ("linear", "cosine")
        if has_length != (self.num_steps is not None):
            expected = ">= 1" if has_length else "None"
            raise ValueError(
                f"num_steps must be {expected} with schedule={self.schedule!r}, got "
                f"{self.num_steps}: it is the length of 'linear' and 'cosine'"
            )
        if self.schedule != "power" and self.exponent != StepRule.exponent:
            raise ValueError(
                f"exponent must be left out with schedule={self.schedule!r}, got {self.exponent}: "
                "it is that of 'power'"
            )
        if self.schedule == "constant" and self.floor:
            raise ValueError(
                f"floor must be 0 with schedule='constant', which does not fall, got {self.floor}"
            )
        if self.carry and not self.first_step:
            raise ValueError(
                "carry must be False with momentum=0, got True: plain SGD remembers nothing"
            )

    @property
    @abstractmethod
    def first_step(self) -> str:
        """Why one step from nothing remembered is not worth making; empty: it is."""

    @property
    @abstractmethod
    def num_means(self) -> int:
        """How many running means the rule keeps."""

    @property
    def is_linear(self) -> bool:
        """Whether a step is linear in y, means and gradient: `pull` then looks at none of them."""
        return False

    def lr_at(self, step: int) -> float:
        """The rate at an outer step."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * warmup * self._decay(step)

    def _decay(self, step: int) -> float:
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "power":
            return max((step + 1) ** -self.exponent, self.floor)
        progress = min(1.0, step / (self.num_steps or 1))
        if self.schedule == "linear":
            left = 1 - progress
        else:
            left = (1 + call(math.cos, math.pi * progress)) / 2
        return self.floor + (1 - self.floor) * left

    def with_lr(self, lr: float) -> StepRule:
        """The same rule for another variable, which has a rate of its own."""
        return dataclasses.replace(self, lr=lr)

    def start(self, y: Params) -> Memory:
        """What is remembered before the first step.

        Raises:
            ValueError: A pattern of `no_decay` matches no name in y.
        """
        self._decays(y)
        return Memory(tuple(zeros_like(y) for _ in range(self.num_means)), 0)

    def step(
        self, y: Params, memory: Memory, g_y: Params, lr: float | Params
    ) -> tuple[Params, Memory]:
        """(y, memory) after one step.

        Args:
            y: The inner variable.
            memory: That of the steps before, or of `start`.
            g_y: The gradient, shaped like y.
            lr: The rate, for `SGD` also a tree of rates that broadcast to y.
        """
        return self.move(y, memory, self.gradient(y, g_y), lr)

    def gradient(self, y: Params, g_y: Params) -> Params:
        """`g_y` as the step uses it: clipped, and with the decay that is added to it."""
        if self.clip_norm is not None:
            length = _root(dot(g_y, g_y))
            factor = self.clip_norm / (length + CLIP_EPSILON)
            g_y = scale(g_y, factor.clamp(max=1.0))
        return self._with_decay(y, g_y)

    def _with_decay(self, y: Params, g_y: Params) -> Params:
        if not self.weight_decay:
            return g_y
        decays = self._decays(y)
        return {
            name: leaf + self.weight_decay * y[name] if decays[name] else leaf
            for name, leaf in g_y.items()
        }

    @abstractmethod
    def move(
        self, y: Params, memory: Memory, gradient: Params, lr: float | Params
    ) -> tuple[Params, Memory]:
        """`step` along what `gradient` gives."""

    def pull(
        self,
        y: Params,
        memory: Memory,
        g_y: Params,
        lr: float | Params,
        w: Params,
        w_means: Means,
    ) -> Pulled:
        """The derivatives of <w, y'> + <w_means, means'>, (y', means') being what `step` gives.

        They are exact; that of the root of a second moment is 0 where it is 0.
        """
        stepped = partial(self._stepped, memory, lr)
        pull = torch.func.vjp(stepped, y, memory.means, g_y)[1]
        return Pulled(*pull((w, w_means)))

    def push(
        self,
        y: Params,
        memory: Memory,
        g_y: Params,
        lr: float,
        dy: Params,
        d_means: Means,
        dg_y: Params,
    ) -> tuple[Params, Means]:
        """The derivative of (y', means') along (dy, d_means, dg_y), as `pull`."""
        stepped = partial(self._stepped, memory, lr)
        if self.is_linear:  # it moves its derivative as it moves y
            return stepped(dy, d_means, dg_y)
        at, along = (y, memory.means, g_y), (dy, d_means, dg_y)
        pushed: tuple[Params, Means] = torch.func.jvp(stepped, at, along)[1]
        return pushed

    def _stepped(
        self, memory: Memory, lr: float | Params, y: Params, means: Means, g_y: Params
    ) -> tuple[Params, Means]:
        moved, remembered = self.step(y, memory._replace(means=means), g_y, lr)
        return moved, remembered.means

    def _decays(self, y: Params) -> dict[str, bool]:
        for pattern in self.no_decay:
            if not any(fnmatchcase(name, pattern) for name in y):
                raise ValueError(
                    f"no_decay must match names of inner tensors, got {pattern!r}, which matches "
                    f"none of {', '.join(y)}"
                )
        return {name: not any(fnmatchcase(name, p) for p in self.no_decay) for name in y}


@dataclass(frozen=True)
class SGD(StepRule):
    """Gradient descent, with momentum if wanted: the steps of `torch.optim.SGD`.

        velocity <- momentum * velocity + g_y;    y <- y - lr * velocity

    Args:
        momentum: In [0, 1); without dampening.
    """

    momentum: float = rule(0.0, ge=0, lt=1)

    @property
    def first_step(self) -> str:
        if not self.momentum:
            return ""
        return "its one step has no velocity yet, so that momentum does nothing"

    @property
    def num_means(self) -> int:
        return 1 if self.momentum else 0

    @property
    def is_plain(self) -> bool:
        """Whether a step is y - lr g_y, up to the schedule of lr."""
        return not self.momentum and not self.weight_decay and self.clip_norm is None

    @property
    def is_linear(self) -> bool:
        return self.clip_norm is None

    def move(
        self, y: Params, memory: Memory, gradient: Params, lr: float | Params
    ) -> tuple[Params, Memory]:
        velocity = gradient
        if self.momentum and memory.num_steps:
            velocity = add(gradient, memory.means[0], self.momentum)
        means = (velocity,) if self.momentum else ()
        return sub(y, _times(lr, velocity)), Memory(means, memory.num_steps + 1)

    def pull(
        self,
        y: Params,
        memory: Memory,
        g_y: Params,
        lr: float | Params,
        w: Params,
        w_means: Means,
    ) -> Pulled:
        if not self.is_linear:
            return super().pull(y, memory, g_y, lr, w, w_means)
        # The gradient enters y' through the velocity only, so this is the cotangent of both.
        u = _times(scale(lr, -1.0) if isinstance(lr, dict) else -lr, w)
        if self.momentum:
            u = add(u, w_means[0])
        means = (scale(u, self.momentum if memory.num_steps else 0.0),) if self.momentum else ()
        return Pulled(self._with_decay(u, w), means, u)


@dataclass(frozen=True)
class Adam(StepRule):
    """Adam (Kingma and Ba, 2015): the steps of `torch.optim.Adam`.

        m <- b1 m + (1-b1) g;   s <- b2 s + (1-b2) g^2
        y <- y - lr m / (1-b1^t) / (sqrt(s / (1-b2^t)) + eps)

    Where all gradients so far are 0 the derivative of a step is lr / eps: set a larger eps to
    differentiate through the steps of tensors that g hardly depends on.

    Args:
        betas: Decay rates of both means, in [0, 1).
        eps: Added to the root, > 0.
    """

    lr: float = rule(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = rule(1e-8, gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.betas
        is_pair = isinstance(given, list | tuple) and len(given) == 2
        if not is_pair or not all(is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {given}")
        object.__setattr__(self, "betas", tuple(self.betas))

    @property
    def first_step(self) -> str:
        return "its one step is the sign of the gradient alone"

    @property
    def num_means(self) -> int:
        return 2

    def move(
        self, y: Params, memory: Memory, gradient: Params, lr: float | Params
    ) -> tuple[Params, Memory]:
        if isinstance(lr, dict):
            raise TypeError("lr must be a number for Adam, got a tree of rates")
        (beta1, beta2), count = self.betas, memory.num_steps + 1
        first = add(scale(memory.means[0], beta1), gradient, 1 - beta1)
        square = multiply(scale(gradient, 1 - beta2), gradient)
        second = add(scale(memory.means[1], beta2), square)
        rate, root = lr / (1 - beta1**count), call(math.sqrt, 1 - beta2**count)

        def moved(y: Tensor, m: Tensor, s: Tensor) -> Tensor:
            return y - rate * m / (_root(s) / root + self.eps)

        return tree_map(moved, y, first, second), Memory((first, second), count)

    def slope(self, memory: Memory, gradient: Params, lr: float) -> Params:
        """d update / d gradient of the step that `gradient` makes, a diagonal.

        Unlike in `pull`, eps counts as a constant beside the root: the slope is 0 where every
        gradient so far was 0.
        """
        (beta1, beta2), count = self.betas, memory.num_steps + 1
        root = call(math.sqrt, 1 - beta2**count)
        rate, epsilon = lr * root / (1 - beta1**count), self.eps * root

        def at(m: Tensor, s: Tensor, g: Tensor) -> Tensor:
            rise = (1 - beta1) * beta2 * s - beta1 * (1 - beta2) * g * m
            return rate * rise / ((beta2 * s + (1 - beta2) * g * g).sqrt() + epsilon) ** 3

        return tree_map(at, *memory.means, gradient)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): that of `torch.optim.AdamW`.

    y is multiplied by 1 - lr * weight_decay before each step of Adam.
    """

    weight_decay: float = rule(0.01, ge=0)

    def _with_decay(self, y: Params, g_y: Params) -> Params:
        return g_y

    def move(
        self, y: Params, memory: Memory, gradient: Params, lr: float | Params
    ) -> tuple[Params, Memory]:
        if self.weight_decay and not isinstance(lr, dict):
            kept, decays = 1 - lr * self.weight_decay, self._decays(y)
            y = {name: kept * leaf if decays[name] else leaf for name, leaf in y.items()}
        return super().move(y, memory, gradient, lr)


def _times(lr: float | Params, tree: Params) -> Params:
    return multiply(lr, tree) if isinstance(lr, dict) else scale(tree, lr)


def _root(square: Tensor) -> Tensor:
    """The square root, whose derivative is 0 at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
