"""SNAIL's blocks: causal, equal to their formulas, and the same for one more element as for the end of a longer sequence."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta as jm
from jmeta.models import snail as blocks


def _net(**options):
    sizes = {"features": 4, "most_shots": 2, "attention": ((4, 3), (5, 4)), "filters": 3}
    return jm.snail_net(jm.mlp(4, hidden=(8,), shape=(6,)), 3, **{**sizes, **options})


def _sequence(key, length=9, width=5):
    return jax.random.normal(key, (length, width))


def _blocks(key):
    dense, attention = blocks.init_dense(key, 5, 4), blocks.init_attention(key, 5, 3, 4)
    yield from (lambda x, mask=None, dilation=dilation: blocks.dense_block(dense, x, dilation, mask) for dilation in (1, 2, 4, 16))
    yield lambda x, mask=None: blocks.attention_block(attention, x, mask)


def test_no_output_depends_on_a_later_input(key):
    x = _sequence(key)
    for block in _blocks(key):
        before = block(x)
        for place in range(1, len(x)):
            after = block(x.at[place].add(1.0))
            np.testing.assert_array_equal(after[:place], before[:place])
            assert not np.array_equal(after[place], before[place])


def test_padding_in_front_changes_nothing(key):
    x = _sequence(key)
    longer = jnp.concatenate([jnp.full((4, 5), 7.0), x])
    mask = jnp.arange(13) >= 4
    for block in _blocks(key):
        np.testing.assert_allclose(block(longer, mask.astype(jnp.float32))[4:], block(x), atol=1e-5)


def test_a_dense_block_is_two_causal_convolutions(key):
    params, x = blocks.init_dense(key, 5, 4), _sequence(key)
    convolve = lambda own: (
        jax.lax.conv_general_dilated(
            x[None], own["kernel"], (1,), [(3, 0)], rhs_dilation=(3,), dimension_numbers=("NWC", "WIO", "NWC")
        )[0]
        + own["bias"]
    )
    expected = jnp.tanh(convolve(params["filter"])) * jax.nn.sigmoid(convolve(params["gate"]))
    np.testing.assert_allclose(blocks.dense_block(params, x, 3), jnp.concatenate([x, expected], -1), atol=1e-5)


def test_an_attention_block_by_hand(key):
    params, x = blocks.init_attention(key, 5, 3, 4), np.asarray(_sequence(key), np.float64)
    affine = lambda own: x @ np.asarray(own["kernel"]) + np.asarray(own["bias"])
    query, key, value = (affine(params[name]) for name in ("query", "key", "value"))
    for place, row in enumerate(blocks.attention_block(params, jnp.asarray(x, jnp.float32))):
        weights = np.exp([query[place] @ key[other] / np.sqrt(3) for other in range(place + 1)])
        np.testing.assert_allclose(row[5:], weights / weights.sum() @ value[: place + 1], atol=1e-5)


def test_the_blocks_equal_pytorchs():
    """Arrays of tests/references/make_torch_snail.py, in float64."""
    with jax.enable_x64(True), np.load(Path(__file__).parents[1] / "references" / "snail.npz") as stored:
        arrays = {name: jnp.asarray(stored[name]) for name in stored.files}
        weights = lambda block, names: {
            name: {part: arrays[f"{block}/{name}/{part}"] for part in ("kernel", "bias")} for name in names
        }
        dense, attention = weights("dense", ("filter", "gate")), weights("attention", ("query", "key", "value"))
        for dilation in (1, 2, 4, 16):
            np.testing.assert_allclose(blocks.dense_block(dense, arrays["x"], dilation), arrays[f"dense{dilation}"], rtol=1e-12)
        np.testing.assert_allclose(blocks.attention_block(attention, arrays["x"]), arrays["attention"], rtol=1e-12)


def test_dilations_reach_over_the_sequence():
    assert blocks.dilations(6) == [2, 4, 8] and blocks.dilations(6, 1) == [1, 2, 4] and blocks.dilations(26) == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("shots", [1, 2])
def test_queries_together_equal_each_at_the_end_of_its_own_sequence(key, shots):
    """The blocks over the whole sequence of examples and one query, against what `answer` makes of what was remembered."""
    net, length = _net(), 3 * shots
    params = net.init(key)
    x, queries = jax.random.normal(key, (length, 6)), jax.random.normal(jax.random.fold_in(key, 1), (4, 6))
    y = jnp.arange(length) % 3
    embed = lambda x: jm.mlp(4, hidden=(8,), shape=(6,)).apply(params["embedding"], x)
    answers = net.answer(params, net.remember(params, x, y, jnp.ones(length)), queries)
    for number, query in enumerate(queries):
        s = jnp.concatenate([embed(x), jax.nn.one_hot(y, 3)], -1)
        s = jnp.concatenate([s, jnp.concatenate([embed(query[None]), jnp.zeros((1, 3))], -1)])
        s = blocks.attention_block(params["attention1"], s)
        for place, dilation in enumerate(blocks.dilations(7)):
            s = blocks.dense_block(params["temporal1"][f"dense{place}"], s, dilation)
        s = blocks.attention_block(params["attention2"], s)
        np.testing.assert_allclose(answers[number], s[-1] @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5)
        alone = net.answer(params, net.remember(params, x, y, jnp.ones(length)), query[None])
        np.testing.assert_allclose(answers[number], alone[0], atol=1e-5)


def test_the_papers_widths(key):
    net = jm.snail_net(jm.conv4(64, pool=True), 5)
    shapes = jax.eval_shape(net.init, key)
    steps = 5  # ceil(log2(26))
    width = 64 + 5 + 32 + 128 * steps + 128 + 128 * steps + 256
    assert shapes["head"]["kernel"].shape == (width, 5) and net.most == 25
    assert shapes["temporal2"]["dense4"]["filter"]["kernel"].shape == (2, 64 + 5 + 32 + 128 * steps + 128 + 4 * 128, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": 0}, "snail_net: filters must be at least 1, got 0"),
        ({"attention": ()}, "snail_net: attention must name at least one pair"),
    ],
)
def test_what_cannot_be_is_refused(key, options, message):
    with pytest.raises(ValueError, match=message):
        _net(**options)
    net = _net(features=7)
    with pytest.raises(ValueError, match="snail_net: features is 7, but the embedding makes 4"):
        net.remember(net.init(key), jnp.zeros((3, 6)), jnp.arange(3), jnp.ones(3))
    chex.assert_tree_all_finite(net.init(key))
