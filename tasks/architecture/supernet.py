"""The network that holds every candidate at once.

Shape letters: B images, C channels, H height, W width, E edges from one state, K kernel side,
O operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import require_integer
from metadist.tasks.architecture.genotype import INPUTS, OPERATIONS, first_edge, num_edges
from metadist.tasks.architecture.network import NORMAL, REDUCTION, CellNetwork, HalveSide

OUTER = ("normal", "reduction")
"""The parameters of a supernet that are x: logits of the operations on each edge, (edges, O)."""
SKIP = OPERATIONS.index("skip")
CONVOLUTIONS = OPERATIONS.index("sep_conv_3x3")


class Supernet(CellNetwork):
    """A network whose cells mix all operations on every edge, by a softmax of logits.

    Cells of one kind share the logits, the parameters `normal` and `reduction`; weights of the
    operations are each cell's own. Batch norm has neither gains nor running statistics.

    Args:
        channels: C of the first cell, even; each reduction cell doubles it.
        cells: The kinds of the cells in order, N (normal) and R (reduction); both must be there.
        nodes: The nodes of a cell, >= 1.
        in_channels, num_classes: Those of the images, and of the outputs.
        stem_stride: The stride of the first convolution; 1 in the paper for images of 32 x 32.
        seed: The seed of the initial weights.

    Source: Liu, Simonyan, Yang, DARTS (ICLR 2019).
    """

    def __init__(
        self,
        channels: int = 8,
        cells: str = "NRN",
        nodes: int = 2,
        in_channels: int = 1,
        num_classes: int = 10,
        stem_stride: int = 2,
        seed: int = 0,
    ) -> None:
        def body(kind: str, channels: int) -> nn.Module:
            return MixedCell(channels, nodes, reduction=kind == REDUCTION)

        require_integer("seed", seed, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                body,
                cells,
                channels,
                nodes,
                in_channels,
                num_classes,
                stem_stride,
                searching=True,
            )
        self.nodes, self.seed = nodes, seed
        for name in OUTER:
            setattr(self, name, nn.Parameter(torch.zeros(num_edges(nodes), len(OPERATIONS))))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, in_channels, H, W)."""
        normal, reduction = (getattr(self, name).softmax(-1) for name in OUTER)
        return self.through(images, {NORMAL: (normal,), REDUCTION: (reduction,)})


class MixedCell(nn.Module):
    """A cell with all operations on all edges: a function of its inputs and weights (edges, O)."""

    def __init__(self, channels: int, nodes: int, reduction: bool) -> None:
        super().__init__()
        self.nodes = nodes
        self.states = nn.ModuleList()
        for source in range(INPUTS + nodes - 1):
            stride = 2 if reduction and source < INPUTS else 1
            self.states.append(MixedEdges(channels, len(self._fed_by(source)), stride))

    def _fed_by(self, source: int) -> range:
        """The nodes with an edge from `source`."""
        return range(max(0, source - INPUTS + 1), self.nodes)

    def forward(self, before: Tensor, last: Tensor, weights: Tensor) -> Tensor:
        sums: list[Tensor] = []
        for source, edges in enumerate(self.states):
            fed = self._fed_by(source)
            rows = weights[[first_edge(node) + source for node in fed]]
            state = (before, last)[source] if source < INPUTS else sums[source - INPUTS]
            for node, part in zip(fed, edges(state, rows).unbind(1), strict=True):
                if node == len(sums):
                    sums.append(part)
                else:
                    sums[node] = sums[node] + part
        return torch.cat(sums, 1)


class MixedEdges(nn.Module):
    """All operations on all E edges that leave one state, (B, C, H, W) to (B, E, C, H, W).

    What the edges have in common is computed once, and what they have of one kind in one kernel.
    A convolution of each channel by itself and the 1x1 convolution after it are one dense
    convolution with the product of both: a product of small tensors, for a pass over images less.
    The weights of the operations are the gains of their batch norm.
    """

    def __init__(self, channels: int, num_edges: int, stride: int) -> None:
        super().__init__()
        self.num_edges = num_edges
        self.stride = stride
        self.separable_3 = nn.ModuleList(SeparableConv(channels, num_edges, 3) for _ in range(2))
        self.separable_5 = nn.ModuleList(SeparableConv(channels, num_edges, 5) for _ in range(2))
        self.dilated_3 = SeparableConv(channels, num_edges, 3, dilation=2)
        self.dilated_5 = SeparableConv(channels, num_edges, 5, dilation=2)
        if stride > 1:
            self.skip = HalveSide(channels, num_edges * channels)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        num_edges, stride = self.num_edges, self.stride
        # Operations without weights of their own: their outputs are the same on every edge.
        pools = [
            F.max_pool2d(x, 3, stride, padding=1),
            F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False),
        ]
        shared = _batch_norm(torch.cat(pools, 1)).unflatten(1, (2, -1))
        if stride == 1:
            shared = torch.cat([shared, x[:, None]], 1)
        active = F.relu(x)
        stages = [self.separable_3[0](active, stride), self.separable_5[0](active, stride)]
        three, five = F.relu(_batch_norm(torch.cat(stages, 1))).chunk(2, 1)
        own = [
            self.separable_3[1](three, groups=num_edges),
            self.separable_5[1](five, groups=num_edges),
            self.dilated_3(active, stride),
            self.dilated_5(active, stride),
        ]
        own_weights = weights[:, CONVOLUTIONS:]
        if stride > 1:
            halves_of_edges = self.skip(x).unflatten(1, (2, num_edges, -1))
            own = [halves_of_edges.transpose(1, 2).flatten(1, 3), *own]
            own_weights = weights[:, SKIP:]
        gains = own_weights.t().repeat_interleave(x.shape[1], 1).flatten()
        mixed = _batch_norm(torch.cat(own, 1), gains).unflatten(1, (len(own), num_edges, -1))
        shared_weights = weights[:, 1 : 1 + shared.shape[1]]
        return mixed.sum(1) + torch.einsum("eo,bochw->bechw", shared_weights, shared)


class SeparableConv(nn.Module):
    """A convolution of each channel by itself, then one that mixes the channels, on E edges."""

    def __init__(self, channels: int, num_edges: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.padding = dilation * (kernel // 2)
        # Drawn as by nn.Conv2d: uniform up to 1 / sqrt(the number of inputs).
        depthwise = torch.empty(num_edges, channels, kernel, kernel).uniform_(-1, 1) / kernel
        pointwise = torch.empty(num_edges, channels, channels).uniform_(-1, 1) / channels**0.5
        self.depthwise = nn.Parameter(depthwise)
        self.pointwise = nn.Parameter(pointwise)

    def forward(self, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        """Shape (B, E C, H, W) of (B, C, H, W), or with `groups` = E of each edge's own input."""
        dense = self.pointwise[..., None, None] * self.depthwise[:, None]
        return F.conv2d(
            x,
            dense.flatten(0, 1),
            stride=stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=groups,
        )


def _batch_norm(x: Tensor, gains: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, gains, None, training=True)
