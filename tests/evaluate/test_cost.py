"""Counted operations and measured seconds."""

import time

import jax
import jax.numpy as jnp
import pytest

from jmeta.evaluate.cost import alternately, operations
from jmeta.models.layers import task_conv

X = jnp.ones((4, 8))
W = jnp.ones((8, 8))
IMAGES, KERNEL = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
ONE = 2 * 4 * 8 * 8
CONV = 2 * 2 * 6 * 6 * 27 * 5


def conv(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def looped(x):
    return jax.lax.fori_loop(0, 7, lambda _, x: x @ W, x)


COUNTS = {
    "a product": (lambda: operations(jnp.matmul, X, W), ONE),
    "equal ones": (lambda: operations(lambda x: (x @ W) + jax.jit(jnp.matmul)(x, W), X), ONE),
    "different ones": (lambda: operations(lambda x: (x @ W) + ((2 * x) @ W), X), 2 * ONE),
    "one that nothing needs": (lambda: operations(lambda x: [(x @ W).sum(), x][1], X), 0),
    "a loop": (lambda: operations(looped, X), 7 * ONE),
    "a scan": (lambda: operations(lambda x: jax.lax.scan(lambda x, _: (x @ W, None), x, None, 5)[0], X), 5 * ONE),
    "branches": (lambda: operations(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ W, lambda x: x @ W @ W, x), X), 2 * ONE),
    "a gradient": (lambda: operations(jax.grad(lambda w: (X @ w).sum() ** 2), W), 2 * ONE),
    "computed anew": (lambda: operations(jax.grad(jax.checkpoint(lambda w: jnp.sin(X @ w).sum())), W), 2 * ONE),
    "a batch": (lambda: operations(jax.vmap(jnp.matmul), jnp.ones((3, 4, 8)), jnp.ones((3, 8, 8))), 3 * ONE),
    "a convolution": (lambda: operations(conv, IMAGES, KERNEL), CONV),
    "our convolution": (lambda: operations(lambda x, k: task_conv(x, k, (1, 1), "SAME"), IMAGES, KERNEL), CONV),
    "its gradients": (
        lambda: operations(jax.grad(lambda x, k: (task_conv(x, k, (1, 1), "SAME") ** 2).sum(), (0, 1)), IMAGES, KERNEL),
        3 * CONV,
    ),
    "its patches": (lambda: operations(lambda x, k: task_conv(x, k, (2, 2), "SAME"), IMAGES, KERNEL), CONV // 4),
    "shapes alone": (lambda: operations(jnp.matmul, *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (X, W))), ONE),
}


@pytest.mark.parametrize("count, expected", COUNTS.values(), ids=list(COUNTS))
def test_operations(count, expected):
    assert count() == expected


def test_calls_are_timed_in_turns():
    called = []

    def call(name, seconds):
        return lambda: called.append(name) or time.sleep(seconds)

    short, long = alternately([call("short", 0.001), call("long", 0.02)], rounds=3, least=0.01)
    assert 0.001 <= short < long and long >= 0.02
    order = [name for number, name in enumerate(called) if not number or called[number - 1] != name]
    assert order == ["short", "long"] * 4  # once to see how often, and three rounds
