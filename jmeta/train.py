"""`fit`: one flat training loop for every meta-learner.

A dispatch runs many meta-steps in one compiled program; a meta-step samples its tasks on the device, accumulates their
meta-gradients chunk by chunk and takes a step of the outer optimiser. The key of a meta-step is `fold_in(key, step)` and that of a
task `fold_in(step key, task index)`, so neither chunks nor interruptions change what is computed.
"""

import contextlib
import functools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh

from jmeta import checkpoint, hosts, log
from jmeta.core import MetaLearner, Tasks, Theta, check_kinds, default_chunk
from jmeta.evaluate.fewshot import Score, fewshot
from jmeta.mesh import check_batch, check_mesh, count_devices, layout_of, on_one, own_shares, put_like, replicate, spread

DISPATCH = 100  # most meta-steps in one call of the compiled program
STAGED_DISPATCH = 10  # the same where images are fetched from the host
DISPATCH_SECONDS = 1.0


class Fit(NamedTuple):
    """What `fit` returns.

    Attributes:
      theta: the best by validation where there is one, else the last.
      last: theta after the last step.
      state: the outer optimiser's state after the last step.
      history: `{"loss": [steps], "accuracy": [steps], ...}` of this call, means over each meta-batch; with validation also
        `valid_step` and `valid_score`.
    """

    theta: Any
    last: Any
    state: Any
    history: dict[str, Any]


class Validation(NamedTuple):
    """How `fit` chooses the best theta: every `every` steps, the score of `learner` on `episodes` fixed episodes of `tasks`.

    Attributes:
      learner: may differ from the one trained, in steps for instance.
      tasks: validation tasks.
      episodes: how many.
      every: meta-steps between two validations; the last step is always validated.
      metric: `(outputs, y) -> scalar`, higher is better; None for accuracy.
    """

    learner: MetaLearner
    tasks: Tasks
    episodes: int = 200
    every: int = 500
    metric: Callable[..., jax.Array] | None = None


class _Carry(NamedTuple):
    theta: Any
    state: Any


def _learned(theta: Theta) -> Theta:
    """The part of theta that the outer optimiser moves: all but its memory."""
    return theta._replace(memory=())


def _scalars(info: dict[str, Any]) -> dict[str, jax.Array]:
    """What is logged; the step's batch is for the outer optimiser alone."""
    return {name: value for name, value in info.items() if name != "batch"}


