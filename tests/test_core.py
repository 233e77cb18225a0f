"""The algebra of rules and the inner loop."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta as jm
from jmeta.core import inner_loop
from tests import toys

RULES = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.01, eps_root=1e-8),
    "chain": lambda: jm.chain(optax.clip(1.0), optax.sgd(0.1)),
    "only": lambda: jm.only("head", optax.sgd(0.1)),
    "only learned": lambda: jm.only(("layer2", "head"), jm.learned_rates(0.1)),
    "learned": lambda: jm.learned_rates(0.1),
    "learned per layer and step": lambda: jm.learned_rates(0.1, per="layer", steps=2),
    "learned per tensor": lambda: jm.learned_rates(0.1, per="tensor"),
    "noisy": lambda: jm.chain(toys.noisy(), optax.sgd(0.1)),
    "shrinking": lambda: jm.chain(toys.shrinking(), optax.sgd(0.1)),
    "alternating": lambda: jm.chain(toys.alternating(), optax.sgd(0.1)),
    "meta": lambda: jm.chain(optax.sgd(0.1), toys.clipped_meta()),
}
LEARNERS = {
    "maml": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.repeat(2)),
    "fomaml": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.repeat(2), order=1),
    "scanned": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.repeat(2), unroll=False),
    "minibatches": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.minibatches(2, 4)),
    "one by one": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.one_by_one(2)),
    "multi-step": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.repeat(2), step_weights=(0.3, 0.7)),
    "carried state": lambda rule: jm.maml(toys.net(), jm.xent, rule, jm.repeat(2), carry_state=True),
    "imaml": lambda rule: jm.imaml(toys.net(), jm.xent, rule, jm.repeat(2)),
    "reptile": lambda rule: jm.reptile(toys.net(), jm.xent, rule, jm.repeat(2)),
    "reptile, one query at a time": lambda rule: jm.reptile(toys.net(), jm.xent, rule, jm.repeat(2), transductive=False),
    "asb": lambda rule: jm.asb(toys.net(), jm.xent, rule, jm.one_by_one(2)),
    "meta-asb": lambda rule: jm.asb(toys.net(), jm.xent, rule, jm.one_by_one(2), through=True),
    "reptile with carried state": lambda rule: jm.reptile(toys.net(), jm.xent, rule, jm.minibatches(2, 4), carry_state=True),
}


@pytest.mark.parametrize("order, expected", [(1, 4.8), (2, 4.32)])
def test_quadratic_gives_the_closed_form(key, order, expected):
    with jax.enable_x64(True):
        learner = jm.maml(toys.quadratic(jnp.float64), toys.half_square, optax.sgd(0.1), jm.repeat(1), order=order)
        theta = learner.init(key)
        base, gradient, info = learner.grad(key, theta, toys.quadratic_task(jnp.float64), meta_step=0)
    np.testing.assert_allclose(gradient.params["p"], expected, rtol=1e-15)
    np.testing.assert_allclose(info["loss"], 0.5 * 4.8**2, rtol=1e-15)
    assert base is theta


OTHERS = {
    "protonet": lambda: jm.protonet(toys.features(), ways=3),
    "protonet, cosine": lambda: jm.protonet(toys.features(), ways=3, distance="cosine"),
    "matching": lambda: jm.matching(toys.features(), ways=3),
    "ridge": lambda: jm.ridge(toys.features(), ways=3),
    "cavia": lambda: jm.cavia(
        jm.with_context(lambda shape: jm.mlp(3, hidden=(8,), shape=shape), (6,), 4), jm.xent, optax.sgd(0.1), jm.repeat(2)
    ),
    "maml++": lambda: jm.maml_plus_plus(toys.normed(), jm.xent, jm.repeat(2), first_order=1),
    "anil": lambda: jm.anil(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2)),
    "boil": lambda: jm.boil(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2)),
    "oml": lambda: jm.oml(toys.net(), jm.xent, jm.chain(jm.zap("head"), optax.sgd(0.1)), jm.one_by_one(2)),
    "supervised": lambda: jm.supervised(toys.net(), jm.xent, jm.repeat(2)),
    "snail": lambda: jm.snail(jm.snail_net(toys.features(), 3, features=4, most_shots=2, attention=((4, 4), (4, 4)), filters=4)),
}
WITHOUT_STEPS = ("protonet", "protonet, cosine", "matching", "ridge", "supervised", "snail")
EVERYTHING = jm.chain(toys.noisy(), toys.shrinking(), toys.alternating(), jm.learned_rates(0.1), optax.clip(1.0))
ROUTES = {
    f"{where}, {refresh}": jm.route(0.5, keep_meta=0.5, where=where, refresh=refresh)
    for where in ("update", "forward")
    for refresh in ("step", "task")
}
CASES = [
    *(
        (f"route {name}", jm.maml(toys.normed(), jm.xent, jm.chain(rule, optax.sgd(0.1)), jm.repeat(2)))
        for name, rule in ROUTES.items()
    ),
    *((f"maml with {name}", LEARNERS["maml"](make())) for name, make in RULES.items()),
    *((f"{name} with everything", make(EVERYTHING)) for name, make in LEARNERS.items()),
    *((name, make()) for name, make in OTHERS.items()),
]


@pytest.mark.parametrize(("name", "learner"), CASES, ids=[name for name, _ in CASES])
def test_properties_of_every_rule_and_every_learner(key, name, learner):
    """jit, vmap, finite gradients, tree and dtype kept, one trace, and the curve ends where predict stands."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grad(key, theta, task):
        return learner.grad(key, theta, task, meta_step=0)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(reptile|imaml|asb): the meta-parameters")
        theta, keys = jax.jit(learner.init)(key), jax.random.split(key, 2)
    tasks = jax.jit(jax.vmap(toys.blobs().sample, (0, None)))(keys, ())
    one = jax.tree.map(lambda leaf: leaf[1], tasks)
    base, gradient, info = grad(keys[1], theta, one)
    chex.assert_trees_all_equal(gradient, grad(keys[1], theta, one)[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, theta._replace(memory=()))
    chex.assert_trees_all_equal_shapes_and_dtypes(base, theta)
    chex.assert_tree_all_finite((gradient, info))
    assert float(optax.tree.norm(gradient.params)) > 0

    together = jax.jit(jax.vmap(lambda key, task: learner.grad(key, theta, task, meta_step=0)[1]))(keys, tasks)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], together), gradient, atol=1e-5)

    @jax.jit
    def end(theta):
        return learner.predict(learner.adapt(key, theta, one.support), one.query.x), learner.curve(key, theta, one)

    outputs, curve = end(theta)
    assert curve.shape == (1 if name in WITHOUT_STEPS else 3, 12, 3)
    np.testing.assert_allclose(curve[-1], outputs, atol=1e-5)


