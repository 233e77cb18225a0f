"""The chart of `speed.py`: one bar a contender, one panel a row."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

COLUMNS = 3


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the tasks a second of every contender, beside its ratio to jmeta's time.

    Args:
      rows: as `speed.py` writes them.
      path: of the picture; it is drawn anew.
    """
    height = -(-len(rows) // COLUMNS)
    figure, axes = plt.subplots(height, COLUMNS, figsize=(4.5 * COLUMNS, 2.4 * height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, (name, row) in zip(axes.flat, rows.items(), strict=False):
        _panel(axis, name, row)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axis: Any, name: str, row: dict[str, Any]) -> None:
    contenders = row["contenders"]
    speeds = [row["work"]["tasks"] / found["seconds"]["median"] if "seconds" in found else 0 for found in contenders.values()]
    bars = axis.barh(list(contenders), speeds, color=["C0" if peer == "jmeta" else "0.7" for peer in contenders])
    ratios = [_label(peer, found, row["ratios"]) for peer, found in contenders.items()]
    axis.bar_label(bars, ratios, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(speeds))
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("tasks/s, and jmeta's speed-up", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _label(peer: str, found: dict[str, Any], ratios: dict[str, float]) -> str:
    if "missing" in found:
        return "not run"
    return f"{ratios[peer]:.1f}x" if peer in ratios else ""