def _mean_over_tasks(leaf: jax.Array) -> jax.Array:
    """Floats are averaged over tasks, anything else (counts) is the last task's."""
    return leaf.mean(0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[-1]


def batch_gradient(learner: MetaLearner, sample: Callable, batch: int, chunk: int, mesh: Mesh | None = None) -> Callable:
    """The meta-gradient of a batch of tasks, `chunk` tasks at a time on each device.

    Args:
      learner: a meta-learner.
      sample: `(key, data) -> Task`.
      batch: tasks of a meta-batch.
      chunk: tasks that are vmapped together; chunks are scanned and their gradients accumulated.
      mesh: devices that the tasks are spread over.

    Returns:
      `(key, theta, data, meta_step, staged=False) -> (base, gradient, info)`: means over the tasks; `data` has a leading axis
      `[batch]` if staged.
    """

    def one(theta, data, meta_step, key):
        key_task, key_learn = jax.random.split(key)
        base, gradient, info = learner.grad(key_learn, theta, sample(key_task, data), meta_step=meta_step)
        leaves = zip(jax.tree.leaves(_learned(base)), jax.tree.leaves(_learned(theta)), strict=True)
        if batch > 1 and not all(ours is theirs for ours, theirs in leaves):
            raise ValueError(
                f"fit: batch is {batch}, but this learner steps from a base that depends on the task (ASB, Meta-ASB), so the "
                "meta-batch must be 1."
            )
        if batch > 1 and "batch" in info:
            raise ValueError(f"fit: batch is {batch}, but this learner draws its own examples at each meta-step; batch must be 1.")
        return (base if batch == 1 else base.memory), gradient, info

    def over_tasks(keys, theta, shared, own, meta_step):
        """Means over the tasks of one device: `own` holds the data of each task, `shared` that of all, and one of them is empty."""
        count = len(keys)

        def part(total, keys_and_data):
            keys, part_own = keys_and_data
            data, axis = (part_own, 0) if jax.tree.leaves(own) else (shared, None)
            if chunk == 1:
                first = jax.tree.map(lambda leaf: leaf[0], data) if axis == 0 else data
                memory, grads, info = one(theta, first, meta_step, keys[0])
                return jax.tree.map(jnp.add, total, grads), (memory, info)
            tasks = jax.vmap(functools.partial(one, theta), (axis, None, 0))
            memories, grads, info = tasks(data, meta_step, keys)
            total = jax.tree.map(lambda t, g: t + g.sum(0), total, grads)
            return total, jax.tree.map(_mean_over_tasks, (memories, info))

        zeros = jax.tree.map(jnp.zeros_like, _learned(theta))
        chunks = jax.tree.map(lambda leaf: leaf.reshape(count // chunk, chunk, *leaf.shape[1:]), (keys, own))
        total, rest = jax.lax.scan(part, zeros, chunks)
        memory, info = jax.tree.map(_mean_over_tasks, rest)
        return memory, jax.tree.map(lambda leaf: leaf / count, total), info

    shares = spread(over_tasks, mesh, (True, False, False, True, False))

    def gradient(key, theta, data, meta_step, staged=False):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))
        if batch == 1:
            return one(theta, jax.tree.map(lambda leaf: leaf[0], data) if staged else data, meta_step, keys[0])
        shared, own = ((), data) if staged else (data, ())
        memory, grads, info = shares(keys, theta, shared, own, meta_step)
        return theta._replace(memory=memory), grads, info

    return gradient


def meta_step(
    learner: MetaLearner, sample: Callable, outer: optax.GradientTransformation, batch: int, chunk: int, mesh: Mesh | None = None
) -> Callable:
    """One step of the outer optimiser: `(key, carry, data, step, staged) -> (carry, info)`."""
    gradient_of = batch_gradient(learner, sample, batch, chunk, mesh)
    outer = optax.with_extra_args_support(outer)

    def step(key, carry, data, number, staged=False):
        theta, state = carry
        base, gradient, info = gradient_of(key, theta, data, number, staged)

        def value_fn(moved, info=None):  # optax hands `info` on to it, by name
            return gradient_of(key, moved._replace(memory=theta.memory), data, number, staged)[2]["loss"]

        extra = {"value": info["loss"], "grad": gradient, "value_fn": value_fn, "info": info}
        updates, state = outer.update(gradient, state, _learned(base), **extra)
        moved: Any = optax.apply_updates(_learned(base), updates)
        return _Carry(moved._replace(memory=base.memory), state), {**_scalars(info), "gradient_norm": optax.tree.norm(gradient)}

    return step


def _run(learner, sample, outer, batch, chunk, mesh, layout, size, key, carry, data, first, count, block):
    """`count` meta-steps from step `first`; `block` is the step of `data[0]` where data is staged, else None.

    `layout` holds the shardings of the carry's leaves where parameters are shared out, else None.
    """
    step = meta_step(learner, sample, outer, batch, chunk, mesh)

    def now(number):
        return data if block is None else jax.tree.map(lambda leaf: leaf[number - block], data)

    @jax.jit  # so that the shapes below and the loop share one trace
    def run(number, carry):
        return step(jax.random.fold_in(key, number), carry, now(number), number, block is not None)

    shapes = jax.eval_shape(run, first, carry)[1]
    rows = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), shapes)

    def body(offset, loop):
        carry, rows = loop
        carry, info = run(first + offset, carry)
        return carry, jax.tree.map(lambda row, value: row.at[offset].set(value), rows, info)

    carry, rows = jax.lax.fori_loop(0, count, body, (carry, rows))
    if layout is not None:
        laid = map(jax.lax.with_sharding_constraint, jax.tree.leaves(carry), layout)
        carry = jax.tree.unflatten(jax.tree.structure(carry), laid)
    return carry, rows


_dispatch = jax.jit(_run, static_argnums=range(8), donate_argnums=9)


