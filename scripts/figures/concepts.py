"""Draw docs/concepts.svg: who has what, and what passes between them in one outer step.

.venv/bin/python scripts/figures/concepts.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FILE = Path(__file__).resolve().parents[2] / "docs" / "concepts.svg"
BLUE, ORANGE, GREEN, GREY = "#cfe3f5", "#fbe0c3", "#d3ecd0", "#ececec"
INK = "#222222"


def box(axes: Axes, x: float, y: float, width: float, title: str, text: str, colour: str) -> None:
    """A box of height 1.5 whose lower left corner is (x, y)."""
    style = "round,pad=0.02,rounding_size=0.12"
    patch = FancyBboxPatch((x, y), width, 1.5, boxstyle=style, fc=colour, ec=INK, lw=0.8)
    axes.add_patch(patch)
    middle = x + width / 2
    axes.text(middle, y + 1.2, title, ha="center", va="center", weight="bold", color=INK)
    axes.text(middle, y + 0.55, text, ha="center", va="center", size=9, color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str, bend: float = 0.0
) -> None:
    """An arrow with its text above the middle."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, connectionstyle=style, color=INK
        )
    )
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        size=9,
        color=INK,
        bbox={"fc": "white", "ec": "none", "pad": 1.5},
    )


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "metadist"  # the same bytes each time
    mpl.rcParams["font.family"] = "DejaVu Sans"
    figure, axes = plt.subplots(figsize=(9.6, 5.4))
    axes.set(xlim=(0, 16), ylim=(0, 9))
    axes.axis("off")

    box(axes, 0.2, 7.2, 4.2, "Sampler", "sample(index)", BLUE)
    box(axes, 5.9, 7.2, 4.2, "Task", "support set,  query set", BLUE)
    box(axes, 11.6, 7.2, 4.2, "Problem", "start of x and y;  losses g, f", ORANGE)
    box(
        axes,
        3.4,
        4.2,
        9.2,
        "Algorithm",
        "adapts y on g (support);\nestimates h = df/dx on f (query)",
        GREEN,
    )
    box(axes, 0.2, 1.2, 4.2, "Outer optimizer", "steps x along h", GREY)
    box(axes, 5.9, 1.2, 4.2, "Trainer", "tasks of a step, checkpoints,\nvalidation", GREY)
    box(axes, 11.6, 1.2, 4.2, "Executor", "this process, or workers\nof a Ray cluster", GREY)

    arrow(axes, (4.5, 7.95), (5.8, 7.95), "")
    arrow(axes, (8.0, 7.1), (8.0, 5.8), "data")
    arrow(axes, (13.2, 7.1), (11.6, 5.8), "derivatives")
    arrow(axes, (4.6, 4.1), (2.6, 2.8), "h, mean over tasks")
    arrow(axes, (1.6, 2.8), (3.3, 5.0), "", bend=-0.35)
    axes.text(1.4, 4.3, "x", ha="center", color=INK)
    arrow(axes, (8.0, 2.8), (8.0, 4.1), "which tasks")
    arrow(axes, (13.2, 2.8), (11.8, 4.1), "where it runs")
    axes.text(
        8,
        0.5,
        "min over x of  f(x, y*(x)),   y*(x) = argmin over y of  g(x, y)",
        ha="center",
        color=INK,
    )
    figure.savefig(FILE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
