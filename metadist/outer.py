"""The outer variable x and its steps: the pure core of the parameter server."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metadist.flat_states import same_form
from metadist.optimizer import OuterOptimizer
from metadist.trees import Params, check_flattenable, flatten, num_elements, same_bytes, unflatten

BLOCK = 1 << 16
"""The number of elements of x that are added up, measured and stepped at a time.

A block stays in the cache from one operation to the next. And a shard of x consists of whole
blocks, so it makes the same calls on each of them as one owner of the whole x, with the same bytes.
On a GPU, where a call costs more than the numbers of a block, x is stepped in one piece, by
operators that act element by element; only norms are those of blocks.
"""


class Numbers:
    """A set of whole numbers >= 0: all below one, and some others.

    Args:
        below: All numbers below this one are in the set.
        others: So are these.
    """

    def __init__(self, below: int = 0, others: Iterable[int] = ()) -> None:
        self.below, self.others = below, set(others)

    def __contains__(self, number: int) -> bool:
        return number < self.below or number in self.others

    def add(self, number: int) -> None:
        self.others.add(number)
        while self.below in self.others:
            self.others.remove(self.below)
            self.below += 1

    def missing(self) -> Iterator[int]:
        """Those that are not in the set, in order, without an end."""
        return (n for n in itertools.count(self.below) if n not in self.others)


class LeaseResult(NamedTuple):
    """The small part of a computed lease, which goes into reports.

    Args:
        lease_id: The lease; each is applied once.
        version: The version of x at which it was computed.
        num_tasks: The number of tasks in the sum.
        dropped: The ids of tasks left out because their hypergradient or state was not finite.
        metrics: Sums over the tasks in the sum; empty unless the lease asked for a report.
        sampling_s: The seconds spent on sampling the tasks.
        compute_s: The seconds spent on their hypergradients.
        calls: The calls of the oracle, see `CountingOracle`.
        worker: The name of the worker that computed it.
    """

    lease_id: int
    version: int
    num_tasks: int
    dropped: tuple[int, ...] = ()
    metrics: Mapping[str, float] = {}  # never changed
    sampling_s: float = 0.0
    compute_s: float = 0.0
    calls: Mapping[str, int] = {}  # never changed
    worker: str = "local"

    @property
    def seconds(self) -> float:
        """The seconds spent in all."""
        return self.sampling_s + self.compute_s


class Contribution(NamedTuple):
    """A computed lease, as it enters an outer step.

    Args:
        result: The small part of it.
        total: The sum of task hypergradients, flat, shape (L,); for a two-point method (2 L,),
            followed by the sum at the previous x.
        states: The new state of each task, by index, where states are kept.
        weight: Multiplies `total` (staleness weighting).
    """

    result: LeaseResult
    total: Tensor
    states: Mapping[int, Tensor] = {}  # never changed
    weight: float = 1.0


class StepResult(NamedTuple):
    """What one call of `OuterVariable.apply` did.

    `applied` and `repeated` are lease ids; `staleness` is in versions, one per applied lease;
    `hypergradient_norm` is that of the mean, before clipping.
    """

    version: int
    applied: tuple[int, ...]
    repeated: tuple[int, ...]
    staleness: tuple[int, ...]
    hypergradient_norm: float
    lr: float


class OuterState(NamedTuple):
    """`OuterVariable` as data.

    Args:
        outer: x.
        optimizer: The tensors of its optimiser.
        version: Outer steps taken.
        applied_below, applied: The leases in x: all with a smaller number, and some others.
        recursion: For a two-point method, w and the previous x, each of shape (L,).
        states: What the algorithm keeps of each task, by task index.
        num_shards: Owners among whom x is divided; a checkpoint has a file for each.
    """

    outer: Params
    optimizer: dict[str, Tensor]
    version: int
    applied_below: int
    applied: tuple[int, ...]
    recursion: Mapping[str, Tensor] = {}  # never changed
    states: Mapping[int, Tensor] = {}  # never changed
    num_shards: int = 1


def differences(state: OuterState, expected: OuterState) -> list[str]:
    """What differs between two states, by name; empty: same bytes, by however many owners."""
    found = [] if state[2:5] == expected[2:5] else ["version or leases"]
    for field in ("outer", "optimizer", "recursion", "states"):
        ours, theirs = getattr(state, field), getattr(expected, field)
        if ours.keys() != theirs.keys():
            found.append(field)
            continue
        found += [f"{field} {n}" for n, leaf in ours.items() if not same_bytes(leaf, theirs[n])]
    return found


class StepRules(NamedTuple):
    """Step rules other than the optimiser.

    Args:
        project: Applied to x after every step, see `Problem.project_outer`; None: nothing.
        recursive_weight: a_k of a two-point method by version, see `Algorithm.recursive_weight`;
            None: a one-point method.
    """

    project: Callable[[Params], Params] | None = None
    recursive_weight: Callable[[int], float | None] | None = None


class _Prepared(NamedTuple):
    """A step that was checked and added up, and has changed nothing yet."""

    fresh: tuple[Contribution, ...]
    repeated: tuple[int, ...]
    num_tasks: int
    recursion: dict[str, Tensor]


class OuterVariable:
    """x, its optimiser state and its version; applies contributions, each lease once.

    Contributions are added in lease order whatever order they come in, so a synchronous run
    gives the same bytes with any number of workers.

    A step has two halves, `prepare` and `commit`, because x may be divided among shards, each an
    `OuterVariable` of a slice of it (see `shard_bounds`): clipping needs the norm over all shards
    before any of them steps, and a contribution that one refuses must change none.

    Args:
        outer: x at the start.
        optimizer: How it is stepped.
        rules: What else belongs to a step.
        device: Where x is kept and stepped, with all that belongs to it; None: where it is. Of a
            GPU a step reads one vector, the norms of the blocks.
    """

    def __init__(
        self,
        outer: Params,
        optimizer: OuterOptimizer,
        rules: StepRules | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_flattenable(outer, "outer")
        self._like = {name: torch.empty_like(leaf, device="meta") for name, leaf in outer.items()}
        flat = flatten({name: leaf.detach() for name, leaf in outer.items()})
        self._flat = flat.to(device or flat.device)
        self._is_on_host = self._flat.device.type == "cpu"
        self._block = BLOCK if self._is_on_host else max(1, len(flat))
        self._config = optimizer
        # Views of the flat x: a step of the optimiser on them is a step of x, without a copy.
        self._blocks = [torch.nn.Parameter(block) for block in self._flat.split(self._block)]
        self._optimizer = optimizer.make(self._blocks)
        # What the optimiser keeps (of "adam" exp_avg, exp_avg_sq) as vectors over all of x. The
        # blocks are an implementation detail, so a checkpoint holds these vectors and not blocks.
        self._moments: dict[str, Tensor] = {}
        self._join_moments(slice(None))
        self._has_stepped = False
        self._rules = rules or StepRules()
        self._recursion: dict[str, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        """What the algorithm keeps of each task, by task index."""
        self.version = 0
        self._applied = Numbers()
        self._prepared: _Prepared | None = None
        self._mean = self._flat.new_empty(0)

    @property
    def previous(self) -> Tensor | None:
        """x one version before, shape (L,), of a two-point method after its first step."""
        return self._recursion.get("previous")

    @property
    def flat(self) -> Tensor:
        """x as one vector of shape (L,): shared memory, not to be written to."""
        return self._flat

    @property
    def params(self) -> Params:
        """A copy of x by name."""
        return self.unflatten(self.flat.clone())

    def unflatten(self, flat: Tensor) -> Params:
        """Views of a vector like `flat` by name."""
        return unflatten(flat, self._like)

    def is_applied(self, lease_id: int) -> bool:
        """Whether this lease's contribution is in x."""
        return lease_id in self._applied

    def next_leases(self, num_leases: int) -> list[int]:
        """The smallest `num_leases` lease ids that are not in x."""
        return list(itertools.islice(self._applied.missing(), num_leases))

    def apply(self, contributions: Sequence[Contribution]) -> StepResult:
        """One outer step with the weighted sum of `contributions` over their number of tasks.

        A lease that was applied before is left out and reported as repeated; if nothing is left,
        or no task of what is left was finite, x stays as it is. The version goes up by one for
        every call that holds a new lease.

        Raises:
            ValueError: a contribution is not one of this variable, or not finite; nothing changed.
        """
        return self.commit(norm_of_blocks(self.prepare(contributions)))

    def prepare(self, contributions: Sequence[Contribution]) -> list[float]:
        """The squared norm of each block of the mean hypergradient; the first half of `apply`.

        Takes the place of an earlier one that was not committed. Raises as `apply` does.
        """
        self._prepared = None
        # Nothing below changes x, the optimiser or the version: a step that raises here, or whose
        # other shards raise, has not happened. Only the buffer of the mean is written to.
        fresh: list[Contribution] = []
        repeated: list[int] = []
        weight = self._weight()
        expected = len(self._flat) * (1 if weight is None or weight == 1 else 2)
        for item in contributions:
            _check_number("lease_id", item.result.lease_id, item)
        for item in sorted(contributions, key=lambda item: item.result.lease_id):
            known = self.is_applied(item.result.lease_id)
            if known or (fresh and fresh[-1].result.lease_id == item.result.lease_id):
                repeated.append(item.result.lease_id)
                continue
            self._check(item, expected)
            fresh.append(item)
        recursion = self._recursion
        squares: list[float] = []
        num_tasks = sum(item.result.num_tasks for item in fresh)
        if num_tasks:
            if len(self._mean) != expected:
                self._mean = self._flat.new_empty(expected)
            found = self._add_up(fresh, num_tasks)
            mean = self._mean[: len(self._flat)]
            if weight is not None:
                recursion = self._recur(weight)
                found = [_square(block) for block in mean.split(BLOCK)] if self._is_on_host else []
            if self._is_on_host:
                squares = _exact_where_needed(found, mean.split(BLOCK))
            else:
                squares = _squares_at_once(mean)
            # The squares of huge but finite elements may overflow, and that is no error.
            if not all(map(math.isfinite, squares)) and not bool(mean.isfinite().all()):
                raise ValueError(
                    "contributions must have a finite mean, got NaN or Inf from leases "
                    f"{[item.result.lease_id for item in fresh]}"
                )
        self._prepared = _Prepared(tuple(fresh), tuple(repeated), num_tasks, recursion)
        return squares

    def commit(self, norm: float) -> StepResult:
        """What the prepared step did; the second half of `apply`.

        Args:
            norm: `norm_of_blocks` of what `prepare` returned, in all shards if there are several.
        """
        assert self._prepared is not None, "prepare comes first"
        fresh, repeated, num_tasks = (
            self._prepared.fresh,
            self._prepared.repeated,
            self._prepared.num_tasks,
        )
        self._recursion = self._prepared.recursion
        self._prepared = None
        lr = self._config.lr_at(self.version)
        if num_tasks:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            num_divided, divisor = self._clip(norm)
            self._step(slice(num_divided), divisor)
            self._step(slice(num_divided, None), None)
            self._has_stepped = True
            if self._rules.project is not None:
                self._flat.copy_(flatten(self._rules.project(self.params)).detach())
        for item in fresh:
            self.states.update(item.states)
        staleness = tuple(self.version - item.result.version for item in fresh)
        if fresh:
            self.version += 1
            for item in fresh:
                self._applied.add(item.result.lease_id)
        return StepResult(
            version=self.version,
            applied=tuple(item.result.lease_id for item in fresh),
            repeated=repeated,
            staleness=staleness,
            hypergradient_norm=norm,
            lr=lr,
        )

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """The blocks of a vector of shape (L,) or (2 L,)."""
        halves = vector.split(len(self._flat))
        return [block for half in halves for block in half.split(self._block)]

    def _add_up(self, fresh: Sequence[Contribution], num_tasks: int) -> list[Tensor]:
        """Set the mean; on a CPU, returns `_square` of each block while it is in the cache."""
        totals = zip(*(self._pieces(item.total) for item in fresh), strict=True)
        squares = []
        for block, pieces in zip(self._pieces(self._mean), totals, strict=True):
            if len(fresh) == 1 and fresh[0].weight == 1 and pieces[0].dtype == block.dtype:
                torch.div(pieces[0], num_tasks, out=block)  # the same, in one pass
            else:
                block.copy_(pieces[0])
                if fresh[0].weight != 1:
                    block.mul_(fresh[0].weight)
                for piece, item in zip(pieces[1:], fresh[1:], strict=True):
                    block.add_(piece, alpha=item.weight)
                block.div_(num_tasks)
            if self._is_on_host:
                squares.append(_square(block))
        return squares

    def _clip(self, norm: float) -> tuple[int, Tensor | None]:
        """Clip the mean but for its first blocks: returns how many and by what to divide them.

        A kernel that divides while it reads the gradient saves a pass over it. It gets whole
        blocks, of which all owners of x have the same.
        """
        clip, most = self._config.clip_norm, self._config.clip_value
        factor, num_divided, divisor = 1.0, 0, None
        if clip is not None and norm > clip:
            factor = clip / norm
            if most is None and self._divides(norm / clip):
                num_divided, divisor = len(self._flat) // self._block, torch.tensor(norm / clip)
        for block in self._mean[: len(self._flat)].split(self._block)[num_divided:]:
            if factor < 1:
                block.mul_(factor)
            if most is not None:
                block.clamp_(-most, most)
        return num_divided, divisor

    def _divides(self, divisor: float) -> bool:
        """Whether the optimiser's kernel can divide by this number, which it takes in float32."""
        if not self._is_on_host or self._flat.dtype != torch.float32:
            return False
        is_offered: bool = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        return is_offered and divisor <= torch.finfo(torch.float32).max

    def _step(self, blocks: slice, divisor: Tensor | None) -> None:
        """Step these blocks of x along what is left of their mean, over `divisor`."""
        gradients = self._mean[: len(self._flat)].split(self._block)
        first, last, _ = blocks.indices(len(self._blocks))
        # The optimiser allocates a moment for each block when it first steps it. Some blocks at a
        # time, so that these copies never add up to a second x in memory.
        num_together = max(1, last - first) if self._has_stepped else 64
        # As torch.amp.GradScaler passes it.
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        for start in range(first, last, num_together):
            some = slice(start, min(start + num_together, last))
            for parameter, gradient in zip(self._blocks[some], gradients[some], strict=True):
                parameter.grad = gradient
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if not self._has_stepped:
                self._join_moments(some)

    def _join_moments(self, blocks: slice) -> None:
        """Move what the optimiser keeps of these blocks into vectors over the whole of x.

        The optimiser then holds views of these vectors, and updates them in place.
        """
        state = self._optimizer.state
        for name, leaf in state.get(self._blocks[blocks][0], {}).items():
            if isinstance(leaf, Tensor) and leaf.ndim:
                if len(self._blocks) == 1:
                    self._moments[name] = leaf
                    continue
                if name not in self._moments:
                    self._moments[name] = torch.empty_like(self._flat, dtype=leaf.dtype)
                pieces = self._moments[name].split(self._block)[blocks]
                for block, piece in zip(self._blocks[blocks], pieces, strict=True):
                    state[block][name] = piece.copy_(state[block][name])

    def _weight(self) -> float | None:
        """a_k of the step to come; 1 as long as there is nothing to go back to."""
        if self._rules.recursive_weight is None:
            return None
        return self._rules.recursive_weight(self.version) if self._recursion else 1.0

    def _recur(self, weight: float) -> dict[str, Tensor]:
        """w_k = h(x_k) + (1 - a_k) (w_{k-1} - h(x_{k-1})), also left in the mean, and x_k."""
        length = len(self._flat)
        if len(self._mean) > length:
            halves = *self._mean.split(length), self._recursion["w"]
            for h, h_before, w in zip(*(v.split(self._block) for v in halves), strict=True):
                h.add_((w - h_before).mul_(1 - weight))
        return {"w": self._mean[:length].clone(), "previous": self._flat.clone()}

    def _check(self, item: Contribution, expected: int) -> None:
        """Raise ValueError unless `item` can be added."""
        what = f"contribution of lease {item.result.lease_id}"
        if item.total.shape != (expected,) or not item.total.is_floating_point():
            raise ValueError(
                f"{what} must have shape ({expected},), got {tuple(item.total.shape)}"
                + ("" if item.total.is_floating_point() else f" of {item.total.dtype}")
            )
        _check_number("version", item.result.version, item, most=self.version)
        _check_number("num_tasks", item.result.num_tasks, item)
        if not 0 <= item.weight < math.inf:
            raise ValueError(f"{what} must have a finite weight >= 0, got {item.weight}")
        for index, state in item.states.items():
            _check_number("task index", index, item)
            like = self.states.get(index, state)
            if not same_form(state, like):
                raise ValueError(
                    f"{what} must have a state of task {index} of shape {tuple(like.shape)} and "
                    f"{like.dtype}, got {tuple(state.shape)} and {state.dtype}"
                )

    def state(self, copy: bool = True) -> OuterState:
        """Everything, for a checkpoint.

        Args:
            copy: True: on the CPU. False: the memory of this variable itself, where that is, not
                to be written to; it changes with the next step.
        """
        first = self._optimizer.state.get(self._blocks[0], {})
        moments = {
            name: self._moments.get(name, torch.as_tensor(leaf))
            for name, leaf in first.items()
            if leaf is not None
        }

        def kept(leaf: Tensor) -> Tensor:
            return leaf.detach().to("cpu", copy=True) if copy else leaf

        return OuterState(
            outer=self.unflatten(kept(self._flat)),
            optimizer={name: kept(leaf) for name, leaf in moments.items()},
            version=self.version,
            applied_below=self._applied.below,
            applied=tuple(sorted(self._applied.others)),
            recursion={name: kept(leaf) for name, leaf in self._recursion.items()},
            states={index: kept(leaf) for index, leaf in sorted(self.states.items())},
        )

    @classmethod
    def from_state(
        cls,
        state: OuterState,
        optimizer: OuterOptimizer,
        rules: StepRules | None = None,
        device: torch.device | None = None,
    ) -> OuterVariable:
        """The variable as it was when `state` was taken, in memory of its own, on `device`.

        Raises:
            ValueError: See `check_state`.
        """
        check_state(state, optimizer)
        variable = cls(state.outer, optimizer, rules, device)
        there = variable._flat.device

        def own(leaf: Tensor) -> Tensor:
            return leaf.to(there, copy=True)

        variable._recursion = {name: own(leaf) for name, leaf in state.recursion.items()}
        variable.states = {index: own(leaf) for index, leaf in state.states.items()}
        (group,) = variable._optimizer.param_groups
        reads_there = group.get("fused") or group.get("capturable")
        for name, leaf in state.optimizer.items():
            if leaf.ndim:
                variable._moments[name] = own(leaf)
                pieces: Iterable[Tensor] = variable._moments[name].split(variable._block)
            else:
                # The number of steps, which all but these kernels read on the CPU.
                pieces = (own(leaf) if reads_there else leaf.clone() for _ in variable._blocks)
            for block, piece in zip(variable._blocks, pieces, strict=True):
                variable._optimizer.state[block][name] = piece
        variable._has_stepped = bool(state.optimizer)
        variable.version = state.version
        variable._applied = Numbers(state.applied_below, state.applied)
        return variable


