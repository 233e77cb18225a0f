"""Checkpoints and runs: what was learned, with what it takes to go on as if never stopped.

A run is a folder: `run.json` (format, config, labels, versions), `checkpoints/STEP/` (Orbax), `metrics.jsonl` and whatever the
command line adds. Orbax writes a checkpoint beside and renames it, so one that was cut off is never taken for whole.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmeta import hosts
from jmeta.mesh import usable_cores

FORMAT = 1
KEEP = 2
DIGEST = "digest"  # of all leaves, kept with them


class Snapshot(NamedTuple):
    """All that a run needs to go on: the carry of the training loop and the best theta so far.

    Attributes:
      theta: after `step` meta-steps.
      state: the outer optimiser's state.
      step: meta-steps taken.
      key: the run's key, `jax.random.key_data`.
      best: the best theta by validation; `()` in a run without one.
      score: its score; -inf where nothing was validated.
    """

    theta: Any
    state: Any
    step: int
    key: Any
    best: Any
    score: float


def versions() -> dict[str, str]:
    """Versions and device, to write beside every result."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    cpus = usable_cores() if device.platform == "cpu" else jax.device_count()
    return {"python": platform.python_version(), **found, "device": f"{device.platform} {kind} x{cpus}"}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(part, path)


def without_nan(value: Any) -> Any:
    """Dicts and lists with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def plain(config: Any) -> Any:
    """A config as JSON would give it back: dataclasses as dicts, tuples as lists."""
    value = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    return json.loads(json.dumps(value))


def read_run(run: str | Path) -> dict[str, Any]:
    """The description of a run, from its `run.json`.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: it was written in a newer format.
    """
    path = Path(run) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"run: {run} holds no run.json, so it is no jmeta run. Usual cause: the folder above or below it.")
    described = json.loads(path.read_text())
    if described.get("format") != FORMAT:
        raise ValueError(
            f"run: {run} has checkpoint format {described.get('format')}, this jmeta reads {FORMAT}. Usual cause: another version."
        )
    return described


def open_run(workdir: str | Path, resume: bool, config: Any, labels: tuple[str, ...], devices: int = 1, **kept: int) -> Path:
    """Makes the folder of a run, or with `resume` takes up the one there.

    Args:
      workdir: the folder.
      resume: whether a run there is taken up.
      config: a dataclass or dict to keep.
      labels: names to keep.
      devices: that the tasks are spread over; a run resumed on other devices goes on with a warning.
      **kept: numbers to keep that a resumed run must share, since others would change what is computed.

    Returns:
      The folder, as an absolute path.

    Raises:
      FileExistsError: the folder holds something and `resume` was not asked for.
      ValueError: the run there has another config, or other numbers.
    """
    check_workdir(workdir, resume)
    folder = Path(workdir).absolute()
    if (folder / "run.json").is_file():
        _same_config(folder, config)
        described = read_run(folder)
        began = described.get("devices", 1)
        if began != devices:
            kept.pop("chunk", None)  # which only orders sums
            warnings.warn(
                f"resume: the run in {folder} began with {began} devices and goes on with {devices}: with the same tasks, and the "
                "same numbers up to the order of sums, but no longer bit for bit.",
                stacklevel=6,
            )
        for name, value in kept.items():
            if described.get(name, value) != value:
                raise ValueError(f"resume: the run in {folder} began with {name} {described[name]}, got {value}.")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    described = {"format": FORMAT, "config": plain(config), "labels": list(labels), "devices": devices, **kept}
    write_json(folder / "run.json", {**described, "versions": versions()})
    return folder


def check_workdir(workdir: str | Path, resume: bool) -> None:
    """Refuses a folder in which a run would overwrite something.

    Raises:
      FileExistsError: the folder holds something and `resume` was not asked for.
    """
    folder = Path(workdir)
    if folder.is_file():
        raise FileExistsError(f"workdir: {workdir} is a file; a folder is expected.")
    started = (folder / "run.json").is_file()
    if started and not resume:
        raise FileExistsError(
            f"workdir: {workdir} holds a run already. To go on with it: resume=True, or jmeta train --resume {workdir}; else give "
            "another folder."
        )
    if not started and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"workdir: {workdir} is not empty and holds no run of jmeta; give a new or an empty folder.")


def kept(workdir: str | Path | None, resume: bool, name: str) -> int | None:
    """The number of that name ("chunk", "devices") that a run to be resumed began with."""
    if workdir is None or not resume or not (Path(workdir) / "run.json").is_file():
        return None
    return read_run(workdir).get(name)


def take_over(folder: Path, config: Any, step: int) -> None:
    """Readies a run to go on from `step`: with the config of now, which may ask for more steps, and without damaged checkpoints.

    Those of later steps could not be read; they are moved to the run's folder `damaged`, since their steps will be written anew.
    """
    described = read_run(folder)
    if described["config"] != plain(config):
        write_json(folder / "run.json", {**described, "config": plain(config)})
    for newer in _steps(folder):
        if newer > step:
            place = folder / "damaged"
            place.mkdir(exist_ok=True)
            (folder / "checkpoints" / str(newer)).rename(place / f"{newer}-{time.strftime('%Y%m%d-%H%M%S')}")


def _same_config(folder: Path, config: Any) -> None:
    """A run may be resumed for more steps, but not as another run; fields that are newer than the run had their defaults."""
    old, defaults = read_run(folder)["config"], {}
    if dataclasses.is_dataclass(config):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
    config = plain(config)
    if not (isinstance(old, dict) and isinstance(config, dict)):
        differing = [] if old == config else ["config"]
    else:
        old = {**plain({name: value for name, value in defaults.items() if value is not dataclasses.MISSING}), **old}
        differing = [name for name in sorted({*old, *config}) if name != "steps" and old.get(name) != config.get(name)]
    if differing:
        raise ValueError(
            f"resume: the run in {folder} has another config; different: {', '.join(differing)}. Resume with the config it began "
            "with (steps alone may change), or start a new run."
        )


def _manager(folder: Path, *, together: bool = False) -> Any:
    """Orbax's manager of a run's checkpoints, of all processes together or of this one alone."""
    import orbax.checkpoint as ocp

    (folder / "checkpoints").mkdir(exist_ok=True)

    own: dict[str, Any] = {}
    if not together and jax.process_count() > 1:
        number = jax.process_index()
        own = {"primary_host": number, "active_processes": {number}, "barrier_sync_key_prefix": f"process{number}"}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEEP,
        enable_async_checkpointing=False,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(**own),
    )
    return ocp.CheckpointManager(folder / "checkpoints", options=options)


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, since Orbax would give NamedTuples back as tuples."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _whole_of(leaf: Any) -> np.ndarray:
    return hosts.whole(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _digest(leaves: dict[str, Any]) -> np.ndarray:
    """SHA-256 of names and bytes, uint8 `[32]`: what stores the arrays would not notice every damage."""
    total = hashlib.sha256()
    for name in sorted(leaves):
        total.update(name.encode())
        total.update(np.ascontiguousarray(leaves[name]).tobytes())
    return np.frombuffer(total.digest(), np.uint8)


def write(folder: Path, snapshot: Snapshot, mesh: Mesh | None = None) -> None:
    """Saves a snapshot as checkpoint `snapshot.step`; the newest two are kept. All processes of a mesh must call it.

    Raises:
      OSError: it cannot be written; those written before stay.
    """
    import orbax.checkpoint as ocp

    written = snapshot.step in _steps(folder)
    hosts.wait(mesh)  # or one would look only after another has written
    if written:
        return
    leaves = {name: _whole_of(_bits(leaf)) for name, leaf in _leaves(snapshot).items()}
    try:
        with _manager(folder, together=hosts.spans_hosts(mesh)) as manager:
            manager.save(snapshot.step, args=ocp.args.StandardSave({**leaves, DIGEST: _digest(leaves)}))
    except (OSError, ValueError) as error:  # TensorStore raises the latter
        before = latest(folder)
        kept = "there is none before it" if before is None else f"the newest one is that of step {before}"
        raise OSError(
            f"checkpoint: step {snapshot.step} cannot be written to {folder}; {kept}. Usual cause: a full disk. "
            f"({str(error).strip()[-200:]})"
        ) from error


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bits(leaf: Any) -> Any:
    """What is kept of a leaf: of a typed key its numbers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as(leaf: Any, stored: Any) -> Any:
    """What was kept, as the kind of array that the leaf is."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(stored), impl=jax.random.key_impl(leaf))
    return np.asarray(stored, leaf.dtype if hasattr(leaf, "dtype") else None)


def fresh(folder: Path, name: str, suffix: str) -> Path:
    """A file name in a folder that is not taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    numbers = [""] + [f"-{number}" for number in range(2, 1000)]
    return next(path for n in numbers if not (path := folder / f"{name}-{stamp}{n}.{suffix}").exists())


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, the newest first; also of a run that another process is writing to."""
    return sorted((int(each.name) for each in (folder / "checkpoints").glob("*") if each.name.isdigit()), reverse=True)


def latest(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None."""
    return next(iter(_steps(folder)), None)


