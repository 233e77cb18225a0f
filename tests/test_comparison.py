"""Learners compared: trained in turn, gone on with, and put into one table."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta as jm
from jmeta import builders, presets
from jmeta.commands import comparison, training
from jmeta.commands.results import TEST_KEY

TINY = dataclasses.replace(
    presets.preset("maml-glyphs-5w1s"), filters=2, steps=2, batch=2, test_queries=2, test_steps=1, validate_every=0, test_episodes=4
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(comparison, "PROBED", 0.01)
    comparing = {"inner_steps": 0, "test_steps": 0, "train_ways": 8}
    for name, changed in (("maml", {}), ("protonet", comparing), ("maml++", {"warmup": 1})):
        monkeypatch.setitem(presets.PRESETS, f"{name}-tiny", dataclasses.replace(TINY, method=name, **changed))


def test_learners_are_trained_once_and_measured(tiny, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "photographs.npz", images=pixels, labels=np.arange(300) // 3)
    how = {"learners": ("maml", "protonet"), "preset": "tiny", "out": str(tmp_path / "all"), "shift": ("glyphs", "grey28")}
    with pytest.raises(ValueError, match="compare: grey28 needs --photographs"):
        comparison.compare(**how)
    with pytest.raises(FileNotFoundError, match=r"compare: photographs is .*nowhere"):
        comparison.compare(**how, photographs=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="without: there is no class '200'"):
        comparison.compare(**how, photographs=str(tmp_path / "photographs.npz"), without=("200",))
    assert not (tmp_path / "all").exists()
    read = []
    monkeypatch.setattr(
        builders, "photographs", lambda source, **options: read.append(options) or jm.photographs(source, **options)
    )
    how |= {"without": ("7",), "classes": (10, 10, 75)}
    how["photographs"] = str(tmp_path / "photographs.npz")
    path = comparison.compare(**how)
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
    table = (tmp_path / "all" / "compare.md").read_text()
    assert table in capsys.readouterr().out and "| protonet | 0 | 2 |" in table and table.startswith("accuracy on 4 episodes, 95 %")

    for name in ("train", "scored"):
        monkeypatch.setattr(training, name, None)  # nothing is trained or measured again
    monkeypatch.setattr(comparison, "fewshot", None)
    again = json.loads(comparison.compare(**how, seeds=(0,)).read_text())
    assert again == rows
    with pytest.raises(
        ValueError, match=r"maml-tiny-seed0 was made with steps 2 and not 4. Usual cause: other arguments, same --out"
    ):
        comparison.compare(**how, steps=4)
    assert json.loads(path.read_text()) == rows


def test_reptile_is_measured_both_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "PROBED", 0.01)
    config = dataclasses.replace(TINY, method="reptile", outer_rate=1.0, inner_rate=1e-3)
    monkeypatch.setitem(presets.PRESETS, "reptile-tiny", config)
    (row,) = json.loads(comparison.compare(learners=("reptile",), preset="tiny", out=str(tmp_path / "all")).read_text())
    assert row["transductive"] and 0 <= row["one_at_a_time"][0] <= 1
    alone = builders.make_learner(dataclasses.replace(config, transductive=False), 1)
    _, theta, _ = jm.load(tmp_path / "all" / "reptile-tiny-seed0")
    score = jm.fewshot(
        jax.random.fold_in(jax.random.key(0), TEST_KEY),
        alone,
        theta,
        builders.make_problem(config).test,
        4,
        every_step=False,
    )
    assert row["one_at_a_time"] == pytest.approx([score.mean, score.interval], abs=1e-6) and not score.transductive


def test_a_budget_in_minutes_is_counted_out_once(tiny, tmp_path, monkeypatch):
    """By meta-steps that take 10 ms, the first call of each program 5 s more: 2 minutes are 12,000 of them."""
    now, seen = [0.0], set()

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

    def slow(key, learner, data, outer, count, *rest, **options):
        now[0] += 0.01 * count + 5.0 * (learner not in seen)
        seen.add(learner)
        return jm.Fit(None, jnp.zeros(1), None, {})

    monkeypatch.setattr(comparison, "time", Clock)
    monkeypatch.setattr(comparison, "fit", slow)
    monkeypatch.setattr(training, "tuned", lambda config, *_: (config, config.chunk))
    found = comparison._affordable("maml", presets.preset("maml-tiny"), 2.0, tmp_path)
    assert found.steps == 12_000 and found.warmup == 0
    both = comparison._affordable("maml++", presets.preset("maml++-tiny"), 2.0, tmp_path)
    assert both.steps == 12_000 and both.warmup == 6_000 and len(seen) == 3  # the warm-up's program, and the one after it
    kept = json.loads((tmp_path / "budget.json").read_text())
    assert kept["maml, 2 minutes, 2 tasks"] == {"steps": 12_000, "chunk": None, "unroll": None}
    monkeypatch.setattr(comparison, "fit", None)
    assert comparison._affordable("maml", presets.preset("maml-tiny"), 2.0, tmp_path) == found


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compare: shift is colour84, of shape \(84, 84, 3\), but omniglot has images of shape"):
        comparison.compare(learners=("maml",), out=str(tmp_path / "new"), shift=("colour84",))
    for wrong, says in (
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"minutes": -1.0}, "minutes must be above 0, got -1.0"),
        ({"batch": 0}, "batch must be above 0, got 0"),
        ({"seeds": ()}, "seeds must be at least one, each once"),
        ({"learners": ("maml", "maml")}, "learners must be at least one, each once"),
    ):
        with pytest.raises(ValueError, match=f"compare: {says}"):
            comparison.compare(**{"learners": ("maml",), "out": str(tmp_path / "new"), **wrong})
    with pytest.raises(ValueError, match="compare: give --steps or --minutes, not both"):
        comparison.compare(learners=("maml",), out=str(tmp_path), steps=1, minutes=1.0)
    with pytest.raises(ValueError, match=r"compare: shift is glyphs, of shape \(28, 28, 1\), but sinusoid has no images"):
        comparison.compare(learners=("maml",), preset="sinusoid-10s", out=str(tmp_path / "new"), shift=("glyphs",))
    with pytest.raises(ValueError, match="preset: 'mamml-omniglot-5w1s' is not known; the nearest is"):
        comparison.compare(learners=("mamml",), out=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
