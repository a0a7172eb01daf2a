"""MAML: the hypergradient of a meta-batch by metadist, by hand, and by other libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from contest import Contest, Job
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metadist import Task, evaluate, task_hypergradients
from metadist.algorithms import ITD
from metadist.compute import Compute
from metadist.models import MLP, Conv4
from metadist.tasks import FewShotProblem, FixedTasks, Glyphs, Sinusoid

INNER_STEPS = 5
INNER_LR = {"mse": 0.01, "cross_entropy": 0.1}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
}


SIZES = {"conv64": (64, 5), "conv32": (32, 1), "anil64": (64, 5), "anil32": (32, 5)}
"""Width and shots by the name of a setting."""


Loss = Literal["mse", "cross_entropy"]


class Setting:
    """A model and tasks; the same numbers go to every way."""

    def __init__(self, kind: str, num_tasks: int, inner_steps: int = INNER_STEPS) -> None:
        torch.manual_seed(0)
        self.inner_steps = inner_steps
        self.adapt: Any = "head" if kind.startswith("anil") else "all"
        if kind == "sinusoid":
            self.loss: Loss = "mse"
            self.model: nn.Module = MLP()
            self.plain: nn.Module = self.model
            sampler: Any = Sinusoid(k_shot=10, k_query=10)
        else:
            width, k_shot = SIZES[kind]
            self.loss = "cross_entropy"
            self.model = Conv4(width=width)
            self.plain = plain_conv4(self.model, width)
            sampler = Glyphs(n_way=5, k_shot=k_shot, k_query=15)
        self.tasks: list[Task] = [sampler.sample(index) for index in range(num_tasks)]
        self.lr = INNER_LR[self.loss]
        self.function = LOSSES[self.loss]
        self.data = [(*task.support.tensors, *task.query.tensors) for task in self.tasks]
        self.start = {name: p.detach().clone() for name, p in self.plain.named_parameters()}

    def flat(self, tree: dict[str, Tensor]) -> Tensor:
        """One vector, in the order of the model."""
        return torch.cat([tree[name].detach().flatten() for name in self.start])

    def task_loss(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of the plain model."""
        return self.function(functional_call(self.plain, params, (inputs,)), targets)


def plain_conv4(model: nn.Module, width: int) -> nn.Module:
    """The same network from torch's own layers, with the same weights."""
    blocks: list[nn.Module] = []
    for i in range(4):
        conv = nn.Conv2d(1 if i == 0 else width, width, 3, padding=1)
        norm = nn.BatchNorm2d(width, track_running_stats=False)
        blocks.append(nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2)))
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(*blocks, nn.Flatten()))
    network.add_module("head", nn.Linear(width, 5))
    network.load_state_dict(model.state_dict())
    return network


def by_metadist(setting: Setting, **options: Any) -> Job:
    """Options of ITD or, as `vectorize` and `chunk_size`, of Compute."""
    fields = ("vectorize", "chunk_size")
    compute = Compute(**{field: options.pop(field) for field in fields if field in options})
    problem = FewShotProblem(setting.model, adapt=setting.adapt, loss=setting.loss)
    outer = problem.init_outer(torch.Generator())
    algorithm = ITD(inner_steps=setting.inner_steps, inner_lr=setting.lr, **options)

    def job() -> Tensor:
        total = task_hypergradients(problem, algorithm, outer, setting.tasks, compute=compute).total
        return torch.cat([leaf.flatten() for leaf in total.values()])

    return job


def by_loop(setting: Setting) -> Job:
    """By hand: plain autograd through the unrolled steps, one task after another."""

    def job() -> Tensor:
        start = {name: p.clone().requires_grad_() for name, p in setting.start.items()}
        leaves = list(start.values())
        sums = [torch.zeros_like(p) for p in leaves]
        for inputs, targets, query_inputs, query_targets in setting.data:
            y = start
            for _ in range(setting.inner_steps):
                loss = setting.task_loss(y, inputs, targets)
                grads = torch.autograd.grad(loss, list(y.values()), create_graph=True)
                y = {name: y[name] - setting.lr * g for name, g in zip(y, grads, strict=True)}
            loss = setting.task_loss(y, query_inputs, query_targets)
            for total, g in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                total += g
        return setting.flat(dict(zip(start, sums, strict=True)))

    return job


def by_vmap(setting: Setting) -> Job:
    """By hand: torch.func over all tasks together."""
    stacked = [torch.stack(column) for column in zip(*setting.data, strict=True)]

    def adapted_loss(start: dict[str, Tensor], *task: Tensor) -> Tensor:
        inputs, targets, query_inputs, query_targets = task
        y = start
        for _ in range(setting.inner_steps):
            g = grad(setting.task_loss)(y, inputs, targets)
            y = {name: y[name] - setting.lr * g[name] for name in y}
        return setting.task_loss(y, query_inputs, query_targets)

    def total(start: dict[str, Tensor]) -> Tensor:
        return vmap(adapted_loss, (None, 0, 0, 0, 0))(start, *stacked).sum()

    return lambda: setting.flat(grad(total)(setting.start))


