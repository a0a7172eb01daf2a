"""`sum_of_micro_batches`: a loss whose examples go through a model part by part, in any derivative.

The forward pass takes the gradient of each part at once, and keeps the sum of these gradients
rather than graphs: a gradient costs what it costs on all examples together. A second-order product
goes through the parts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from metadist.checks.values import require_integer
from metadist.rematerialise import Surroundings, is_transformed, unchanged, without_autocast
from metadist.trees import Params


def sum_of_micro_batches(
    function: Callable[..., Tensor],
    variables: Sequence[Params],
    examples: Sequence[Tensor],
    micro_batch: int | None,
) -> Tensor:
    """The sum over parts of the examples of `function(*variables, *part)`, of shape ().

    For losses of a `Problem`: the value and its first and second derivatives, by reverse mode, are
    those of one call with all examples, and memory is that of one part. What belongs to all
    examples, the number by which a mean divides or weights that are normalised over the batch, is
    computed outside and passed as an example's own:

        def weighted(inner, inputs, targets, weights):
            return (weights * losses_of_examples(inner, inputs, targets)).sum()

        parts = inputs, targets, weights / len(weights)
        mean = sum_of_micro_batches(weighted, (inner,), parts, micro_batch=4)

    Args:
        function: Returns the contribution of a part, of shape (), which must be a sum over its
            examples. It depends on variables through its arguments alone.
        variables: Trees that go to every part.
        examples: Tensors whose leading axis is the example; also differentiable ones.
        micro_batch: Examples per part; None: all of them.

    Raises:
        ValueError: `micro_batch` < 1; `function` returns no scalar, draws random numbers, changes
            its arguments, or depends on a variable that is no argument of it.

    Cost: that of one call with all examples; of a second-order product one more gradient. Under
    torch.func, so also under vmap, memory is that of all examples, and a warning says so.
    """
    if micro_batch is None:
        return _scalar(function(*variables, *examples))
    require_integer("micro_batch", micro_batch, 1)
    sizes = {len(tensor) for tensor in examples}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            "examples must be tensors of one length >= 1 along axis 0, got "
            f"{[tuple(tensor.shape) for tensor in examples]}"
        )
    if min(sizes) <= micro_batch:
        return _scalar(function(*variables, *examples))
    tensors = [leaf for tree in variables for leaf in tree.values()] + [*examples]
    parts = _Parts(function, [list(tree) for tree in variables], micro_batch, tensors)
    wants_gradient = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tensors)
    if is_transformed() or not wants_gradient:
        return torch.stack([parts.value(part) for _, part in parts.cut(tensors)]).sum()
    found: Tensor = _Sum.apply(parts, *tensors)
    return found


def _scalar(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != ():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the function of micro-batches must return a tensor of shape (), got {got}: sum over "
            "the examples within it"
        )
    return value


class _Parts:
    """The parts of a sum, as functions of tensors: leaves of all variables, then examples."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        names: list[list[str]],
        size: int,
        tensors: Sequence[Tensor],
    ) -> None:
        self._function, self._names, self._size = function, names, size
        self._count = sum(map(len, names))
        self._surroundings = Surroundings.now(tensors)

    def cut(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Which examples, and the arguments, of each part."""
        variables, examples = tensors[: self._count], tensors[self._count :]
        for start in range(0, len(examples[0]), self._size):
            where = slice(start, start + self._size)
            yield where, [*variables, *(tensor[where] for tensor in examples)]

    def value(self, arguments: Sequence[Tensor]) -> Tensor:
        """The contribution of a part."""
        leaves = iter(arguments)
        trees = [{name: next(leaves) for name in names} for names in self._names]
        with self._surroundings.again():
            return _scalar(self._function(*trees, *leaves))

    def gathered(self, tensors: Sequence[Tensor], wanted: Sequence[bool], of_part: OfPart) -> Grads:
        """What `of_part` gives for the wanted tensors: summed, and of examples in order."""
        numbers = [number for number, is_wanted in enumerate(wanted) if is_wanted]
        totals = [torch.zeros_like(tensors[number]) for number in numbers]
        for where, part in self.cut(tensors):
            part = [leaf.detach() for leaf in part]
            leaves = [part[number].requires_grad_() for number in numbers]
            with torch.enable_grad(), unchanged("the function of micro-batches", part):
                value = self.value(part)
            # As outside of a loss: autocast would round what goes back, too.
            with without_autocast():
                found = of_part(where, value, leaves)
            for number, total, gradient in zip(numbers, totals, found, strict=True):
                total[self.place(number, where)].add_(gradient)
            del value, leaves, found, part  # the graph of a part, before the next one is made
        return totals

    def place(self, number: int, where: slice) -> slice | EllipsisType:
        """What belongs to a part in the tensor of this number."""
        return ... if number < self._count else where


Grads = list[Tensor]

OfPart = Callable[[slice, Tensor, list[Tensor]], Sequence[Tensor]]
"""(which examples, the contribution, the leaves it depends on) -> a tensor like each leaf."""


class _Sum(torch.autograd.Function):
    """The sum, which keeps its gradient."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, *tensors: Tensor) -> Tensor:
        ctx.parts, ctx.wanted = parts, ctx.needs_input_grad[1:]
        values: list[Tensor] = []

        def gradient(where: slice, value: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
            if not values:
                _refuse_others(value, leaves)
            values.append(value.detach())
            return _gradients([value], leaves, None)

        gradients = parts.gathered(tensors, ctx.wanted, gradient)
        ctx.save_for_backward(*tensors, *gradients)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        found = iter(_Gradient.apply(ctx.parts, ctx.wanted, *ctx.saved_tensors))
        return None, *(cotangent * next(found) if wanted else None for wanted in ctx.wanted)


class _Gradient(torch.autograd.Function):
    """The gradient of the sum, which is known; its derivative goes through the parts again."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, wanted: Sequence[bool], *tensors: Tensor) -> Any:
        count = len(wanted)
        ctx.parts, ctx.wanted = parts, wanted
        ctx.save_for_backward(*tensors[:count])
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        # once_differentiable would leave a third derivative out where unused variables are allowed.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "micro-batches have first and second derivatives, got a graph of the second to "
                "differentiate again: leave out micro_batch"
            )
        numbers = [number for number, wanted in enumerate(ctx.wanted) if wanted]

        def product(where: slice, value: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
            slopes = _gradients([value], leaves, None, create_graph=True)
            directions = [
                direction[ctx.parts.place(number, where)]
                for number, direction in zip(numbers, along, strict=True)
            ]
            return _gradients(slopes, leaves, directions)

        found = iter(ctx.parts.gathered(ctx.saved_tensors, ctx.wanted, product))
        products = [next(found) if wanted else None for wanted in ctx.wanted]
        return None, None, *products, *(None for _ in numbers)


def _gradients(
    outputs: Sequence[Tensor],
    leaves: list[Tensor],
    cotangents: Sequence[Tensor] | None,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    cotangents = cotangents or [torch.ones_like(output) for output in outputs]
    pairs = zip(outputs, cotangents, strict=True)
    live = [(output, along) for output, along in pairs if output.requires_grad]
    if not live:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        [output for output, _ in live],
        leaves,
        [along for _, along in live],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _refuse_others(value: Tensor, leaves: list[Tensor]) -> None:
    """Raise ValueError if `value` depends on a variable that is none of `leaves`."""
    ours = set(map(id, leaves))
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [previous for previous, _ in node.next_functions]
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ours:
            raise ValueError(
                "the function of micro-batches must depend on variables through its arguments, it "
                f"also takes one of shape {tuple(variable.shape)} from elsewhere, whose gradient "
                "would be lost: pass it in variables, or among the examples"
            )
