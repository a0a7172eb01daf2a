"""The error of each algorithm's hypergradient against its cost.

    .venv/bin/python scripts/figures/accuracy_vs_cost.py      writes docs/accuracy_vs_cost_*.png

At one fixed x, so that the answer is known: the implicit formula at the minimiser of g, with a
dense Hessian. Deterministic; one or two minutes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from metadist import (
    SGD,
    Adam,
    Algorithm,
    AutogradOracle,
    Batch,
    CountingOracle,
    Params,
    Problem,
    Task,
)
from metadist.algorithm import split_own
from metadist.algorithms import (
    AID,
    BOME,
    DARTS,
    F2SA,
    FG2U,
    FSLA,
    IMAML,
    ITD,
    MEHA,
    MRBO,
    PZOBO,
    SABA,
    SAMA,
    SOBA,
    SUSTAIN,
    T1T2,
    UFOM,
    VPBGD,
    VRBO,
    AmIGO,
    LancBiO,
    NoLoopAID,
    Nystrom,
    Penalty,
    StocBiO,
    SubBiO,
)
from metadist.checks.exact import dense_hessian
from metadist.tasks.synthetic.dense import implicit_hypergradient
from metadist.trees import add, zeros_like

BUDGET = 2000
"""Gradients, as `cost` counts them."""
DOUBLE = torch.float64
FOLDER = Path(__file__).resolve().parents[2] / "docs"


class Setting(NamedTuple):
    """A problem at one x, its solution, and the batch size of stochastic methods there."""

    title: str
    problem: Problem
    task: Task
    x: Params
    start: Params
    exact: Tensor
    curvature: float  # the largest eigenvalue of H
    batch_size: int | None


Points = list[tuple[float, float]]
"""(cost, relative error) of hypergradients that cost more and more."""
Run = Callable[[Setting], Points]


# Problems


class Quadratic(Problem):
    """g = y'Ay/2 - y'(Bx + c),  f = |y - t|^2/2; a support example is (A, B, c), a query t."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.randn(10, generator=generator, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": outer["x"].new_zeros(20)}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        a, b, c = (tensor.mean(0) for tensor in batch.tensors)
        y = inner["y"]
        return 0.5 * y @ a @ y - y @ (b @ context["x"] + c)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return 0.5 * (inner["y"] - batch.tensors[0].mean(0)).square().sum()


class Regularised(Problem):
    """Logistic regression with one weight decay exp(x_d) per feature, judged on held-out data."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.linspace(-2.5, 0, 20, dtype=DOUBLE)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.zeros_like(outer["x"])}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        decay = 0.5 * (context["x"].exp() * inner["y"].square()).sum()
        return self.outer_loss(context, inner, batch) + decay

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs, labels = batch.tensors
        return F.binary_cross_entropy_with_logits(inputs @ inner["y"], labels)


def quadratic() -> Setting:
    """Eigenvalues of H from 0.5 to 5 in geometric progression."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=DOUBLE)

    basis = torch.linalg.qr(normal(20, 20))[0]
    a = basis @ torch.logspace(math.log10(0.5), math.log10(5), 20, dtype=DOUBLE).diag() @ basis.T
    support = Batch.of(a[None], normal(1, 20, 10), normal(1, 20))
    task = Task(support, Batch.of(normal(1, 20)), 0)
    return solved("Quadratic, condition number 10", Quadratic(), task, None)


def logistic() -> Setting:
    """256 examples to fit and 256 to judge on; 5 of 20 features matter, labels are noisy."""
    random = torch.Generator().manual_seed(1)
    weights = torch.zeros(20, dtype=DOUBLE)
    weights[:5] = torch.tensor([2.0, -1.5, 1.0, -1.0, 0.5])

    def examples() -> Batch:
        inputs = torch.randn(256, 20, generator=random, dtype=DOUBLE)
        inputs[:, 5:] += 0.7 * inputs[:, :1]
        chances = torch.sigmoid(inputs @ weights)
        draws = torch.rand(256, generator=random, dtype=DOUBLE)
        return Batch.of(inputs, (draws < chances).to(DOUBLE))

    task = Task(examples(), examples(), 0)
    return solved("Logistic regression, a weight decay per feature", Regularised(), task, 64)


