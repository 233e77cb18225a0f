"""Learners compared: trained in turn, gone on with, and put into one table."""

import dataclasses
import json

import numpy as np
import pytest

import jmeta as jm
from jmeta import builders, commands, commands_compare, presets

TINY = dataclasses.replace(
    presets.preset("maml-glyphs-5w1s"), filters=2, steps=2, batch=2, test_queries=2, test_steps=1, validate_every=0, test_episodes=4
)


@pytest.fixture
def tiny(monkeypatch):
    for name, changed in (("maml", {}), ("protonet", {"inner_steps": 0, "test_steps": 0, "train_ways": 8})):
        monkeypatch.setitem(presets.PRESETS, f"{name}-tiny", dataclasses.replace(TINY, method=name, **changed))


def test_learners_are_trained_once_and_measured(tiny, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "photographs.npz", images=pixels, labels=np.arange(300) // 3)
    how = {"learners": ("maml", "protonet"), "preset": "tiny", "out": str(tmp_path / "all"), "shift": ("glyphs", "grey28")}
    with pytest.raises(ValueError, match="compare: grey28 needs --photographs"):
        commands_compare.compare(**how)
    with pytest.raises(FileNotFoundError, match=r"compare: photographs is .*nowhere"):
        commands_compare.compare(**how, photographs=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="without: there is no class '200'"):
        commands_compare.compare(**how, photographs=str(tmp_path / "photographs.npz"), without=("200",))
    assert not (tmp_path / "all").exists()
    read = []
    monkeypatch.setattr(
        builders, "photographs", lambda source, **options: read.append(options) or jm.photographs(source, **options)
    )
    how |= {"without": ("7",), "classes": (10, 10, 75)}
    how["photographs"] = str(tmp_path / "photographs.npz")
    path = commands_compare.compare(**how)
    rows = json.loads(path.read_text())
    assert [row["learner"] for row in rows] == ["maml", "protonet"]
    for row in rows:
        assert row["meta_steps"] == 2 and row["episodes"] == 4 and row["norm"] == "batch"
        assert row["adaptation_seconds"] > 0 and row["meta_step_seconds"] > 0 and row["meta_step_mib"] > 0
        assert row["shift"]["glyphs"] == pytest.approx([row["mean"], row["interval95"]], abs=1e-6)  # the same tasks here
        assert 0 <= row["shift"]["grey28"][0] < 0.7  # noise has no classes
        assert row["config"]["without"] == []  # glyphs know nothing of it
    assert read == [{"size": 28, "channels": 1, "classes": (10, 10, 75), "without": ("7",), "seed": 0}]
    assert rows[0]["parameters"] > rows[1]["parameters"]  # which has no head
    assert (tmp_path / "all" / "compare.png").stat().st_size
    assert "protonet, seed 0, 2 meta-steps" in capsys.readouterr().out

    monkeypatch.setattr(commands, "train", None)  # nothing is trained again
    again = json.loads(commands_compare.compare(**how).read_text())
    assert [row["mean"] for row in again] == [row["mean"] for row in rows]


def test_a_budget_in_minutes_is_counted_out_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(commands_compare, "PROBED", 0.01)
    steps = commands_compare._affordable("maml", presets.preset("maml-tiny"), 2.0, tmp_path)
    assert steps >= 1 and json.loads((tmp_path / "budget.json").read_text()) == {"maml, 2 minutes": steps}
    monkeypatch.setattr(commands_compare, "fit", None)
    assert commands_compare._affordable("maml", presets.preset("maml-tiny"), 2.0, tmp_path) == steps


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compare: shift is colour84, of shape \(84, 84, 3\), but omniglot has images of shape"):
        commands_compare.compare(learners=("maml",), out=str(tmp_path / "new"), shift=("colour84",))
    with pytest.raises(ValueError, match="compare: give --steps or --minutes, not both"):
        commands_compare.compare(learners=("maml",), out=str(tmp_path), steps=1, minutes=1.0)
    with pytest.raises(ValueError, match=r"compare: shift is glyphs, of shape \(28, 28, 1\), but sinusoid has no images"):
        commands_compare.compare(learners=("maml",), preset="sinusoid-10s", out=str(tmp_path / "new"), shift=("glyphs",))
    with pytest.raises(ValueError, match="preset: 'mamml-omniglot-5w1s' is not known; the nearest is"):
        commands_compare.compare(learners=("mamml",), out=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
