"""An nn.Module as a function of its parameters: which are refused, names, and constants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from metadist.copies import copy_module
from metadist.models import TaskBatchNorm
from metadist.rematerialise import as_plain, refuse_checkpointing
from metadist.trees import Params


def trainable(module: nn.Module) -> Params:
    """A copy of the trainable parameters of `module` by name."""
    named = module.named_parameters()
    return {name: leaf.detach().clone() for name, leaf in named if leaf.requires_grad}


def constants(module: nn.Module) -> Iterator[Tensor]:
    """The buffers and the frozen parameters of `module`."""
    yield from module.buffers()
    yield from (leaf for leaf in module.parameters() if not leaf.requires_grad)


def move_constants(module: nn.Module, device: torch.device) -> None:
    """Move the buffers and the frozen parameters of `module` to `device`."""
    for child in module.modules():
        for name, leaf in child.named_buffers(recurse=False):
            if leaf.device != device:
                child._buffers[name] = leaf.to(device)
        for name, leaf in child.named_parameters(recurse=False):
            if not leaf.requires_grad and leaf.device != device:
                child._parameters[name] = nn.Parameter(leaf.to(device), requires_grad=False)


def names_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The trainable parameters, as `trainable` calls them, for each name that a user may know.

    A parameter that several layers share, or whose layer is registered twice, has several names
    and counts once. A weight that is computed (torch.nn.utils.parametrize) stands for the
    parameters that it is computed from.
    """
    first = {id(leaf): name for name, leaf in module.named_parameters() if leaf.requires_grad}
    known: dict[str, tuple[str, ...]] = {name: (name,) for name in first.values()}
    for name, leaf in module.named_parameters(remove_duplicate=False):
        if id(leaf) in first:
            known[name] = (first[id(leaf)],)
            layer, is_computed, rest = name.partition("parametrizations.")
            if is_computed:
                computed = layer + rest.partition(".")[0]
                known[computed] = (*known.get(computed, ()), first[id(leaf)])
    return known


class _Place(NamedTuple):
    """Where a module holds a parameter.

    Args:
        owner: The parameters of the layer.
        name: Its name there.
        path: Its name in the whole module at this place.
        key: Its name in the whole module, as `trainable` calls it: that of its first place.
    """

    owner: dict[str, Any]
    name: str
    path: str
    key: str


def _places(module: nn.Module) -> list[_Place]:
    places = []
    keys: dict[int, str] = {}
    for layer, child in module.named_modules():
        for name, leaf in child.named_parameters(recurse=False):
            path = f"{layer}.{name}" if layer else name
            key = keys.setdefault(id(leaf), path)
            places.append(_Place(owner=child._parameters, name=name, path=path, key=key))
    return places


# A cache for the whole process: to look for the parameters takes longer than a small model does.
_known: WeakKeyDictionary[nn.Module, tuple[list[_Place], bool]] = WeakKeyDictionary()


def call(module: nn.Module, params: Params, *inputs: Tensor, **named: Tensor) -> Tensor:
    """The outputs of `module` with `params`, named as by `trainable`, in place of its own."""
    if torch.compiler.is_compiling():
        return _call_by_torch(module, params, *inputs, **named)
    if module not in _known:
        _known[module] = _places(module), any(True for _ in constants(module))
    places, has_constants = _known[module]
    if has_constants:
        move_constants(module, inputs[0].device)
    given = [place for place in places if place.key in params]
    own = [place.owner[place.name] for place in given]
    try:
        for place in given:
            place.owner[place.name] = params[place.key]
        output: Tensor = module(*inputs, **named)
    except RuntimeError as error:
        if not re.search(r"\b[Mm]eta\b(?!-)", str(error)):  # torch's word for a blank weight
            raise
        raise ValueError(
            f"model must read its weights from its layers, got {type(module).__name__}, in which "
            f"a hook, a list or a function holds one itself ({error}): let it hold the layer"
        ) from error
    finally:
        for place, leaf in zip(given, own, strict=True):
            place.owner[place.name] = leaf
    return output


def _call_by_torch(module: nn.Module, params: Params, *inputs: Tensor, **named: Tensor) -> Tensor:
    """The same by the one way that torch.compile knows, and some times slower in eager."""
    move_constants(module, inputs[0].device)
    # Each place once. With tie_weights=True torch also fills the second names of a layer, and then
    # restores the two in the wrong order, so that the tensors of this call stay in the module.
    given = {place.path: params[place.key] for place in _places(module) if place.key in params}
    output: Tensor = functional_call(module, given, inputs, named, tie_weights=False)
    return output


def without_parameters(model: nn.Module) -> nn.Module:
    """A copy of `model` whose trainable parameters have a shape but no memory; can be pickled."""
    # A memo of `deepcopy` holds the copies to use: so the weights are never copied.
    memo: dict[int, Any] = {
        id(leaf): nn.Parameter(torch.empty_like(leaf, device="meta"))
        for leaf in model.parameters()
        if leaf.requires_grad
    }
    try:
        copied = copy_module(model, memo)
    except Exception as error:  # whatever a user's class raises
        raise ValueError(
            f"model must be a module that copy.deepcopy can copy, got {type(model).__name__}, "
            f"with which it ends in {type(error).__name__}: {error}{_computed(model)}"
        ) from error
    return _all_picklable(copied)


