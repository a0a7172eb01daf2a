"""What a run shows of itself beside numbers: adaptation to a task, and learned weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from metadist.algorithm import Algorithm, split_own
from metadist.compute import Compute
from metadist.inference import predict
from metadist.problem import HasModel, Problem, context_of, start_carried
from metadist.run.monitor import Monitor, is_images
from metadist.task import Batch, Task, targets_of, to_device
from metadist.trees import Params

log = logging.getLogger("metadist.pictures")

MAX_TILES = 20
TILE = 72
"""The width of a picture of an example, in pixels."""
CAPTION = 30
COLUMNS = 10
RIGHT, WRONG = (86, 180, 233), (230, 130, 30)
"""Blue and orange, which colour-blind readers tell apart; captions say it too."""
MAX_SHARE = 0.02
"""Of the time of a run that pictures may take."""


@runtime_checkable
class WeighsExamples(Protocol):
    """A problem that learns a weight for each support example."""

    def example_weights(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """The weights of the examples of `batch`, shape (examples,)."""
        ...


@runtime_checkable
class KnowsWrongLabels(Protocol):
    """A sampler that knows which of its training labels are wrong."""

    @property
    def wrong(self) -> Tensor:
        """Whether each label of the support set is wrong; bool, (examples,)."""
        ...


class Gallery:
    """Logs pictures of a run from time to time; a failure leaves them out and is logged."""

    def __init__(self) -> None:
        self._next = 0.0
        self._has_failed = False

    def show(self, make: Callable[[], None]) -> None:
        """Call `make`, unless pictures have taken too much time already."""
        began = time.monotonic()
        if began < self._next or self._has_failed:
            return
        try:
            make()
        except Exception:  # the training is worth more than its pictures
            log.exception("pictures of this run are missing")
            self._has_failed = True
        ended = time.monotonic()
        self._next = ended + (ended - began) / MAX_SHARE


def log_adaptation(
    monitor: Monitor,
    problem: Problem,
    algorithm: Algorithm,
    outer: Params,
    task: Task,
    inner_steps: int | None,
    compute: Compute,
) -> None:
    """Log query images of a task with their predictions before and after adaptation."""
    images, targets = task.query.tensors[0], targets_of(task.query)
    if not isinstance(problem, HasModel) or not is_images(images):
        return
    if targets is None or targets.ndim != 1 or targets.is_floating_point():
        return
    after = predict(problem, algorithm, outer, task, inner_steps=inner_steps, compute=compute)
    x, _ = split_own(outer)
    here = to_device(task, "cpu", next(iter(x.values())).dtype)
    with torch.no_grad():
        context = context_of(problem, x, here, start_carried(problem, x, here))
        before = problem.predict(context, problem.init_inner(x, here), here.query)
    picture = adaptation_picture(images, targets, before.argmax(-1).cpu(), after.argmax(-1).cpu())
    monitor.image("adaptation/query", picture)


def adaptation_picture(images: Tensor, true: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """A picture (3, height, width) of images in rows, each above its classes."""
    from PIL import Image, ImageDraw  # late: no worker needs it

    places = torch.linspace(0, len(images) - 1, min(MAX_TILES, len(images))).round().long()
    low, high = images.min(), images.max()
    scaled = ((images - low) / (high - low).clamp(min=1e-5) * 255).byte().cpu()
    height = max(1, round(TILE * images.shape[2] / images.shape[3]))
    columns = min(COLUMNS, len(places))
    rows = -(-len(places) // columns)
    cell_W, cell_H = TILE + 8, height + CAPTION + 8
    sheet = Image.new("RGB", (columns * cell_W, rows * cell_H), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, place in enumerate(places.tolist()):
        left, top = number % columns * cell_W + 4, number // columns * cell_H + 4
        pixels = scaled[place].expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        tile = Image.fromarray(pixels).resize((TILE, height), Image.Resampling.NEAREST)
        is_right = bool(after[place] == true[place])
        colour = RIGHT if is_right else WRONG
        draw.rectangle((left - 3, top - 3, left + TILE + 2, top + height + 2), fill=colour)
        sheet.paste(tile, (left, top))
        words = [_verdict(found[place], true[place]) for found in (before, after)]
        draw.text((left, top + height + 3), f"class {int(true[place])}", fill=(0, 0, 0))
        draw.text((left, top + height + 15), f"{words[0]} > {words[1]}", fill=(0, 0, 0))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float() / 255


def _verdict(predicted: Tensor, true: Tensor) -> str:
    return f"{int(predicted)}{'+' if bool(predicted == true) else 'x'}"


def example_weights(
    problem: Problem, sampler: object, outer: Params, inner: Params, task: Task
) -> Mapping[str, Tensor]:
    """The learned weights of the support examples, apart where the sampler knows wrong labels."""
    if not isinstance(problem, WeighsExamples):
        return {}
    x, _ = split_own(outer)
    leaf = next(iter(x.values()))
    task = to_device(task, leaf.device, leaf.dtype)
    with torch.no_grad():
        context = context_of(problem, x, task)
        weights = problem.example_weights(context, inner, task.support).cpu()
    if not isinstance(sampler, KnowsWrongLabels) or len(sampler.wrong) != len(weights):
        return {"all": weights}
    wrong = sampler.wrong.cpu()
    groups = {"right label": weights[~wrong], "wrong label": weights[wrong]}
    return {name: found for name, found in groups.items() if len(found)}