def fit(
    key: jax.Array,
    learner: MetaLearner,
    tasks: Tasks,
    outer: optax.GradientTransformation,
    steps: int,
    batch: int,
    *,
    theta: Theta | None = None,
    state: Any = None,
    validate: Validation | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    config: Any = None,
    labels: tuple[str, ...] = (),
    save_every: int = 500,
    log_every: int = 100,
    progress: bool = True,
) -> Fit:
    """Meta-trains a learner.

    It may be called under `jax.vmap`, over keys or over anything that the learner was made from; it then neither prints nor writes.

    Args:
      key: a typed key, `jax.random.key(seed)`; all of the run follows from it.
      learner: what is trained.
      tasks: what it is trained on.
      outer: any optax optimiser; it may take `value`, `grad`, `value_fn` and `info` by keyword.
      steps: meta-steps.
      batch: tasks of a meta-step.
      theta: where to start; `learner.init` if None. It is copied, not consumed. One from `jmeta.init_sharded` stays laid out on the
        mesh as it is.
      state: the outer optimiser's state to start from; a fresh one if None.
      validate: how the best theta is chosen; None returns the last.
      chunk: tasks that are vmapped together, a divisor of each device's share of batch; chosen by device and network if None.
      mesh: devices that the tasks of a meta-step are spread over, as `jmeta.task_mesh()` makes it; None uses one.
      workdir: a new folder for checkpoints, `metrics.jsonl` and TensorBoard; with it, Ctrl-C and SIGTERM save before they end
        the run.
      resume: go on with the run in workdir, bit for bit as if it had not stopped where the number of devices is the same; a new one
        begins where there is none.
      config: dataclass or dict to keep beside the checkpoints; a resumed run must have the same but for `steps`.
      labels: names of the classes trained on, to keep likewise.
      save_every: meta-steps between checkpoints.
      log_every: meta-steps that a row of metrics is the mean of.
      progress: whether to show a progress bar, or plain lines outside a terminal.

    Returns:
      A `Fit`.

    Raises:
      ValueError: an argument does not fit; a batch above 1 for a learner whose base depends on the task; a head that is too small;
        several processes that would not compute the same.
      FileExistsError: workdir holds something and `resume` was not asked for.
      FloatingPointError: the loss or its gradient is no longer finite; the message says at which step and what is saved.
      OSError: a checkpoint cannot be written; those before it stay.
      RuntimeError: another process of the run has died.
      KeyboardInterrupt, SystemExit: the run was interrupted, and saved if it has a workdir.
    """
    plan = _Plan(steps, batch, save_every, log_every, validate, mesh)
    check_kinds("fit", key, learner, tasks, theta)
    if not isinstance(outer, optax.GradientTransformation):
        raise TypeError(f"fit: outer must be an optax optimiser such as optax.adam(1e-3), got {outer!r}.")
    check_mesh(mesh)
    if workdir is not None or hosts.spans_hosts(mesh):
        hosts.check_hosts(mesh)
    if workdir is not None:
        checkpoint.check_workdir(workdir, resume)
    start_theta: Theta = learner.init(key) if theta is None else theta
    _check_outputs(learner, tasks, start_theta)
    if chunk is None:
        share = batch // count_devices(mesh)
        chunk = math.gcd(checkpoint.kept(workdir, resume, "chunk") or default_chunk(start_theta.params, share), share)
    _check(plan, chunk)
    start = _first_snapshot(key, start_theta, outer, state, plan)
    shared = tasks._replace(data=replicate(tasks.data, mesh))
    program = learner, tasks.sample, outer, batch, chunk, mesh, layout_of((start.theta, start.state), mesh)
    dispatch = functools.partial(_dispatch, *program)
    if _is_traced(dispatch, key, start, shared, batch, mesh):
        return _fit_traced(functools.partial(_run, *program), key, start, tasks, plan, workdir)
    folder = None if workdir is None else Path(workdir).absolute()
    start = _begun(start, key, plan, chunk, folder, resume, config, labels)
    shown = hosts.leads() or not hosts.spans_hosts(mesh)
    with (
        log.reporter(folder if shown else None, steps, start.step, progress and shown) as report,
        _signals(folder is not None) as received,
        hosts.naming_the_lost(mesh, folder),
    ):
        if hosts.spans_hosts(mesh) and folder is not None:
            report.note(f"{jax.process_count()} processes; should one die, the others end within a minute: {hosts.advice(folder)}.")
        return _loop(dispatch, key, shared, start, plan, report, folder, received)


