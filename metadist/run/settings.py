"""Settings of a run as JSON data in its checkpoints, and their comparison with those of today.

Values are compared, not texts, and a field that a later version added has its default in all
checkpoints before: so an upgrade leaves old runs resumable as long as nothing changes for them.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor

from metadist.checks.values import plain

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def recorded(value: Any, where: str) -> Any:
    """The JSON data of a setting.

    Raises:
        ValueError: It has no description that would be the same in another process.
    """
    value = plain(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [recorded(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): recorded(item, f"{where}[{key!r}]") for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: recorded(getattr(value, f.name), f"{where}.{f.name}") for f in _own(value)}
        return {"class": type(value).__qualname__, "fields": found}
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(str(data.tolist()).encode()).hexdigest()
        return f"tensor of {tuple(data.shape)}, {data.dtype}, sha256 {digest}"
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        text = f"{value.__module__}.{value.__qualname__}"
        if "<" not in text:
            return text
    text = repr(value)
    if _ADDRESS.search(text):
        raise ValueError(
            f"{where} must have a repr of its own with a run_dir, by which a resumed run is "
            f"compared with its checkpoint, got {text}: make its class a dataclass or give it a "
            "__repr__ of its settings, and a function a name at the top of its module"
        )
    return text


def difference(stored: Any, value: Any, where: str) -> tuple[str, Any, Any] | None:
    """(its name, then, now) of the first setting that is not as it was stored; None: all are.

    Args:
        stored: What `recorded` gave then, or the text or dict of fields that older versions wrote.
        value: The setting of today.
        where: Its name.
    """
    if not is_dataclass(value) or isinstance(value, type):
        now = recorded(value, where)
        return None if stored == now else (where, stored, now)
    if stored == repr(value):
        return None
    name, then = _parts(stored)
    if then is None or name not in (None, type(value).__qualname__):
        return where, stored, repr(value)
    for field in _own(value):
        now = getattr(value, field.name)
        if field.name not in then:
            then = {**then, field.name: recorded(_default(field), field.name)}
        if found := difference(then[field.name], now, f"{where}.{field.name}"):
            return found
    gone = sorted(then.keys() - {field.name for field in _own(value)})
    return (f"{where}.{gone[0]}", then[gone[0]], "no such setting") if gone else None


def as_text(stored: Any) -> Any:
    """What `recorded` gave, as a reader knows it."""
    if isinstance(stored, Mapping) and stored.keys() == {"class", "fields"}:
        items = (f"{name}={as_text(value)!r}" for name, value in stored["fields"].items())
        return f"{stored['class']}({', '.join(items)})"
    return stored


def _own(value: Any) -> list[Any]:
    return [field for field in fields(value) if field.repr]


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return "not recorded" if field.default_factory is MISSING else field.default_factory()


def _parts(stored: Any) -> tuple[str | None, Mapping[str, Any] | None]:
    """(class, fields) as stored; the class is None where it was not; no fields: not understood."""
    if isinstance(stored, Mapping):
        if isinstance(stored.get("fields"), Mapping):
            return str(stored.get("class")), stored["fields"]
        return None, stored
    try:
        call = ast.parse(stored, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        found = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (AssertionError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return None, None
    return call.func.id, {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
    }
