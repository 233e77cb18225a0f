"""Sequential and standard transfer, against loops by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta import plot
from jmeta.evaluate import draws as drawing

NET = jm.mlp(6, hidden=(8,), shape=(12,))
HOW = {"classes": 4, "shots": 3, "queries": 2}


class _Warm(nn.Module):
    """A network that does something after its head."""

    @nn.compact
    def __call__(self, x):
        return 2 * nn.Dense(6, name="head")(x.reshape(len(x), -1))


def _images(noise=40):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 200, (5, 1, 3, 4))
    pixels = np.clip(kinds + rng.integers(0, noise, (5, 6, 3, 4)), 0, 255).astype(np.uint8)
    return jm.from_arrays(pixels.reshape(-1, 3, 4), np.repeat(np.arange(5), 6))


def _theta(key):
    return jm.Theta(NET.init(key))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_matrix_is_that_of_a_loop_over_images(key, frozen):
    """With features frozen, that of a linear head over stored features."""
    images, theta = _images(), _theta(key)
    found = jm.continual(
        key, NET, jm.xent, theta, images, optax.sgd, **HOW, frozen=frozen, rates=[0.5], draws=2, checkpoints=[0, 1, 4]
    )
    data, second = drawing.on_device(images), jax.random.split(jax.random.split(key)[1], 2)
    for number, own in enumerate(second):
        key_draw, key_head = jax.random.split(own)
        x = drawing.draw(key_draw, data, 4, 5).astype(jnp.float32).reshape(4, 5, 12) / 255
        params = jm.zap_layer(key_head, theta.params, "head", bias=True)
        if frozen:
            body = params["layer1"]["dense"]
            x, params = jax.nn.relu(x @ body["kernel"] + body["bias"]), params["head"]

        def apply(params, x):
            return x @ params["kernel"] + params["bias"] if frozen else NET.apply(params, x)

        rows = []
        for label in range(5):
            if label in (0, 1, 4):
                rows.append([float((apply(params, x[j, 3:]).argmax(-1) == j).mean()) for j in range(4)])
            for place in range(3 if label < 4 else 0):
                gradient = jax.grad(lambda p, one, y: jm.xent(apply(p, one), y))(params, x[label, place][None], jnp.array([label]))
                params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        np.testing.assert_allclose(found.matrix[number], rows, atol=1e-6)
    assert found.matrix.shape == (2, 3, 4) and found.rate == 0.5 and found.tried == {}


def test_the_rate_is_chosen_on_draws_of_its_own(key):
    images, theta = _images(), _theta(key)
    rates = [1e-6, 0.03, 0.3]
    found = jm.continual(key, NET, jm.xent, theta, images, **HOW, frozen=True, rates=rates, draws=3, select=4)
    assert list(found.tried) == rates and found.rate == max(rates, key=lambda rate: found.tried[rate][0]) != 1e-6
    alone = jm.continual(key, NET, jm.xent, theta, images, **HOW, frozen=True, rates=[found.rate], draws=3)
    np.testing.assert_array_equal(alone.matrix, found.matrix)

    def run(shared, key, rate):
        return (jax.random.uniform(key) + rate,)

    (seen,), rate, tried = drawing.two_stages(key, run, (), (1.0, 2.0), 4, 4, lambda found: found[0], 1, None)
    assert rate == 2.0 and tried[2.0][0] == pytest.approx(tried[1.0][0] + 1, abs=1e-5)
    assert abs(seen.mean() - tried[2.0][0]) > 1e-3
    assert drawing.chosen(0.03, found.tried) == "rate 0.03 of 3"
    assert drawing.chosen(0.3, found.tried) == "rate 0.3 of 3, at the edge of what was tried"


def test_further_rates_are_tried_while_the_best_is_at_an_edge(key):
    """Of a score that is best at a rate of 4, from 1 and 2, and then from 4 and 8, whose next is not better."""
    seen = []

    def score(shared, key, rate):
        jax.debug.callback(lambda rate: seen.append(float(rate)), rate)
        return (1 / (1 + (rate - 4.0) ** 2),)

    grid = (16.0, 8.0, 4.0, 2.0, 1.0)
    how: dict = {"draws": 2, "select": 2, "judge": lambda found: found[0], "together": 1, "mesh": None, "further": grid}
    run = drawing.runner(score)
    _, rate, tried = drawing.two_stages(key, run, (), (1.0, 2.0), **how)
    jax.effects_barrier()
    assert rate == 4.0 and sorted(tried) == [1.0, 2.0, 4.0, 8.0] and seen.count(8.0) == 2 and 16.0 not in seen
    assert drawing.two_stages(key, run, (), (1.0, 2.0), **{**how, "further": grid[::-1]})[1:] == (rate, tried)  # in any order
    assert sorted(drawing.two_stages(key, run, (), (16.0, 8.0), **{**how, "further": grid[:2]})[2]) == [8.0, 16.0]
    assert drawing.two_stages(key, run, (), (2.0,), **how)[1:] == (2.0, {})  # a single one is not chosen


@pytest.mark.parametrize("frozen", [True, False])
def test_the_choice_needs_no_checkpoints(key, frozen):
    """What the first stage measures is what the reported one would at its last checkpoint."""
    how = {**HOW, "frozen": frozen, "draws": 2, "rates": (1e-2, 1e-3)}
    both = [jm.continual(key, NET, jm.xent, _theta(key), _images(), checkpoints=each, **how) for each in (None, (4,))]
    assert both[0].tried == both[1].tried and both[0].rate == both[1].rate
    np.testing.assert_array_equal(both[0].matrix[:, -1], both[1].matrix[:, -1])


def test_devices_and_chunks_change_nothing(key):
    images, theta = _images(), _theta(key)

    def run(**how):
        return jm.continual(key, NET, jm.xent, theta, images, **HOW, rates=[0.01, 0.03], draws=3, **how)

    one, two, many = run(), run(mesh=jm.task_mesh(2)), run(chunk=2)
    for other in (two, many):
        np.testing.assert_allclose(other.matrix, one.matrix, atol=1e-6)
        assert other.rate == one.rate


def test_figures_of_a_matrix_by_hand(tmp_path):
    matrix = np.array([[[0.1, 0.2, 0.3], [1.0, 0.2, 0.1], [0.6, 0.9, 0.3], [0.5, 0.4, 1.0]]] * 2)
    found = jm.Continual(matrix, matrix, (0, 1, 2, 3), 1e-3, {})
    assert found.final == pytest.approx((1.9 / 3, 0))
    np.testing.assert_allclose(found.running[0], [np.nan, 1.0, 0.75, 1.9 / 3])
    assert found.forgetting == pytest.approx(((0.5 + 0.5) / 2, 0))
    assert found.backward == pytest.approx(((-0.5 - 0.5) / 2, 0))
    assert found.forward == pytest.approx((((0.2 - 0.2) + (0.3 - 0.3)) / 2, 0))
    assert np.isnan(found._replace(matrix=matrix[:, 1:], checkpoints=(1, 2, 3)).forward[0])
    once = found._replace(matrix=matrix[:, [0, 3]], checkpoints=(0, 3))
    assert np.isnan([once.forgetting[0], once.backward[0], once.forward[0]]).all()
    assert found.plot(tmp_path / "matrix.png").stat().st_size > 1000
    plot.by_classes({"a": (found.checkpoints, found.running)}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_single_draw_has_no_interval(key):
    """What is not known is left out of the printed line."""
    images, theta = _images(), _theta(key)
    how = {**HOW, "rates": [0.5], "draws": 1}
    found = jm.continual(key, NET, jm.xent, theta, images, **how, checkpoints=[4])
    assert str(found) == f"{found.final[0]:.3f} over 4 classes (1 draw, so no interval); rate 0.5"
    fine = jm.transfer(key, NET, jm.xent, theta, images, **how)
    assert str(fine) == f"{fine.accuracy.mean():.3f} (1 draw, so no interval); rate 0.5"


@pytest.mark.parametrize("method", ["finetune", "probe", "least_squares"])
def test_transfer_learns_classes_apart(key, method):
    images, theta = _images(noise=5), _theta(key)
    found = jm.transfer(key, NET, jm.xent, theta, images, **HOW, method=method, epochs=60, size=5, rates=[1e-6, 0.01], draws=3)
    assert found.accuracy.shape == (3,) and found.accuracy.mean() > 0.8
    assert np.isnan(found.rate) if method == "least_squares" else found.rate == 0.01


def test_least_squares_is_the_solution(key):
    images, theta = _images(), _theta(key)
    found = jm.transfer(key, NET, jm.xent, theta, images, **HOW, method="least_squares", draws=2, ridge=1e-6)
    own = jax.random.split(jax.random.split(key)[1], 2)[0]
    x = drawing.draw(jax.random.split(own)[0], drawing.on_device(images), 4, 5).reshape(4, 5, 12) / 255
    h = np.asarray(jax.nn.relu(x @ theta.params["layer1"]["dense"]["kernel"] + theta.params["layer1"]["dense"]["bias"]), float)
    h = np.concatenate([h, np.ones((4, 5, 1))], -1)
    weights = np.linalg.lstsq(h[:, :3].reshape(12, -1), np.repeat(np.eye(4), 3, 0), rcond=None)[0]
    expected = ((h[:, 3:] @ weights).argmax(-1) == np.arange(4)[:, None]).mean()
    assert found.accuracy[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": 6}, "classes is 6, but the image set has 5"),
        ({"shots": 5}, "shots . queries is 5 . 2, but class .* has 6 images"),
        ({"model": jm.mlp(3, hidden=(8,), shape=(12,))}, "head has 3 outputs, too few for 4 classes"),
        ({"model": jm.mlp(6, hidden=(8,), shape=(12,), norm="batch")}, "predictions depend on each other"),
        ({"rates": []}, "rates must be numbers above 0"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"model": jm.from_linen(nn.Dense(6), jax.ShapeDtypeStruct((1, 3, 4, 1), "float32"))}, "must have a kernel"),
        ({"model": jm.from_linen(_Warm(), jax.ShapeDtypeStruct((1, 3, 4, 1), "float32")), "frozen": True}, "is something else"),
        ({"checkpoints": [2, 1]}, "checkpoints must rise"),
        ({"model": jm.Model(NET.init, NET.apply)}, "does not tell its layers"),
    ],
)
def test_bad_input_is_named(key, change, says):
    change = {**HOW, **change}
    model = change.pop("model", NET)
    with pytest.raises(ValueError, match=says):
        jm.continual(key, model, jm.xent, jm.Theta(model.init(key)), _images(), **change)
