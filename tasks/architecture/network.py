"""The network that all cells are put into, and the one that a genotype describes.

Shape letters: B images, C channels, H height, W width, E edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import require_integer
from metadist.tasks.architecture.genotype import INPUTS, Cell, Genotype

STEM_MULTIPLIER = 3
NORMAL, REDUCTION = "N", "R"


def batch_norm(channels: int, searching: bool) -> nn.BatchNorm2d:
    """During a search by the statistics of the batch at hand and without gains; else as usual."""
    return nn.BatchNorm2d(channels, affine=not searching, track_running_stats=not searching)


class HalveSide(nn.Module):
    """ReLU and two 1x1 convolutions of stride 2 for half of the channels each, off by one pixel.

    The second reads the image moved by one, so that together they see more than every other pixel.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.even = nn.Conv2d(in_channels, half, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - half, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        # A border of zeros, so that sides may be odd.
        return torch.cat([self.even(x), self.odd(F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:])], 1)


def conv_1x1(in_channels: int, out_channels: int, searching: bool) -> nn.Sequential:
    """ReLU, a 1x1 convolution and batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, batch_norm(out_channels, searching))


class CellInNetwork(nn.Module):
    """A cell with the layers that bring its two inputs to its channels and to one side.

    Args:
        body: The cell: a function of both inputs.
        channels: Those of the two inputs, and C of the cell.
        halve: Whether input 0 has twice the side of input 1.
        searching: See `batch_norm`.
    """

    def __init__(
        self, body: nn.Module, channels: tuple[int, int, int], halve: bool, searching: bool
    ) -> None:
        super().__init__()
        before, last, own = channels
        if halve:
            self.first = nn.Sequential(HalveSide(before, own), batch_norm(own, searching))
        else:
            self.first = conv_1x1(before, own, searching)
        self.second = conv_1x1(last, own, searching)
        self.body = body

    def forward(self, before: Tensor, last: Tensor, *weights: Tensor) -> Tensor:
        return self.body(self.first(before), self.second(last), *weights)


class CellNetwork(nn.Module):
    """A 3x3 convolution, cells one after another, the mean over the image, a linear layer.

    Args:
        make_body: The cell of a kind, "N" or "R", with C channels.
        cells: The kinds of the cells in order; each "R" halves the side and doubles C.
        channels: C of the first cell, even.
        nodes: The nodes of a cell.
        in_channels, num_classes: Those of the images, and of the outputs.
        stem_stride: The stride of the first convolution.
        searching: See `batch_norm`.
    """

    def __init__(
        self,
        make_body: Callable[[str, int], nn.Module],
        cells: str,
        channels: int,
        nodes: int,
        in_channels: int,
        num_classes: int,
        stem_stride: int,
        searching: bool,
    ) -> None:
        super().__init__()
        if set(cells) != {NORMAL, REDUCTION}:
            raise ValueError(
                f"cells must be letters N (normal) and R (reduction), each at least once, got "
                f"{cells!r}: for example 'NRN'"
            )
        require_integer("channels", channels, 2)
        if channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        sizes = {"nodes": nodes, "in_channels": in_channels, "num_classes": num_classes}
        for field, size in {**sizes, "stem_stride": stem_stride}.items():
            require_integer(field, size, 1)
        self.channels, self.cells, self.stem_stride = channels, cells, stem_stride
        self.in_channels, self.num_classes = in_channels, num_classes
        stem = STEM_MULTIPLIER * channels
        conv = nn.Conv2d(in_channels, stem, 3, stem_stride, padding=1, bias=False)
        self.stem = nn.Sequential(conv, batch_norm(stem, searching))
        self.placed = nn.ModuleList()
        before, last, halved = stem, stem, False
        for kind in cells:
            if kind == REDUCTION:
                channels *= 2
            sizes_of_cell = (before, last, channels)
            body = make_body(kind, channels)
            self.placed.append(CellInNetwork(body, sizes_of_cell, halved, searching))
            before, last, halved = last, nodes * channels, kind == REDUCTION
        self.head = nn.Linear(last, num_classes)

    def through(self, images: Tensor, weights: dict[str, tuple[Tensor, ...]]) -> Tensor:
        """The outputs for `images`; `weights` are what the cells of each kind need besides."""
        before = last = self.stem(images)
        for kind, cell in zip(self.cells, self.placed, strict=True):
            before, last = last, cell(before, last, *weights[kind])
        return self.head(last.mean((2, 3)))


class Network(CellNetwork):
    """The network of a genotype; its batch norm has gains and running statistics.

    Args:
        genotype: The cells.
        channels: C of the first cell, even; each reduction cell doubles it.
        cells: The kinds of the cells in order, N and R.
        in_channels, num_classes: Those of the images, and of the outputs.
        stem_stride: The stride of the first convolution.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 8,
        cells: str = "NRN",
        in_channels: int = 1,
        num_classes: int = 10,
        stem_stride: int = 2,
    ) -> None:
        def body(kind: str, channels: int) -> nn.Module:
            cell = genotype.reduction if kind == REDUCTION else genotype.normal
            return DerivedCell(cell, channels, reduction=kind == REDUCTION)

        super().__init__(
            body,
            cells,
            channels,
            len(genotype.normal),
            in_channels,
            num_classes,
            stem_stride,
            searching=False,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, in_channels, H, W)."""
        return self.through(images, {NORMAL: (), REDUCTION: ()})


class DerivedCell(nn.Module):
    """A cell of a genotype: a function of its two inputs, (B, C, H, W)."""

    def __init__(self, cell: Cell, channels: int, reduction: bool) -> None:
        super().__init__()
        self.sources = [[edge.source for edge in node] for node in cell]
        self.edges = nn.ModuleList()  # those of all nodes, one after another
        for node in cell:
            for operation, source in node:
                stride = 2 if reduction and source < INPUTS else 1
                self.edges.append(make_operation(operation, channels, stride))

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [before, last]
        edges = iter(self.edges)
        for left, right in self.sources:
            states.append(next(edges)(states[left]) + next(edges)(states[right]))
        return torch.cat(states[INPUTS:], 1)


def make_operation(name: str, channels: int, stride: int) -> nn.Module:
    """An operation of `OPERATIONS` other than "none", on C channels."""

    def norm() -> nn.Module:
        return batch_norm(channels, searching=False)

    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, padding=1), norm())
    if name == "avg_pool_3x3":
        pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        return nn.Sequential(pool, norm())
    if name == "skip":
        if stride == 1:
            return nn.Identity()
        return nn.Sequential(HalveSide(channels, channels), norm())
    kind, _, size = name.partition("_conv_")
    kernel = int(size[0])
    if kind == "dil":
        return nn.Sequential(*_depthwise(channels, kernel, stride, dilation=2), norm())
    return nn.Sequential(
        *_depthwise(channels, kernel, stride, dilation=1),
        norm(),
        *_depthwise(channels, kernel, 1, dilation=1),
        norm(),
    )


def _depthwise(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    """ReLU, a convolution of each channel by itself, and one that mixes the channels."""
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
    ]