def emptied(model: nn.Module) -> tuple[Params, nn.Module]:
    """(the trainable parameters of `model`, `model` itself without memory for them).

    For a model that nobody else has: nothing is copied, so that a frozen base may stay a file that
    is mapped into memory.
    """
    start = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    blank = {
        name: nn.Parameter(torch.empty_like(leaf, device="meta")) for name, leaf in start.items()
    }
    for place in _places(model):
        if place.key in blank:
            place.owner[place.name] = blank[place.key]
    return {name: leaf.detach() for name, leaf in start.items()}, _all_picklable(model)


def _all_picklable(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if parametrize.is_parametrized(layer):
            _make_picklable(layer, type(layer).__bases__[0])
    return model


def _computed(model: nn.Module) -> str:
    for name, layer in model.named_modules():
        for field, value in vars(layer).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                return (
                    f". Layer {name!r} keeps a tensor that it has computed, {field!r}: compute it "
                    "in forward; in place of torch.nn.utils.weight_norm and spectral_norm use "
                    "those of torch.nn.utils.parametrizations"
                )
    return ""


def _make_picklable(layer: nn.Module, plain: type[nn.Module]) -> None:
    """Let a parametrized layer be pickled, which torch refuses since it makes its class itself."""

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _parametrized, (plain, vars(self))

    made = type(layer)
    layer.__class__ = type(made.__name__, (made,), {"__reduce_ex__": reduce})


def _parametrized(plain: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    layer = plain.__new__(plain)
    vars(layer).update(state)
    parametrize._inject_new_class(layer)
    for name in state["_modules"]["parametrizations"]:
        parametrize._inject_property(layer, name)
    _make_picklable(layer, plain)
    return layer


def plain_module(model: nn.Module, params: Params, inputs: Tensor) -> nn.Module:
    """A copy of `model` with these parameters in it, of torch's own layers and weights.

    Args:
        model: As of `without_parameters`.
        params: Its trainable parameters, named as by `trainable`.
        inputs: The support inputs, whose statistics "inductive" batch norm keeps.
    """
    module = as_plain(copy_module(model, {}))
    made: dict[str, nn.Parameter] = {}
    for place in _places(module):
        if place.key in params:
            leaf = made.setdefault(place.key, nn.Parameter(params[place.key].detach().clone()))
            place.owner[place.name] = leaf
    move_constants(module, inputs.device)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):  # a head may have as many outputs as its task has classes
            layer.out_features = len(layer.weight)
        if parametrize.is_parametrized(layer):
            names = list(cast(nn.ModuleDict, layer.parametrizations))
            # A copy shares its class with `model`, and torch takes the properties from the class.
            layer.__class__ = type(layer).__bases__[0].__bases__[0]
            parametrize._inject_new_class(layer)
            for name in names:
                parametrize._inject_property(layer, name)
            for name in names:
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
            hooks = layer._load_state_dict_pre_hooks
            for number, hook in list(hooks.items()):  # for names that the weights had before
                if getattr(hook, "hook", hook).__module__ == nn.utils.parametrizations.__name__:
                    del hooks[number]
        if type(layer).__module__.startswith("metadist.layers."):
            layer.__class__ = type(layer).__bases__[0]
    norms = _torch_batch_norms(module, inputs)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in norms:
                parent._modules[name] = norms[child]
    return norms.get(module, module)


def _torch_batch_norms(module: nn.Module, inputs: Tensor) -> dict[nn.Module | None, nn.Module]:
    """The layer of torch that does what each `TaskBatchNorm` does after this support set."""
    seen: dict[TaskBatchNorm, list[Tensor]] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, TaskBatchNorm)
        seen.setdefault(layer, []).append(args[0].detach())

    layers = [layer for layer in module.modules() if isinstance(layer, TaskBatchNorm)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: _torch_batch_norm(layer, passed) for layer, passed in seen.items()}


def _torch_batch_norm(layer: TaskBatchNorm, passed: list[Tensor]) -> nn.Module:
    is_inductive = layer.policy == "inductive"
    if is_inductive and len(passed) > 1:
        raise ValueError(
            f"batch norm of policy 'inductive' must run once in a pass to be exported, got {layer} "
            f"that runs {len(passed)} times: it has other statistics each time"
        )
    x = passed[0]
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(x.ndim, nn.BatchNorm1d)
    norm = kind(layer.num_features, eps=layer.eps, track_running_stats=is_inductive)
    norm.weight, norm.bias = layer.weight, layer.bias
    if is_inductive:
        axes = [0, *range(2, x.ndim)]
        norm.running_var, norm.running_mean = torch.var_mean(x, axes, correction=0)
    return norm