def _gradients(key, rule, **options):
    dtype = options.pop("dtype", jnp.float32)
    learner = jm.maml(toys.net(), jm.xent, rule, options.pop("data", jm.repeat(4)), **options)
    theta, task = (_cast(tree, dtype) for tree in (learner.init(key), toys.blobs().sample(key, ())))
    return jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0)[1])(theta)


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


SPLITS = {
    "twos": lambda step: step // 2,
    "turns": lambda step: step % 2,
    "uneven": lambda step: step == 1,
    "each": lambda step: step,
}


@pytest.mark.parametrize(
    ("rule", "data"),
    [(RULES["adam"](), jm.repeat(4)), (EVERYTHING, jm.minibatches(4, 4))],
    ids=["adam", "everything with minibatches"],
)
def test_scan_equals_unroll_and_any_split_into_phases(key, rule, data):
    with jax.enable_x64(True):
        unrolled = _gradients(key, rule, data=data, unroll=True, dtype=jnp.float64)
        for split in (None, *SPLITS.values()):
            parts = (rule,) if split is None else (jm.Rule("split", phase=split), rule)
            scanned = _gradients(key, jm.chain(*parts), data=data, unroll=False, dtype=jnp.float64)
            chex.assert_trees_all_close(scanned, unrolled, rtol=1e-6, atol=1e-12)


def test_long_runs_are_scanned_and_short_ones_unrolled(key):
    def program(steps):
        follow = inner_loop(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(steps)).follow
        task = toys.blobs().sample(key, ())
        return str(jax.make_jaxpr(follow)(key, jm.Theta(toys.net().init(key)), task.support))

    assert "scan[" not in program(10)
    assert "scan[" in program(11)


@pytest.mark.parametrize("unroll", [True, False])
def test_steps_computed_anew_change_nothing(key, unroll):
    with jax.enable_x64(True):
        kept, anew = (_gradients(key, EVERYTHING, unroll=unroll, remat=remat, dtype=jnp.float64) for remat in (False, True))
    chex.assert_trees_all_close(anew, kept, rtol=1e-9, atol=1e-12)


