"""`rematerialise`: blocks of a model that keep their inputs alone until they are differentiated.

torch's own checkpoint runs a block again in the backward pass and then keeps what that pass makes,
if it is to be differentiated once more. Here the backward pass of a block is such a block itself: a
function of its inputs and of the gradients of its outputs that keeps these alone. So derivatives of
every order, by reverse mode, keep inputs of blocks and nothing from within them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), is the idea for the first
derivative.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex, TypeVar, cast
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metadist.rows import Rows, current_rows, rows

Module = TypeVar("Module", bound=nn.Module)


def rematerialise(model: Module, blocks: str | Sequence[str] = "auto") -> Module:
    """`model` itself, with blocks that keep their inputs only and compute the rest again.

    Derivatives are those of the plain model, and so are its names, weights and pickles. The memory
    of a gradient, or of a second-order product, is then that of one block and of the inputs of all,
    at up to twice the time. Under `torch.func`, so also under vmap, and in compiled code blocks
    are computed as if they were plain, with a warning.

    Args:
        model: The model; it must not checkpoint by itself.
        blocks: Patterns of the names of modules, as of `named_modules`: "features.*", where * is
            one part of a name. "auto": all blocks of the class that the longest list of blocks (a
            ModuleList or Sequential, not one within a block) has most of.

    Raises:
        ValueError: No block is found, one is within another, or one cannot be computed again from
            its inputs. When it is called: a block draws random numbers, changes its inputs or
            buffers, depends on a variable that is no input of it, or is given what is neither
            tensors nor plain values.
    """
    for name, module in model.named_modules():
        refuse_checkpointing(name, module)
    chosen = _largest_blocks(model) if blocks == "auto" else _named(model, blocks)
    outermost: list[str] = []
    for name in sorted(chosen):  # a module comes before those within it
        block = model.get_submodule(name)
        inner = [child for child, module in block.named_modules() if is_rematerialised(module)]
        above = [other for other in outermost if name.startswith(other + ".")]
        above += [
            other for other in _parents(name) if is_rematerialised(model.get_submodule(other))
        ]
        if inner or above:
            other = above[0] if above else f"{name}.{inner[0]}".rstrip(".")
            raise ValueError(
                "blocks must not be within one another nor be rematerialised already, got "
                f"{name!r} and {other!r}: what is within a block is computed again with it. Name "
                "one of them"
            )
        if "forward" in vars(block) or parametrize.is_parametrized(block):
            raise ValueError(
                f"blocks must be plain modules, got {name!r}, whose forward or own weights were "
                "replaced on the instance: name the modules in it, or the one around it"
            )
        outermost.append(name)
    for name in chosen:
        block = model.get_submodule(name)
        block.__class__ = _class_of(type(block))
    return model


def refuse_checkpointing(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module that checkpoints by itself, as those of transformers can."""
    if getattr(module, "gradient_checkpointing", False) is True:
        whose = f"layer {name!r}" if name else "the model"
        raise ValueError(
            f"gradient_checkpointing must be off, {whose} ({type(module).__name__}) has it on: it "
            "serves first derivatives of a model's own weights only. Call "
            "model.gradient_checkpointing_disable(), and metadist.models.rematerialise(model), "
            "which serves second derivatives too"
        )


def is_rematerialised(module: nn.Module) -> bool:
    """Whether `module` is a block that `rematerialise` has changed."""
    return isinstance(module, _Rematerialised)


def as_plain(model: Module) -> Module:
    """`model` itself, its blocks as they were before `rematerialise`."""
    for module in model.modules():
        if is_rematerialised(module):
            module.__class__ = _plain_class(type(module))
    return model


def _parents(name: str) -> list[str]:
    """The names of the modules around the one of this name, the model's own, "", included."""
    parts = name.split(".") if name else []
    return [".".join(parts[:number]) for number in range(len(parts))]


def _named(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    given, patterns = patterns, [patterns] if isinstance(patterns, str) else patterns
    if (
        not isinstance(patterns, Sequence)
        or not patterns
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise ValueError(
            f"blocks must be 'auto', or patterns of names of modules, got {given!r}: name at least "
            "one, such as 'features.*'"
        )
    found: dict[str, None] = {}
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        parts = pattern.split(".")
        matching = [
            name
            for name in names
            if len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts))
        ]
        if not matching:
            raise ValueError(
                f"blocks must match names of modules, got {pattern!r}: the modules are "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            )
        found.update(dict.fromkeys(matching))
    return list(found)


