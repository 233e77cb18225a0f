"""The training loop: what is computed does not depend on chunks, dispatches or interruptions."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import checkpoint
from jmeta.train import _dispatch, batch_gradient
from tests import toys

OUTER = optax.adam(1e-2)
TASKS = toys.blobs()


def _learner(**options):
    return jm.maml(toys.net(), jm.xent, optax.sgd(0.1), options.pop("data", jm.repeat(2)), **options)


def _fit(key, steps, learner=None, **options):
    return jm.fit(key, learner or _learner(), TASKS, OUTER, steps, options.pop("batch", 4), progress=False, **options)


@pytest.mark.parametrize("data", [jm.repeat(2), jm.minibatches(2, 4)], ids=["all", "minibatches"])
def test_chunks_give_the_same_meta_gradient(key, data):
    with jax.enable_x64(True):
        learner = _learner(data=data)
        theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), learner.init(key))
        gradients = [jax.jit(batch_gradient(learner, TASKS.sample, 32, chunk))(key, theta, (), 0)[1] for chunk in (1, 4, 32)]
    for other in gradients[1:]:
        chex.assert_trees_all_close(gradients[0], other, rtol=1e-6, atol=1e-12)


def test_fit_equals_a_hand_written_loop(key):
    learner = _learner()
    done = _fit(key, 3, batch=2)
    theta, state = learner.init(key), OUTER.init(learner.init(key))
    for step in range(3):
        gradients = []
        for index in range(2):
            key_task, key_learn = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), index))
            gradients.append(learner.grad(key_learn, theta, TASKS.sample(key_task, ()), meta_step=step)[1])
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
        updates, state = OUTER.update(mean, state, theta)
        theta = optax.apply_updates(theta, updates)
    chex.assert_trees_all_close(done.theta, theta, rtol=1e-5, atol=1e-6)
    assert done.history["loss"].shape == (3,)


def test_training_learns(key):
    history = _fit(key, 300).history
    assert history["loss"][-20:].mean() < 0.6 * history["loss"][:20].mean()
    assert history["accuracy"][-20:].mean() > 0.8


def test_same_objects_are_traced_once(key):
    learner = _learner()
    _fit(key, 5, learner)
    size = _dispatch._cache_size()
    _fit(key, 7, learner)
    assert _dispatch._cache_size() == size


def test_start_is_given_and_kept(key):
    learner = _learner()
    theta = learner.init(key)
    before = jax.tree.map(np.array, theta)
    first = _fit(key, 4, theta=theta)
    chex.assert_trees_all_equal(theta, before)
    more = _fit(jax.random.key(1), 4, theta=first.last, state=first.state)
    assert int(optax.tree.get(more.state, "count")) == 8


def test_memory_is_averaged_over_tasks(key):
    learner = jm.maml(toys.net(), jm.xent, optax.sgd(0.1, momentum=0.9), jm.repeat(2), carry_state=True)
    theta = learner.init(key)
    alone = [
        learner.grad(keys[1], theta, TASKS.sample(keys[0], ()), meta_step=0)[0].memory
        for keys in (jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 0), index)) for index in range(4))
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *alone)
    for chunk in (1, 2, 4):
        chex.assert_trees_all_close(_fit(key, 1, learner, chunk=chunk).last.memory, mean, rtol=1e-5, atol=1e-7)


def test_outer_optimiser_may_ask_for_the_value_function(key):
    outer = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=10))
    done = jm.fit(key, _learner(), TASKS, outer, 30, 4, progress=False)
    assert done.history["loss"][-5:].mean() < done.history["loss"][:5].mean()


def test_a_fit_is_vmapped_over_seeds_and_rates(key):
    keys = jax.random.split(key, 2)
    many = jax.vmap(lambda key: _fit(key, 6).theta)(keys)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], many), _fit(keys[1], 6).theta, rtol=1e-4, atol=1e-5)

    def at(rate):
        return jm.fit(key, jm.maml(toys.net(), jm.xent, optax.sgd(rate), jm.repeat(1)), TASKS, OUTER, 6, 4).history["loss"]

    losses = jax.vmap(at)(jnp.array([0.0, 0.3]))
    assert losses.shape == (2, 6) and not np.allclose(losses[0], losses[1])


def test_validation_keeps_the_best(key):
    learner = _learner()
    watch = jm.Validation(learner, TASKS, episodes=20, every=5)
    done = _fit(key, 20, learner, validate=watch)
    assert done.history["valid_step"].tolist() == [5, 10, 15, 20]
    best = int(done.history["valid_step"][done.history["valid_score"].argmax()])
    chex.assert_trees_all_equal(done.theta, _fit(key, best, learner).theta)


def _moving(key):
    """A learner whose base depends on the task."""
    plain = _learner()

    def grad(key, theta, task, *, meta_step):
        base = plain.adapt(key, theta, task.support)
        return base, *plain.grad(key, theta, task, meta_step=meta_step)[1:]

    return plain._replace(grad=grad)


def test_a_base_that_depends_on_the_task_needs_a_meta_batch_of_one(key):
    learner = _moving(key)
    for chunk in (1, 4):
        with pytest.raises(ValueError, match="meta-batch must be 1"):
            _fit(key, 2, learner, chunk=chunk)
    theta = learner.init(key)
    key_task, key_learn = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 0), 0))
    base = learner.adapt(key_learn, theta, TASKS.sample(key_task, ()).support)
    done = jm.fit(key, learner, TASKS, optax.sgd(0.0), 1, 1, progress=False)
    chex.assert_trees_all_close(done.last, base, rtol=1e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"batch": 6, "chunk": 4}, ValueError, "divisible by chunk"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "typed key"),
        ({"outer": optax.adam}, TypeError, "outer must be an optax optimiser"),
        ({"theta": {"w": 1}}, TypeError, "theta must be a jmeta.Theta"),
        ({"tasks": TASKS.sample}, TypeError, "tasks must be a jmeta.Tasks"),
        ({"learner": toys.net()}, TypeError, "learner must be a jmeta.MetaLearner"),
    ],
)
def test_bad_arguments_are_named(key, change, error, message):
    good = {"key": key, "learner": _learner(), "tasks": TASKS, "outer": OUTER, "steps": 2, "batch": 4}
    with pytest.raises(error, match=message):
        jm.fit(**{**good, **change})


def test_a_run_is_resumed_bit_for_bit(key, tmp_path):
    whole = _fit(key, 30, workdir=tmp_path / "whole", save_every=10, log_every=5)
    _fit(key, 17, workdir=tmp_path / "parts", save_every=10, log_every=5)
    parts = _fit(key, 30, workdir=tmp_path / "parts", save_every=10, log_every=5, resume=True)
    chex.assert_trees_all_equal(whole.last, parts.last)
    assert type(parts.state[0]) is type(whole.state[0])
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "parts")
    ]
    losses = [{row["step"]: row["loss"] for row in each} for each in rows]
    assert all(losses[0][step] == losses[1][step] for step in (5, 10, 15, 25, 30))
    assert all(len({row["step"] for row in each}) == len(each) for each in rows)


def test_a_resumed_run_keeps_its_chunk_and_notes_its_steps(key, tmp_path):
    for steps, chunk in ((2, 2), (3, None)):
        _fit(key, steps, workdir=tmp_path / "run", config={"steps": steps}, chunk=chunk, resume=True)
    described = checkpoint.read_run(tmp_path / "run")
    assert described["chunk"] == 2 and described["config"] == {"steps": 3}
    assert checkpoint.kept(tmp_path / "run", False, "chunk") is None


def test_stopped_before_its_first_validation_a_run_gives_its_last_theta(key, tmp_path):
    learner = _learner()
    for steps in (1, 12):
        watch = jm.Validation(learner, TASKS, episodes=20, every=10)
        _fit(key, steps, learner, workdir=tmp_path / str(steps), validate=watch if steps > 1 else None)
    assert np.isfinite(checkpoint.read(tmp_path / "12", _snapshot(key, learner)).score)
    unvalidated = _snapshot(key, learner)._replace(theta=_fit(key, 1, learner).last)
    folder = checkpoint.open_run(tmp_path / "stopped", False, None, ())
    checkpoint.write(folder, unvalidated)
    chex.assert_trees_all_equal(checkpoint.read_theta(folder, unvalidated.theta), unvalidated.theta)


def _snapshot(key, learner):
    theta = learner.init(key)
    return checkpoint.Snapshot(theta, OUTER.init(theta), 0, jax.random.key_data(key), theta, -np.inf)


def test_scores_and_small_numbers_are_kept_whole(key, tmp_path):
    snapshot = _snapshot(key, _learner())._replace(step=3, score=0.9533333333333333)
    folder = checkpoint.open_run(tmp_path / "run", False, None, ())
    checkpoint.write(folder, snapshot)
    again = checkpoint.read(folder, snapshot)
    assert again.score == snapshot.score and again.step == 3


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(key, tmp_path):
    whole, folder = _fit(key, 6), tmp_path / "run"
    _fit(key, 4, workdir=folder, save_every=2)
    damaged = folder / "checkpoints" / "4" / "default" / "_METADATA"
    content = damaged.read_bytes()[:100]
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match=r"that of step 4 in .* is damaged \(.*; that of step 2 is used"):
        again = _fit(key, 6, workdir=folder, save_every=2, resume=True)
    chex.assert_trees_all_equal(again.last, whole.last)
    (aside,) = (folder / "damaged").glob("4-*")
    assert content in [path.read_bytes() for path in aside.rglob("*") if path.is_file()]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]


def test_a_run_with_no_checkpoint_that_can_be_read_is_refused(key, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", lambda leaves: np.zeros(32, np.uint8))
        _fit(key, 1, workdir=tmp_path / "run")
    says = (
        r"that of step 1 in .* is damaged \(its arrays are not those that were written\), and there is none before it. Usual cause"
    )
    with pytest.raises(ValueError, match=says):
        _fit(key, 2, workdir=tmp_path / "run", resume=True)
    assert checkpoint.latest(tmp_path / "run") == 1


def test_a_checkpoint_that_cannot_be_written_costs_none_written_before(key, tmp_path):
    folder, snapshot = checkpoint.open_run(tmp_path / "run", False, None, ()), _snapshot(key, _learner())
    checkpoint.write(folder, snapshot._replace(step=3))
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"step 4 cannot be written to .*; the newest one is that of step 3. Usual cause: a full disk"
    ):
        checkpoint.write(folder, snapshot._replace(step=4))
    assert checkpoint.read(folder, snapshot).step == 3


def test_a_resumed_run_must_have_the_same_batch(key, tmp_path):
    _fit(key, 2, workdir=tmp_path / "run")
    with pytest.raises(ValueError, match="began with batch 4, got 8"):
        _fit(key, 4, workdir=tmp_path / "run", batch=8, chunk=4, resume=True)


def test_what_a_user_has_is_not_overwritten(key, tmp_path):
    _fit(key, 2, workdir=tmp_path / "run", config={"rate": 1})
    with pytest.raises(FileExistsError, match="holds a run already"):
        _fit(key, 2, workdir=tmp_path / "run", config={"rate": 1})
    with pytest.raises(ValueError, match="another config; different: rate"):
        _fit(key, 2, workdir=tmp_path / "run", config={"rate": 2}, resume=True)
    with pytest.raises(ValueError, match="another key"):
        _fit(jax.random.key(5), 4, workdir=tmp_path / "run", config={"rate": 1}, resume=True)
    other = jm.maml(jm.mlp(3, hidden=(8, 9), shape=(6,)), jm.xent, optax.sgd(0.1), jm.repeat(1))
    with pytest.raises(ValueError, match="another model"):
        _fit(key, 4, other, workdir=tmp_path / "run", config={"rate": 1}, resume=True)
    with pytest.raises(ValueError, match=r"steps is 1, but the run in .* has taken 2 already"):
        _fit(key, 1, workdir=tmp_path / "run", config={"rate": 1}, resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        _fit(key, 2, workdir=tmp_path / "notes")


def test_a_loss_that_is_not_finite_stops_the_run(key, tmp_path):
    def loss(outputs, y):
        return jm.xent(outputs, y) + jnp.where(jnp.abs(outputs).max() > 2.5, jnp.nan, 0.0)

    learner = jm.maml(toys.net(), loss, optax.sgd(0.1), jm.repeat(1))
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+; the last good checkpoint is step \d+") as raised:
        _fit(key, 2000, learner, workdir=tmp_path / "run", save_every=1)
    saved = checkpoint.latest(tmp_path / "run")
    assert f"at step {saved + 1};" in str(raised.value)


RUN = """
import sys
import jax, optax
import jmeta as jm
from tests import toys
learner = jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2))
outer = optax.adam(1e-2)
done = jm.fit(jax.random.key(0), learner, toys.blobs(), outer, 3000, 4, workdir=sys.argv[1], resume=True, save_every=50)
"""


@contextlib.contextmanager
def _started(folder):
    command = [sys.executable, "-c", RUN, str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        yield process


def _finish(folder):
    with _started(folder) as process:
        text = process.communicate()[1]
        assert process.returncode == 0, text


def _wait_for_checkpoint(folder, after):
    until = time.monotonic() + 120
    while (checkpoint.latest(folder) or 0) <= after and time.monotonic() < until:
        time.sleep(0.05)


def _final(folder):
    like = jax.eval_shape(_learner().init, jax.random.key(0))
    return checkpoint.read_theta(folder, like)


def test_killed_three_times_it_ends_bit_for_bit_the_same(key, tmp_path):
    _finish(tmp_path / "whole")
    chance = random.Random(os.urandom(8))
    for _ in range(3):
        before = checkpoint.latest(tmp_path / "killed") or 0
        with _started(tmp_path / "killed") as process:
            _wait_for_checkpoint(tmp_path / "killed", before)
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
    assert 0 < checkpoint.latest(tmp_path / "killed") < 3000
    _finish(tmp_path / "killed")
    chex.assert_trees_all_equal(_final(tmp_path / "whole"), _final(tmp_path / "killed"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_resume(tmp_path, number):
    with _started(tmp_path / "run") as process:
        _wait_for_checkpoint(tmp_path / "run", 0)
        process.send_signal(number)
        text = process.communicate(timeout=60)[1]
    saved = checkpoint.latest(tmp_path / "run")
    assert process.returncode != 0
    assert f"Stopped at step {saved}" in text and "resume" in text
