"""Which channels tasks choose, and how far they agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.evaluate.routing import Routing

GROUPS, CLASSES, SIDE = 3, 6, 16


def _images(names=None):
    """Every class of a group is as bright as the group's number; drawings add the class's number."""
    number = np.repeat(np.arange(GROUPS * CLASSES), 4)
    pixels = np.broadcast_to((100 + number // CLASSES)[:, None, None], (len(number), SIDE, SIDE)).astype(np.uint8)
    found = names or [f"g{n // CLASSES}/c{n % CLASSES}" for n in range(GROUPS * CLASSES)]
    return jm.from_arrays(pixels, np.array(found)[number])


def _by_brightness(per_group):
    """A learner whose phi has large scales where the brightness of the support says so."""

    def adapt(key, theta, support):
        group = jnp.round(support.x.mean() * 255).astype(int) - 100
        noise = jax.random.uniform(key, (12,))
        return jm.Theta({"norm": {"scale": jnp.where(jnp.arange(12) // 4 == group, 2.0, 0.0) * per_group + noise}})

    none: Any = [lambda *_: None] * 5
    return jm.MetaLearner(*none)._replace(adapt=adapt, predict=lambda phi, x: jnp.zeros((len(x), 4)))


def test_specialised_parts_agree_within_groups_alone(key):
    found = jm.routing(key, _by_brightness(1.0), jm.Theta(()), _images(), 1 / 3, ways=3, shots=1, draws=5)
    assert found.groups == ("g0", "g1", "g2") and found.chosen["norm"].shape == (3, 5, 3, 12)
    np.testing.assert_allclose(found.overlap, np.eye(3))
    np.testing.assert_allclose(found.again, 1)
    figures = found.figures()
    assert figures["same minus other groups"] == (1.0, 0.0) and figures["chance"] == pytest.approx(1 / 3)
    assert "same group 1.000 ± 0.000, other groups 0.000 ± 0.000" in str(found)


def test_choices_at_random_agree_by_chance(key):
    found = jm.routing(key, _by_brightness(0.0), jm.Theta(()), _images(), 0.25, ways=3, shots=2, draws=300)
    figures = found.figures()
    for name in ("same classes", "same group", "other groups"):
        assert figures[name][0] == pytest.approx(found.chance, abs=0.03)
    assert found.chance == pytest.approx(0.25)


def test_intervals_hold_the_truth_where_groups_differ():
    """Groups choose channels by tastes of their own; the truth is the mean over very many of them."""
    rng = np.random.default_rng(0)

    def found(groups):
        tastes = rng.random((groups, 1, 1, 10)) ** 3
        ranks = (tastes + 0.3 * rng.random((groups, 20, 3, 10))).argsort(-1)
        return Routing(tuple(map(str, range(groups))), {"norm": (ranks.argsort(-1) >= 5)})

    truth = {name: found(1500).figures()[name][0] for name in ("other groups", "same minus other groups")}
    held = dict.fromkeys(truth, 0)
    for _ in range(300):
        figures = found(12).figures()
        for name, value in truth.items():
            held[name] += abs(figures[name][0] - value) <= figures[name][1]
    for count in held.values():
        assert 0.9 <= count / 300 <= 0.99


def test_a_real_learner_and_its_picture(key, tmp_path):
    net = jm.conv4(3, filters=4, shape=(SIDE, SIDE, 1))
    learner = jm.maml(net, jm.xent, jm.chain(jm.route(0.5), optax.sgd(0.1)), jm.repeat(2), order=1)
    found = jm.routing(key, learner, learner.init(key), _images(), 0.5, ways=3, shots=1, draws=2)
    assert all(each.sum(-1).min() == each.sum(-1).max() == 2 for each in found.chosen.values()) and len(found.chosen) == 4
    found.plot(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 1000


def test_what_the_learner_cannot_do_is_named(key):
    net = jm.conv4(2, filters=4, shape=(SIDE, SIDE, 1))
    learner = jm.maml(net, jm.xent, jm.chain(jm.route(0.5), optax.sgd(0.1)), jm.repeat(2), order=1)
    with pytest.raises(ValueError, match="routing: ways is 3, but the network has 2 outputs"):
        jm.routing(key, learner, learner.init(key), _images(), 0.5, ways=3, shots=1)
    with pytest.raises(ValueError, match=r"channels: keep must be above 0 and at most 1, or a tuple of such shares, got \[0.5\]"):
        jm.routing(key, learner, learner.init(key), _images(), [0.5], ways=2, shots=1)


@pytest.mark.parametrize(
    ("images", "options", "says"),
    [
        (
            _images(),
            {"ways": 4, "shots": 1},
            "three groups of at least 2 \\* ways = 8 classes, got g0 6, g1 6, g2 6.*keeps alphabets whole",
        ),
        (_images([str(n) for n in range(18)]), {"ways": 2, "shots": 1}, "got none.*names unlike 'group/class'"),
        (_images(), {"ways": 0, "shots": 1}, "ways must be at least 1, got 0"),
        (_images(), {"ways": 3, "shots": 1, "draws": 0}, "draws must be at least 1, got 0"),
        (_images(), {"ways": 3, "shots": 3}, "must have 2 \\* shots = 6 images, got one of 4"),
    ],
)
def test_bad_input_is_named(key, images, options, says):
    with pytest.raises(ValueError, match=says):
        jm.routing(key, _by_brightness(1.0), jm.Theta(()), images, 0.5, **options)