def _begun(start, key, plan, chunk, folder, resume, config, labels) -> checkpoint.Snapshot:
    """Where a run stands whose folder is made, or taken up; all processes must agree on it."""
    found = False
    if folder is not None:
        devices, numbers = count_devices(plan.mesh), {"chunk": chunk, "batch": plan.batch}
        hosts.alone(plan.mesh, lambda: checkpoint.open_run(folder, resume, config, labels, devices, **numbers))
        found = checkpoint.latest(folder) is not None
    if folder is not None and found:
        start = _taken_up(start, key, plan.steps, folder, plan.mesh)
    if hosts.spans_hosts(plan.mesh):
        hosts.check_same(**_identity(start, key, plan, chunk, config, folder))
    if folder is not None and found:
        hosts.alone(plan.mesh, lambda: checkpoint.take_over(folder, config, start.step))
    return start


def _identity(start, key, plan, chunk, config, folder) -> dict[str, bytes]:
    """What must be the same in every process of a run, by name."""
    numbers = (plan.steps, plan.batch, plan.save_every, plan.log_every, plan.validate and plan.validate[2:4], chunk)
    described = b"" if folder is None else (folder / "run.json").read_bytes() if (folder / "run.json").is_file() else b"none"
    return {
        "the key": np.asarray(jax.random.key_data(key)).tobytes(),
        "steps, batch, chunk or validation": str(numbers).encode(),
        "the config": json.dumps(checkpoint.plain(config)).encode() if folder is not None else b"",
        "the workdir": described,
        "the step of the newest checkpoint that can be read": str(start.step).encode(),
        "theta": b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(start.theta.params) if leaf.is_fully_replicated),
    }


def _check_outputs(learner: MetaLearner, tasks: Tasks, theta: Theta) -> None:
    """Refuses a head with fewer outputs than the tasks have classes."""
    if tasks.classes is None or tasks.stage is not None:
        return
    key = jax.random.key(0)
    task = jax.eval_shape(tasks.sample, key, tasks.data)
    one = jax.ShapeDtypeStruct((1, *task.query.x.shape[1:]), jnp.float32)
    outputs = jax.eval_shape(lambda support, x: learner.predict(learner.adapt(key, theta, support), x), task.support, one)
    if outputs.shape[-1] < tasks.classes:
        raise ValueError(
            f"fit: the tasks have {tasks.classes} classes, but the model's head has {outputs.shape[-1]} outputs, too few. Usual "
            "cause: classes that were rotated, or a network made for episodes."
        )


class _Plan(NamedTuple):
    steps: int
    batch: int
    save_every: int
    log_every: int
    validate: Validation | None
    mesh: Mesh | None

    def boundary(self, step: int) -> int:
        """The next step after `step` at which something is due."""
        every = [self.log_every, self.save_every, *([self.validate.every] if self.validate else [])]
        return min(self.steps, *(step - step % each + each for each in every))

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps


def _first_snapshot(key: jax.Array, theta: Theta, outer: Any, state: Any, plan: _Plan) -> checkpoint.Snapshot:
    """Where a new run starts, in copies, since the first dispatch may overwrite what it is given."""
    best = jax.tree.map(jnp.copy, theta) if plan.validate else ()
    state = outer.init(_learned(theta)) if state is None else state
    theta, state = replicate(jax.tree.map(jnp.copy, (theta, state)), plan.mesh)
    return checkpoint.Snapshot(theta, state, 0, jax.random.key_data(key), best, -math.inf)


