"""Hyper-cleaning: a hypergradient of 5,000 weights by metadist, by hand, by other libraries."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from contest import Contest, Job
from torch import Tensor, nn

from metadist import Algorithm, Task, task_hypergradients
from metadist.algorithms import AID, BOME, ITD, SOBA
from metadist.compute import Compute
from metadist.task import Batch
from metadist.tasks import HyperCleaning

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 5000, 784, 10
STEPS, LR, DECAY = 10, 0.1, 2e-3
BATCH_SIZE = 256
BOME_ETA = 2.0
"""Large enough that the barrier acts; else the hypergradient at the start is 0."""


class Data:
    """Random inputs of the size of MNIST with labels that a linear model can learn in part."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        truth = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=draw)
        sets = []
        for _ in range(2):
            inputs = torch.randn(NUM_EXAMPLES, NUM_FEATURES, generator=draw) / 10
            noise = torch.randn(NUM_EXAMPLES, NUM_CLASSES, generator=draw)
            sets.append((inputs, (inputs @ truth + noise).argmax(1)))
        self.train, self.val = sets
        self.task = Task(Batch.of(*self.train), Batch.of(*self.val), 0)
        self.x = torch.randn(NUM_EXAMPLES, generator=draw)

    def start(self) -> list[Tensor]:
        """y: weights and biases, 0."""
        return [torch.zeros(NUM_CLASSES, NUM_FEATURES), torch.zeros(NUM_CLASSES)]

    def inner_loss(self, x: Tensor, y: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """g, on all training examples or on `rows`."""
        inputs, labels = self.train
        if rows is not None:
            inputs, labels, x = inputs[rows], labels[rows], x[rows]
        losses = F.cross_entropy(F.linear(inputs, *y), labels, reduction="none")
        decay = y[0].square().sum() + y[1].square().sum()
        return (torch.sigmoid(x) * losses).mean() + DECAY / 2 * decay

    def outer_loss(self, y: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """f."""
        inputs, labels = self.val
        if rows is not None:
            inputs, labels = inputs[rows], labels[rows]
        return F.cross_entropy(F.linear(inputs, *y), labels)


def by_metadist(
    data: Data, algorithm: Algorithm, batch_size: int | None = None, moves: int = 1
) -> Job:
    """One call on one task; with two moves the second one, from the state that the first left."""
    problem = HyperCleaning(num_examples=NUM_EXAMPLES, weight_decay=DECAY)
    outer = {name: data.x.clone() for name in problem.init_outer(torch.Generator())}
    call = partial(
        task_hypergradients,
        problem,
        algorithm,
        outer,
        [data.task],
        compute=Compute(batch_size=batch_size),
    )
    states = call(states={}).states if moves > 1 else None

    def job() -> Tensor:
        (gradient,) = call(states=states).total.values()
        return gradient

    return job


def descend(data: Data, x: Tensor) -> list[Tensor]:
    """STEPS steps on g from 0."""
    y = data.start()
    for _ in range(STEPS):
        y = [p.requires_grad_() for p in y]
        g_y = torch.autograd.grad(data.inner_loss(x, y), y)
        y = [(p - LR * g).detach() for p, g in zip(y, g_y, strict=True)]
    return y


def by_hand_implicit(data: Data, solve: Callable[..., list[Tensor]]) -> Job:
    """Plain torch: descend, solve H v = f_y with one kept graph, -J v."""

    def job() -> Tensor:
        x = data.x.clone().requires_grad_()
        y = [p.requires_grad_() for p in descend(data, data.x)]
        f_y = torch.autograd.grad(data.outer_loss(y), y)
        g_y = torch.autograd.grad(data.inner_loss(x, y), y, create_graph=True)
        v = solve(lambda p: torch.autograd.grad(g_y, y, p, retain_graph=True), f_y)
        return -torch.autograd.grad(g_y, x, v)[0]

    return job


def conjugate_gradients(product: Callable[..., Any], b: Sequence[Tensor]) -> list[Tensor]:
    """STEPS products."""
    v = [torch.zeros_like(leaf) for leaf in b]
    r = list(b)
    p = list(b)
    squared = sum(leaf.square().sum() for leaf in r)
    for _ in range(STEPS):
        h_p = product(p)
        alpha = squared / sum((a * c).sum() for a, c in zip(p, h_p, strict=True))
        v = [a + alpha * c for a, c in zip(v, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, h_p, strict=True)]
        before, squared = squared, sum(leaf.square().sum() for leaf in r)
        p = [a + squared / before * c for a, c in zip(r, p, strict=True)]
    return v


def neumann_series(product: Callable[..., Any], b: Sequence[Tensor]) -> list[Tensor]:
    """STEPS products."""
    p = list(b)
    total = list(b)
    for _ in range(STEPS):
        p = [a - LR * c for a, c in zip(p, product(p), strict=True)]
        total = [a + c for a, c in zip(total, p, strict=True)]
    return [LR * leaf for leaf in total]


def by_hand_unrolled(data: Data) -> Job:
    """Plain torch: backward through all steps."""

    def job() -> Tensor:
        x = data.x.clone().requires_grad_()
        y = [p.requires_grad_() for p in data.start()]
        for _ in range(STEPS):
            g_y = torch.autograd.grad(data.inner_loss(x, y), y, create_graph=True)
            y = [p - LR * g for p, g in zip(y, g_y, strict=True)]
        return torch.autograd.grad(data.outer_loss(y), x)[0]

    return job


def by_hand_soba(data: Data, batch_size: int | None) -> Job:
    """Plain torch: the second move of y, v and x at once."""
    draw = torch.Generator().manual_seed(0)

    def rows() -> Tensor | None:
        if batch_size is None:
            return None
        return torch.randint(NUM_EXAMPLES, (batch_size,), generator=draw)

    def move(y: list[Tensor], v: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = data.x.clone().requires_grad_()
        y = [p.requires_grad_() for p in y]
        g_y = torch.autograd.grad(data.inner_loss(x, y, rows()), y, create_graph=True)
        j_v, *h_v = torch.autograd.grad(g_y, [x, *y], v)
        f_y = torch.autograd.grad(data.outer_loss(y, rows()), y)
        y = [(p - LR * g).detach() for p, g in zip(y, g_y, strict=True)]
        v = [p - LR * (h - f) for p, h, f in zip(v, h_v, f_y, strict=True)]
        return -j_v, y, v

    _, y, v = move(data.start(), [torch.zeros_like(p) for p in data.start()])
    return lambda: move(y, v)[0]


def by_hand_bome(data: Data) -> Job:
    """Plain torch: the barrier method, y from 0."""

    def job() -> Tensor:
        x = data.x.clone().requires_grad_()
        y_t = descend(data, data.x)
        y = [p.requires_grad_() for p in data.start()]
        f_y = torch.autograd.grad(data.outer_loss(y), y)
        q_x, *q_y = torch.autograd.grad(data.inner_loss(x, y), [x, *y])
        q_x = q_x - torch.autograd.grad(data.inner_loss(x, y_t), x)[0]
        squared = q_x.square().sum() + sum(leaf.square().sum() for leaf in q_y)
        along = sum((a * c).sum() for a, c in zip(f_y, q_y, strict=True))
        lam = torch.clamp((BOME_ETA * squared - along) / (squared + 1e-8), min=0)
        [p - 0.1 * (a + lam * c) for p, a, c in zip(y, f_y, q_y, strict=True)]
        return lam * q_x

    return job


def by_betty(data: Data, method: str) -> Job:
    """Betty's implicit gradient at the same y; its engine around it is left out."""
    from betty.hypergradient.cg import cg
    from betty.hypergradient.neumann import neumann

    config = SimpleNamespace(
        cg_iterations=STEPS, cg_alpha=1.0, neumann_iterations=STEPS, neumann_alpha=LR
    )

    def job() -> Tensor:
        x = data.x.clone().requires_grad_()
        y = [p.requires_grad_() for p in descend(data, data.x)]
        lower = SimpleNamespace(
            paths=[],
            config=config,
            cur_batch=None,
            training_step_exec=lambda batch: data.inner_loss(x, y),
            trainable_parameters=lambda: y,
            parameters=lambda: y,
        )
        upper = SimpleNamespace(trainable_parameters=lambda: [x])
        f_y = torch.autograd.grad(data.outer_loss(y), y)
        (gradient,) = {"cg": cg, "neumann": neumann}[method](f_y, lower, upper)
        return gradient

    return job


class Weights(nn.Module):
    """The upper model of BOAT: x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())


def boat_inner_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    """g in BOAT's form."""
    y = list(lower.parameters()) if params is None else list(params)
    return feed["data"].inner_loss(upper.x, y)


def boat_outer_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    """f in BOAT's form."""
    y = list(lower.parameters()) if params is None else list(params)
    return feed["data"].outer_loss(y)


def by_boat(data: Data, operator: str) -> Job:
    """BOAT with naive gradient descent and one of its operators: CG, NS or RAD."""
    import boat_torch as boat

    sys.modules.setdefault("cleaning", sys.modules[__name__])
    upper = Weights(data.x)
    lower = nn.Linear(NUM_FEATURES, NUM_CLASSES)
    for p in lower.parameters():
        nn.init.zeros_(p)
    config = {
        "fo_op": None, "gm_op": ["NGD"], "na_op": [operator],
        "lower_level_model": lower, "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()), "upper_level_var": list(upper.parameters()),
        "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=LR),
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=1.0),
        "lower_iters": STEPS, "device": "cpu", "loss_log_path": os.devnull,
        "accumulate_grad": False, "copy_last_param": False, "return_grad": True,
        "CG": {"tolerance": 0.0, "k": STEPS},
        "NS": {"tolerance": 0.0, "k": STEPS},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
        "RGT": {"truncate_iter": 0}, "DI": {"lr": 0.0}, "FD": {"r": 1e-2},
        "PTT": {"truncate_max_loss_iter": False},
    }  # fmt: skip
    losses = {
        "lower_level_loss": {"function": "cleaning.boat_inner_loss", "params": {}},
        "upper_level_loss": {"function": "cleaning.boat_outer_loss", "params": {}},
    }
    problem = boat.Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()
    feed = {"data": data}

    def job() -> Tensor:
        upper.zero_grad()
        problem.run_iter(feed, feed, 0)
        (gradient,) = [p.grad for p in upper.parameters() if p.grad is not None]
        return gradient.clone()

    return job


def by_jax(data: Data, method: str) -> Job:
    """JAX, compiled: AID with conjugate gradients, or unrolled."""
    import jax
    import jax.numpy as jnp

    train_x, train_y = (jnp.asarray(t.numpy()) for t in data.train)
    val_x, val_y = (jnp.asarray(t.numpy()) for t in data.val)
    outer = jnp.asarray(data.x.numpy())

    def losses(y: Any, inputs: Any, labels: Any) -> Any:
        logits = jax.nn.log_softmax(inputs @ y[0].T + y[1])
        return -jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]

    def g(x: Any, y: Any) -> Any:
        decay = (y[0] ** 2).sum() + (y[1] ** 2).sum()
        return (jax.nn.sigmoid(x) * losses(y, train_x, train_y)).mean() + DECAY / 2 * decay

    def f(y: Any) -> Any:
        return losses(y, val_x, val_y).mean()

    start = (jnp.zeros((NUM_CLASSES, NUM_FEATURES)), jnp.zeros(NUM_CLASSES))
    g_y = jax.grad(g, argnums=1)

    def adapted(x: Any) -> Any:
        y = start
        for _ in range(STEPS):
            y = jax.tree.map(lambda p, d: p - LR * d, y, g_y(x, y))
        return y

    def implicit(x: Any) -> Any:
        y = jax.lax.stop_gradient(adapted(x))
        product = jax.linearize(lambda p: g_y(x, p), y)[1]
        v, _ = jax.scipy.sparse.linalg.cg(product, jax.grad(f)(y), maxiter=STEPS, tol=0.0)
        return -jax.vjp(lambda p: g_y(p, y), x)[1](v)[0]

    chosen = {"cg": implicit, "unrolled": jax.grad(lambda x: f(adapted(x)))}[method]
    compiled = jax.jit(chosen)
    return lambda: torch.from_numpy(np.array(compiled(outer)))


def implicit_contest(solver: Literal["cg", "neumann"]) -> Contest:
    """AID with one of its solvers."""
    data = Data()
    fields: dict[str, Any] = {"adjoint_lr": LR} if solver == "neumann" else {}
    solve = {"cg": conjugate_gradients, "neumann": neumann_series}[solver]
    algorithm = AID(
        inner_steps=STEPS, inner_lr=LR, solver=solver, adjoint_steps=STEPS, tolerance=0.0, **fields
    )
    ways: dict[str, Callable[[], Job]] = {
        "metadist": lambda: by_metadist(data, algorithm),
        "by hand": lambda: by_hand_implicit(data, solve),
        "Betty": lambda: by_betty(data, solver),
        "BOAT": lambda: by_boat(data, {"cg": "CG", "neumann": "NS"}[solver]),
    }
    if solver == "cg":
        ways["JAX, jit"] = lambda: by_jax(data, "cg")
    return Contest(
        title=f"AID, {solver}, {STEPS} + {STEPS}, {SIZE}",
        baseline="by hand",
        ways=ways,
        with_memory=True,
    )


def unrolled_contest() -> Contest:
    """ITD."""
    data = Data()
    ways: dict[str, Callable[[], Job]] = {
        "metadist": lambda: by_metadist(data, ITD(inner_steps=STEPS, inner_lr=LR)),
        "by hand": lambda: by_hand_unrolled(data),
        "BOAT": lambda: by_boat(data, "RAD"),
        "JAX, jit": lambda: by_jax(data, "unrolled"),
    }
    engines: tuple[Literal["adjoint", "unrolled", "higher"], ...] = (
        "adjoint",
        "unrolled",
        "higher",
    )
    for engine in engines:
        algorithm = ITD(inner_steps=STEPS, inner_lr=LR, engine=engine)
        ways[f"metadist, engine {engine}"] = partial(by_metadist, data, algorithm)
    return Contest(
        title=f"ITD, {STEPS} steps, {SIZE}", baseline="by hand", ways=ways, with_memory=True
    )


def soba_contest(batch_size: int | None) -> Contest:
    """SOBA: the second move of y, v and x; v is 0 at the first."""
    data = Data()
    what = "whole sets" if batch_size is None else f"batches of {batch_size}"
    algorithm = SOBA(inner_steps=1, inner_lr=LR, adjoint_lr=LR)
    return Contest(
        title=f"SOBA, {what}, {SIZE}",
        baseline="by hand",
        ways={
            "metadist": lambda: by_metadist(data, algorithm, batch_size, moves=2),
            "by hand": lambda: by_hand_soba(data, batch_size),
        },
        tolerance=1e-3 if batch_size is None else math.inf,  # other draws
    )


def bome_contest() -> Contest:
    """BOME."""
    data = Data()
    return Contest(
        title=f"BOME, {STEPS} steps, {SIZE}",
        baseline="by hand",
        ways={
            "metadist": lambda: by_metadist(
                data, BOME(inner_steps=STEPS, inner_lr=LR, eta=BOME_ETA)
            ),
            "by hand": lambda: by_hand_bome(data),
        },
    )


SIZE = f"hyper-cleaning {NUM_FEATURES} x {NUM_CLASSES}, {NUM_EXAMPLES} + {NUM_EXAMPLES}"
CONTESTS: dict[str, Callable[[], Contest]] = {
    "aid-cg": lambda: implicit_contest("cg"),
    "aid-neumann": lambda: implicit_contest("neumann"),
    "itd": unrolled_contest,
    "soba": lambda: soba_contest(None),
    "soba-batch": lambda: soba_contest(BATCH_SIZE),
    "bome": bome_contest,
}
