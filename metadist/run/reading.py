"""Events and scalars of a run folder in whatever state it is, in bounded memory.

A power failure leaves sectors of zeros, a full disk half a file, and anybody may have written the
folder. What cannot be read is left out and said.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from metadist.run.files import EVENTS
from metadist.run.storage import Folder

MAX_EVENT_BYTES = 4 << 20
"""The most that is read of the events, from the newest back."""
MAX_SCALAR_BYTES = 32 << 20
"""The same of TensorBoard's files together."""
MAX_LINE_BYTES = 1 << 16
MAX_RECORD_BYTES = 1 << 16
"""The size of the longest record that is looked into; a scalar takes a hundred bytes."""
MAX_PICTURE_BYTES = 1 << 19
MAX_PICTURES = 24
PNG = b"\x89PNG\r\n\x1a\n"
MAX_RECORDS = 100_000
MAX_TAGS = 10_000
MAX_NAME = 1000
MAX_STEP = 10**12
MAX_SECONDS = 1e11
"""The latest time, in seconds since 1970, and more than any duration."""
HEADER = 12
"""A record is its length (8 bytes), a checksum of that (4), the data and a checksum (4)."""

NUMBERS = (
    *("until_step", "num_lost", "score", "num_steps", "num_tasks", "num_dropped"),
    *("seconds", "pid"),
)
TEXTS = ("checkpoint", "error", "executor", "policy", "device", "host", "boot", "started")


class Scalar(NamedTuple):
    """The newest value of a TensorBoard scalar; `time` in seconds since 1970."""

    value: float
    step: int
    time: float


def find_events(folder: Folder) -> tuple[list[dict[str, Any]], list[str], bool]:
    """(the events, oldest first; what is wrong with their file; whether older ones are left out).

    Half a line, as a process leaves it that is killed or still writes, is no event and not wrong.
    """
    try:
        data, before = folder.tail(EVENTS, MAX_EVENT_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return [], [], False
    except (OSError, ValueError) as error:
        return [], [f"{EVENTS} cannot be read: {error}"], False
    found, bad = [], 0
    lines = data.split(b"\n")
    if before:  # it begins within a line
        bad += len(lines.pop(0)) > MAX_LINE_BYTES
    for line in lines:
        event = None if len(line) > MAX_LINE_BYTES else _event(line)
        if event is not None:
            found.append(event)
        elif line.strip() and not (line.startswith(b"{") and _is_half(line)):
            bad += 1
    wrong = [f"{EVENTS} has {bad} lines that are no events"] if bad else []
    return found, wrong, before > 0


def _is_half(line: bytes) -> bool:
    return len(line) <= MAX_LINE_BYTES and not line.endswith(b"}") and b"\0" not in line


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        moment = datetime.fromisoformat(event["time"]).timestamp()
        step = event["step"]
        is_event = isinstance(event["event"], str) and type(step) is int and 0 <= step <= MAX_STEP
        if not (is_event and 0 <= moment <= MAX_SECONDS):
            return None
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, OSError):
        return None
    return plain_fields(event)


def plain_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of JSON data that are of the kind that their name promises, and not too deep."""
    found = {}
    for name, value in tree.items():
        if name in NUMBERS and value is not None:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and abs(value) <= MAX_STEP:  # not NaN either
                found[name] = value
        elif name == "num_workers" and isinstance(value, (int, str)):
            found[name] = value  # a text where a run starts: "1 to 4"
        elif name in TEXTS and value is not None:
            if isinstance(value, str):
                found[name] = value
        elif isinstance(value, list):
            found[name] = [item for item in value if not isinstance(item, (list, dict))]
        elif not isinstance(value, dict):
            found[name] = value
    return found


def find_json(folder: Folder, name: str) -> tuple[dict[str, Any], list[str]]:
    """(the plain fields of the object in a file, what is wrong with it); nothing without a file."""
    try:
        data, before = folder.tail(name, 1 << 20)
        found = json.loads(b"" if before else data)
        return plain_fields(found), []
    except (FileNotFoundError, NotADirectoryError):
        return {}, []
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}, [f"{name} is no JSON object of at most 1 MiB"]


def find_tree(folder: Folder, name: str) -> dict[str, Any]:
    """The JSON object in a file, of any form; empty where there is none to be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(folder.read(name, 1 << 24))
        return found if isinstance(found, dict) else {}
    return {}


def find_scalars(folder: Folder) -> tuple[dict[str, Scalar], list[str]]:
    """(the newest value of every scalar by tag, what is wrong with TensorBoard's files).

    Values of steps that an interrupted run had taken and its continuation takes again are left
    out, as TensorBoard does it.
    """
    found: dict[str, Scalar] = {}
    wrong: dict[str, None] = {}

    def news(event: Any) -> list[Any]:
        return [
            value
            for value in event.summary.value
            if value.WhichOneof("value") == "simple_value" and value.tag not in found
        ]

    for event, values in _events(folder, wrong, news, MAX_RECORD_BYTES):
        if len(found) >= MAX_TAGS:
            break
        for value in values:
            found.setdefault(value.tag, Scalar(value.simple_value, event.step, event.wall_time))
    return found, list(wrong)


@dataclass(frozen=True)
class History:
    """What TensorBoard's files of a run hold, by tag.

    Args:
        scalars: The values of each scalar, in the order of their steps.
        images: The newest picture of each tag: (step, PNG).
        texts: The newest text.
        histograms: The newest distribution: (step, [(lower edge, upper edge, count)]).
        unreadable: What is wrong with the files; what they would add is missing.
        is_partial: Whether the files are so long that only the newest records were read.
    """

    scalars: dict[str, list[Scalar]]
    images: dict[str, tuple[int, bytes]]
    texts: dict[str, str]
    histograms: dict[str, tuple[int, list[tuple[float, float, float]]]]
    unreadable: list[str]
    is_partial: bool