def shard_bounds(length: int, num_shards: int) -> list[tuple[int, int]]:
    """Where the slices of x of that length begin and end, all of whole blocks but for the last.

    Raises:
        ValueError: There are fewer blocks than shards.
    """
    num_blocks = max(1, math.ceil(length / BLOCK))
    if not 1 <= num_shards <= num_blocks:
        raise ValueError(
            f"num_shards must be between 1 and {num_blocks} for an outer variable of {length} "
            f"numbers, got {num_shards}: a shard holds {BLOCK} of them or more, and with fewer "
            "would only cost time"
        )
    cuts = [min(length, BLOCK * (n * num_blocks // num_shards)) for n in range(num_shards + 1)]
    return list(itertools.pairwise(cuts))


def norm_of_blocks(squares: Iterable[float]) -> float:
    """The Euclidean norm of a vector from the squared norms of its blocks, in their order."""
    total = 0.0
    for square in squares:  # `sum` rounds differently from one version of Python to another
        total += square
    return math.sqrt(total)


def _square(block: Tensor) -> Tensor:
    """The squared norm of a block: the same whoever owns it."""
    wide = block if block.dtype == torch.float32 else block.double()
    return torch.dot(wide, wide)


def _squares_at_once(vector: Tensor) -> list[float]:
    """The squared norm of each block of a vector on a GPU, in float64, with one look there."""
    whole = len(vector) // BLOCK * BLOCK
    parts = [
        part for part in (vector[:whole].view(-1, BLOCK), vector[None, whole:]) if part.numel()
    ]
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]
    squares: list[float] = torch.cat(norms).square().tolist()
    return squares


MIN_SQUARE = 1e-24
"""A squared norm in float32 that is smaller may lack squares that are zero in float32."""


def _exact_where_needed(squares: Sequence[Tensor], blocks: Sequence[Tensor]) -> list[float]:
    """The squared norms as numbers, in float64 where float32 overflows or underflows.

    In float32 they are exact to about the seventh digit, for a quarter of the time.
    """
    found = [float(square) for square in torch.stack(list(squares)).tolist()]
    for number, (square, block) in enumerate(zip(found, blocks, strict=True)):
        if not MIN_SQUARE <= square < math.inf and block.dtype == torch.float32:
            found[number] = float(_square(block.double()))
    return found


def check_state(state: OuterState, optimizer: OuterOptimizer) -> None:
    """Raise ValueError unless the parts of `state` belong together and to the optimiser."""
    length = num_elements(state.outer)
    like = torch.nn.Parameter(torch.zeros(1))
    like.grad = torch.zeros(1)
    stepped = optimizer.make([like])
    stepped.step()
    known = {name: leaf for name, leaf in stepped.state[like].items() if leaf is not None}
    shapes = {
        name: () if torch.as_tensor(leaf).ndim == 0 else (length,) for name, leaf in known.items()
    }
    recursion = {"w": (length,), "previous": (length,)}
    for group, leaves, expected in (
        ("optimizer", state.optimizer, shapes),
        ("recursion", state.recursion, recursion),
    ):
        found = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        if found not in ({}, expected):
            raise ValueError(
                f"{group} of a state must have the shapes {expected}, or be empty, got {found}"
            )
    if min([state.version, state.applied_below, *state.applied]) < 0:
        raise ValueError("version and leases of a state must be >= 0")


def _check_number(name: str, value: Any, item: Contribution, most: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer from 0 to `most`."""
    if not isinstance(value, int) or value < 0 or (most is not None and value > most):
        rule = ">= 0" if most is None else f"between 0 and {most}"
        raise ValueError(
            f"contribution of lease {item.result.lease_id} must have a {name} {rule}, got {value}"
        )