def read(folder: Path, like: Snapshot) -> Snapshot:
    """Reads the newest checkpoint into the structure of `like`; of one that is damaged it warns, and reads the one before.

    Raises:
      FileNotFoundError: there is none.
      ValueError: none can be read, or it is of another model, learner or optimiser; the first leaf that differs is named.
    """
    return _fit_into(like, _stored(folder), folder)


def _stored(folder: Path) -> dict[str, Any]:
    """Leaves by name of the newest checkpoint that is whole."""
    found = _steps(folder)
    if not found:
        raise FileNotFoundError(f"run: {folder} has no whole checkpoint yet.")
    for step, before in zip(found, [*found[1:], None], strict=True):
        try:
            return _whole(folder, step)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            damage = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
            what = f"checkpoint: that of step {step} in {folder} is damaged ({damage})"
            if before is None:
                cause = "Usual causes: files that were copied in part, or changed by hand."
                raise ValueError(f"{what}, and there is none before it. {cause}") from error
            warnings.warn(f"{what}; that of step {before} is used.", stacklevel=5)
    raise AssertionError


def _whole(folder: Path, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        stored = manager.restore(step, args=ocp.args.StandardRestore())
    digest = stored.pop(DIGEST, None)  # those of jmeta's first runs have none
    if digest is not None and not np.array_equal(digest, _digest(stored)):
        raise ValueError("its arrays are not those that were written")
    return stored


def _fit_into(like: Any, stored: dict[str, Any], folder: Path) -> Any:
    wanted = _leaves(like)
    cause = "Usual cause: a checkpoint of another model, learner or outer optimiser."
    if set(wanted) != set(stored):
        odd = sorted(set(wanted) ^ set(stored))[0]
        where = "misses" if odd in wanted else "has, unlike the learner,"
        raise ValueError(f"checkpoint: {folder} {where} {odd}. {cause}")
    for name, leaf in wanted.items():
        found, expected = jnp.shape(stored[name]), jnp.shape(jax.eval_shape(_bits, leaf))
        if found != expected:
            raise ValueError(f"checkpoint: {folder} has {name} of shape {found}, the learner expects {expected}. {cause}")
    leaves = [_as(leaf, stored[name]) for name, leaf in wanted.items()]
    restored = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return restored._replace(step=int(restored.step), score=float(restored.score)) if isinstance(like, Snapshot) else restored


def read_theta(folder: Path, like: Any) -> Any:
    """The best theta of the newest checkpoint, or the last where nothing was validated, in the structure of `like`.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    stored = _stored(folder)
    field = ".best" if np.isfinite(stored[".score"]) else ".theta"
    own = {name.removeprefix(field): leaf for name, leaf in stored.items() if name.startswith(field)}
    return _fit_into(like, own, folder)


def write_theta(workdir: str | Path, theta: Any, config: Any, labels: tuple[str, ...]) -> Path:
    """Makes a run of a theta alone, in a new folder."""
    folder = open_run(workdir, False, config, labels)
    write(folder, Snapshot(theta, (), 0, (), (), float("-inf")))
    return folder