def by_bmm(setting: Setting) -> Job:
    """By hand, for the MLP: every layer of all tasks as one batched product."""
    columns = [torch.stack(column) for column in zip(*setting.data, strict=True)]
    inputs, targets, query_inputs, query_targets = columns
    names = list(setting.start)

    def losses(y: list[Tensor], x: Tensor, target: Tensor) -> Tensor:
        for layer in range(0, len(y), 2):
            x = torch.baddbmm(y[layer + 1][:, None], x, y[layer].transpose(1, 2))
            x = torch.relu(x) if layer < len(y) - 2 else x
        return ((x - target) ** 2).flatten(1).mean(1).sum()

    def job() -> Tensor:
        leaves = [p.clone().requires_grad_() for p in setting.start.values()]
        y = [p.expand(len(setting.tasks), *p.shape) for p in leaves]
        for _ in range(setting.inner_steps):
            grads = torch.autograd.grad(losses(y, inputs, targets), y, create_graph=True)
            y = [p - setting.lr * g for p, g in zip(y, grads, strict=True)]
        grads = torch.autograd.grad(losses(y, query_inputs, query_targets), leaves)
        return setting.flat(dict(zip(names, grads, strict=True)))

    return job


def by_higher(setting: Setting) -> Job:
    """The library `higher`."""
    import higher

    sgd = torch.optim.SGD(setting.plain.parameters(), lr=setting.lr)

    def job() -> Tensor:
        setting.plain.zero_grad()
        for inputs, targets, query_inputs, query_targets in setting.data:
            context = higher.innerloop_ctx(setting.plain, sgd, copy_initial_weights=False)
            with context as (network, steps):
                for _ in range(setting.inner_steps):
                    steps.step(setting.function(network(inputs), targets))
                setting.function(network(query_inputs), query_targets).backward()
        grads = {name: p.grad for name, p in setting.plain.named_parameters()}
        return setting.flat({name: g for name, g in grads.items() if g is not None})

    return job


def by_torchopt(setting: Setting) -> Job:
    """TorchOpt's MetaSGD."""
    import torchopt

    sgd = torchopt.MetaSGD(setting.plain, lr=setting.lr)

    def job() -> Tensor:
        setting.plain.zero_grad()
        begun = torchopt.extract_state_dict(setting.plain, by="reference")
        optimizer_begun = torchopt.extract_state_dict(sgd)
        leaves = dict(setting.plain.named_parameters())
        for inputs, targets, query_inputs, query_targets in setting.data:
            for _ in range(setting.inner_steps):
                sgd.step(setting.function(setting.plain(inputs), targets))
            setting.function(setting.plain(query_inputs), query_targets).backward()
            torchopt.recover_state_dict(setting.plain, begun)
            torchopt.recover_state_dict(sgd, optimizer_begun)
        grads = {name: p.grad for name, p in leaves.items()}
        return setting.flat({name: g for name, g in grads.items() if g is not None})

    return job


def by_learn2learn(setting: Setting) -> Job:
    """The MAML wrapper of learn2learn."""
    from learn2learn.algorithms import MAML

    wrapped = MAML(setting.plain, lr=setting.lr)

    def job() -> Tensor:
        setting.plain.zero_grad()
        for inputs, targets, query_inputs, query_targets in setting.data:
            learner = wrapped.clone()
            for _ in range(setting.inner_steps):
                learner.adapt(setting.function(learner(inputs), targets))
            setting.function(learner(query_inputs), query_targets).backward()
        grads = {name: p.grad for name, p in setting.plain.named_parameters()}
        return setting.flat({name: g for name, g in grads.items() if g is not None})

    return job


def by_jax(setting: Setting) -> Job:
    """JAX, compiled, for the MLP: the limit for small models."""
    import jax
    import jax.numpy as jnp

    stacked = [
        jnp.asarray(torch.stack(column).numpy()) for column in zip(*setting.data, strict=True)
    ]
    start = [jnp.asarray(p.numpy()) for p in setting.start.values()]

    def loss(y: list[Any], x: Any, target: Any) -> Any:
        for layer in range(0, len(y), 2):
            x = x @ y[layer].T + y[layer + 1]
            x = jax.nn.relu(x) if layer < len(y) - 2 else x
        return jnp.mean((x - target) ** 2)

    def adapted_loss(begun: list[Any], x: Any, t: Any, query_x: Any, query_t: Any) -> Any:
        y = begun
        for _ in range(setting.inner_steps):
            y = [p - setting.lr * g for p, g in zip(y, jax.grad(loss)(y, x, t), strict=True)]
        return loss(y, query_x, query_t)

    @jax.jit
    def total(begun: list[Any]) -> Any:
        each = jax.vmap(adapted_loss, (None, 0, 0, 0, 0))
        return jax.grad(lambda p: each(p, *stacked).sum())(begun)

    def job() -> Tensor:
        grads = total(start)
        return torch.cat([torch.from_numpy(np.array(g)).flatten() for g in grads])

    return job


