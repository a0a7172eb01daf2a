"""The backbones of the few-shot literature, with batch norm as an explicit policy.

Plain torch modules: nothing here knows of problems or tasks. `FewShotProblem` calls them
functionally and says by `rows` which rows of a batch belong to which set and task.

Shape letters: R rows (examples), B tasks, C channels, H height, W width, N ways.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import check, require_number
from metadist.factory import ModelFactory
from metadist.layers.batch_norm import batch_norm
from metadist.layers.convolution import Conv2d
from metadist.layers.pooling import MaxPool2d, max_pool
from metadist.rematerialise import rematerialise
from metadist.rows import current_rows

__all__ = [
    "MLP",
    "Conv4",
    "ModelFactory",
    "ResNet12",
    "TaskBatchNorm",
    "rematerialise",
    "with_task_batch_norm",
]

BatchNormPolicy = Literal["transductive", "inductive", "none"]


class TaskBatchNorm(nn.Module):
    """Batch norm over the examples of one set of one task; it keeps no running statistics.

    Args:
        num_features: C.
        policy: "transductive": each set by its own statistics, so a query example sees the
            other query examples (the convention of MAML). "inductive": every set by the
            statistics of the support set.
        eps: The constant added to the variance.

    Tasks that pass together (see `rows`) are kept apart exactly.
    """

    def __init__(
        self,
        num_features: int,
        policy: Literal["transductive", "inductive"] = "transductive",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if policy not in ("transductive", "inductive"):
            raise ValueError(f"policy must be 'transductive' or 'inductive', got {policy!r}")
        _check_sizes(num_features=num_features)
        check("eps", eps, ge=0)
        self.num_features = num_features
        self.policy = policy
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        num_tasks, sets = current_rows()
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        shape = x.shape
        # On a CPU the native batch norm sums channels_last inputs in a way that loses 30 to 60
        # times the accuracy in float32, which second derivatives then multiply.
        if x.device.type == "cpu":
            x = x.contiguous()
        # With rows example-major and task-minor this is a view (of channels_last on a GPU, a copy),
        # and each channel of each task is a channel of its own to the native batch norm.
        if num_tasks > 1:
            x = x.reshape(-1, num_tasks * shape[1], *shape[2:])
            weight, bias = weight.repeat(num_tasks), bias.repeat(num_tasks)
        if len(sets) < 2:
            out = batch_norm(x, weight, bias, self.eps)
        elif self.policy == "transductive":
            parts = [batch_norm(part, weight, bias, self.eps) for part in x.split(sets)]
            out = torch.cat(parts)
        else:
            axes = [0, *range(2, x.ndim)]
            variance, mean = torch.var_mean(x[: sets[0]], axes, correction=0, keepdim=True)
            channel = mean.shape
            gain = weight.view(channel[1:]) * (variance + self.eps).rsqrt()
            out = (x - mean) * gain + bias.view(channel[1:])
        return out.reshape(shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, policy={self.policy!r}"


def norm_layer(num_features: int, policy: BatchNormPolicy) -> nn.Module:
    """The layer for a batch-norm policy; "none" is no normalisation at all."""
    if policy == "none":
        return nn.Identity()
    if policy not in ("transductive", "inductive"):
        raise ValueError(
            f"batch_norm must be 'transductive', 'inductive' or 'none', got {policy!r}"
        )
    return TaskBatchNorm(num_features, policy)


REPLACED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def with_task_batch_norm(
    model: nn.Module,
    policy: Literal["transductive", "inductive"] = "transductive",
    example: Tensor | None = None,
) -> nn.Module:
    """`model` itself, each batch norm in it replaced by a `TaskBatchNorm` of the same weights.

    Args:
        model: The model. Only torch's own classes are replaced; each of its layers is compared
            with what replaces it on random numbers.
        policy: That of the new layers.
        example: Inputs on which the whole model is compared with what it was, its batch norm in
            training mode; None: its layers alone are.

    Raises:
        ValueError: A layer does more than normalise, or the new model computes something else;
            `model` is then as it was.
    """
    made: dict[int, TaskBatchNorm] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            made[id(layer)] = _task_batch_norm(name, layer, policy)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if id(child) in made
    ]
    expected = None if example is None else _in_training_mode(model, example)
    for parent, name, child in places:
        setattr(parent, name, made[id(child)])
    converted = made.get(id(model), model)
    if example is not None and expected is not None:
        with torch.no_grad():
            difference = _difference(converted(example), expected)
        if difference > TOLERANCE:
            for parent, name, child in places:
                setattr(parent, name, child)
            raise ValueError(
                "model must compute the same with TaskBatchNorm, got outputs that differ by "
                f"{difference:.0%} on the example: it uses its batch norm in another way than by "
                "calling it (its running statistics, say). Replace those layers by hand"
            )
    return converted


TOLERANCE = 1e-2
"""Of relative differences; batch norm in float32 has some, where a channel is almost constant."""


def _task_batch_norm(
    name: str, layer: nn.Module, policy: Literal["transductive", "inductive"]
) -> TaskBatchNorm:
    """The layer that replaces `layer`; ValueError if that does more, or another thing."""
    if type(layer) not in REPLACED:
        raise ValueError(
            f"model must have batch norm of torch's own classes, layer {name!r} is a "
            f"{type(layer).__name__}: what such a class does besides would be lost. Replace that "
            "layer by a TaskBatchNorm and what it does besides, or freeze it with .eval()"
        )
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    norm = TaskBatchNorm(layer.num_features, policy, layer.eps)
    if layer.affine:
        norm.weight, norm.bias = layer.weight, layer.bias
    else:
        norm.requires_grad_(False)
        if layer.running_mean is not None:
            norm.to(layer.running_mean)
    sizes = {nn.BatchNorm1d: (), nn.BatchNorm3d: (2, 2, 2)}.get(type(layer), (2, 2))
    # Where numbers are drawn matters to nobody else, and neither does what is drawn.
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, layer.num_features, *sizes, generator=random).to(norm.weight)
    if type(layer) is nn.SyncBatchNorm:
        return norm  # which runs between processes only
    difference = _difference(norm(inputs), _in_training_mode(layer, inputs))
    if difference > TOLERANCE:
        raise ValueError(
            f"batch norm must do nothing besides, layer {name!r} does (a hook, or a forward of its "
            f"own): its outputs are {difference:.0%} from those of a TaskBatchNorm. Take that out "
            "first, or replace the layer by hand"
        )
    return norm


@torch.no_grad()
def _in_training_mode(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of a copy of `model` whose batch norm is in training mode."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()
    output: Tensor = copied(inputs)
    return output


def _difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinite for tensors of other shapes."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).detach().norm() / expected.norm().clamp_min(1e-12))


keep_inputs_only = rematerialise  # where an argument has that name


class Conv4(nn.Module):
    """Four blocks of conv 3x3, batch norm, ReLU, max-pool 2, and a linear head.

    Args:
        n_way: N, the number of outputs.
        in_channels: C, the channels of the images.
        width: Channels of every block; 64 (Omniglot) and 32 (mini-ImageNet) are usual.
        image_size: H = W, the side of the images, >= 16.
        batch_norm: A policy: "transductive", "inductive" or "none".
        rematerialise: Whether its blocks keep their inputs only, see `rematerialise`.

    Source: Vinyals et al., NeurIPS 2016; Finn, Abbeel, Levine, ICML 2017.
    """

    def __init__(
        self,
        n_way: int = 5,
        in_channels: int = 1,
        width: int = 64,
        image_size: int = 28,
        batch_norm: BatchNormPolicy = "transductive",
        rematerialise: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(n_way=n_way, in_channels=in_channels, width=width)
        _check_image_size(image_size)
        self.n_way, self.in_channels, self.width = n_way, in_channels, width
        self.image_size, self.batch_norm = image_size, batch_norm
        self.rematerialise = rematerialise
        channels = [in_channels, width, width, width, width]
        blocks: list[nn.Module] = []
        for i in range(4):
            conv = Conv2d(channels[i], channels[i + 1], 3, padding=1)
            norm = norm_layer(channels[i + 1], batch_norm)
            # In this order ReLU has a quarter of the numbers, with the same result.
            blocks.append(nn.Sequential(conv, norm, MaxPool2d(2), nn.ReLU()))
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(width * (image_size // 16) ** 2, n_way)
        if rematerialise:
            keep_inputs_only(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (R, N), of images of shape (R, C, H, W)."""
        return self.head(self.features(x))


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with a 1x1 shortcut, LeakyReLU(0.1), max-pool 2."""

    def __init__(self, in_channels: int, width: int, batch_norm: BatchNormPolicy) -> None:
        super().__init__()
        channels = [in_channels, width, width, width]
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [
                Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False),
                norm_layer(width, batch_norm),
            ]
            if i < 2:
                layers.append(nn.LeakyReLU(0.1))
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(
            Conv2d(in_channels, width, 1, bias=False), norm_layer(width, batch_norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(F.leaky_relu(self.residual(x) + self.shortcut(x), 0.1))


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, global average pooling, a linear head.

    Args:
        n_way: N, the number of outputs.
        in_channels: C, the channels of the images.
        widths: Channels of the blocks; (64, 160, 320, 640) as in MetaOptNet.
        image_size: H = W, the side of the images, >= 16.
        batch_norm: A policy: "transductive", "inductive" or "none".
        rematerialise: Whether its blocks keep their inputs only, see `rematerialise`.

    Source: Lee et al., "Meta-Learning with Differentiable Convex Optimization", CVPR 2019.
    Differs from it in: no DropBlock, whose masks no inner loop could replay.
    """

    def __init__(
        self,
        n_way: int = 5,
        in_channels: int = 3,
        widths: tuple[int, int, int, int] = (64, 160, 320, 640),
        image_size: int = 84,
        batch_norm: BatchNormPolicy = "transductive",
        rematerialise: bool = False,
    ) -> None:
        super().__init__()
        for width in widths:
            _check_sizes(n_way=n_way, in_channels=in_channels, widths=width)
        _check_image_size(image_size)
        self.n_way, self.in_channels, self.widths = n_way, in_channels, widths
        self.image_size, self.batch_norm = image_size, batch_norm
        self.rematerialise = rematerialise
        channels = [in_channels, *widths]
        self.features = nn.Sequential(
            *(ResidualBlock(channels[i], channels[i + 1], batch_norm) for i in range(4)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(widths[-1], n_way)
        if rematerialise:
            keep_inputs_only(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (R, N), of images of shape (R, C, H, W)."""
        return self.head(self.features(x))


class MLP(nn.Module):
    """Linear layers with ReLU between them; (40, 40) for sinusoid regression as in MAML.

    Args:
        in_features, out_features: The sizes of input and output.
        hidden: The widths of the layers between.
    """

    def __init__(
        self, in_features: int = 1, out_features: int = 1, hidden: tuple[int, ...] = (40, 40)
    ) -> None:
        super().__init__()
        _check_sizes(in_features=in_features, out_features=out_features)
        for width in hidden:
            _check_sizes(hidden=width)
        self.in_features, self.out_features, self.hidden = in_features, out_features, hidden
        sizes = [in_features, *hidden]
        layers: list[nn.Module] = []
        for i in range(len(hidden)):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape (R, out_features), of inputs of shape (R, in_features)."""
        return self.head(self.features(x))


def _check_image_size(image_size: int) -> None:
    require_number(image_size=image_size)
    if image_size < 16:
        raise ValueError(f"image_size must be >= 16 for four poolings, got {image_size}")


def _check_sizes(**sizes: int) -> None:
    for field, size in sizes.items():
        check(field, size, is_integer=True, ge=1)