class Head:
    """The last layer of a model, and the model without it.

    Args:
        model: As of `without_parameters`.
        name: The name of the layer.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.head = model.get_submodule(name)
        whole = {id(leaf): name for name, leaf in model.named_parameters()}
        self._names = {whole[id(leaf)]: local for local, leaf in self.head.named_parameters()}
        memo: dict[int, Any] = {id(leaf): leaf for leaf in model.parameters()}
        memo |= {id(leaf): leaf for leaf in model.buffers()}
        memo[id(self.head)] = nn.Identity()  # in all places where the model has it
        self.body = copy_module(model, memo)
        for shared, leaf in self.body.named_parameters():
            if leaf.requires_grad and whole[id(leaf)] in self._names:
                raise ValueError(
                    f"adapt must not be 'head' for a model whose last layer {name!r} shares a "
                    f"parameter with what comes before it ({shared!r}), got 'head': it would be "
                    f"adapted there too. Use 'all', or name it, adapt='{name}.*'"
                )

    def of_body(self, params: Params) -> Params:
        return {name: leaf for name, leaf in params.items() if name not in self._names}

    def of_head(self, params: Params) -> Params:
        return {name: leaf for name, leaf in params.items() if name in self._names}

    def to_head(self, params: Params) -> Params:
        """The head's own parameters, by the names the head itself has for them."""
        return {self._names[name]: leaf for name, leaf in self.of_head(params).items()}


def last_registered(model: nn.Module) -> str:
    """The name of the module that owns the last trainable parameter."""
    registered = [name for name, leaf in model.named_parameters() if leaf.requires_grad]
    if not registered:
        raise ValueError("model must have a trainable parameter, got none with requires_grad=True")
    # The parameters of a parametrized layer are in a child of it.
    layer = ("." + registered[-1]).rpartition(".")[0].partition(".parametrizations.")[0]
    if not layer:
        raise ValueError(
            "adapt must be 'all' or names of parameters for a model whose last parameter "
            f"{registered[-1]!r} is in no submodule, got 'head'"
        )
    return layer.removeprefix(".")


def last_executed(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """The name of the layer with trainable parameters whose output is that of `run`.

    Args:
        model: The model.
        run: Calls the model once.

    Raises:
        ValueError: There is no such layer, or it runs more than once.
    """
    ran: list[tuple[str, bool, Any]] = []
    hooks = []
    for name, layer in model.named_modules():
        if any(leaf.requires_grad for leaf in layer.parameters()) and name:

            def note(layer: nn.Module, args: Any, output: Any, name: str = name) -> None:
                ran.append((name, not any(True for _ in layer.children()), output))

            hooks.append(layer.register_forward_hook(note))
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    # A layer returns before the modules that it is in.
    heads = [name for name, _, found in ran if found is output]
    if not heads:
        last = ran[-1][0] if ran else last_registered(model)
        raise ValueError(
            f"adapt must not be 'head' for a model that returns something else than the output of "
            f"its last layer {last!r}, got 'head': name the parameters instead, adapt='{last}.*'"
        )
    times = sum(name == heads[0] for name, *_ in ran)
    if times > 1:
        raise ValueError(
            f"adapt must not be 'head' for a model whose last layer {heads[0]!r} runs {times} "
            f"times in a forward pass, got 'head': use 'all', or adapt='{heads[0]}.*'"
        )
    return heads[0]


def _dropout(module: nn.Module) -> float:
    """The share of its inputs that `module` itself would drop at random."""
    if module.training and isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if module.training and isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout)
    return 0.0


def check_model(model: nn.Module) -> None:
    """Raise ValueError for layers whose inner loop could not be replayed or differentiated."""
    for name, leaf in model.named_parameters():
        if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameters must have no hooks on their gradients, {name!r} has one: it would "
                "never run, since an inner loop computes with other tensors in their place. Do in "
                "the forward pass what it does, for example multiply the weight by a mask, or set "
                "requires_grad_(False)"
            )
    for name, module in model.named_modules():
        refuse_checkpointing(name, module)
        whose = f"layer {name!r}" if name else "the model"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"model must not be compiled by torch.compile, {whose} is: compiled code has no "
                "second derivative. Pass the module that was compiled (._orig_mod); algorithms "
                "with compile=True compile its derivatives"
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise ValueError(
                f"model must know its sizes, {whose} is a {type(module).__name__} that has seen no "
                "inputs: call the model once, model(inputs)"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model must be a plain nn.Module, {whose} is a {type(module).__name__}, whose "
                "parameters cannot be exchanged: pass the module that was scripted"
            )
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"max_norm must be None in the inner loop, {whose} has {module.max_norm}: it "
                "writes to the weight while a gradient is computed; clip weights in a problem's "
                "project_outer, or leave it out"
            )
        if _dropout(module) > 0:
            raise ValueError(
                f"dropout must be off in the inner loop, layer {name!r} has p={_dropout(module)}: "
                "its random mask could not be replayed for second derivatives; set it to 0, or "
                f"model.get_submodule({name!r}).eval()"
            )
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.training
        ):
            raise ValueError(
                f"batch norm must not update running statistics, layer {name!r} does: convert "
                "the model with metadist.models.with_task_batch_norm(model), or freeze the "
                f"statistics with model.get_submodule({name!r}).eval()"
            )
