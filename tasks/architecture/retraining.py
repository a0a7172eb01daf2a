"""Training of the network that a search found, from scratch, by plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import check, require_integer
from metadist.tasks.architecture.genotype import Genotype
from metadist.tasks.architecture.network import Network
from metadist.tasks.image_sets import ImageData, Images


def retrain(
    genotype: Genotype,
    data: ImageData,
    channels: int = 8,
    cells: str = "NRN",
    stem_stride: int = 2,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 0.025,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip_norm: float = 5.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> float:
    """The test accuracy of the network of `genotype`, trained on training and validation images.

    SGD with momentum, a cosine from `lr` to 0, and gradients clipped by their norm. Nothing is
    chosen by the test images: the weights after the last step count.

    Args:
        genotype: The cells.
        data: The images.
        channels: C of the first cell, even; it need not be that of the search, nor need the next.
        cells: The kinds of the cells in order, N and R.
        stem_stride: The stride of the first convolution.
        epochs: Passes over the images, >= 1.
        batch_size: >= 2; a last batch that is not full is left out.
        lr: The rate of SGD at the start, > 0.
        momentum: The momentum of SGD.
        weight_decay: Adds weight_decay / 2 * |y|^2 to the loss.
        clip_norm: The largest norm of a gradient, > 0.
        seed: The seed of the initial weights and of the order of the images.
        device: Where to train.

    Source: Liu, Simonyan, Yang, DARTS (ICLR 2019), section 3.1.
    Differs from it in: no augmentation of images, no auxiliary head, no dropped paths.
    """
    require_integer("epochs", epochs, 1)
    require_integer("batch_size", batch_size, 2)
    require_integer("seed", seed, 0)
    check("lr", lr, gt=0)
    check("clip_norm", clip_norm, gt=0)
    images, labels = _tensors(data, [data.train, data.val], device)
    num_batches = len(labels) // batch_size
    if not num_batches:
        raise ValueError(
            f"batch_size must be <= {len(labels)}, the training and validation images, got "
            f"{batch_size}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(
            genotype, channels, cells, images.shape[1], data.num_classes, stem_stride
        ).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * num_batches)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        rows = torch.randperm(len(labels), generator=order)[: num_batches * batch_size]
        for batch in rows.to(device).view(num_batches, batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            schedule.step()
    return _accuracy(network.eval(), *_tensors(data, [data.test], device))


@torch.no_grad()
def _accuracy(network: Network, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest output is that of their label."""
    hits = 0
    for part, expected in zip(images.split(500), labels.split(500), strict=True):
        hits += int((network(part).argmax(-1) == expected).sum())
    return hits / len(labels)


def _tensors(
    data: ImageData, parts: list[Images], device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """The images and labels of `parts`, one after another."""
    batches = [data.scaling.batch(part).tensors for part in parts]
    images, labels = (torch.cat(tensors).to(device) for tensors in zip(*batches, strict=True))
    return images, labels