def evaluation_contest() -> Contest:
    """A test of MAML against a plain loop of steps and two passes over the query set."""
    num_tasks = 20

    def ours() -> Job:
        setting = Setting("conv32", num_tasks)
        problem = FewShotProblem(setting.model, adapt="all")
        outer = problem.init_outer(torch.Generator())
        algorithm = ITD(inner_steps=INNER_STEPS, inner_lr=setting.lr)
        sampler = FixedTasks(setting.tasks)

        def job() -> Tensor:
            test = evaluate(problem, sampler, algorithm, outer, num_tasks, before=False)
            return torch.tensor(test.metrics["query_loss"].mean)

        return job

    def plain() -> Job:
        setting = Setting("conv32", num_tasks)

        def job() -> Tensor:
            losses = []
            for inputs, targets, query_inputs, query_targets in setting.data:
                y = setting.start
                for _ in range(INNER_STEPS):
                    y = {name: p.detach().requires_grad_() for name, p in y.items()}
                    loss = setting.task_loss(y, inputs, targets)
                    grads = torch.autograd.grad(loss, list(y.values()))
                    y = {name: y[name] - setting.lr * g for name, g in zip(y, grads, strict=True)}
                with torch.no_grad():
                    logits = functional_call(setting.plain, y, (query_inputs,))
                    losses.append(F.cross_entropy(logits, query_targets))
                    (logits.argmax(-1) == query_targets).double().mean()
            return torch.stack(losses).mean()

        return job

    return Contest(
        title=f"test of {num_tasks} tasks, MAML Conv4-32 5-way 1-shot, {INNER_STEPS} steps",
        baseline="plain loop",
        ways={"plain loop": plain, "metadist": ours},
    )


def sinusoid(num_tasks: int) -> Contest:
    """Small models, where the calls and not the arithmetic take the time."""
    setting = Setting("sinusoid", num_tasks)
    return Contest(
        title=f"MAML, sinusoid, {num_tasks} tasks x {INNER_STEPS} steps, MLP 40 x 40",
        baseline="bmm by hand",
        ways={
            "metadist": lambda: by_metadist(setting),
            "metadist, compiled": lambda: by_metadist(setting, compile=True),
            "metadist, a loop": lambda: by_metadist(setting, vectorize=False),
            "bmm by hand": lambda: by_bmm(setting),
            "vmap by hand": lambda: by_vmap(setting),
            "higher": lambda: by_higher(setting),
            "TorchOpt": lambda: by_torchopt(setting),
            "learn2learn": lambda: by_learn2learn(setting),
            "JAX, jit": lambda: by_jax(setting),
        },
    )


def conv4(kind: str, inner_steps: int = INNER_STEPS) -> Contest:
    """One task, where convolutions take the time."""
    setting = Setting(kind, 1, inner_steps)
    shots = {"conv64": "Conv4-64, 5-way 5-shot", "conv32": "Conv4-32, 5-way 1-shot"}[kind]
    engines = ("adjoint", "unrolled", "higher")
    ways: dict[str, Callable[[], Job]] = {
        "higher": lambda: by_higher(setting),
        "plain loop": lambda: by_loop(setting),
        "TorchOpt": lambda: by_torchopt(setting),
        "learn2learn": lambda: by_learn2learn(setting),
        "metadist": lambda: by_metadist(setting),
        "metadist, compiled": lambda: by_metadist(setting, compile=True),
    }
    for engine in engines:
        ways[f"metadist, engine {engine}"] = partial(by_metadist, setting, engine=engine)
    return Contest(
        title=f"MAML, {shots}, one task x {inner_steps} steps",
        baseline="higher",
        ways=ways,
        tolerance=0.05,  # float32 through several second derivatives of batch norm
        with_memory=True,
    )


def anil(num_tasks: int = 8) -> Contest:
    """A meta-batch of ANIL against one pass through the backbone, which nobody can avoid."""
    setting = Setting("anil64", num_tasks)

    def floor() -> Job:
        features = setting.plain.get_submodule("features")

        def job() -> None:
            for inputs, _, query_inputs, _ in setting.data:
                outputs = features(torch.cat([inputs, query_inputs]))
                outputs.backward(torch.ones_like(outputs))

        return job

    ways: dict[str, Callable[[], Job]] = {"backbone once": floor}
    for engine in ("adjoint", "unrolled", "higher"):
        ways[f"metadist, engine {engine}"] = partial(by_metadist, setting, engine=engine)
    return Contest(
        title=f"ANIL, Conv4-64, {num_tasks} tasks, 5-way 5-shot, {INNER_STEPS} steps",
        baseline="backbone once",
        ways=ways,
    )


CONTESTS: dict[str, Callable[[], Contest]] = {
    "anil": anil,
    "sinusoid-25": lambda: sinusoid(25),
    "sinusoid-100": lambda: sinusoid(100),
    "conv4-64": lambda: conv4("conv64"),
    "conv4-64-20-steps": lambda: conv4("conv64", 20),
    "conv4-32": lambda: conv4("conv32"),
    "evaluation": evaluation_contest,
}
