"""Several processes on this machine: the same numbers as one, and an end for all when one dies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import checkpoint, hosts

RUN = """
import sys
from pathlib import Path

import jax
import numpy as np
import jmeta as jm
from tests import test_hosts

coordinator, processes, process, folder, steps = sys.argv[1:]
jm.start_processes(coordinator, int(processes), int(process))
jm.use_cores(1)
assert jax.device_count() == int(processes)
done, score = test_hosts.train(folder, int(steps), jm.task_mesh())
np.savez(f"{folder}-{process}.npz", *jax.tree.leaves(done.last), score=score.mean)
"""


def train(folder, steps, mesh):
    """A run of MAML whose images stay on the host, with validation, and a test."""
    rng = np.random.default_rng(0)
    images = jm.from_arrays(rng.integers(0, 256, (60, 6, 6, 1), np.uint8), np.arange(60) // 6)
    learner = jm.maml(jm.mlp(3, hidden=(8,), shape=(6, 6, 1)), jm.xent, optax.sgd(0.1), jm.repeat(1))
    tasks, shown = jm.episodes(images, 3, 1, 2, device_budget=0), jm.episodes(images, 3, 1, 2)
    watch = jm.Validation(learner, shown, episodes=10, every=20)
    key = jax.random.key(0)
    how = {"validate": watch, "mesh": mesh, "workdir": folder, "resume": True, "save_every": 10, "log_every": 10}
    done = jm.fit(key, learner, tasks, optax.adam(1e-2), steps, 4, chunk=1, **how)
    return done, jm.fewshot(key, learner, done.theta, shown, 30, mesh=mesh)


def _port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def _started(count, folder, steps):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command, where = [sys.executable, "-c", RUN, f"localhost:{_port()}", str(count)], Path(__file__).parents[1]
    with contextlib.ExitStack() as stack:
        how: dict = {"stderr": subprocess.PIPE, "text": True, "cwd": where, "env": environment}
        made = [subprocess.Popen([*command, str(number), str(folder), str(steps)], **how) for number in range(count)]
        for process in made:
            stack.enter_context(process)
            stack.callback(process.kill)
        yield made


def _finish(count, folder, steps):
    with _started(count, folder, steps) as processes:
        said = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, said
    return [np.load(f"{folder}-{number}.npz") for number in range(count)], said


@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_what_one_gives(tmp_path, count):
    each, said = _finish(count, tmp_path / "run", 20)
    done, score = train(tmp_path / "alone", 20, None)
    for found in each:
        assert float(found["score"]) == pytest.approx(score.mean, abs=1e-6)
        for name, leaf in zip([f"arr_{number}" for number in range(4)], jax.tree.leaves(done.last), strict=True):
            np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-5)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2 and "step 20/20" in said[0]
    assert not any("step" in text for text in said[1:])
    assert checkpoint.read_run(tmp_path / "run")["devices"] == count


def test_when_a_process_dies_the_others_end_and_all_can_go_on(tmp_path):
    saved = 0
    for victim in (1, 0):
        with _started(2, tmp_path / "run", 1_000_000) as processes:
            _wait_for_checkpoint(tmp_path / "run", saved)
            processes[victim].send_signal(signal.SIGKILL)
            text = processes[1 - victim].communicate(timeout=60)[1]
        assert processes[1 - victim].returncode != 0
        assert "another process of this run has died" in text or "another task died" in text
        saved = checkpoint.latest(tmp_path / "run")
    again, _ = _finish(2, tmp_path / "run", saved + 20)
    straight, _ = _finish(2, tmp_path / "straight", saved + 20)
    for name in straight[0]:
        np.testing.assert_array_equal(again[0][name], straight[0][name])


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    with _started(2, tmp_path / "run", 1_000_000) as processes:
        _wait_for_checkpoint(tmp_path / "run", 0)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    assert all(f"Stopped at step {checkpoint.latest(tmp_path / 'run')}" in text for text in said)


def _wait_for_checkpoint(folder, after):
    until = time.monotonic() + 120
    while (checkpoint.latest(folder) or 0) <= after:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("localhost:1",), "processes, process is missing; give all three"),
        (("localhost:1", 2, 2), "process must be from 0 to processes - 1, got process 2 of 2"),
        (("localhost", 2, 0), "coordinator must be 'host:port', got 'localhost'"),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        jm.start_processes(*arguments)


def _commands(count, *arguments):
    """What as many processes of the command line, each with its number, return and print."""
    command = [sys.executable, "-m", "jmeta", "train", *arguments, "--distributed", "--coordinator", f"localhost:{_port()}"]
    given = [["--processes", str(count), "--process", str(number)] for number in range(count)]
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "XLA_FLAGS": ""}}
    processes = [subprocess.Popen([*command, *own], **pipes) for own in given]
    said = [process.communicate(timeout=300) for process in processes]
    ours = [["\n".join(line for line in text.splitlines() if "peer" not in line) for text in each] for each in said]  # not Gloo's
    return [(process.returncode, *each) for process, each in zip(processes, ours, strict=True)]


def test_the_command_line_trains_in_two_processes(tmp_path):
    run = str(tmp_path / "run")
    small = ["--steps", "4", "--batch", "4", "--test-episodes", "10", "--devices", "1", "--outer-schedule", "constant"]
    first, second = _commands(2, "maml-sinusoid-5s", "--out", run, *small)
    assert first[0] == second[0] == 0, (first, second)
    assert "on unseen tasks" in first[1] and first[1].strip().endswith(run) and second[1] == ""
    assert (tmp_path / "run" / "result.json").is_file()
    assert checkpoint.read_run(run)["devices"] == 2
    first, second = _commands(2, "--resume", run, "--steps", "6", "--devices", "1")
    assert first[0] == second[0] == 0 and checkpoint.latest(tmp_path / "run") == 6, (first, second)
    (one, _, text), _ = _commands(2, "maml-sinusoid-5s", "--out", str(tmp_path / "odd"), "--devices", "1", "--batch", "5")
    assert one == 1 and "the nearest batches that fit: 4 and 6" in text


def test_bad_use_of_the_command_line_is_refused(tmp_path):
    for arguments, says in (
        (["maml-sinusoid-5s", "--distributed"], "--distributed needs --out"),
        (["maml-sinusoid-5s", "--process", "1"], "go with --distributed"),
        (["zap-asb-omniglot", "--distributed", "--out", str(tmp_path / "run")], "pre-training takes one"),
        (["maml-sinusoid-5s", "--distributed", "--out", str(tmp_path / "run")], "JAX cannot find out who the other processes are"),
    ):
        done = subprocess.run([sys.executable, "-m", "jmeta", "train", *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and says in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_failure_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "spans_hosts", lambda mesh: True)
    says = r"another process of this run has died, or cannot be reached \(UNKNOWN: Gloo .*; start all .*--resume run --distributed"
    with pytest.raises(RuntimeError, match=says), hosts.naming_the_lost(None, Path("run")):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed\nand more")


def test_processes_that_differ_are_refused(monkeypatch):
    rows = np.array([[1, 5, 7], [1, 6, 8]], np.uint32)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda mine: rows)
    with pytest.raises(ValueError, match=r"the processes of this run differ in key, theta. Usual causes: arguments or data"):
        hosts.check_same(config=b"", key=b"", theta=b"")
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine]))
    hosts.check_same(config=b"1", key=b"2")


def test_failures_of_one_process_are_not_renamed():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), hosts.naming_the_lost(None, None):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