def solved(title: str, problem: Problem, task: Task, batch_size: int | None) -> Setting:
    """The setting with the exact hypergradient, by Newton's method and a dense Hessian."""
    x = problem.init_outer(torch.Generator().manual_seed(0))
    start = problem.init_inner(x, task)
    exact, y = implicit_hypergradient(problem, task, x, start["y"])
    # Of logistic regression the curvature is largest at y = 0.
    at = {"y": y} if batch_size is None else start
    hessian = dense_hessian(AutogradOracle(problem, task), x, at)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    return Setting(title, problem, task, x, start, exact, largest, batch_size)


# Runs


def cost(counts: dict[str, int]) -> float:
    """Gradients: a joint gradient counts 1; H v, J v or both in one pass count 2."""
    products = counts.get("hvp", 0) + counts.get("directional", 0)
    return counts.get("inner_grad", 0) + counts.get("outer_grads", 0) + 2 * products


def error(setting: Setting, hypergradient: Params, scale: float | None = 1.0) -> float:
    """|scale h - exact| / |exact|; None: with the best scale."""
    found = split_own(hypergradient)[0]["x"]
    if scale is None:
        scale = float(found @ setting.exact / (found @ found).clamp(min=1e-300))
    return float((scale * found - setting.exact).norm() / setting.exact.norm())


def estimate(setting: Setting, algorithm: Algorithm, seed: int = 0) -> tuple[float, Params]:
    """(cost, hypergradient) of one estimate from a new state, on whole sets."""
    oracle = CountingOracle(AutogradOracle(setting.problem, setting.task, seed=seed, eager=True))
    x = {**setting.x, **algorithm.init_own(setting.start)}
    state = algorithm.init(oracle, x, setting.start)
    found = algorithm.estimate(oracle, x, state).hypergradient
    return cost(oracle.counts), found


def sweep(
    make: Callable[[int, float], Algorithm], values: Iterable[int], scale: float | None = 1.0
) -> Run:
    """One estimate of each of several budgets: make(value, 1/L)."""

    def run(setting: Setting) -> Points:
        points = []
        for value in values:
            spent, found = estimate(setting, make(value, 1 / setting.curvature))
            if spent > BUDGET:
                break
            points.append((spent, error(setting, found, scale)))
        return points

    return run


def averaged(make: Callable[[float], Algorithm]) -> Run:
    """The mean of more and more estimates with other mini-batches."""

    def run(setting: Setting) -> Points:
        spent, total, points, number = 0.0, zeros_like(setting.x), [], 0
        while spent < BUDGET:
            more, found = estimate(setting, make(1 / setting.curvature), seed=number)
            number, spent = number + 1, spent + more
            total = add(total, found)
            points.append((spent, error(setting, total, 1 / number)))
        return spaced(points)

    return run


def kept(
    make: Callable[[float], Algorithm], scale: float | None = 1.0, *, batches: bool = False
) -> Run:
    """Estimates at the same x, one after another, with the state kept.

    With `batches`, on mini-batches where the setting has them; a gradient then costs its share
    of one on the whole set.
    """

    def run(setting: Setting) -> Points:
        algorithm = make(1 / setting.curvature)
        size = setting.batch_size if batches else None
        share = size / len(setting.task.support.index) if size else 1.0
        spent, points, step, state = 0.0, [], 0, None
        while spent < BUDGET:
            local = AutogradOracle(setting.problem, setting.task, size, eager=True, step=step)
            oracle = CountingOracle(local)
            if state is None:
                state = algorithm.init(oracle, setting.x, setting.start)
            found = algorithm.estimate(oracle, setting.x, state)
            state, step, spent = found.state, step + 1, spent + share * cost(oracle.counts)
            points.append((spent, error(setting, found.hypergradient, scale)))
        return spaced(points)

    return run


def falling(lr: float, exponent: float) -> SGD:
    return SGD(lr, schedule="power", exponent=exponent)