def _largest_blocks(model: nn.Module) -> list[str]:
    lists: list[list[str]] = []
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or name.startswith(within):
            continue
        members: dict[type[nn.Module], list[str]] = {}
        for child, block in module.named_children():
            if any(True for _ in block.children()):  # else there is nothing within it to keep
                members.setdefault(type(block), []).append(f"{name}.{child}".lstrip("."))
        blocks = max(members.values(), key=len, default=[])
        if len(blocks) > 1:
            lists.append(blocks)
            within += tuple(block + "." for block in blocks)
    if not lists:
        raise ValueError(
            f"blocks must be named for {type(model).__name__}, which has no list of blocks of one "
            "class, got 'auto': give patterns of names of its modules"
        )
    longest = type(model.get_submodule(max(lists, key=len)[0]))
    # A decoder has the blocks of its encoder.
    return [
        name for blocks in lists for name in blocks if type(model.get_submodule(name)) is longest
    ]


class _Rematerialised(nn.Module):
    """What a block is beside its own class: that class comes next in the order of its bases."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = super().forward
        if is_transformed() or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        function = _Forward(self, plain, (args, kwargs))
        if not any(leaf.requires_grad for leaf in function.inputs):
            return plain(*args, **kwargs)
        for leaf in function.arguments.rest:
            if not isinstance(leaf, PLAIN):
                raise ValueError(
                    f"a rematerialised block ({type(self).__name__}) must be given tensors and "
                    f"plain values, got a {type(leaf).__name__}: such an object may change when "
                    "the block is computed again. A cache of keys and values is left out by "
                    "use_cache=False; else leave out rematerialise"
                )
        return function.output(_Checkpoint.apply(function, *function.inputs))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # Its class is made at run time: what is saved is the class that it was made of.
        new, (made, *rest), *state = cast(Any, super().__reduce_ex__(max(2, int(protocol))))
        assert new is copyreg.__newobj__ and made is type(self)  # type: ignore[attr-defined]
        return (_new, (_plain_class(made), *rest), *state)


PLAIN = (int, float, complex, str, bytes, type(None), Enum, type, torch.dtype, torch.device)
"""The classes of arguments of which nothing is different when a block is computed again."""


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a rematerialised block of class `plain`; its name is the same."""
    if plain not in _made:
        namespace = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _made[plain] = type(plain.__name__, (_Rematerialised, plain), namespace)
    return _made[plain]


def _plain_class(made: type[nn.Module]) -> type[nn.Module]:
    plain: type[nn.Module] = made.__bases__[1]
    return plain


def _new(plain: type[nn.Module], *args: Any) -> nn.Module:
    made = _class_of(plain)
    return made.__new__(made, *args)


def is_transformed() -> bool:
    """Whether torch.func or torch.compile is at work, under which nothing is computed again.

    Warns about it, once in a process.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    _warn_transformed()
    return True


@lru_cache
def _warn_transformed() -> None:
    warn(
        "rematerialised blocks and micro-batches save no memory under vmap and torch.func: "
        "Compute(vectorize=False) computes tasks one by one",
        RuntimeWarning,
        stacklevel=4,
    )


class Surroundings(NamedTuple):
    """What a forward pass depends on beside its inputs, and what is to be so again.

    Args:
        rows: What the batch norm of several tasks reads.
        autocast: (kind of device, whether it is on, the dtype) of each kind.
        caches: Whether autocast keeps what it has cast.
        kernels: Those that attention may take.
    """

    rows: Rows
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    caches: bool
    kernels: tuple[SDPBackend, ...]

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> Surroundings:
        return cls._of({leaf.device.type for leaf in tensors})

    @classmethod
    def _of(cls, devices: set[str]) -> Surroundings:
        return cls(
            rows=current_rows(),
            autocast=tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in sorted(devices | {"cpu"})
            ),
            caches=torch.is_autocast_cache_enabled(),
            kernels=tuple(_cur_sdpa_kernel_backends()),
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        now = self._of({kind for kind, *_ in self.autocast})
        with ExitStack() as stack:
            if now.rows != self.rows:
                stack.enter_context(rows(*self.rows))
            if now.kernels != self.kernels:
                stack.enter_context(sdpa_kernel(list(self.kernels)))
            for kind, is_on, dtype in self.autocast:
                # Also where nothing has changed: what it has cast belongs to one pass.
                if is_on or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, is_on, self.caches))
            yield


class _Structure(NamedTuple):
    """What a tree of arguments or results is beside its tensors.

    Args:
        spec: How it is built from its leaves.
        rest: The leaves, None in place of tensors.
        slots: The numbers of those that are tensors.
    """

    spec: TreeSpec
    rest: list[Any]
    slots: list[int]

    @classmethod
    def split(cls, tree: Any) -> tuple[_Structure, list[Tensor]]:
        """The structure of a tree, and its tensors."""
        leaves, spec = tree_flatten(tree)
        slots = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(spec, rest, slots), [leaves[slot] for slot in slots]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The tree with these tensors in it."""
        leaves = list(self.rest)
        for slot, leaf in zip(self.slots, tensors, strict=True):
            leaves[slot] = leaf
        return tree_unflatten(leaves, self.spec)