def find_history(folder: Folder) -> History:
    """All that TensorBoard's files of a run say, without what was taken again."""
    wrong: dict[str, None] = {}
    found = History({}, {}, {}, {}, [], is_partial=False)
    num_events = 0
    for event, values in _events(folder, wrong, _all_values, MAX_PICTURE_BYTES):
        num_events += 1
        for value in values:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                scalar = Scalar(value.simple_value, event.step, event.wall_time)
                if value.tag in found.scalars or len(found.scalars) < MAX_TAGS:
                    found.scalars.setdefault(value.tag, []).append(scalar)
            elif kind == "image" and len(found.images) < MAX_PICTURES:
                data = bytes(value.image.encoded_image_string)
                if data.startswith(PNG):
                    found.images.setdefault(value.tag, (event.step, data))
            elif kind == "histo":
                buckets = _buckets(value.histo)
                found.histograms.setdefault(value.tag, (event.step, buckets))
            elif kind == "tensor" and value.tensor.string_val:
                text = value.tensor.string_val[0].decode(errors="replace")
                found.texts.setdefault(value.tag, text)
    # The files are read from their end.
    scalars = {
        tag: sorted(column, key=lambda scalar: scalar.step) for tag, column in found.scalars.items()
    }
    is_partial = num_events >= MAX_RECORDS
    return replace(found, scalars=scalars, unreadable=list(wrong), is_partial=is_partial)


def _all_values(event: Any) -> list[Any]:
    return list(event.summary.value)


def _buckets(histogram: Any) -> list[tuple[float, float, float]]:
    """(lower edge, upper edge, count) of the buckets that lie in the range of the values."""
    found = []
    lower = histogram.min
    for upper, count in zip(histogram.bucket_limit, histogram.bucket, strict=False):
        if count > 0:
            found.append((max(lower, histogram.min), min(upper, histogram.max), count))
        lower = upper
    return found[:MAX_TAGS]


def _events(
    folder: Folder, wrong: dict[str, None], wanted: Callable[[Any], list[Any]], at_most: int
) -> Iterator[tuple[Any, list[Any]]]:
    """(event, the values of it that are `wanted`), newest first; notes what is `wrong`."""
    # Late: it takes long to import, and no worker needs it.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    end = math.inf
    for number, (file, record) in enumerate(_records(folder, wrong, at_most)):
        if number >= MAX_RECORDS:
            break
        damaged = f"{folder.path(file)} has a damaged record"
        try:
            event = Event.FromString(record[:-4])
        except Exception:  # noqa: BLE001  # protobuf's own error has no public place
            wrong[damaged] = None
            continue
        is_start = event.HasField("session_log") and event.session_log.status == SessionLog.START
        is_known = 0 <= event.step <= MAX_STEP and 0 <= event.wall_time <= MAX_SECONDS
        values = wanted(event)
        if not is_start and not (values and event.step < end):
            continue
        # Only of what is used, as it is slow.
        if not is_known or _checksum(record[:-4]) != struct.unpack("<I", record[-4:])[0]:
            wrong[damaged] = None
        elif is_start:
            end = min(end, event.step)
        else:
            yield event, [value for value in values if len(value.tag) <= MAX_NAME]


def _records(folder: Folder, wrong: dict[str, None], at_most: int) -> Iterator[tuple[str, bytes]]:
    """(file, data and its checksum) of short records, newest first.

    What is being written now is left out. Behind damage, the next header with a right checksum is
    looked for.
    """
    left = MAX_SCALAR_BYTES
    files = [name for name in folder.names() if name.startswith("events.out.tfevents.")]
    for name in reversed(files):
        if left <= 0:
            return
        try:
            data, before = folder.tail(name, left)
        except (OSError, ValueError) as error:
            wrong[f"{folder.path(name)} cannot be read: {error}"] = None
            continue
        left -= len(data)
        places: deque[tuple[int, int]] = deque(maxlen=MAX_RECORDS)
        begin = _next_header(data, 0) if before else 0
        if begin > MAX_LENGTH:  # further than a record that began before
            wrong[f"{folder.path(name)} is damaged"] = None
        while begin + HEADER <= len(data):
            header = data[begin : begin + HEADER]
            if not _is_header(header):
                wrong[f"{folder.path(name)} is damaged"] = None
                begin = _next_header(data, begin + 1)
                continue
            (size,) = struct.unpack("<Q", header[:8])
            first = begin + HEADER
            begin = first + size + 4
            if begin > len(data):
                break
            if size <= at_most:
                places.append((first, begin))
        for first, last in reversed(places):
            yield name, data[first:last]


MAX_LENGTH = 1 << 24
LENGTHS = re.compile(rb"(?=(?:[^\0]..|.[^\0].|..[^\0])\0{5})", re.DOTALL)
"""Where a length below `MAX_LENGTH`, and not 0, may begin."""
MAX_TRIED = 200_000


def _next_header(data: bytes, start: int) -> int:
    """Where the next header begins; the end of the data if there is none."""
    for number, found in enumerate(LENGTHS.finditer(data, start)):
        if number >= MAX_TRIED:
            break
        if _is_header(data[found.start() : found.start() + HEADER]):
            return found.start()
    return len(data)


@lru_cache(maxsize=1 << 12)
def _is_header(header: bytes) -> bool:
    return len(header) == HEADER and _checksum(header[:8]) == struct.unpack("<I", header[8:])[0]


def _checksum(data: bytes) -> int:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return int(masked_crc32c(data))
