"""What a run tells: a progress bar or plain lines, `metrics.jsonl` and TensorBoard."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Reporter(NamedTuple):
    """Where a training run reports.

    Attributes:
      advance: `(step, row)`, after every dispatch, for the progress bar.
      row: `(row)`, a dict with `step` and scalars, to be kept.
      note: `(text)`, a line for the reader.
    """

    advance: Callable[[int, dict[str, float]], None]
    row: Callable[[dict[str, Any]], None]
    note: Callable[[str], None]


def _describe(row: dict[str, Any]) -> str:
    known = {
        "loss": "loss {:.4f}",
        "accuracy": "accuracy {:.3f}",
        "valid_score": "validation {:.3f}",
        "tasks_per_second": "{:.0f} tasks/s",
    }
    return "  ".join(text.format(row[name]) for name, text in known.items() if name in row)


def keep_rows_until(path: Path, step: int) -> None:
    """Drops the rows after `step` and a line that was cut off: the resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    os.replace(part, path)


@contextlib.contextmanager
def bar(steps: int, start: int, progress: bool = True) -> Iterator[tuple[Callable, Callable]]:
    """`(advance, note)`: moves a rich progress bar on an interactive terminal, and writes a line; neither without `progress`."""
    if not progress:
        yield (lambda step, row: None), (lambda text: None)
        return
    if not sys.stderr.isatty():
        yield (lambda step, row: None), (lambda text: print(text, file=sys.stderr, flush=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=steps, completed=start)
        yield lambda step, row: shown.update(task, completed=step, description=_describe(row)), shown.console.print


@contextlib.contextmanager
def reporter(workdir: Path | None, steps: int, start: int, progress: bool) -> Iterator[Reporter]:
    """Opens the outputs of a run and closes them at its end.

    Args:
      workdir: where `metrics.jsonl` and TensorBoard's events go; None for neither.
      steps: meta-steps of the run.
      start: meta-steps taken before.
      progress: whether to show anything; a notebook's loops may not want to.
    """
    with contextlib.ExitStack() as stack:
        advance, note = stack.enter_context(bar(steps, start, progress))
        outputs = []
        if workdir is not None:
            outputs = [_json_lines(stack, workdir, start), _tensorboard(stack, workdir)]
        printed = [start]

        def row(values):
            for output in outputs:
                output(values)
            if values["step"] - printed[0] >= steps / 20 or values["step"] == steps or "valid_score" in values:
                printed[0] = values["step"]
                note(f"step {values['step']}/{steps}  {_describe(values)}")

        yield Reporter(advance, row, note)


def _json_lines(stack: contextlib.ExitStack, workdir: Path, start: int) -> Callable:
    path = workdir / "metrics.jsonl"
    keep_rows_until(path, start)
    file = stack.enter_context(path.open("a"))

    def write(row):
        file.write(json.dumps(row) + "\n")
        file.flush()

    return write


def _tensorboard(stack: contextlib.ExitStack, workdir: Path) -> Callable:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir / "tensorboard"))
    stack.callback(writer.close)

    def write(row):
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return write