def _loop(dispatch, key, tasks, now, plan, report, folder, received) -> Fit:
    """Dispatches until the last step; logs, validates and saves where they are due."""
    history, pending, since = [], [], time.perf_counter()
    shared_key = replicate(key, plan.mesh)
    valid_steps, valid_scores, pace = [], [], 1
    with _staging(tasks, key, plan.batch, plan.mesh) as block_of:
        while now.step < plan.steps:
            data, block, end = block_of(now.step)
            count = min(plan.boundary(now.step), end, now.step + pace) - now.step
            longest = DISPATCH if block is None else STAGED_DISPATCH
            began = time.perf_counter()
            carry, rows = jax.block_until_ready(
                dispatch(longest, shared_key, _Carry(now.theta, now.state), data, now.step, count, block)
            )
            rows = jax.tree.map(lambda leaf, count=count: hosts.whole(leaf)[:count], rows)
            _check_finite(rows, now.step, folder)
            stop, pace = hosts.agree(plan.mesh, max(received, default=0), _next_pace(pace, time.perf_counter() - began, longest))
            now = now._replace(theta=carry.theta, state=carry.state, step=now.step + count)
            history.append(rows)
            pending.append(rows)
            row = {"step": now.step, **_means(pending)}
            report.advance(now.step, {**row, "tasks_per_second": plan.batch * count / (time.perf_counter() - began)})
            if plan.validate and plan.due(now.step, plan.validate.every):
                now, score = _validated(key, plan.validate, plan.mesh, now)
                valid_steps.append(now.step)
                valid_scores.append(score.mean)
                row |= {"valid_score": score.mean, "valid_interval": score.interval}
            if stop or plan.due(now.step, plan.log_every) or "valid_score" in row:
                tasks_done = plan.batch * sum(len(part["loss"]) for part in pending)
                report.row({**row, "tasks_per_second": tasks_done / (time.perf_counter() - since)})
                pending, since = [], time.perf_counter()
            if folder is not None and (stop or plan.due(now.step, plan.save_every)):
                checkpoint.write(folder, now, plan.mesh)
            if stop:
                break
    if folder is not None and not history:
        checkpoint.write(folder, now, plan.mesh)
    stop, _ = hosts.agree(plan.mesh, max(received, default=0), pace)
    if stop:
        _leave(stop, now.step, str(folder))
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *history) if history else {}
    if plan.validate:
        rows |= {"valid_step": np.array(valid_steps), "valid_score": np.array(valid_scores)}
    theta, state = on_one((now.theta, now.state), plan.mesh)
    return Fit(now.best if plan.validate else theta, theta, state, rows)


def _fit_traced(run, key, start, tasks, plan, workdir) -> Fit:
    """All steps in one dispatch, for `vmap` over whole runs, where nothing is donated."""
    if workdir is not None or plan.validate is not None or plan.mesh is not None or tasks.stage is not None:
        raise ValueError("fit: under vmap or jit there can be neither workdir nor validate nor mesh nor host-resident images.")
    carry, rows = run(plan.steps, key, _Carry(start.theta, start.state), tasks.data, 0, plan.steps, None)
    return Fit(carry.theta, carry.theta, carry.state, rows)


def _is_traced(dispatch, key, start, tasks, batch, mesh) -> bool:
    """Whether `fit` runs under a transformation: an argument, or something the learner was made from, is a tracer."""
    arguments = (key, start.theta, start.state, tasks.data)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
        return True
    with _staging(tasks, key, batch, mesh) as block_of:
        data, block, _ = block_of(0)
    longest = DISPATCH if block is None else STAGED_DISPATCH
    call = functools.partial(dispatch, longest)
    program = jax.make_jaxpr(call)(replicate(key, mesh), _Carry(start.theta, start.state), data, 0, 1, block)
    return any(isinstance(constant, Tracer) for constant in program.consts)


@contextlib.contextmanager
def _staging(tasks: Tasks, key: jax.Array, batch: int, mesh: Mesh | None) -> Iterator[Callable]:
    """Gives `block_of(step) -> (data, first step of the block or None, step after the block)`.

    Data on the device is one endless block. Images on the host come in blocks of 10 meta-steps, the next of which a thread fetches
    while the device works on the present one; each of several processes fetches those of its own devices' tasks.
    """
    stage = tasks.stage
    if stage is None:
        yield lambda step: (tasks.data, None, math.inf)
        return

    @jax.jit
    def keys_of(steps):
        def of_task(step, index):
            return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), index))[0]

        return jax.vmap(lambda step: jax.vmap(lambda index: of_task(step, index))(jnp.arange(batch)))(steps)

    def fetch(block):
        return own_shares(images_of, keys_of(block + jnp.arange(STAGED_DISPATCH)), mesh)

    def images_of(keys):
        return jax.tree.map(lambda leaf: leaf.reshape(*keys.shape, *leaf.shape[1:]), stage(keys.reshape(-1)))

    with ThreadPoolExecutor(1) as pool:
        waiting = {}

        def block_of(step):
            block = step - step % STAGED_DISPATCH
            following = block + STAGED_DISPATCH
            for wanted in (block, following):
                if wanted not in waiting:
                    waiting[wanted] = pool.submit(fetch, wanted)
            for old in [each for each in waiting if each < block]:
                del waiting[old]
            return waiting[block].result(), block, following

        yield block_of


