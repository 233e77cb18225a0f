"""Kills training at random moments, and checks that it goes on and ends with the very numbers of a run that was left alone.

    python benchmarks/kills.py --kills 100

Half of the kills go to MAML and half to zapped ASB, both on glyphs, with a checkpoint at every meta-step. More than half come while
a checkpoint is being written; the rest at any moment, some of them SIGTERM, after which a run saves and leaves. Before some starts
bits of the newest checkpoint are turned, or the cached images are cut short. At last the disk is full, for which a file system of
8 MiB is mounted; that takes root, and is reported as not done elsewhere.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from machine import machine  # pyright: ignore[reportMissingImports]

import jmeta as jm
from jmeta import checkpoint

OUT = Path(__file__).parent / "results" / "kills.json"
KINDS = ("maml", "zapped asb")
FOREVER = 1_000_000  # meta-steps
FULL = 2**23  # bytes of the small file system
IN_WRITE, TERMINATED, DAMAGED, CUT = 0.65, 0.3, 0.15, 0.05  # shares of kills, of the other kills, of starts, of starts


def work(kind: str, folder: Path, steps: int) -> None:
    """Trains, and prints a digest of theta and of the optimiser's state."""
    jm.use_cache()
    data, key = jm.glyphs(), jax.random.key(0)
    if kind == "maml":
        net = jm.mlp(5, hidden=(64,), shape=(28, 28, 1))
        learner, tasks, batch = jm.maml(net, jm.xent, optax.sgd(0.1), jm.repeat(2)), jm.episodes(data.train, 5, 1, 5), 4
    else:
        net = jm.mlp(len(data.train.names), hidden=(64,), shape=(28, 28, 1))
        learner = jm.asb(net, jm.xent, jm.chain(jm.zap("head"), optax.sgd(1e-2)), jm.one_by_one(10))
        tasks, batch = jm.streams(data.train, shots=10, remember=32), 1
    done = jm.fit(key, learner, tasks, optax.adam(1e-3), steps, batch, workdir=folder, resume=True, save_every=1, log_every=10)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((done.last, done.state))]
    print(hashlib.sha256(b"".join(leaves)).hexdigest())


@contextmanager
def started(kind: str, folder: Path, steps: int, cache: Path) -> Iterator[subprocess.Popen]:
    """A process that trains; it is killed at the end if it still runs."""
    command = [sys.executable, __file__, "--work", kind, str(folder), str(steps)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "JMETA_CACHE_DIR": str(cache)}, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(kind: str, folder: Path, steps: int, cache: Path) -> str:
    """The digest of a run that takes all its steps."""
    with started(kind, folder, steps, cache) as process:
        out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{kind} did not end: {err}")
    return out.strip()


def await_step(folder: Path, after: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of a later step is there."""
    until = time.monotonic() + 300
    while (checkpoint.latest(folder) or 0) <= after:
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"{folder.name} does not go on after step {after}: {process.communicate()[1]}")
        time.sleep(0.001)


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any("tmp" in each.name for each in os.scandir(folder / "checkpoints"))


def strike(process: subprocess.Popen, folder: Path, chance: random.Random) -> tuple[str, str]:
    """Ends the process; returns how, and what it had said."""
    sent = signal.SIGKILL
    if chance.random() < IN_WRITE:
        while process.poll() is None and not unfinished(folder):
            pass
        time.sleep(chance.uniform(0, 0.02))
    else:
        sent = signal.SIGTERM if chance.random() < TERMINATED else sent
        time.sleep(chance.uniform(0, 1))
    process.send_signal(sent)
    said = process.communicate()[1]
    if process.returncode not in (-signal.SIGKILL, 128 + signal.SIGTERM):
        sys.exit(f"{folder.name} ended by itself: {said}")
    if sent == signal.SIGTERM:
        return "SIGTERM", said
    return "SIGKILL in a write" if unfinished(folder) else "SIGKILL", said


def damage(folder: Path, cache: Path, chance: random.Random) -> tuple[str, str | None]:
    """Damages something, or nothing; returns what, and what the next start must say of it."""
    steps = sorted((int(each.name) for each in (folder / "checkpoints").iterdir() if each.name.isdigit()), reverse=True)
    drawn = chance.random()
    if drawn < DAMAGED and len(steps) > 1:
        arrays = (folder / "checkpoints" / str(steps[0])).rglob("ocdbt.process_0/d/*")
        turn(max(arrays, key=lambda path: path.stat().st_size))
        return "newest checkpoint damaged", f"that of step {steps[0]} in {folder} is damaged"
    if drawn > 1 - CUT:
        path = next(cache.glob("glyphs-*.npz"))
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
        return "cached images cut short", "the cached glyphs are damaged"
    return "", None


def turn(path: Path) -> None:
    """Turns bits all over a file."""
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 100):
        content[place] ^= 0x55
    path.write_bytes(content)


def campaign(kind: str, kills: int, base: Path, cache: Path, chance: random.Random) -> dict[str, Any]:
    """Kills a run again and again; what happened, how often, and whether it ended as a run left alone."""
    folder, happened, reached = base / kind.replace(" ", "-"), Counter(), 0
    for number in range(kills):
        what, must_say = damage(folder, cache, chance) if number else ("", None)
        newest = checkpoint.latest(folder) or 0
        with started(kind, folder, FOREVER, cache) as process:
            await_step(folder, newest, process)
            how, said = strike(process, folder, chance)
        if must_say and must_say not in said:
            sys.exit(f"{kind}: after '{what}' the start said only: {said}")
        happened.update([how, *([what] if what else [])])
        reached = checkpoint.latest(folder) or 0
        print(f"{kind}, kill {number + 1}: {how} at step {reached}{', ' * bool(what)}{what}", flush=True)
    full = full_disk(kind, folder, base, cache)
    ends = [finish(kind, place, reached + 20, cache) for place in (folder, base / f"{folder.name}-alone")]
    return {"kills": kills, "steps": reached + 20, **happened, "full disk": full, "ended as a run left alone": ends[0] == ends[1]}


def full_disk(kind: str, folder: Path, base: Path, cache: Path) -> str:
    """A copy of the run goes on where there is no room: what it says, and whether all that was written before is still there."""
    place = base / "small"
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL}", "tmpfs", place], capture_output=True).returncode:
        return "not done: no file system could be mounted"
    try:
        copy = Path(shutil.copytree(folder, place / "run"))
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
        with (place / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1024))
            except OSError:
                pass
        with started(kind, copy, FOREVER, cache) as process:
            said = process.communicate()[1].strip().splitlines()[-1]
        kept = all(path.read_bytes() == content for path, content in before.items())
        (place / "filler").unlink()
        newest = checkpoint.latest(copy) or 0
        with started(kind, copy, FOREVER, cache) as process:
            await_step(copy, newest, process)
        return f"said: {said.replace(str(base), '')[:200]}; {'all' if kept else 'NOT all'} kept; goes on with room"
    finally:
        subprocess.run(["umount", place], check=True)


def main() -> None:
    """Both kinds of run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", nargs=3, metavar=("KIND", "FOLDER", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work[0], Path(asked.work[1]), int(asked.work[2]))
        return
    if asked.out.exists():
        sys.exit(f"--out is {asked.out}, which exists; move it away or give another name.")
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as base:
        cache = Path(base) / "cache"
        found = {kind: campaign(kind, asked.kills // len(KINDS), Path(base), cache, chance) for kind in KINDS}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(asked.out, {"seed": asked.seed, "machine": machine(), **found})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
