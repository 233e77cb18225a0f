"""Convolution as patches, pooling and normalisation."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jmeta as jm
from jmeta.models.layers import BatchNorm, conv_norm, max_pool, task_conv


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_task_conv_is_the_convolution(key, padding, stride):
    x = jax.random.normal(key, (2, 9, 7, 3))
    kernel = jax.random.normal(key, (3, 2, 3, 4))
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)
    np.testing.assert_allclose(task_conv(x, kernel, (stride, stride), padding), expected, rtol=1e-4, atol=1e-5)


def test_task_conv_refuses_what_it_cannot_do(key):
    x, kernel = jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 2, 4))
    for options in ({"lhs_dilation": (2, 2)}, {"feature_group_count": 2}):
        with pytest.raises(NotImplementedError, match="dilated images and feature groups are not supported"):
            task_conv(x, kernel, (1, 1), "SAME", **options)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 2), (1, 3))])
def test_task_conv_dilates_kernels_as_xla_does(key, strides, padding):
    x, kernel = jax.random.normal(key, (2, 9, 8, 3)), jax.random.normal(key, (3, 2, 3, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=(2, 3), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(task_conv(x, kernel, strides, padding, rhs_dilation=(2, 3)), expected, atol=1e-4)


def test_no_network_keeps_a_grouped_convolution(key):
    model = jm.conv4(3, filters=4)
    params = jax.vmap(model.init)(jax.random.split(key, 2))
    program = str(jax.make_jaxpr(jax.vmap(model.apply))(params, jnp.zeros((2, 3, 28, 28, 1))))
    assert "conv_general_dilated" not in program and "dot_general" in program


def test_max_pool_drops_what_is_left_over(key):
    x = jax.random.normal(key, (2, 7, 6, 3))
    expected = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool(x), expected)


@pytest.mark.parametrize("norm", ["batch", "support", "group", "layer", "instance", "none"])
@pytest.mark.parametrize(
    "make",
    [
        lambda norm: jm.conv4(5, filters=8, norm=norm),
        lambda norm: jm.conv4(5, filters=8, pool=True, norm=norm),
        lambda norm: jm.resnet12(5, widths=(4, 8), shape=(28, 28, 1), norm=norm),
        lambda norm: jm.conv3(5, filters=12, norm=norm),  # so many that a first layer's normalisation is folded
        lambda norm: jm.anml_net(5, filters=4, gate_filters=2, norm=norm),
    ],
    ids=["conv4", "conv4 pooled", "resnet12", "conv3", "anml"],
)
def test_networks_have_their_layers_in_order(key, make, norm):
    model = make(norm)
    params = jax.jit(model.init)(key)
    assert set(params) == set(model.layers) and model.layers[-1] == "head"
    y = jax.jit(model.apply)(params, jax.random.normal(key, (6, 28, 28, 1)))
    assert y.shape == (6, 5) and bool(jnp.isfinite(y).all())
    assert (model.stats is not None) == (norm == "support")
    assert ("norm" in params["block1"]) == (norm != "none") or "conv1" in params["block1"]


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (jm.conv3(1000), 3_489_256),
        (jm.conv4(64, filters=256, pool=True, shape=(84, 84, 3), norm="instance"), 2_189_120),
    ],
    ids=["Omniglot", "mini-ImageNet"],
)
def test_the_networks_that_zapping_pretrains_have_their_papers_sizes(key, model, size):
    """The second by hand: 7,168 + 3 x 590,080 of kernels and biases, 4 x 512 of normalisation, 409,664 of the head."""
    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, key))) == size


def test_the_derivatives_of_batch_norm_are_those_of_its_formula(key):
    def formula(x, scale, bias):
        return (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5) * scale + bias

    def layer(x, scale, bias):
        return BatchNorm().apply({"params": {"scale": scale, "bias": bias}}, x)

    def derivatives(function, *arguments):
        def loss(*arguments):
            return jnp.sin(function(*arguments)).sum()

        def sloped(*arguments):
            return sum(jnp.square(leaf).sum() for leaf in jax.grad(loss, (0, 1, 2))(*arguments))

        forward = jax.jvp(function, arguments, jax.tree.map(jnp.cos, arguments))
        return forward, jax.grad(loss, (0, 1, 2))(*arguments), jax.grad(sloped, (0, 1, 2))(*arguments)

    with jax.enable_x64(True):
        draw = functools.partial(jax.random.normal, dtype=jnp.float64)
        x, scale, bias = draw(key, (2, 4, 3, 5)) + 2, draw(key, (2, 5)), draw(key, (2, 5))
        ours, expected = (jax.vmap(functools.partial(derivatives, each))(x, scale, bias) for each in (layer, formula))
    chex.assert_trees_all_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tasks", [None, 2], ids=["one task", "vmap"])
@pytest.mark.parametrize(
    ("channels", "stride", "padding"),
    [(1, 2, "SAME"), (8, 2, "SAME"), (8, 2, ((0, 3), (2, 1))), (3, 1, "SAME"), (3, 1, "VALID"), (1, 1, ((0, 3), (2, 1)))],
)
def test_the_derivatives_of_task_conv_are_those_of_the_convolution(key, channels, stride, padding, tasks):
    options = {"window_strides": (stride, stride), "padding": padding}

    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, **options, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def derivatives(function, x, kernel):
        def step(x, kernel):
            return kernel - jax.grad(lambda kernel: jnp.sin(function(x, kernel)).sum())(kernel)

        return jax.grad(lambda x, kernel: jnp.sin(function(x, step(x, kernel))).sum(), (0, 1))(x, kernel)

    with jax.enable_x64(True):
        draw, many = functools.partial(jax.random.normal, key, dtype=jnp.float64), (tasks,) if tasks else ()
        x, kernel = draw((*many, 4, 6, 5, channels)), draw((*many, 3, 2, channels, 16))
        both = [functools.partial(derivatives, each) for each in (functools.partial(task_conv, **options), conv)]
        ours, expected = (jax.jit(jax.vmap(each) if tasks else each)(x, kernel) for each in both)
    chex.assert_trees_all_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_forward_derivatives_of_a_convolution_of_stride_1_are_its_backward_ones(key):
    with jax.enable_x64(True):
        x, kernel = (jax.random.normal(key, shape, jnp.float64) for shape in ((2, 4, 4, 2), (3, 3, 2, 3)))

        def value(kernel):
            return jnp.sin(task_conv(x, kernel, (1, 1), "SAME")).sum()

        np.testing.assert_allclose(jax.jacfwd(jax.grad(value))(kernel), jax.jacrev(jax.grad(value))(kernel), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("norm", "axes"), [("batch", (0, 1, 2)), ("instance", (1, 2))])
@pytest.mark.parametrize("stride", [1, 2])
def test_normalisation_folded_into_a_first_kernel_changes_nothing(key, stride, norm, axes):
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv_norm(norm, x, 32, stride=stride)

    def plain(params, x):
        y = lax.conv_general_dilated(
            x, params["conv"]["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = y + params["conv"]["bias"]
        y = (y - y.mean(axes, keepdims=True)) / jnp.sqrt(y.var(axes, keepdims=True) + 1e-5)
        return y * params["norm"]["scale"] + params["norm"]["bias"]

    def derivatives(function, params, x):
        def step(params):
            grads = jax.grad(lambda params: jnp.sin(function(params, x)).sum())(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        return jax.value_and_grad(lambda params, x: jnp.sin(function(step(params), x)).sum(), (0, 1))(params, x)

    with jax.enable_x64(True):
        x = 5 + jax.random.normal(key, (3, 6, 6, 2), jnp.float64)
        params = Folded().init(key, x)["params"]
        params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape, jnp.float64), params)
        derive = jax.jit(derivatives, static_argnums=0)
        ours = derive(lambda params, x: Folded().apply({"params": params}, x), params, x)
        expected = derive(plain, params, x)
    chex.assert_trees_all_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_the_first_of_equal_values_of_a_window_has_the_gradient():
    x = jnp.array([[1.0, 3.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0, 1, 1, 0], [0, 0, 0, 0]])


def test_batch_norm_has_mean_0_and_variance_1(key):
    model = jm.mlp(4, hidden=(4,), shape=(4,), norm="batch")
    params = model.init(key)
    identity = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    params = {"layer1": {**params["layer1"], "dense": identity}, "head": identity}
    x = 3 + 2 * jax.random.normal(key, (50, 4))
    expected = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0)
    np.testing.assert_allclose(model.apply(params, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jm.conv4(0), "ways must be at least 1"),
        (lambda: jm.conv4(5, norm="bach"), "norm must be one of"),
        (lambda: jm.conv4(5, shape=(28, 28)), "shape must be"),
        (lambda: jm.conv4(5, pool=True, shape=(12, 12, 1)), "pooled away"),
        (lambda: jm.resnet12(5, shape=(8, 8, 3)), "pooled away"),
        (lambda: jm.mlp(1, norm="instance"), "instance"),
        (lambda: jm.mlp(1, hidden=(4, 0)), r"hidden\[1\] must be at least 1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pictures_of_whole_numbers_are_those_of_floats(key):
    model = jm.conv4(5, filters=16)
    pixels = jax.random.randint(key, (4, 28, 28, 1), 0, 255, jnp.uint8)
    np.testing.assert_allclose(
        model.apply(model.init(key), pixels), model.apply(model.init(key), pixels.astype("float32")), rtol=1e-5
    )
