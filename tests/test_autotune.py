"""The autotune and the cache of compiled programs."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import autotune as tune
from jmeta import builders, checkpoint, presets
from jmeta.commands import training
from jmeta.train import batch_gradient
from tests import toys

SINE = jm.sinusoid(5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("JMETA_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def measured(monkeypatch):
    """Counts what is measured."""
    calls = []
    real = tune._measure

    def count(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(tune, "_measure", count)
    return calls


def _make(steps=1, hidden=(8,)):
    return lambda unroll: jm.maml(jm.mlp(1, hidden=hidden), jm.mse, optax.sgd(0.01), jm.repeat(steps), unroll=unroll)


def test_the_fastest_candidate_is_chosen(key, measured):
    choice = jm.tune(key, _make(4), SINE, 8)
    assert set(choice.seconds) == {(8, True), (1, True), (choice.chunk, False)} and choice.source == "measured"
    assert choice.seconds[choice.chunk, choice.unroll] == min(choice.seconds.values()) > 0
    assert len(measured) == 3
    line = str(choice)
    assert line.startswith(f"chunk {choice.chunk}, {'unrolled' if choice.unroll else 'scanned'} (measured: chunk 8 unrolled ")
    assert "\n" not in line and line.count(" s") >= 3


def test_a_second_call_measures_nothing_and_another_case_does(key, measured):
    first = jm.tune(key, _make(), SINE, 4)
    count = len(measured)
    again = jm.tune(jax.random.key(1), _make(), SINE, 4)
    assert len(measured) == count and again == first._replace(source="cache") and "measured before" in str(again)
    assert jm.tune(key, _make(), SINE, 4, cached=False).source == "measured"
    for make, tasks in ((_make(hidden=(9,)), SINE), (_make(2), SINE), (_make(), jm.sinusoid(6)), (_make(), SINE)):
        count = len(measured)
        assert jm.tune(key, make, tasks, 4, chunks=(4,)).source == "measured" and len(measured) == count + 1
    assert jm.tune(key, _make(), SINE, 6, chunks=(6,)).source == "measured"
    assert jm.tune(key, _make(), SINE, 4, chunks=(4,)).source == "cache"


def test_another_machine_measures_anew(key, measured, monkeypatch):
    jm.tune(key, _make(), SINE, 4, chunks=(2,))
    monkeypatch.setattr(tune, "processor", lambda: "another processor")
    assert jm.tune(key, _make(), SINE, 4, chunks=(2,)).source == "measured"
    assert jm.tune(key, _make(), SINE, 4, chunks=(2,), mesh=jm.task_mesh(2)).source == "measured"


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"NAME": 3}', '{"NAME": {"seconds": []}}', '{"NAME": {"seconds": [{"chunk": 7}]}}', b"\xff"]
)
def test_a_broken_cache_is_measured_over(key, cache, content):
    jm.tune(key, _make(), SINE, 4, chunks=(4,))
    name = next(iter(json.loads((cache / tune.FILE).read_text())))
    (cache / tune.FILE).write_bytes(content if isinstance(content, bytes) else content.replace("NAME", name).encode())
    assert jm.tune(key, _make(), SINE, 4, chunks=(4,)).source == "measured"
    assert jm.tune(key, _make(), SINE, 4, chunks=(4,)).source == "cache"


def test_a_cache_that_cannot_be_written_is_no_error(key, cache, monkeypatch):
    cache.mkdir()
    (cache / tune.FILE).mkdir()
    assert jm.tune(key, _make(), SINE, 4, chunks=(4,)).chunk == 4
    monkeypatch.setenv("JMETA_CACHE_DIR", str(cache / ("x" * 300)))
    assert jm.tune(key, _make(), SINE, 4, chunks=(4,)).chunk == 4


def test_every_chunk_and_unroll_gives_the_same_gradient(key):
    with jax.enable_x64(True):
        gradients = []
        for chunk, unroll in ((8, True), (1, True), (4, False)):
            learner = _make(4)(unroll)
            theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), learner.init(key))
            gradients.append(jax.jit(batch_gradient(learner, SINE.sample, 8, chunk))(key, theta, (), 0)[:2])
    for other in gradients[1:]:
        chex.assert_trees_all_close(gradients[0], other, rtol=1e-10, atol=1e-12)


def test_training_with_the_choice_is_training_with_another(key):
    with jax.enable_x64(True):
        choice = jm.tune(key, _make(4), SINE, 8, unrolls=(True,))
        other = 1 if choice.chunk == 8 else 8

        def train(chunk, unroll):
            learner = _make(4)(unroll)
            theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), learner.init(key))
            return jm.fit(key, learner, SINE, optax.sgd(0.01), 5, 8, theta=theta, chunk=chunk, progress=False).theta

        chosen, compared = train(choice.chunk, choice.unroll), train(other, not choice.unroll)
    chex.assert_trees_all_close(chosen, compared, rtol=1e-10, atol=1e-12)


def test_candidates_of_the_inner_steps():
    assert [tune._unrolls(None, lambda n=n: n) for n in (1, 3, 4, 10, 11, 20, 21)] == [
        *[(True,)] * 2,
        *[(True, False)] * 2,
        *[(False, True)] * 2,
        (False,),
    ]


def test_candidates_of_the_chunk(monkeypatch):
    images, flat = {"kernel": jnp.zeros((3, 3, 1, 4))}, {"kernel": jnp.zeros((3, 4))}
    assert tune._chunks(None, images, 16) == (1, 16) and tune._chunks(None, flat, 16) == (16, 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert tune._chunks(None, images, 16) == (16, 4, 1) and tune._chunks(None, images, 6) == (6, 1)


def test_a_slow_candidate_is_given_up_at_once(monkeypatch):
    monkeypatch.setattr(tune, "QUICK_SECONDS", 0.01)
    calls = []
    assert tune._time(lambda: calls.append(time.sleep(0.04)), 0.01) > 0.03 and len(calls) == 1
    tune._time(lambda: calls.append(time.sleep(0.04)), 0.02)
    assert len(calls) == 1 + tune.CALLS


def test_a_program_larger_than_the_memory_is_not_run(key, monkeypatch):
    monkeypatch.setattr(tune, "_room", lambda mesh: 0.0)
    monkeypatch.setattr(tune, "_time", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="none of chunk 4 unrolled, chunk 1 unrolled fits into the memory"):
        jm.tune(key, _make(), SINE, 4)
    assert "too large" in str(jm.Choice(1, True, {(1, True): 1.0, (4, True): math.inf}, "measured"))


def test_memory_that_runs_out_is_a_candidate_less(key, monkeypatch):
    def runs_out(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(tune, "_time", runs_out)
    assert tune._measure(lambda x: x, (1.0,), math.inf, 1.0) == math.inf
    assert 2**20 < tune._room(None) < 2**60 and tune._room(jm.task_mesh(2)) == tune._room(None) / 2


def test_images_on_the_host_are_measured_too(key, measured):
    images = jm.from_arrays(np.asarray(jax.random.randint(key, (60, 6, 6, 1), 0, 256), np.uint8), np.arange(60) // 6)
    tasks = jm.episodes(images, 3, 1, 2, device_budget=0)
    make = lambda unroll: jm.maml(jm.mlp(3, hidden=(8,), shape=(6, 6, 1)), jm.xent, optax.sgd(0.1), jm.repeat(1), unroll=unroll)
    assert tasks.stage is not None
    choice = jm.tune(key, make, tasks, 4, mesh=jm.task_mesh(2))
    assert choice.chunk in (1, 2) and len(measured) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunks": (3,)}, "chunks must be divisors of each device's share of batch, 8 tasks"),
        ({"chunks": ()}, "chunks must be"),
        ({"unrolls": ()}, "unrolls must be"),
        ({"unrolls": (5,)}, "unrolls must be"),
    ],
)
def test_unfit_candidates_are_refused(key, options, message):
    with pytest.raises(ValueError, match=message):
        jm.tune(key, _make(), SINE, 8, **options)


def test_a_learner_with_memory_and_noise_is_measured(key):
    make = lambda unroll: jm.maml(
        toys.net(), jm.xent, jm.chain(toys.noisy(), optax.sgd(0.1, momentum=0.9)), jm.repeat(2), unroll=unroll, carry_state=True
    )
    assert jm.tune(key, make, toys.blobs(), 4, chunks=(2,)).chunk == 2


CONFIG = dataclasses.replace(
    presets.preset("maml-sinusoid-10s"), inner_steps=4, test_steps=4, batch=4, steps=3, save_every=3, test_episodes=4
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_long_run_is_tuned_and_its_resumption_is_not(tmp_path, monkeypatch, capsys, measured):
    monkeypatch.setattr(training, "TUNED_FROM", 1)
    monkeypatch.setattr(training, "plot", lambda folder: None)
    monkeypatch.setattr(tune, "_search", lambda *_: {(4, True): 0.3, (2, True): 0.1, (2, False): 0.05})
    folder = training.train(CONFIG, tmp_path / "run", devices=1)
    assert "chunk 2, scanned (measured: " in capsys.readouterr().out
    described = checkpoint.read_run(folder)
    assert described["chunk"] == 2 and described["config"]["unroll"] is False and described["config"]["chunk"] is None
    monkeypatch.setattr(training, "tune", lambda *_, **__: pytest.fail("it was tuned again"))
    stored = presets.from_dict(described["config"], folder)
    training.train(dataclasses.replace(CONFIG, steps=5), folder, resume=True)
    assert checkpoint.read_run(folder)["config"] == checkpoint.plain(dataclasses.replace(stored, steps=5))
    assert checkpoint.latest(folder) == 5
    with pytest.raises(ValueError, match="different: unroll"):
        training.train(dataclasses.replace(CONFIG, steps=6, unroll=True), folder, resume=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_short_run_is_not_tuned_and_an_older_one_goes_on(tmp_path, monkeypatch, capsys, measured):
    monkeypatch.setattr(training, "plot", lambda folder: None)
    folder = training.train(CONFIG, tmp_path / "run", devices=1)
    assert "chunk 4, unrolled (default" in capsys.readouterr().out and not measured
    path = folder / "run.json"
    described = json.loads(path.read_text())
    for newer in ("unroll", "precision"):
        del described["config"][newer]
    path.write_text(json.dumps(described))
    config = presets.from_dict(json.loads(path.read_text())["config"], folder)
    training.train(dataclasses.replace(config, steps=4), folder, resume=True)
    assert checkpoint.latest(folder) == 4


def test_what_is_given_is_not_tuned(monkeypatch):
    monkeypatch.setattr(training, "TUNED_FROM", 1)
    seen = []
    monkeypatch.setattr(training, "tune", lambda *_, **options: seen.append(options) or jm.Choice(2, False, {}, "measured"))
    problem = builders.make_problem(CONFIG)
    given = dataclasses.replace(CONFIG, chunk=2, unroll=True)
    assert training.tuned(given, problem, None) == (given, 2) and not seen
    training.tuned(dataclasses.replace(CONFIG, chunk=2), problem, None)
    assert seen[0]["chunks"] == (2,) and seen[0]["unrolls"] is None


def test_runs_of_minutes_and_less_are_not_tuned():
    def is_long(config):
        params = jax.eval_shape(builders.make_learner(config).init, jax.random.key(0)).params
        return training._work(config, params) >= training.TUNED_FROM

    long = {name for name, config in presets.PRESETS.items() if is_long(config)}
    one_pass = {name for name, config in presets.PRESETS.items() if config.method in ("protonet", "matching", "ridge")}
    small = {"metanas-omniglot-5w1s"}
    assert long == {name for name in presets.PRESETS if "omniglot" in name or "colour84" in name} - one_pass - small


def _run(folder, *args, **environment):
    command = [
        sys.executable,
        "-m",
        "jmeta",
        "train",
        "maml-sinusoid-10s",
        "--steps",
        "2",
        "--batch",
        "2",
        "--test-episodes",
        "4",
        *args,
    ]
    without = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    return subprocess.run(
        [*command, "--out", folder.name],
        cwd=folder.parent,
        env={**without, "JMETA_CACHE_DIR": str(folder.parent / "cache"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def _left(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], json.loads((folder / "result.json").read_text())["by_step"]


def test_a_second_process_compiles_nothing(tmp_path):
    first = _run(tmp_path / "one")
    entries = {path.name for path in (tmp_path / "cache" / "xla").glob("*-cache")}
    if not entries and not tune._loads_again():
        pytest.skip("this CPU loads no compiled programs")
    second = _run(tmp_path / "two")
    assert {path.name for path in (tmp_path / "cache" / "xla").glob("*-cache")} == entries and len(entries) > 10
    assert _left(tmp_path / "one") == _left(tmp_path / "two")
    for done in (first, second):
        assert not [line for line in done.stderr.splitlines() if "warn" in line.lower() or line.startswith(("E0", "W0"))], (
            done.stderr
        )


def test_jaxs_own_threshold_counts(tmp_path, cache):
    code = "import jax, jmeta as jm; print(jm.use_cache()); jax.numpy.ones(3) + 1"
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tune._loads_again()) and not list(cache.glob("xla/*-cache"))


@pytest.mark.parametrize("name, value", [("JAX_COMPILATION_CACHE_DIR", "mine"), ("JAX_ENABLE_COMPILATION_CACHE", "0")])
def test_a_cache_of_the_users_own_stays(tmp_path, name, value):
    code = "import jax, jmeta as jm; print(jm.use_cache(), jax.config.jax_compilation_cache_dir)"
    environment = {**os.environ, name: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "mine" if value == "mine" else "None"]


def test_what_the_loader_complains_of_is_not_kept(monkeypatch, capfd):
    from jax.experimental import serialize_executable

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(serialize_executable, "deserialize_and_load", lambda *_: os.write(2, b"Machine type doesn't match"))
    assert not tune._loads_again() and not jm.use_cache()
    assert capfd.readouterr().err == "" and jax.config.jax_compilation_cache_dir == before
