"""`check_hypergradient`: an algorithm's hypergradient beside the derivatives it stands for.

In float64, on one task, at one x:

    unrolled   d f(x, A(x)) / dx,  A being the algorithm's own adaptation: what methods stand for
               that train the start of adaptation; here by central differences
    solution   d f(x, y*(x)) / dx = grad_x f - J H^-1 grad_y f at the minimiser y* of g: what
               methods stand for that hold the start constant (implicit ones, penalties,
               value functions); here with a dense Hessian
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.algorithm import Algorithm, split_own
from metadist.autograd import AutogradOracle
from metadist.checks.derivatives import check_precision
from metadist.checks.exact import (
    Minimum,
    NoMinimiser,
    axes,
    dense_hessian,
    fixed_point,
    fixed_point_gradient,
    implicit_gradient,
    lbfgs,
    newton,
)
from metadist.checks.losses import check_losses
from metadist.checks.preflight import check_trainable, initial_outer, preflight
from metadist.checks.values import check, is_number
from metadist.compute import DEFAULT, Compute
from metadist.draws import BatchSize
from metadist.hypergradient import task_hypergradients
from metadist.oracle import CountingOracle
from metadist.problem import Problem, carries, context_of, is_nonsmooth
from metadist.sampler import TaskSampler
from metadist.task import Task, to_device
from metadist.trees import (
    Params,
    add,
    check_flattenable,
    detach,
    dot,
    flatten,
    gradients,
    leaves,
    norm,
    num_elements,
    scale,
    sub,
    tree_map,
    unflatten,
)
from metadist.workload import Workload

WHOLE_GRADIENT = 100
"""Up to so many numbers in x, central differences are taken in each of them."""
NEWTON_STEPS = 10
UNROLLED, SOLUTION = "the unrolled map", "the solution"
HOW_TO_READ = {
    UNROLLED: "This algorithm trains the start of adaptation, so the unrolled map is the measure: "
    "a method that is exact for any number of steps agrees with it.",
    SOLUTION: "This algorithm holds the start of adaptation constant, so the solution is the "
    "measure: a good method comes near it as its steps and weights grow, or its state is kept.",
}
LENGTH = "A cosine near 1 beside a large error: the right direction, another length.\n"
LARGE_RESIDUAL = 0.1


class Comparison(NamedTuple):
    """The hypergradient beside one reference.

    Args:
        reference: What it is compared with, in words.
        error: |hypergradient - reference| / |reference|; where x is large, of the slopes along
            random directions.
        cosine: The cosine of the angle between the two, or between their slopes.
        uncertainty: Relative error of the reference itself, from two step sizes; 0 if exact.
        judged: Whether the algorithm stands for this reference.
    """

    reference: str
    error: float
    cosine: float
    uncertainty: float
    judged: bool


class Repetition(NamedTuple):
    """The error after several estimates at the same x: `what` says of which, and which reference.

    Relative errors are by number of estimates, ascending; `judged` as in `Comparison`.
    """

    what: str
    errors: dict[int, float]
    judged: bool


@dataclass(frozen=True)
class HypergradientReport:
    """The findings of `check_hypergradient`; printed as tables.

    Args:
        algorithm: With its hyperparameters.
        measure: The reference that the algorithm stands for, in words.
        setting: Sizes and precision.
        comparisons: The first estimate beside every reference that exists.
        repetitions: More estimates at the same x: with the state kept from one to the next,
            and, for an algorithm that draws random numbers, their mean with new states.
        metrics: Norms, residuals and the algorithm's own metrics.
        counts: What one estimate asked of the oracle, see `CountingOracle`.
        notes: What could not be compared, and why.
    """

    algorithm: str
    measure: str
    setting: dict[str, str]
    comparisons: tuple[Comparison, ...]
    repetitions: tuple[Repetition, ...]
    metrics: dict[str, float]
    counts: dict[str, int]
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Against the reference that the algorithm stands for; infinite where that is not known.

        That of the first estimate or, if smaller, of the last of the repeated ones.
        """
        errors = [comparison.error for comparison in self.comparisons if comparison.judged]
        errors += [list(found.errors.values())[-1] for found in self.repetitions if found.judged]
        return min(errors, default=float("inf"))

    def __rich__(self) -> Group:
        compared = Table("hypergradient beside", "relative error", "cosine")
        for reference, error, cosine, uncertainty, judged in self.comparisons:
            doubt = f" (+- {uncertainty:.0e})" if uncertainty > 0.1 * error else ""
            compared.add_row(
                reference, f"{error:.2e}{doubt}", f"{cosine:.6f}", style="bold" if judged else ""
            )
        how_to_read = Text(f"{HOW_TO_READ[self.measure]} {LENGTH}")
        parts: list[Table | Text] = [Text(self.algorithm), compared, how_to_read]
        if self.repetitions:
            numbers = list(self.repetitions[0].errors)
            repeated = Table("relative error after several estimates", *map(str, numbers))
            for what, errors, judged in self.repetitions:
                metrics = (f"{errors[n]:.2e}" for n in numbers)
                repeated.add_row(what, *metrics, style="bold" if judged else "")
            parts.append(repeated)
        asked = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        facts = Table(show_header=False, box=None)
        for name, text in (
            *self.setting.items(),
            *((name, f"{value:.3g}") for name, value in self.metrics.items()),
            ("one estimate asks for", asked or "no derivative"),
            *(("note", note) for note in self.notes),
        ):
            facts.add_row(Text(f"{name}:"), Text(text))
        return Group(*parts, facts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, force_jupyter=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def check_hypergradient(
    problem: Problem,
    tasks: TaskSampler | Task,
    algorithm: Algorithm,
    outer: Params | None = None,
    *,
    compute: Compute = DEFAULT,
    num_directions: int = 20,
    repeats: Sequence[int] = (1, 10, 100),
    max_dense: int = 2000,
) -> HypergradientReport:
    """The hypergradient of `algorithm` on one task beside exact derivatives.

    Runs on the CPU in float64, or, where the problem's constants do not allow that, in the
    problem's own precision, which the report says.

    Args:
        problem: The problem.
        tasks: A task, or a sampler, whose task 0 is used.
        algorithm: Its `estimate` goes the way it goes in training.
        outer: x, the algorithm's own variables included; None: the start of training.
        compute: The draws of the estimates, as in training; its seed is also that of the start
            and of the directions. The references are always those of the whole sets.
        num_directions: Random directions of central differences; where x has 100 numbers or
            fewer, all of the gradient is compared instead.
        repeats: Numbers of estimates to report the error after; empty: none.
        max_dense: Sizes of y up to which a dense Hessian is formed.

    Raises:
        ValueError: An argument out of range, or what training would refuse too.

    Cost: `max(repeats)` estimates (twice if the algorithm is random), 4 adaptations per direction,
    dy Hessian-vector products per Newton step, and what L-BFGS needs.
    """
    check("num_directions", num_directions, is_integer=True, ge=1)
    check("max_dense", max_dense, is_integer=True, ge=1)
    if any(not is_number(number) or number < 1 for number in repeats):
        raise ValueError(f"repeats must hold numbers >= 1, got {list(repeats)}")
    check_trainable(problem, algorithm)
    sampler = _Always(tasks) if isinstance(tasks, Task) else tasks
    if compute.device not in ("auto", "cpu"):
        raise ValueError(
            f"device must be 'cpu' or 'auto' for a check, which runs there, got {compute.device!r}"
        )
    # The task goes alone, however many a training has go together.
    compute = replace(compute, vectorize=False)
    # The report has a kept state beside new ones.
    keep_state = bool(algorithm.needs_kept_state) or carries(problem)
    workload = Workload(problem, sampler, algorithm, keep_state=keep_state, compute=compute)
    if outer is None:
        outer = initial_outer(workload)
    trained = outer
    outer, notes = _in_double(workload, trained)
    check_precision(workload, trained)
    preflight(workload, outer)
    # The fused attention kernels have no double backward, the plain one has.
    with compute.applied(), sdpa_kernel(SDPBackend.MATH):
        return _Check(workload, outer, notes).report(num_directions, repeats, max_dense)


class _Always:
    """A sampler of one task."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def sample(self, index: int) -> Task:
        return self._task


def _in_double(workload: Workload, outer: Params) -> tuple[Params, list[str]]:
    """(x in float64 if the problem can be computed there, notes)."""
    dtype = check_flattenable(outer, "outer")
    outer = {name: leaf.detach().cpu() for name, leaf in outer.items()}
    if dtype == torch.float64:
        return outer, []
    double = {name: leaf.double() for name, leaf in outer.items()}
    try:
        check_losses(workload.problem, workload.sampler, double)
        return double, []
    except ValueError as error:
        check_losses(workload.problem, workload.sampler, outer)  # raises if it fails there too
        reason = str(error).partition("got ")[2].partition("\n")[0]
        return outer, [
            f"computed in {str(dtype).removeprefix('torch.')}, since the problem cannot be "
            f"computed in float64 (cast its constants with .double()): {reason}"
        ]


class _Reference(NamedTuple):
    """A derivative to compare with, known along `directions` (None: whole)."""

    words: str
    short: str
    judged: bool
    value: Tensor
    directions: list[Params] | None = None
    uncertainty: float = 0.0

    def error(self, hypergradient: Params) -> float:
        return _relative(self._of(hypergradient) - self.value, self.value)

    def compare(self, hypergradient: Params) -> Comparison:
        found = self._of(hypergradient)
        size = float(found.norm() * self.value.norm())
        cosine = float(found @ self.value) / size if size else 0.0
        error = self.error(hypergradient)
        return Comparison(
            reference=self.words,
            error=error,
            cosine=cosine,
            uncertainty=self.uncertainty,
            judged=self.judged,
        )

    def _of(self, hypergradient: Params) -> Tensor:
        if self.directions is None:
            # The algorithm's own variables do not enter the solution.
            return flatten(split_own(hypergradient)[0])
        return torch.stack([dot(hypergradient, direction) for direction in self.directions])


class _Check:
    """One problem on one task at one x, and everything that is computed there."""

    def __init__(self, workload: Workload, outer: Params, notes: list[str]) -> None:
        self.workload = workload
        self.problem, self.algorithm = workload.problem, workload.algorithm
        self.outer = outer
        self.notes = notes
        self.measure = SOLUTION if self.algorithm.trains == "context" else UNROLLED
        self.dtype = next(iter(outer.values())).dtype
        self.task = to_device(workload.sampler.sample(0), "cpu", self.dtype)
        problem_outer, self.own = split_own(outer)
        with torch.no_grad():
            self.context = detach(context_of(self.problem, problem_outer, self.task))
            self.start = detach(self.problem.init_inner(problem_outer, self.task))

    def report(
        self, num_directions: int, repeats: Sequence[int], max_dense: int
    ) -> HypergradientReport:
        drawn = CountingOracle(self._oracle(self.workload.compute.batch_sizes))
        x = {**self.context, **self.own}
        estimate = self.algorithm.estimate(drawn, x, self.algorithm.init(drawn, x, self.start))
        adapted = detach(estimate.state.inner)
        first, other = self._estimates(2)
        has_map = self._oracle().has_inner_map
        what = "|y - Phi(x, y)|" if has_map else "|grad_y g|"
        matrix = "singular value of I - dPhi/dy" if has_map else "eigenvalue of H"
        metrics = {
            f"{what} at the start": self._residual(self.start),
            f"{what} after adaptation": self._residual(adapted),
            **{name: float(value) for name, value in estimate.metrics.items()},
        }
        references = [self._unrolled(num_directions)]
        try:
            found = self._minimum(adapted, max_dense)
        except NoMinimiser as error:
            self.notes.append(f"no exact hypergradient of the solution y*(x): {error}")
        else:
            references.append(self._solution(found))
            low, high = found.eigenvalues
            metrics |= {
                "|y - y*| / |y*| after adaptation": _relative(flatten(adapted) - found.y, found.y),
                f"smallest {matrix} at y*": low,
                f"largest {matrix} at y*": high,
            }
        if metrics.get("adjoint_residual", 0.0) > LARGE_RESIDUAL:
            self.notes.append(
                "v does not solve H v = grad_y f, see adjoint_residual: it may want more steps, "
                "damping, or a kept state"
            )
        repeated = self._repetitions(references, repeats, is_random=not _equal(first, other))
        outer_size, inner_size = num_elements(self.outer), num_elements(self.start)
        precision = str(self.dtype).removeprefix("torch.")
        return HypergradientReport(
            algorithm=repr(self.algorithm),
            measure=self.measure,
            setting={"x, y": f"{outer_size:,} and {inner_size:,} numbers in {precision}"},
            comparisons=tuple(reference.compare(first) for reference in references),
            repetitions=tuple(repeated),
            metrics=metrics,
            counts=dict(drawn.counts),
            notes=tuple(self.notes),
        )

    def _oracle(self, batch_size: BatchSize = None) -> AutogradOracle:
        return AutogradOracle(
            self.problem, self.task, batch_size, self.workload.compute.seed, eager=True
        )

    def _residual(self, y: Params) -> float:
        oracle = self._oracle()
        if oracle.has_inner_map:
            return float(norm(sub(y, oracle.inner_map(self.context, y, oracle.draw_inner()))))
        return float(norm(oracle.inner_grad(self.context, y, oracle.draw_inner())))

    def _estimates(self, number: int, *, keep: bool = False) -> list[Params]:
        """Hypergradients at x by the path of training, with other draws each."""
        found = []
        compute = self.workload.compute
        new: dict[int, Tensor] | None = {} if keep or self.workload.keep_state else None
        states = new
        for step in range(number):
            result = task_hypergradients(
                self.problem,
                self.algorithm,
                self.outer,
                [self.task],
                # Schedules go by the step; without a kept state there is none.
                compute=replace(compute, seed=compute.seed + (0 if keep else step)),
                step=step if keep else 0,
                states=states,
                is_checked=True,
            )
            if result.dropped:
                raise ValueError(
                    f"the hypergradient must be finite, got NaN or Inf in estimate {step + 1} "
                    f"at the same x: the kept state diverges ({self.algorithm})"
                )
            states = dict(result.states) if keep else new
            found.append(result.total)
        return found

    def _repetitions(
        self, references: list[_Reference], repeats: Sequence[int], *, is_random: bool
    ) -> list[Repetition]:
        if not repeats:
            return []
        repeats = sorted(set(repeats))
        found = []
        for reference in references[1:]:  # a kept state leaves the unrolled map
            kept = self._estimates(repeats[-1], keep=True)
            errors = {number: reference.error(kept[number - 1]) for number in repeats}
            what = f"state kept: the last, of {reference.short}"
            found.append(Repetition(what, errors, reference.judged))
        if not is_random:
            return found
        drawn = self._estimates(repeats[-1])
        means = {number: _mean(drawn[:number]) for number in repeats}
        for reference in references:
            errors = {number: reference.error(mean) for number, mean in means.items()}
            what = f"state new, other draws: their mean, of {reference.short}"
            found.append(Repetition(what, errors, reference.judged))
        return found

    def _unrolled(self, num_directions: int) -> _Reference:
        """Central differences of x -> f(x, A(x)), extrapolated from two step sizes."""
        whole = num_elements(self.outer) <= WHOLE_GRADIENT
        directions = axes(self.outer) if whole else self._random_directions(num_directions)
        size = torch.finfo(self.dtype).eps ** (1 / 3) * max(
            1.0, *(float(leaf.abs().max()) for leaf in self.outer.values() if leaf.numel())
        )
        slopes, halved = (
            torch.stack([self._slope(direction, step) for direction in directions])
            for step in (size, size / 2)
        )
        held = {"context": ", its start held constant", "start": ", the context held constant"}
        along = "" if whole else f", along {num_directions} random directions"
        return _Reference(
            f"{UNROLLED} x -> f(x, A(x))" + held.get(self.algorithm.trains, "") + along,
            UNROLLED,
            self.measure == UNROLLED,
            (4 * halved - slopes) / 3,
            directions,
            _relative(halved - slopes, halved),
        )

    def _random_directions(self, number: int) -> list[Params]:
        generator = torch.Generator().manual_seed(self.workload.compute.seed)
        drawn = [
            tree_map(
                lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=self.dtype),
                self.outer,
            )
            for _ in range(number)
        ]
        return [scale(direction, 1 / norm(direction)) for direction in drawn]

    def _slope(self, direction: Params, size: float) -> Tensor:
        above, below = (
            self._adapted_loss(add(self.outer, direction, sign * size)) for sign in (1, -1)
        )
        return (above - below) / (2 * size)

    def _adapted_loss(self, outer: Params) -> Tensor:
        """f(x, A(x)) on the whole sets."""
        problem_outer, own = split_own(outer)
        trains = self.algorithm.trains
        with torch.no_grad():
            context, start = self.context, self.start
            if trains != "start":
                context = context_of(self.problem, problem_outer, self.task)
            if trains != "context":
                start = self.problem.init_inner(problem_outer, self.task)
        adapted = self.algorithm.unrolled_map(self._oracle(), {**context, **own}, start)
        return self.problem.outer_loss(context, adapted, self.task.query).detach()

    def _minimum(self, adapted: Params, max_dense: int) -> Minimum:
        """The minimiser y*(x); NoMinimiser says why there is none."""
        size = num_elements(adapted)
        if self.algorithm.trains == "start":
            raise NoMinimiser(
                "the algorithm trains the start of adaptation, which y*(x) does not depend on"
            )
        if is_nonsmooth(self.problem):
            raise NoMinimiser("the lower objective has a non-smooth part")
        if size > max_dense:
            raise NoMinimiser(f"y has {size:,} numbers, more than max_dense = {max_dense:,}")
        if self._oracle().has_inner_map:
            return fixed_point(self._oracle(), self.context, adapted, NEWTON_STEPS)
        y = lbfgs(self._lower_loss, adapted)

        def gradient(flat: Tensor) -> Tensor:
            oracle = self._oracle()
            at = unflatten(flat, y)
            return flatten(oracle.inner_grad(self.context, at, oracle.draw_inner()))

        def hessian(flat: Tensor) -> Tensor:
            return dense_hessian(self._oracle(), self.context, unflatten(flat, y))

        return newton(gradient, hessian, flatten(y), NEWTON_STEPS)

    def _lower_loss(self, y: Params) -> Tensor:
        return self.problem.inner_loss(self.context, y, self.task.support)

    def _solution(self, found: Minimum) -> _Reference:
        """The exact hypergradient of x -> f(x, y*(x)): the implicit gradient, through `encode`."""
        y = unflatten(found.y, self.start)
        oracle = self._oracle()
        exact_gradient = fixed_point_gradient if oracle.has_inner_map else implicit_gradient
        at_context = exact_gradient(oracle, self.context, y, found.hessian)
        x = leaves(split_own(self.outer)[0])
        with torch.enable_grad():
            context = context_of(self.problem, x, self.task)
        (exact,) = gradients(list(context.values()), list(at_context.values()), x)
        return _Reference(
            f"{SOLUTION} x -> f(x, y*(x))", SOLUTION, self.measure == SOLUTION, flatten(exact)
        )


def _equal(first: Params, second: Params) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def _mean(trees: list[Params]) -> Params:
    total = trees[0]
    for tree in trees[1:]:
        total = add(total, tree)
    return scale(total, 1 / len(trees))


def _relative(difference: Tensor, reference: Tensor) -> float:
    """|difference| / |reference|; 0 if both are 0."""
    size, base = float(difference.norm()), float(reference.norm())
    if size == 0:
        return 0.0
    return size / base if base else float("inf")