def test_memory_grows_with_parameters_alone_where_steps_are_computed_anew(key, optimised):
    model = jm.mlp(3, hidden=(16, 16), shape=(6,))
    task = jm.Task(*(jm.Batch(jnp.ones((600, 6)), jnp.arange(600) % 3),) * 2)

    def memory(steps, remat=None):
        learner = jm.maml(model, jm.xent, optax.sgd(0.1), jm.repeat(steps), unroll=False, remat=remat)
        program = jax.jit(lambda theta: learner.grad(key, theta, task, meta_step=0)[1])
        analysis = program.lower(learner.init(key)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(model.init(key)))
    few, many = memory(4), memory(40)
    assert many - few < 2 * 36 * parameters
    assert many < 2 * few
    assert memory(40, remat=False) > 5 * memory(4, remat=False)


def test_chain_is_associative_and_neutral(key):
    parts = [toys.noisy(), jm.learned_rates(0.1), toys.shrinking(), toys.noisy(), optax.clip(0.5)]
    flat, task = jm.chain(*parts), toys.blobs().sample(key, ())

    def program(rule):
        learner = jm.maml(toys.net(), jm.xent, rule, jm.repeat(2))
        theta = jax.eval_shape(learner.init, key)
        assert list(theta.hyper) == ["learned_rates", "shrinking"]
        return str(jax.make_jaxpr(lambda theta: learner.grad(key, theta, task, meta_step=0)[1])(theta))

    names, expected = [part.name for part in flat.parts or ()], program(flat)
    for nested in (
        jm.chain(jm.chain(*parts[:2]), jm.chain(*parts[2:])),
        jm.chain(parts[0], jm.chain(parts[1], jm.chain(*parts[2:]))),
        jm.chain(jm.chain(), jm.chain(*parts), optax.identity(), jm.Rule("nothing")),
        jm.chain(flat),
    ):
        assert [part.name for part in nested.parts or ()] == names
        assert program(nested) == expected
    assert program(jm.chain(parts[1], parts[0], *parts[2:])) != expected
    assert jm.chain().parts == ()


def test_repeated_names_have_randomness_of_their_own(key):
    twice = jm.chain(toys.noisy(), toys.noisy())
    params = {"w": jnp.zeros(3)}
    moved = twice.reset(key, params, None, hyper={})
    once = jm.chain(toys.noisy()).reset(key, params, None, hyper={})
    assert not np.allclose(moved["w"], 2 * once["w"])


def test_hooks_get_their_context(key):
    seen = []

    def reset(key, params, support, *, hyper):
        seen.append(("reset", support.x.shape, float(hyper)))
        return params

    def gate(params, *, step, hyper, key):
        seen.append(("gate", step, float(hyper), key is None))
        return params

    def update(updates, state, params=None, *, step, phase, hyper, key, **_):
        seen.append(("update", step, phase, float(hyper), key is None))
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    both = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    rule = jm.Rule("spy", lambda params: jnp.array(0.5), reset, gate, both, lambda step: "late" if step else "early")
    learner = jm.maml(toys.net(), jm.xent, jm.chain(rule, optax.clip(1.0)), jm.repeat(2), order=1)
    task = toys.blobs().sample(key, ())
    phi = learner.adapt(key, learner.init(key), task.support)
    learner.predict(phi, task.query.x)
    assert ("reset", (6, 6), 0.5) in seen
    assert [entry for entry in seen if entry[0] == "update"] == [
        ("update", 0, "early", 0.5, False),
        ("update", 1, "late", 0.5, False),
    ]
    assert ("gate", 0, 0.5, False) in seen
    assert seen[-1] == ("gate", 2, 0.5, True)


def test_meta_hook_has_the_last_word(key):
    gradient = _gradients(key, jm.chain(optax.sgd(0.1), toys.clipped_meta()))
    assert float(max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient))) == pytest.approx(1e-3)


def test_state_is_carried_in_memory_and_not_differentiated(key):
    learner = jm.maml(toys.net(), jm.xent, optax.adam(0.01, eps_root=1e-8), jm.repeat(2), carry_state=True)
    theta, task = learner.init(key), toys.blobs().sample(key, ())
    base, gradient, _ = learner.grad(key, theta, task, meta_step=0)
    counts = [int(optax.tree.get(memory["state"], "count")) for memory in (theta.memory, base.memory)]
    assert counts == [0, 2]
    assert gradient.memory == ()
    chex.assert_trees_all_equal(base.memory, learner.adapt(jax.random.split(key)[0], theta, task.support).memory)
    fresh = jm.maml(toys.net(), jm.xent, optax.adam(0.01, eps_root=1e-8), jm.repeat(2))
    chex.assert_trees_all_close(gradient, fresh.grad(key, theta._replace(memory=()), task, meta_step=0)[1], rtol=1e-6)