class _Forward:
    """A block as a function of `inputs`: the tensors among its arguments, weights and buffers."""

    def __init__(self, block: nn.Module, plain: Callable[..., Any], arguments: Any) -> None:
        self._name, self._plain = type(block).__name__, plain
        self.arguments, tensors = _Structure.split(arguments)
        # Where modules hold weights and buffers: a caller may have exchanged them for this call.
        self._places: list[tuple[dict[str, Any], str]] = [
            (owner, name)
            for module in block.modules()
            for owner in (module._parameters, module._buffers)
            for name, leaf in owner.items()
            if leaf is not None
        ]
        self.inputs: list[Tensor] = tensors + [owner[name] for owner, name in self._places]
        self._surroundings = Surroundings.now(self.inputs)
        self._output: _Structure | None = None

    def __str__(self) -> str:
        return self._name

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(self.arguments.slots)
        args, kwargs = self.arguments.filled(inputs[:count])
        own = [owner[name] for owner, name in self._places]
        try:
            for (owner, name), leaf in zip(self._places, inputs[count:], strict=True):
                owner[name] = leaf
            with self._surroundings.again():
                output = self._plain(*args, **kwargs)
        finally:
            for (owner, name), leaf in zip(self._places, own, strict=True):
                owner[name] = leaf
        self._output, tensors = _Structure.split(output)
        return tuple(tensors)

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """What the block returned, with these tensors in it."""
        assert self._output is not None
        return self._output.filled(tensors)


class _Checkpoint(torch.autograd.Function):
    """A function of tensors that keeps them alone, and is computed again to be differentiated."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        # With a graph, to see what else enters: what is detached makes none.
        with torch.enable_grad(), unchanged(f"a rematerialised block ({function})", inputs):
            outputs = function(*(leaf.detach() for leaf in inputs))
        if any(leaf.requires_grad for leaf in outputs):
            raise ValueError(
                f"a rematerialised block ({function}) must depend on variables through its inputs "
                "and weights, it also takes one from elsewhere, whose gradient would be lost: pass "
                "it as an argument, or leave out rematerialise"
            )
        ctx.differentiable = [n for n, leaf in enumerate(outputs) if _is_differentiable(leaf)]
        ctx.mark_non_differentiable(*(leaf for leaf in outputs if not _is_differentiable(leaf)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        pull = _Pull(ctx.function, wanted, ctx.differentiable)
        found = iter(
            _Checkpoint.apply(
                pull, *(cotangents[number] for number in ctx.differentiable), *ctx.saved_tensors
            )
        )
        return None, *(next(found) if is_wanted else None for is_wanted in wanted)


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class _Pull(NamedTuple):
    """The product of cotangents with the Jacobian of a function, as a function of all tensors.

    Args:
        function: The function.
        wanted: For each of its inputs, whether a gradient in it is wanted.
        outputs: The numbers of the outputs that have cotangents.
    """

    function: Callable[..., tuple[Tensor, ...]]
    wanted: tuple[bool, ...]
    outputs: list[int]

    def __str__(self) -> str:
        return str(self.function)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        cotangents, inputs = tensors[: len(self.outputs)], tensors[len(self.outputs) :]
        create_graph = any(leaf.requires_grad for leaf in tensors)
        inputs = tuple(
            leaf.detach().requires_grad_() if is_wanted and not leaf.requires_grad else leaf
            for is_wanted, leaf in zip(self.wanted, inputs, strict=True)
        )
        with torch.enable_grad():
            outputs = self.function(*inputs)
        pairs = [
            (outputs[number], cotangent)
            for number, cotangent in zip(self.outputs, cotangents, strict=True)
            if outputs[number].requires_grad
        ]
        return torch.autograd.grad(
            [output for output, _ in pairs],
            [leaf for is_wanted, leaf in zip(self.wanted, inputs, strict=True) if is_wanted],
            [cotangent for _, cotangent in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )


@contextmanager
def unchanged(what: str, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Raise ValueError if a computation leaves something that makes it another one the next time.

    Args:
        what: What is computed, in words.
        inputs: The tensors that it must not write to.
    """
    versions, random = [leaf._version for leaf in inputs], _random_states(inputs)
    yield
    if versions != [leaf._version for leaf in inputs]:
        raise ValueError(
            f"{what} must not change its inputs or buffers, it does: they would be others when it "
            "is computed again. Compute a new tensor instead; batch norm is converted by "
            "metadist.models.with_task_batch_norm"
        )
    if not all(map(torch.equal, random, _random_states(inputs))):
        raise ValueError(
            f"{what} must not draw random numbers, it does: they would be others when it is "
            "computed again. Set dropout to 0, or call model.eval()"
        )


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the block no autocast is on, as where derivatives are taken outside of it."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _random_states(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The states of the generators that are drawn from where the caller names none."""
    states = [torch.get_rng_state()]
    for device in {leaf.device for leaf in inputs if leaf.device.type == "cuda"}:
        if not torch.cuda.is_current_stream_capturing():
            states.append(torch.cuda.get_rng_state(device))
    return states
