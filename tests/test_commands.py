"""A run of metanas from its training to a network of the architecture that it came to, as a notebook calls it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jmeta as jm
from jmeta import commands, presets

SMALL = dataclasses.replace(
    presets.preset("metanas-glyphs-5w1s"),
    filters=2,
    cells=1,
    reductions=(0,),
    inner_steps=1,
    inner_batch=5,
    train_shots=2,
    test_steps=2,
    steps=3,
    warmup=2,
    batch=1,
    test_queries=2,
    test_episodes=4,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return commands.train(SMALL, tmp_path_factory.mktemp("metanas") / "run")


def test_the_log_has_the_weights_of_operations(run):
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for kind in ("normal", "reduce"):
        assert sum(value for name, value in row.items() if name.startswith(f"{kind}/")) == pytest.approx(1, abs=1e-5)
    result = json.loads((run / "result.json").read_text())
    assert result["episodes"] == 4 and len(result["by_step"]) == 1 + 2 + 1  # alpha and weights, then weights alone


def test_the_warm_up_leaves_the_alphas(run):
    learner, theta, _ = jm.load(run)
    config = dataclasses.replace(SMALL, steps=2)
    problem, start = presets.make_problem(config), learner.init(jax.random.key(0))
    fit = jm.fit(
        jax.random.key(0),
        presets.make_learner(config),
        problem.train,
        presets.make_outer(config),
        2,
        1,
        theta=start,
        progress=False,
    )
    assert all(
        np.array_equal(*each) for each in zip(*(jax.tree.leaves(t.params["alpha"]) for t in (fit.theta, start)), strict=True)
    )
    assert not np.array_equal(fit.theta.params["w"]["head"]["kernel"], start.params["w"]["head"]["kernel"])
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), theta.params["alpha"], start.params["alpha"])
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_its_cells_are_drawn_and_its_architecture_trains(run, tmp_path, capsys):
    paths = commands.plot(str(run), cells=True)
    assert [path.name for path in paths] == ["cells.json", "cells.png", "alphas.png"] and all(path.stat().st_size for path in paths)
    assert list(json.loads(paths[0].read_text())) == ["meta-model", "task 1", "task 2"]
    path = commands.derive(str(run))
    assert jm.load_genotype(path) == jm.genotype(jm.load(run)[1].params)
    assert "parameters at the width of the supernet" in capsys.readouterr().out
    config = dataclasses.replace(SMALL, method="fomaml", genotype=str(path), inner_batch=None, steps=1, inner_rate=0.1)
    trained = commands.train(config, tmp_path / "derived")
    path.unlink()
    _, theta, _ = jm.load(trained)
    assert set(theta.params) == {"stem", "cell0", "head"}


def test_other_runs_have_no_cells(tmp_path):
    learner = presets.make_learner(presets.Config(filters=4))
    jm.save(tmp_path / "run", learner.init(jax.random.key(0)), config=presets.Config(filters=4))
    with pytest.raises(ValueError, match=r"plot: .* is of method maml, which has no cells to draw; --cells is for metanas"):
        commands.plot(str(tmp_path / "run"), cells=True)
    with pytest.raises(ValueError, match=r"derive: .* is of method maml, which has no architecture to derive"):
        commands.derive(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern": "head"}, "pattern: method metanas is a pattern itself"),
        ({"genotype": "metanas-omniglot-v2"}, "genotype: method metanas searches for one"),
        (
            {"method": "maml", "genotype": "metanas-v9"},
            "genotype: 'metanas-v9' is neither a file, nor JSON, nor one of metanas-mini",
        ),
        ({"norm": "support"}, "norm must be one of batch, layer, instance for networks of cells, got 'support'"),
        ({"cells": 0, "reductions": ()}, "supernet: cells must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_trains(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        commands.train(dataclasses.replace(SMALL, **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
