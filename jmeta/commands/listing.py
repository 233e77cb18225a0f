"""What `jmeta presets`, `data` and `bench` do."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jmeta import builders, presets, pretrain
from jmeta.presets import Config

BENCHMARKS = ("speed", "growth", "overhead", "frozen")


def show_presets() -> None:
    """Lists the presets and what each sets."""
    for name, config in presets.PRESETS.items():
        print(_preset_line(name, config, Config()))
    for name, config in pretrain.PRESETS.items():
        print(_preset_line(name, config, pretrain.Pretrain()))


def _preset_line(name: str, config: Any, default: Any) -> str:
    changed = (field.name for field in dataclasses.fields(config) if getattr(config, field.name) != getattr(default, field.name))
    return f"{name:26s}" + " ".join(f"{field}={getattr(config, field)}" for field in changed)


def data(
    name: Annotated[Literal["glyphs", "omniglot", "colour84", "grey28"], tyro.conf.Positional],
    *,
    source: str | None = None,
    split: Literal["customary", "background"] = "customary",
    classes: tuple[int, int, int] = Config.classes,
    without: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Renders glyphs, fetches Omniglot or reads photographs, and shows what is there.

    Args:
      name: of the data set.
      source: where Omniglot lies, looked up or downloaded if not given, or the photographs (see `jmeta.photographs`).
      split: of Omniglot's classes.
      classes: of photographs, to train on, to validate on and to test on.
      without: classes of photographs to leave out.
      seed: of the split.
    """
    asked = Config(dataset=name, source=source, split=split, classes=classes, without=without, seed=seed)
    splits = builders.make_splits(asked)
    assert splits is not None
    for part, images in zip(splits._fields, splits, strict=True):
        if images is not None:
            size = f"{images.pixels.shape[1]}x{images.pixels.shape[2]}, {images.pixels.nbytes / 2**20:.0f} MiB"
            first = ", ".join(images.names[:3])
            print(f"{part:6s}{len(images.names):6d} classes {len(images.pixels):7d} images {size}; {first}, ...")


def bench(args: list[str]) -> int:
    """Runs one of the benchmarks that come with jmeta, in a process of its own.

    Args:
      args: "speed" (also if none is named), "growth", "overhead" or "frozen", and its options; results go to
        `jmeta-bench-NAME.json` here if `--out` is not among them.

    Returns:
      The exit status.
    """
    name, *rest = args if args and args[0] in BENCHMARKS else ["speed", *args]
    here = Path(__file__).parents[1]
    folder = next(each for each in (here / "benchmarks", here.parent / "benchmarks") if (each / "speed.py").is_file())
    out = [] if any(arg.startswith("--out") for arg in rest) else ["--out", f"jmeta-bench-{name}.json"]
    return subprocess.run([sys.executable, str(folder / f"{name}.py"), *rest, *out], check=False).returncode
