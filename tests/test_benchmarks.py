"""What the benchmarks count."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest

from jmeta.evaluate.cost import operations

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def work():
    spec = importlib.util.spec_from_file_location("work", FOLDER / "work.py")
    assert spec is not None and spec.loader is not None
    sys.modules["work"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("row", "order"), [("asb-64", 1), *((row, order) for row in ("sinusoid", "omniglot-5w1s", "colour84-5w5s") for order in (1, 2))]
)
def test_operations_are_those_of_the_program(key, work, row, order):
    small = work.ROWS[row]._replace(order=order, steps=2, queries=2, filters=8)
    if small.network == "pooled":
        small = small._replace(shape=(32, 32, 3))
    if small.kind == "asb":
        small = small._replace(shots=2, ways=20)
    learner = work.learner_of(small)
    theta = jax.eval_shape(learner.init, key)
    inputs, queries = (jax.ShapeDtypeStruct((count, *small.shape), "float32") for count in work.examples(small))
    labels = [
        jax.ShapeDtypeStruct(x.shape[:1] if small.network != "mlp" else x.shape, "int32" if small.network != "mlp" else "float32")
        for x in (inputs, queries)
    ]
    task = work.jm.Task(work.jm.Batch(inputs, labels[0]), work.jm.Batch(queries, labels[1]))
    found = operations(lambda theta, task: learner.grad(key, theta, task, meta_step=0)[1], theta, task)
    zeros = 0.15 if small.network == "conv3" else 0.05  # without padding the way back multiplies zeros around the maps
    assert work.operations(small) == pytest.approx(small.tasks * found, rel=zeros)


@pytest.fixture
def zapping(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("zapping")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_the_best_rates_are_chosen_of_those_that_go_on_learning(zapping, tmp_path):
    with pytest.raises(SystemExit, match="rates of asb are not chosen yet for 64 filters, 9 are left"):
        zapping.chosen("asb", 64)
    rows = {zapping.title(rates): {"score": None} for rates in zapping.CANDIDATES["asb"]}
    (tmp_path / "rates-64.json").write_text(json.dumps({"asb": rows}))
    with pytest.raises(SystemExit, match="no rates of asb serve"):
        zapping.chosen("asb", 64)
    rows["0.001 0.003"] = {"score": 0.3}
    (tmp_path / "rates-64.json").write_text(json.dumps({"asb": rows}))
    assert zapping.chosen("asb", 64) == (1e-3, 3e-3)
    settings = {name: {"setting": name, "tried": {"0.1": [mean, 0.0]}} for name, mean in (("frozen", 0.4), ("unfrozen", 0.6))}
    falls = {"settings": settings, "training_accuracy": [0.2, 0.5, 0.3]}
    assert zapping.scored(falls, "asb") == {"score": None, "of": {"frozen": 0.4, "unfrozen": 0.6}}
    assert zapping.scored(falls, "iid-zap")["score"] == 0.5  # between zaps it may
    assert zapping.scored({"settings": {}, "diverged": "at step 3"}, "asb")["score"] is None


def test_results_of_another_configuration_are_not_gone_on_with(zapping, tmp_path):
    config = zapping.pretrain.PRESETS["zap-asb-glyphs"]
    path = tmp_path / "asb-zap-32-1000-seed0.json"
    path.write_text(json.dumps({"settings": {}, "config": {**dataclasses.asdict(config), "inner_rate": 0.5}}))
    with pytest.raises(SystemExit, match="is of another configuration"):
        zapping.measure("asb-zap", config, [], tmp_path, tmp_path)


def test_gains_pair_runs_of_equal_length_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    table = importlib.import_module("table")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    (tmp_path / "zapping").mkdir()
    for method, steps, seed, mean in (("asb", 9, 0, 0.5), ("asb-zap", 9, 0, 0.75), ("asb-zap", 25, 0, 0.9)):
        config = {"filters": 64, "steps": steps, "seed": seed, "sequence": 20, "remember": 64, "size": 256}
        row = {"method": method, "config": config, "settings": {"frozen 10": {"mean": mean, "interval95": 0.1}}}
        (tmp_path / "zapping" / f"{method}-64-{steps}-seed{seed}.json").write_text(json.dumps(row))
    rows = table.gains().splitlines()[2:]
    assert rows == ["| ASB, zapped - ASB | 64 | 9 | +0.250 |"]
    assert "NOT held" in table.zapping() and "held (0.900)" in table.zapping()
    other = json.loads((tmp_path / "zapping" / "asb-64-9-seed0.json").read_text())
    other["config"] |= {"seed": 1, "inner_rate": 0.1}
    (tmp_path / "zapping" / "asb-64-9-seed1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="the results of asb are of several configurations"):
        table.gains()
