"""What a step leaves as it is."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from jmeta import invariant

WEIGHTS = jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)


def body(carry, step):
    """The first leaf stands still; what is made of it is a matrix product and arrays of zeros."""
    still, moving = carry
    made = jnp.tanh(still @ WEIGHTS)
    return (still, jax.nn.relu(moving @ made + jnp.zeros((8, 8))) * 0.1 + step), (moving.sum(), made.sum())


CARRY = jnp.eye(8), jnp.ones((8, 8))
STEPS = jnp.arange(5.0)


@pytest.mark.parametrize("wrap", [lambda body: body, jax.checkpoint], ids=["kept", "anew"])
def test_scan_computes_what_jax_computes_and_its_derivatives(wrap):
    def both(run):
        return jax.jit(lambda carry: (run(carry), jax.grad(lambda carry: run(carry)[0][1].sum() + run(carry)[1][1].sum())(carry)))

    ours = both(lambda carry: invariant.scan(body, carry, STEPS, wrap))(CARRY)
    chex.assert_trees_all_close(ours, both(lambda carry: jax.lax.scan(body, carry, STEPS))(CARRY), rtol=1e-5)


def _loops(function, *arguments):
    """The primitives in the program's one loop, and those outside."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    (loop,) = [each for each in jaxpr.eqns if each.primitive.name == "scan"]
    return [each.primitive.name for each in loop.params["jaxpr"].eqns], [each.primitive.name for each in jaxpr.eqns]


def test_what_does_not_change_is_computed_before_the_loop():
    inside, outside = _loops(lambda carry: invariant.scan(body, carry, STEPS), CARRY)
    assert inside.count("dot_general") == 1
    assert "tanh" not in inside
    assert outside.count("dot_general") == 1
    assert "broadcast_in_dim" in inside  # zeros are written anew rather than kept


def test_nothing_changes_and_everything_changes():
    def still(carry, step):
        return carry, jnp.sin(carry).sum()

    last, seen = jax.jit(lambda carry: invariant.scan(still, carry, STEPS))(jnp.ones(3))
    chex.assert_trees_all_close((last, seen), (jnp.ones(3), jnp.full(5, 3 * jnp.sin(1.0))))
    last, seen = invariant.scan(lambda carry, step: (carry * 2 + step, None), 1.0, STEPS)
    assert float(last) == 2 * (2 * (2 * (2 * (2 * 1 + 0) + 1) + 2) + 3) + 4
    assert seen is None


def test_what_has_effects_stays_in_the_loop(capfd):
    def told(carry, step):
        jax.debug.print("here {}", carry[0].sum())
        return (carry[0], carry[1] + step), None

    jax.block_until_ready(jax.jit(lambda carry: invariant.scan(told, carry, STEPS))(CARRY))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("here 8.0") == 5


def test_flows_tells_which_gradients_are_read_and_which_parameters_move():
    tree = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(())}

    def update(grads):
        return {"a": -grads["a"], "b": -0.1 * jnp.zeros_like(grads["b"]), "c": tree["c"] * 0.1}, ()

    assert invariant.flows(update, tree)[:2] == ([True, False, False], [True, False, True])
    sgd = optax.clip_by_global_norm(1.0)
    clipped = invariant.flows(lambda grads: sgd.update(grads, sgd.init(tree)), tree)
    assert clipped[:2] == ([True] * 3, [True] * 3)
    chex.assert_trees_all_equal(clipped.run(tree), sgd.update(tree, sgd.init(tree)))


def test_a_gradient_that_only_the_state_reads_is_read():
    def update(grads):
        return jax.tree.map(jnp.zeros_like, grads), grads["a"].sum()

    assert invariant.flows(update, {"a": jnp.ones(2), "b": jnp.ones(3)})[:2] == ([True, False], [False, False])