def spaced(points: Points, per_decade: int = 12) -> Points:
    """Points at even distances of log(cost): root mean squares over what lies between."""
    groups: dict[int, Points] = {}
    for spent, off in points:
        groups.setdefault(math.floor(per_decade * math.log10(spent)), []).append((spent, off))
    return [
        (
            math.exp(sum(math.log(spent) for spent, _ in group) / len(group)),
            math.sqrt(sum(off * off for _, off in group) / len(group)),
        )
        for group in groups.values()
    ]


STEPS = (1, 2, 3, 5, 8, 12, 20, 35, 60, 100, 175, 300, 500)
POWERS = (1, 2, 4, 8, 16, 32, 64)
NUMBER = 30
"""Inner steps where another option varies."""
LARGE = 100.0
"""The weight of g relative to f, where a method has one."""

# In a lambda, a is 1/L.
FAMILIES: dict[str, dict[str, Run]] = {
    "Implicit differentiation": {
        "AID, CG": sweep(lambda t, a: AID(t, a, adjoint_steps=t), STEPS),
        "IMAML, lam = 0.01": sweep(
            lambda t, a: IMAML(t, a, lam=0.01, adjoint_steps=min(t, 25)), STEPS
        ),
        "Nystrom, rank 10": sweep(lambda t, a: Nystrom(t, a, rank=10, damping=0.5), STEPS),
        "NoLoopAID": kept(lambda a: NoLoopAID(inner_lr=a)),
        "AmIGO": kept(lambda a: AmIGO(5, a, adjoint_steps=5)),
        "SubBiO": kept(lambda a: SubBiO(5, a)),
        "LancBiO": kept(lambda a: LancBiO(5, a, adjoint_steps=1, subspace_start=10)),
    },
    "Through the inner loop": {
        "ITD = MetaSGD here": sweep(lambda t, a: ITD(t, a), STEPS),
        "ITD, truncate = 10": sweep(lambda t, a: ITD(t, a, truncate=min(t, 10)), STEPS),
        f"UFOM, T = {NUMBER}, mean": averaged(lambda a: UFOM(NUMBER, a)),
        f"FG2U, T = {NUMBER}": sweep(lambda b, a: FG2U(NUMBER, a, num_directions=b), POWERS),
        f"PZOBO, T = {NUMBER}": sweep(lambda b, a: PZOBO(NUMBER, a, num_directions=b), POWERS),
    },
    "Stochastic": {
        "StocBiO": kept(lambda a: StocBiO(5, a, adjoint_steps=30, adjoint_lr=a), batches=True),
        "MRBO": kept(
            lambda a: MRBO(5, inner_optimizer=falling(a, 1 / 3), adjoint_steps=30, adjoint_lr=a),
            batches=True,
        ),
        "VRBO": kept(lambda a: VRBO(3, a, adjoint_steps=30, adjoint_lr=a), batches=True),
        "SUSTAIN": kept(
            lambda a: SUSTAIN(5, inner_optimizer=falling(a, 1 / 3), adjoint_steps=30, adjoint_lr=a),
            batches=True,
        ),
        "SOBA": kept(
            lambda a: SOBA(1, inner_optimizer=falling(a, 0.3), adjoint_lr=a, adjoint_decay=0.3),
            batches=True,
        ),
        "SABA": kept(lambda a: SABA(1, a / 2, adjoint_lr=a / 2), batches=True),
        "FSLA": kept(
            lambda a: FSLA(
                1,
                inner_optimizer=falling(a, 0.3),
                adjoint_lr=a,
                adjoint_decay=0.3,
                weight_decay=0.5,
            ),
            batches=True,
        ),
    },
    "First derivatives of g (Penalty: H v too)": {
        "BOME, eta = 100": kept(lambda a: BOME(20, a, y_lr=a / LARGE, eta=LARGE)),
        "MEHA, c = 100": kept(
            lambda a: MEHA(1, a / 2, y_lr=a / 2, gamma=10.0, c=LARGE, c_power=0.0), LARGE
        ),
        "F2SA, lam = 100": kept(lambda a: F2SA(10, a, lam=LARGE)),
        "F2SA-2, lam = 100": kept(lambda a: F2SA(10, a, lam=LARGE, order=2)),
        "VPBGD, gamma = 100": kept(lambda a: VPBGD(2, a, y_lr=a, gamma_max=LARGE), LARGE),
        # It updates its multipliers where all gradients are small; here always, as x stands still.
        "Penalty, rho = 10": kept(
            lambda a: Penalty(
                20, 1 / (1 + 10 / a**2), rho=10.0, eps=1e9, eps_factor=1.0, lam_factor=0.9
            )
        ),
    },
    "Heuristic: direction only, best length": {
        "T1T2": sweep(lambda t, a: T1T2(t, a), STEPS, None),
        "DARTS": sweep(lambda t, a: DARTS(t, a), STEPS, None),
        "SAMA, SGD": sweep(lambda t, a: SAMA(t, a), STEPS, None),
        "SAMA, Adam": kept(lambda a: SAMA(10, inner_optimizer=Adam(0.01, carry=True)), None),
    },
}