def test_support_statistics_make_predictions_independent(key):
    tasks = toys.blobs()
    task = tasks.sample(key, ())
    for norm, together in (("batch", True), ("support", False), ("layer", False)):
        model = jm.mlp(3, hidden=(8,), shape=(6,), norm=norm)
        learner = jm.maml(model, jm.xent, optax.sgd(0.1), jm.repeat(2))
        phi = learner.adapt(key, learner.init(key), task.support)
        whole, part = learner.predict(phi, task.query.x), learner.predict(phi, task.query.x[:2])
        assert np.allclose(whole[:2], part, atol=1e-5) != together
        assert ("stats" in dict(phi.memory)) == (norm == "support")


def test_second_order_gradients_of_conv4_agree_with_finite_differences(key):
    with jax.enable_x64(True):
        model = jm.conv4(3, filters=4, shape=(16, 16, 1))
        learner = jm.maml(model, jm.xent, optax.sgd(0.4), jm.repeat(2))
        params = jax.tree.map(lambda p: p.astype(jnp.float64), learner.init(key).params)
        x = jax.random.normal(key, (2, 6, 16, 16, 1), jnp.float64)
        y = jnp.arange(6) % 3
        task = jm.Task(jm.Batch(x[0], y), jm.Batch(x[1], y))

        @jax.jit
        def loss(params):
            theta = jm.Theta(params)
            _, gradient, info = learner.grad(key, theta, task, meta_step=0)
            return info["loss"], gradient.params

        direction = jax.tree.map(lambda p: jax.random.normal(jax.random.fold_in(key, p.size), p.shape, p.dtype), params)
        at = lambda step: loss(jax.tree.map(lambda p, d: p + step * d, params, direction))[0]
        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        exact = optax.tree.vdot(loss(params)[1], direction)
    np.testing.assert_allclose(slope, exact, rtol=1e-5)


def test_masked_examples_do_not_count(key):
    with jax.enable_x64(True):
        learner = jm.maml(toys.net(), jm.xent, optax.sgd(0.1), jm.repeat(2))
        theta, task = (_cast(tree, jnp.float64) for tree in (learner.init(key), toys.blobs().sample(key, ())))
        grad = jax.jit(lambda task: learner.grad(key, theta, task, meta_step=0)[1:])
        (plain, info), (masked, same) = grad(task), grad(jm.Task(*(_pad(batch) for batch in task)))
    chex.assert_trees_all_close((plain, info["loss"]), (masked, same["loss"]), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(info["accuracy"], same["accuracy"], rtol=1e-6)  # counted in float32


def _pad(batch):
    x = jnp.concatenate([batch.x, jnp.full((3, 6), 7.0)])
    y = jnp.concatenate([batch.y, jnp.zeros(3, batch.y.dtype)])
    return jm.Batch(x, y, (jnp.arange(len(y)) < len(batch.y)).astype(batch.x.dtype))


def test_memoised_constructors_give_the_same_object_and_one_trace(key):
    rule = optax.sgd(0.1)
    make = lambda: jm.maml(jm.mlp(3, hidden=(8,), shape=(6,)), jm.xent, rule, jm.repeat(2))
    assert make() is make()
    assert jm.anil(toys.net(), jm.xent, rule, jm.repeat(1)) is jm.anil(toys.net(), jm.xent, rule, jm.repeat(1))


@pytest.mark.parametrize("part", [optax.sgd, 0.1, None])
def test_chain_refuses_what_is_no_rule(part):
    with pytest.raises(TypeError, match="chain: each part must be a jmeta Rule or an optax transformation"):
        jm.chain(optax.clip(1.0), part)


@pytest.mark.parametrize("make", [jm.minibatches, lambda steps, size: jm.one_by_one(9)])
def test_feeds_refuse_more_than_the_support_set_has(key, make):
    learner = jm.maml(toys.net(), jm.xent, optax.sgd(0.1), make(2, 9))
    with pytest.raises(ValueError, match="support set has 6"):
        learner.adapt(key, learner.init(key), toys.blobs().sample(key, ()).support)
