"""Charts as SVG: axes with units, colours and dashes that colour-blind readers tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metadist.report.page import HTML, escaped

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 46
NUM_STYLES = 7
"""Colours of the style sheet; further curves use them again, dashed."""
MAX_POINTS = 300
MAX_MARKS = 40
"""Curves of so few points show them."""
LOG_FROM = 50
"""The ratio of the largest to the smallest value from which on the scale is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """A curve.

    Args:
        name: What the legend calls it.
        points: (x, y) in the order of x; where y is not finite the point is left out.
        low, high: The edges of a band around it, for each point; empty: none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_chart(curves: Sequence[Curve], x_label: str, y_label: str) -> HTML:
    """Curves over one axis, with a legend; empty if there is no point to draw."""
    drawn = [thinned for curve in curves if (thinned := _thinned(_finite(curve))).points]
    if not drawn:
        return HTML("")
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    ys += [edge for curve in drawn for edge in (*curve.low, *curve.high) if math.isfinite(edge)]
    is_log = min(ys) > 0 and max(ys) / min(ys) > LOG_FROM
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, is_log, margin=0.04)
    parts = [_frame(x_axis, y_axis, x_label, y_label + (", log scale" if is_log else ""))]
    for number, curve in enumerate(drawn):
        parts.append(_line(curve, number, x_axis, y_axis))
    summary = f"{y_label} against {x_label}: {', '.join(curve.name for curve in drawn)}"
    return HTML(
        f'<figure>{_legend([curve.name for curve in drawn])}<svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escaped(summary)}">{"".join(parts)}</svg></figure>'
    )


Bars = tuple[str, Sequence[tuple[float, float, float]]]
"""A name, and (lower edge, upper edge, count) of each bar."""


def histogram(groups: Sequence[Bars], x_label: str, y_label: str) -> HTML:
    """Distributions over one axis, as shares of each group in equal bins."""
    bars = [bar for _, found in groups for bar in found]
    if not bars:
        return HTML("")
    low, high = min(bar[0] for bar in bars), max(bar[1] for bar in bars)
    edges = [low + (high - low) * i / 30 for i in range(31)] if high > low else [low, low + 1]
    shares = [(name, _binned(found, edges)) for name, found in groups]
    top = max(share for _, column in shares for share in column)
    x_axis = _Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y_axis = _Axis(0.0, top, HEIGHT - BOTTOM, TOP, margin=0.04, from_zero=True)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for number, (name, column) in enumerate(shares):
        corners = [(edges[0], 0.0)]
        for i, share in enumerate(column):
            corners += [(edges[i], share), (edges[i + 1], share)]
        corners.append((edges[-1], 0.0))
        path = _path(corners, x_axis, y_axis)
        parts.append(
            f'<path d="{path}Z" class="area {_style(number)}"><title>{escaped(name)}</title></path>'
            f'<path d="{path}" class="line {_style(number)}"/>'
        )
    legend = _legend([name for name, _ in groups])
    return HTML(
        f'<figure>{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escaped(x_label)}">{"".join(parts)}</svg></figure>'
    )


def _binned(bars: Sequence[tuple[float, float, float]], edges: Sequence[float]) -> list[float]:
    """The share of a group in each bin; a bar counts in the bin of its middle."""
    counts = [0.0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for low, high, count in bars:
        place = int(((low + high) / 2 - edges[0]) / width)
        counts[min(max(place, 0), len(counts) - 1)] += count
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


class _Axis:
    """From values to pixels, and where its ticks are."""

    def __init__(
        self,
        low: float,
        high: float,
        first: float,
        last: float,
        is_log: bool = False,
        margin: float = 0.0,
        from_zero: bool = False,
    ) -> None:
        self._is_log = is_log
        low, high = self._scaled(low), self._scaled(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            pad = 0.5 * abs(high) or 0.5
            low, high = low - pad, high + pad
        room = margin * (high - low)
        self._low = low if from_zero else low - room
        self._high = high + room
        self._first, self._last = first, last

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._first + share * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Round values, about five."""
        if self._is_log:
            return self._log_ticks()
        step = _round_step((self._high - self._low) / 5)
        first = math.ceil(self._low / step - 1e-9)
        last = math.floor(self._high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        low, high = math.floor(self._low), math.ceil(self._high)
        every = max(1, (high - low) // 5)
        factors = (1, 2, 5) if high - low <= 2 else (1,)
        found = [f * 10.0**power for power in range(low, high + 1, every) for f in factors]
        return [value for value in found if self._low <= self._scaled(value) <= self._high]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._is_log else value


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so much."""
    power = 10.0 ** math.floor(math.log10(least))
    for factor in (1, 2, 5):
        if factor * power >= least * (1 - 1e-9):
            return factor * power
    return 10 * power


def number_text(value: float) -> str:
    """A number of four digits; large ones with thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    """Grid lines, ticks and labels."""
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{_tick(tick)}</text>')
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(f'<path d="M{x:.1f} {HEIGHT - BOTTOM}v5" class="axis"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="mid">{_tick(tick)}</text>'
        )
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" class="axis"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" class="mid label">{escaped(x_label)}</text>')
    y = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{y}" transform="rotate(-90 14 {y})" class="mid label">'
        f"{escaped(y_label)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.10g}"[:8]


def _line(curve: Curve, number: int, x_axis: _Axis, y_axis: _Axis) -> str:
    style = _style(number)
    xs = [x for x, _ in curve.points]
    band = ""
    if curve.low and len(curve.points) > 1:
        upper = list(zip(xs, curve.high, strict=True))
        lower = list(zip(xs, curve.low, strict=True))
        edge = _path([*upper, *reversed(lower)], x_axis, y_axis)
        band = f'<path d="{edge}Z" class="band {style}"/>'
    title = f"<title>{escaped(curve.name)}</title>"
    path = _path(curve.points, x_axis, y_axis)
    marks = ""
    if len(curve.points) <= MAX_MARKS:
        for x, y in curve.points:
            text = escaped(f"{curve.name}: {number_text(y)} at {number_text(x)}")
            marks += (
                f'<circle cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3" '
                f'class="dot {style}"><title>{text}</title></circle>'
            )
    return f'{band}<path d="{path}" class="line {style}">{title}</path>{marks}'


def _path(points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    places = [f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}" for x, y in points]
    return "M" + "L".join(places)


def _style(number: int) -> str:
    dashed = " dashed" if number >= NUM_STYLES else ""
    return f"c{number % NUM_STYLES}{dashed}"


def _legend(names: Sequence[str]) -> str:
    items = []
    for number, name in enumerate(names):
        swatch = f'<svg viewBox="0 0 24 8"><path d="M1 4H23" class="line {_style(number)}"/></svg>'
        items.append(f"<span>{swatch}{escaped(name)}</span>")
    return f"<figcaption>{''.join(items)}</figcaption>"


def _finite(curve: Curve) -> Curve:
    kept = [
        number
        for number, (x, y) in enumerate(curve.points)
        if math.isfinite(x) and math.isfinite(y)
    ]
    low = [curve.low[number] for number in kept] if curve.low else []
    high = [curve.high[number] for number in kept] if curve.high else []
    if not all(map(math.isfinite, (*low, *high))):
        low, high = [], []
    return Curve(curve.name, [curve.points[number] for number in kept], low, high)


def _thinned(curve: Curve) -> Curve:
    """At most `MAX_POINTS` points: the means of as many neighbours as that takes."""
    size = math.ceil(len(curve.points) / MAX_POINTS)
    if size <= 1:
        return curve
    columns = [
        [x for x, _ in curve.points],
        [y for _, y in curve.points],
        list(curve.low),
        list(curve.high),
    ]
    xs, ys, low, high = ([_mean(c[i : i + size]) for i in range(0, len(c), size)] for c in columns)
    name = f"{curve.name} (means of {size} points)"
    return Curve(name, list(zip(xs, ys, strict=True)), low, high)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
