"""The search for a pattern."""

import json

import jax
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.evaluate import trials
from tests import toys

NET = toys.net()
TASKS = toys.blobs()
STEPS, EPISODES = 2, 20


def make(pattern):
    return jm.maml(NET, jm.xent, jm.lambda_mask(pattern, optax.sgd(0.5)), jm.repeat(STEPS))


@pytest.fixture(scope="module")
def theta():
    learner = jm.maml(NET, jm.xent, optax.sgd(0.5), jm.repeat(STEPS))
    return jm.fit(jax.random.key(1), learner, TASKS, optax.adam(1e-2), steps=30, batch=4, progress=False).theta


PATTERNS = [jm.pattern(NET, text, STEPS) for text in ("head", "full, head", "suffix(2)", "body", "0.5:layer2+head")]


def _search(theta, patterns=PATTERNS, **options):
    options = {"tolerance": 0.02, "episodes": EPISODES, "timed": 3, "rounds": 0, "progress": False, **options}
    return jm.search(jax.random.key(0), make, theta, patterns, TASKS, **options)


def test_every_pattern_scores_as_its_static_learner_on_the_same_episodes(theta):
    found = _search(theta)
    assert {each.pattern for each in found.table} == {*PATTERNS, jm.pattern(NET, "full", STEPS)}
    for each in found.table:
        score = jm.fewshot(jax.random.key(0), make(each.pattern), theta, TASKS, EPISODES, every_step=False)
        assert each.accuracy == pytest.approx(score.mean, abs=1e-6)
        assert each.interval == pytest.approx(score.interval, abs=1e-6)
        assert each.difference == pytest.approx(each.accuracy - found.reference.accuracy, abs=1e-9)
    assert found.reference.difference == found.reference.difference_interval == 0


def test_best_is_the_cheapest_within_the_tolerance_and_the_front_is_the_front(theta):
    found = _search(theta, by="operations")
    within = [each for each in found.table if each.difference >= -0.02]
    assert found.best.operations == min(each.operations for each in within) and found.best in within
    surely = [each for each in found.table if each.difference - each.difference_interval >= -found.tolerance]
    assert found.sure.operations == min(each.operations for each in surely) and found.sure in surely
    assert found.most_accurate.accuracy == max(each.accuracy for each in found.table)
    for each in found.table:
        beaten = any(o.operations <= each.operations and o.accuracy > each.accuracy for o in found.table)
        beaten |= any(o.operations < each.operations and o.accuracy >= each.accuracy for o in found.table)
        assert (each.operations, each.accuracy) in {(o.operations, o.accuracy) for o in found.front} or beaten
    costs = [each.operations for each in found.front]
    assert costs == sorted(costs)
    anything = _search(theta, by="operations", tolerance=0.99)
    assert anything.best.operations == min(each.operations for each in anything.table)
    assert anything.best.pattern == PATTERNS[0]


def test_the_full_pattern_and_as_many_as_asked_for_are_timed(theta):
    found = _search(theta)
    timed = [each for each in found.table if each.latency is not None]
    assert len(timed) == 3 and found.reference in timed and found.best in timed
    assert all(each.latency > 0 and each.throughput > 0 for each in timed)
    assert all(np.isfinite(each.cost("latency")) for each in found.front)


def test_a_search_that_was_cut_off_goes_on(theta, tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    _search(theta, PATTERNS[:2], path=path)
    asked = []
    score = trials._scores
    monkeypatch.setattr(trials, "_scores", lambda *args: asked.append(np.asarray(args[9])) or score(*args))
    found = _search(theta, path=path)
    assert len({row.tobytes() for rows in asked for row in rows}) == len(PATTERNS) - 2
    calls = len(asked)
    again = _search(theta, path=path)
    assert len(asked) == calls
    assert [each[:6] for each in again.table] == [each[:6] for each in found.table]
    with pytest.raises(ValueError, match="holds no search of this theta"):
        _search(theta, path=path, episodes=EPISODES + 1)
    (tmp_path / "mine.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"mine\.json, which holds no search"):
        _search(theta, path=tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "[1, 2]"


def test_rounds_try_patterns_next_to_the_front(theta):
    start = PATTERNS[:1]
    found = _search(theta, start, rounds=1, by="operations")
    new = {each.pattern for each in found.table} - {*start, jm.pattern(NET, "full", STEPS)}
    assert new
    near = [np.array([row] * STEPS) for row in ([0, 0, 1], [1, 1, 1])]
    assert all(min(np.sum(np.array(each.rows) != rows) for rows in near) == 1 for each in new)


def test_devices_change_nothing(theta):
    one, two = (_search(theta, mesh=mesh, by="operations") for mesh in (None, jm.task_mesh(2)))
    assert [each.accuracy for each in one.table] == pytest.approx([each.accuracy for each in two.table], abs=1e-6)


def test_text_json_and_picture(theta, tmp_path):
    found = _search(theta)
    assert str(found.best.pattern) in str(found) and "over 20 episodes" in str(found)
    (tmp_path / "found.json").write_text(json.dumps(found.as_dict()))
    assert jm.load_pattern(tmp_path / "found.json") == found.best.pattern
    assert found.plot(tmp_path / "front.png").stat().st_size > 1000


def test_another_reference(theta):
    found = _search(theta, reference=jm.pattern(NET, "head"), by="operations")
    assert found.reference.pattern == PATTERNS[0] and found.reference.difference == 0
    assert found.best.operations == found.reference.operations


def test_the_file_of_another_learner_is_refused(theta, tmp_path):
    _search(theta, path=tmp_path / "scores.json", by="operations")

    def slower(pattern):
        return jm.maml(NET, jm.xent, jm.lambda_mask(pattern, optax.sgd(0.4)), jm.repeat(STEPS))

    with pytest.raises(ValueError, match="holds no search of this theta"):
        options = {"tolerance": 0.1, "episodes": EPISODES, "path": tmp_path / "scores.json", "progress": False}
        jm.search(jax.random.key(0), slower, theta, PATTERNS, TASKS, **options)
    with pytest.raises(FileNotFoundError, match="whose folder is not there"):
        _search(theta, path=tmp_path / "nowhere" / "scores.json")


BAD = {
    "tolerance": ({"tolerance": -0.1}, ValueError, "tolerance must be from 0"),
    "points": ({"tolerance": 1}, ValueError, "a point is 0.01"),
    "episodes": ({"episodes": 1}, ValueError, "episodes"),
    "by": ({"by": "beauty"}, ValueError, "by must be"),
    "timed": ({"timed": 0}, ValueError, "timed"),
    "none": ({"patterns": []}, ValueError, "of one network"),
    "two networks": ({"patterns": [PATTERNS[0], jm.pattern(("a", "b"), "full")]}, ValueError, "of one network"),
    "rows": ({"patterns": [[[0, 1, 1]]]}, TypeError, r"jmeta\.Pattern"),
}


@pytest.mark.parametrize("options, kind, message", BAD.values(), ids=list(BAD))
def test_bad_searches_are_refused(theta, options, kind, message):
    with pytest.raises(kind, match=message):
        _search(theta, **options)


def test_a_learner_that_needs_a_static_pattern_says_so(theta):
    def static(pattern):
        return make(jm.pattern(pattern.layers, pattern.rows))

    with pytest.raises(TypeError, match="must be known before a program is traced"):
        jm.search(jax.random.key(0), static, theta, PATTERNS, TASKS, tolerance=0.1, episodes=4, progress=False)
