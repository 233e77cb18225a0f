"""Saving, loading and their errors."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

import jmeta as jm
from jmeta import checkpoint
from jmeta.builders import make_learner
from jmeta.presets import Config

CONFIG = Config(filters=4)


def test_save_and_load_give_the_same_predictions(key, tmp_path):
    learner = make_learner(CONFIG, CONFIG.test_steps)
    theta = learner.init(key)
    jm.save(tmp_path / "run", CONFIG, theta, ("a", "b"))
    loaded, again, labels = jm.load(tmp_path / "run")
    chex.assert_trees_all_equal(theta, again)
    assert labels == ("a", "b")
    x = np.random.default_rng(0).random((5, 28, 28, 1), np.float32)
    support = jm.Batch(x, np.arange(5))
    expected, got = (each.predict(each.adapt(key, theta, support), x) for each in (learner, loaded))
    np.testing.assert_allclose(expected, got, rtol=1e-6)
    with pytest.raises(FileExistsError):
        jm.save(tmp_path / "run", CONFIG, theta)


def test_a_run_with_its_own_config_needs_a_learner(key, tmp_path):
    learner = make_learner(CONFIG)
    jm.save(tmp_path / "run", {"mine": 1}, learner.init(key))
    with pytest.raises(ValueError, match="learner="):
        jm.load(tmp_path / "run")
    assert jm.load(tmp_path / "run", learner)[0] is learner
    wider = make_learner(Config(filters=8))
    with pytest.raises(ValueError, match="another model"):
        jm.load(tmp_path / "run", wider)


def test_what_is_no_run_or_of_another_format_is_refused(key, tmp_path):
    with pytest.raises(FileNotFoundError, match="no jmeta run"):
        jm.load(tmp_path)
    jm.save(tmp_path / "run", CONFIG, make_learner(CONFIG).init(key))
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        jm.load(tmp_path / "run")


def test_a_field_newer_than_the_run_counts_as_its_default(key, tmp_path):
    folder = jm.save(tmp_path / "run", CONFIG, make_learner(CONFIG).init(key))
    path = folder / "run.json"
    described = json.loads(path.read_text())
    del described["config"]["outer_schedule"]
    path.write_text(json.dumps(described))
    assert checkpoint.open_run(folder, True, CONFIG, ()) == folder
    with pytest.raises(ValueError, match="different: outer_schedule"):
        checkpoint.open_run(folder, True, dataclasses.replace(CONFIG, outer_schedule="cosine"), ())


def test_theta_keeps_its_types(tmp_path, key):
    learner = make_learner(Config(method="meta-sgd", filters=4))
    theta = learner.init(key)
    jm.save(tmp_path / "run", {"mine": 1}, theta)
    again = jm.load(tmp_path / "run", learner)[1]
    assert type(again) is jm.Theta
    assert jax.tree.structure(again) == jax.tree.structure(theta)