# The pictures

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FLOOR = 1e-8


def draw(setting: Setting, path: Path) -> None:
    """One panel per family, with the curve of AID in all of them."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9.5), sharex=True, sharey=True)
    panels = list(axes.flat)
    aid = FAMILIES["Implicit differentiation"]["AID, CG"](setting)
    for panel, (family, runs) in zip(panels, FAMILIES.items(), strict=False):
        if "AID, CG" not in runs:
            panel.plot(*columns(aid), color="0.75", linewidth=4, label="AID, CG", zorder=1)
        for i, (name, run) in enumerate(runs.items()):
            panel.plot(
                *columns(run(setting)),
                color=COLORS[i],
                marker=MARKERS[i],
                markersize=8 - 0.6 * i,  # hollow and of several sizes: to be seen on one another
                markerfacecolor="none",
                label=name,
            )
        panel.set_title(family, fontsize=13, fontweight="bold", loc="left")
        panel.set(xscale="log", yscale="log", xlim=(3, 1.2 * BUDGET), ylim=(FLOOR / 2, 100))
        panel.grid(color="0.92")
        panel.legend(fontsize=9.5, loc="lower left", framealpha=0.9)
        panel.tick_params(labelbottom=True, labelsize=10)
    panels[-1].axis("off")
    panels[-1].text(
        0, 1, note(setting), va="top", fontsize=11, linespacing=1.5, transform=panels[-1].transAxes
    )
    figure.suptitle(f"{setting.title}: hypergradient error against cost", fontsize=16)
    figure.supxlabel("cost in gradients (a joint gradient = 1; H v, J v or both in one pass = 2)")
    figure.supylabel("|h - exact| / |exact|")
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def columns(points: Points) -> tuple[list[float], list[float]]:
    return [spent for spent, _ in points], [max(off, FLOOR) for _, off in points]


def note(setting: Setting) -> str:
    noise = (
        "Stochastic methods draw 64 of 256 examples here;\n"
        "a gradient then costs 1/4. The others use all."
        if setting.batch_size
        else "There is no noise here: one example per set."
    )
    return (
        "One fixed x, exact solution known.\n"
        "All inner and adjoint rates are about 1/L.\n\n"
        "AID, IMAML, Nystrom, ITD, T1T2, DARTS, SAMA (SGD):\n"
        "one estimate each, of 1 .. 500 inner steps.\n"
        "FG2U, PZOBO: one estimate, of 1 .. 64 directions.\n"
        "UFOM: the mean of more and more estimates.\n"
        "All others: estimates one after another with the\n"
        "state kept.\n\n"
        "MEHA and VPBGD estimate the hypergradient divided\n"
        "by c and by gamma; that factor is taken out.\n"
        f"{noise}\n"
        f"Errors below {FLOOR:g} are drawn there."
    )


def main() -> None:
    """Write both pictures."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name, setting in (("quadratic", quadratic()), ("logistic", logistic())):
        path = FOLDER / f"accuracy_vs_cost_{name}.png"
        draw(setting, path)
        print(os.path.relpath(path))


if __name__ == "__main__":
    main()
