"""`OuterOptimizer`: the optimiser of the outer variable and the schedule of its learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from metadist.checks.values import check, check_fields, rule

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
SCHEDULES = ("constant", "linear", "cosine", "power", "piecewise")


@dataclass(frozen=True)
class OuterOptimizer:
    """How the outer variable is stepped: a `torch.optim` optimiser by name, clipping, a schedule.

    The optimiser acts on x as one flat vector, which is the same for every optimiser that acts
    element by element.

    Args:
        name: One of `OPTIMIZERS`.
        lr: The outer learning rate, > 0.
        options: Further arguments of that torch.optim class, e.g. {"weight_decay": 1e-4}. Adam and
            AdamW use torch's fused kernels, several times faster than its loop, which has other
            roundings and is used with {"fused": False}.
        clip_norm: The hypergradient is scaled down to this Euclidean norm; None: never.
        clip_value: Each element of the hypergradient is clamped to [-clip_value, clip_value], after
            `clip_norm`; None: none is.
        schedule: The learning rate is "constant"; falls to 0 over `schedule_steps` outer steps
            as "linear" or "cosine"; is "power", lr * (k+1)^-schedule_power at outer step k; or
            "piecewise", constant between the steps in `schedule_factors`.
        schedule_steps: The length of "linear" and "cosine", which need it.
        schedule_power: The exponent of "power", in (0, 1].
        schedule_factors: Of "piecewise": {100: 0.1, 200: 0.01} is lr * 0.1 from outer step 100 on,
            and lr * 0.01 from 200 on.
        warmup_steps: Outer steps of linear growth of the rate from lr / warmup_steps.
    """

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = rule(
        "adam", one_of=tuple(OPTIMIZERS)
    )
    lr: float = rule(1e-3, gt=0)
    options: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = rule(None, gt=0, none="for no clipping")
    clip_value: float | None = rule(None, gt=0, none="for no clipping")
    schedule: Literal["constant", "linear", "cosine", "power", "piecewise"] = rule(
        "constant", one_of=SCHEDULES
    )
    schedule_steps: int | None = rule(None, ge=1, none="")
    schedule_power: float = rule(0.5, gt=0, le=1)
    schedule_factors: dict[int, float] = field(default_factory=dict)
    warmup_steps: int = rule(0, ge=0)

    def __post_init__(self) -> None:
        check_fields(self)
        has_length = self.schedule in ("linear", "cosine")
        if has_length != (self.schedule_steps is not None):
            expected = ">= 1" if has_length else "None"
            raise ValueError(
                f"schedule_steps must be {expected} with schedule={self.schedule!r}, got "
                f"{self.schedule_steps}: it is the length of 'linear' and 'cosine'"
            )
        if self.schedule != "power" and self.schedule_power != type(self).schedule_power:
            raise ValueError(
                f"schedule_power must be left out with schedule={self.schedule!r}, got "
                f"{self.schedule_power}: it is the exponent of 'power'"
            )
        if bool(self.schedule_factors) != (self.schedule == "piecewise"):
            raise ValueError(
                "schedule_factors must be given with schedule='piecewise', and with no other, got "
                f"{self.schedule_factors} and {self.schedule!r}: for example {{100: 0.1}}"
            )
        for step, factor in self.schedule_factors.items():
            check("a step of schedule_factors", step, is_integer=True, ge=1)
            check(f"schedule_factors[{step}]", factor, gt=0)
        known = set(inspect.signature(OPTIMIZERS[self.name]).parameters) - {"params", "lr"}
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"options of {self.name} must be among {sorted(known)}, got {option!r}"
                )

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that a reader of a result needs: those that have not their defaults."""
        usual = vars(OuterOptimizer())
        found: dict[str, str | int | float] = {
            "outer optimizer": self.name,
            "outer lr": self.lr,
        }
        for name, value in vars(self).items():
            if name not in ("name", "lr") and value != usual[name]:
                found[f"outer {name}"] = value if isinstance(value, int | float) else str(value)
        return found

    def make(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimiser of `params`."""
        options = dict(self.options)
        if self.name in ("adam", "adamw") and not options.keys() & _INSTEAD_OF_FUSED:
            options["fused"] = True
        return OPTIMIZERS[self.name](params, lr=self.lr, **options)

    def lr_at(self, version: int) -> float:
        """The learning rate of the step from `version` to `version + 1`."""
        warmup = min(1.0, (version + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.lr * warmup
        if self.schedule == "power":
            return self.lr * warmup * (version + 1) ** -self.schedule_power
        if self.schedule == "piecewise":
            begun = [step for step in self.schedule_factors if step <= version]
            factor = self.schedule_factors[max(begun)] if begun else 1.0
            return self.lr * warmup * factor
        progress = min(1.0, version / (self.schedule_steps or 1))
        decay = (
            1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )
        return self.lr * warmup * decay


_INSTEAD_OF_FUSED = {"fused", "foreach", "capturable", "differentiable"}