@contextlib.contextmanager
def _signals(enabled: bool) -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM instead of dying, so that the loop can save first; a second one ends at once."""
    received: list[int] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, step: int, folder: str) -> None:
    command = f"jmeta train --resume {folder}{' --distributed' * (jax.process_count() > 1)}"
    message = f"Stopped at step {step}; saved in {folder}. To go on, call again with resume=True ({command})."
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    print(message, file=sys.stderr)
    raise SystemExit(128 + number)


def _check(plan: _Plan, chunk: int) -> None:
    for name in ("batch", "save_every", "log_every"):
        if getattr(plan, name) < 1:
            raise ValueError(f"fit: {name} must be at least 1, got {getattr(plan, name)}.")
    if plan.steps < 0:
        raise ValueError(f"fit: steps must be at least 0, got {plan.steps}.")
    check_batch(plan.batch, plan.mesh)
    devices = count_devices(plan.mesh)
    if chunk < 1 or plan.batch // devices % chunk:
        a_device = f", {plan.batch // devices} on each of {devices} devices," if plan.mesh else ""
        raise ValueError(f"fit: batch must be divisible by chunk, got batch {plan.batch}{a_device} and chunk {chunk}.")
    if plan.validate is not None and plan.validate.every < 1:
        raise ValueError(f"fit: validate.every must be at least 1, got {plan.validate.every}.")


def _check_finite(rows: dict[str, np.ndarray], first: int, folder: Path | None) -> None:
    finite = np.isfinite(rows["loss"]) & np.isfinite(rows["gradient_norm"])
    if finite.all():
        return
    saved = "nothing is saved, since there is no workdir"
    if folder is not None:
        step = checkpoint.latest(folder)
        saved = f"the last good checkpoint is step {step}" if step is not None else "no checkpoint was due before"
        saved += f" in {folder}"
    raise FloatingPointError(
        f"fit: the loss or its gradient is not finite at step {first + int(finite.argmin()) + 1}; {saved}. Usual causes: an "
        "inner or outer rate that is too high, an inner Adam without eps_root, inputs that are not scaled to about 1, labels "
        "that start at 1, more ways than the network has outputs."
    )


def _taken_up(start: checkpoint.Snapshot, key: jax.Array, steps: int, folder: Path, mesh: Mesh | None) -> checkpoint.Snapshot:
    """The newest checkpoint, laid out on the devices as `start` is."""
    snapshot = checkpoint.read(folder, start)
    if snapshot.step > steps:
        raise ValueError(f"resume: steps is {steps}, but the run in {folder} has taken {snapshot.step} already.")
    if not np.array_equal(snapshot.key, jax.random.key_data(key)):
        raise ValueError(f"resume: the run in {folder} began with another key, so it would not go on as if it had not stopped.")
    theta, state = put_like((snapshot.theta, snapshot.state), (start.theta, start.state), mesh)
    return snapshot._replace(theta=theta, state=state, best=put_like(snapshot.best, start.best, mesh))


def _next_pace(pace: int, seconds: float, size: int) -> int:
    """Meta-steps of the next dispatch, so that it lasts about a second: short enough for Ctrl-C, long enough to cost nothing."""
    if seconds > 2 * DISPATCH_SECONDS:
        return max(1, pace // 2)
    return min(2 * pace, size) if seconds < DISPATCH_SECONDS / 2 else pace


def _means(rows: list[dict[str, np.ndarray]]) -> dict[str, float]:
    return {name: float(np.concatenate([part[name] for part in rows]).mean()) for name in rows[0]}


def _validated(
    key: jax.Array, validate: Validation, mesh: Mesh | None, now: checkpoint.Snapshot
) -> tuple[checkpoint.Snapshot, Score]:
    key = jax.random.fold_in(key, 2**32 - 1)  # no meta-step has this number
    theta = on_one(now.theta, mesh)
    how = {"metric": validate.metric, "every_step": False, "mesh": mesh}
    score = fewshot(key, validate.learner, theta, validate.tasks, validate.episodes, **how)
    if score.mean > now.score:
        now = now._replace(best=jax.tree.map(jnp.copy, theta), score=score.mean)
    return now, score
