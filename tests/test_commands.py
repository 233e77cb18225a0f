"""A run of metanas from its training to a network of the architecture that it came to, as a notebook calls it."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import jmeta as jm
from jmeta import architecture, builders, presets
from jmeta.commands import adaptation, pictures, training

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
    save_every=1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return training.train(SMALL, tmp_path_factory.mktemp("metanas") / "run")


def test_the_log_has_all_alphas_and_the_result_what_tasks_use(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start = jm.load(run)[0].init(jax.random.key(0)).params["alpha"]  # which all three meta-steps began from
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], architecture.from_named(rows)), start, rtol=1e-5)
    result = json.loads((run / "result.json").read_text())
    sizes = result["task_parameters"]
    assert 0 < sizes["least"] <= sizes["mean"] <= sizes["most"] <= sizes["all"] and sizes["tasks"] == training.SIZED_TASKS
    assert result["episodes"] == 4 and len(result["by_step"]) == 1 + 2 + 1  # alpha and weights, then weights alone


def test_the_warm_up_leaves_the_alphas(run, tmp_path):
    """Of the two checkpoints that are kept, the first ends the warm-up."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    (learner, warm, _), (_, last, _) = (jm.load(folder) for folder in (tmp_path / "run", run))
    start = learner.init(jax.random.key(0))
    alphas = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta.params["alpha"])]) for theta in (start, warm, last)]
    np.testing.assert_array_equal(alphas[0], alphas[1])
    assert np.abs(alphas[2] - alphas[1]).max() > 1e-4
    assert not np.array_equal(warm.params["w"]["head"]["kernel"], start.params["w"]["head"]["kernel"])


def test_its_cells_are_drawn_and_its_architecture_is_kept(run, capsys):
    paths = pictures.plot(str(run), cells=True)
    assert [path.name for path in paths] == ["cells.json", "cells.png", "alphas.png"] and all(path.stat().st_size for path in paths)
    drawn = json.loads(paths[0].read_text())
    found = {name: architecture.read_genotype(json.dumps(each), name) for name, each in drawn.items()}
    assert list(found) == ["meta-model", "task 1", "task 2"] and len(set(found.values())) == 3  # each task chose its own
    path = pictures.derive(str(run))
    assert jm.load_genotype(path) == jm.genotype(jm.load(run)[1].params) == found["meta-model"]
    told = capsys.readouterr().out
    assert "parameters at the width of the supernet" in told
    how = f"--dataset glyphs --genotype {path} --cells 1 --reductions 0 --filters 2   trains it"
    assert told.splitlines()[-1] == f"jmeta train reptile-omniglot-5w1s {how}"
    config = builders.with_genotype(dataclasses.replace(SMALL, method="fomaml", genotype=str(path)))
    path.unlink()
    theta = jax.eval_shape(builders.make_learner(config).init, jax.random.key(0))
    assert set(theta.params) == {"stem", "cell0", "head"}
    drawn = paths[0].read_text()
    paths[0].write_text(json.dumps(found["task 1"]._asdict()))
    with pytest.raises(FileExistsError, match=r"plot: .*cells.json holds something else, perhaps a genotype"):
        pictures.plot(str(run), cells=True)
    paths[0].write_text(drawn)
    with pytest.raises(ValueError, match="plot: --routing is for runs of nrml and --cells for runs of metanas"):
        pictures.plot(str(run), cells=True, routing=True)


def test_a_derived_network_is_told_to_train_on_the_same_classes():
    config = dataclasses.replace(
        presets.preset("metanas-colour84-5w1s"), source="my pictures", classes=(6, 5, 5), without=("a b",), seed=3, filters=8
    )
    how = pictures._retraining(config, "found.json")
    data = "--source 'my pictures' --classes 6 5 5 --without 'a b' --seed 3"
    assert how == f"jmeta train reptile-colour84-5w1s {data} --genotype found.json --filters 8"
    twenty = pictures._retraining(presets.preset("metanas-omniglot-20w1s"), "found.json")
    assert twenty.startswith("jmeta train reptile-omniglot-20w1s --genotype found.json --")
    assert "--no-rotate" in pictures._retraining(dataclasses.replace(config, dataset="omniglot", rotate=False), "found.json")


def test_photographs_are_adapted_to_in_colour_and_as_they_are(tmp_path, monkeypatch):
    config = dataclasses.replace(presets.preset("maml-colour84-5w1s"), source="photographs", filters=2)
    jm.save(tmp_path / "run", config, builders.make_learner(config).init(jax.random.key(0)))
    for name, colour in (("bright", (250, 240, 200)), ("red", (200, 0, 0))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (60, 40), colour).save(tmp_path / "pictures" / name / "0.png")
    seen = []
    monkeypatch.setattr(adaptation, "predict", lambda *given: seen.append(given[2:4]) or np.full((2, 2), 0.5))
    for ink in ("auto", "dark"):
        adaptation.adapt(str(tmp_path / "run"), support=str(tmp_path / "pictures"), query=str(tmp_path / "pictures"), ink=ink)
    for (shown, asked), first in zip(seen, (250, 5), strict=True):
        assert shown.pixels.shape == asked.shape == (2, 84, 84, 3)
        assert shown.pixels[0, 0, 0, 0] == asked[0, 0, 0, 0] == first


def test_a_run_from_before_photographs_is_read_as_it_was():
    config = presets.preset("maml-omniglot-5w1s")
    old = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("classes", "without", "clip")}
    assert presets.from_dict(old, "run") == config


def test_other_runs_have_no_cells(tmp_path):
    learner = builders.make_learner(presets.Config(filters=4))
    jm.save(tmp_path / "run", presets.Config(filters=4), learner.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"plot: .* is of method maml, which has no cells to draw; --cells is for metanas"):
        pictures.plot(str(tmp_path / "run"), cells=True)
    with pytest.raises(ValueError, match=r"derive: .* is of method maml, which has no architecture to derive"):
        pictures.derive(str(tmp_path / "run"))


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
        ({"warmup": 3}, "train: warmup must be below steps, got 3 and 3"),
        ({"inner_steps": 0}, "train: method metanas needs at least 1 inner step"),
        ({"dataset": "sinusoid"}, "train: method metanas is for images"),
        ({"method": "reptile", "inner_batch": 99}, "minibatches: size is 99, but the support set has 10 examples"),
        ({"method": "reptile", "test_batch": 3, "shots": 1, "inner_batch": 30}, "minibatches: size is 30"),
        ({"cells": 0, "reductions": ()}, "supernet: cells must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_trains(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        training.train(dataclasses.replace(SMALL, **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
