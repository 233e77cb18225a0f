"""Architectures: what alphas weigh, and genotypes in files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta as jm
from jmeta.architecture import PRIMITIVES, check_genotype, from_named, init_alpha, mixture, named, pairs_of, weighed


def test_a_mixture_by_hand(key):
    alpha = jax.tree.map(lambda leaf: 1000 * leaf, init_alpha(key, 3))
    mixed = mixture(alpha, 0.5, 0.1)
    for kind in ("normal", "reduce"):
        for node in range(3):
            ops, pairs = (np.asarray(alpha[kind][f"node{node}"][name]) for name in ("ops", "pairs"))
            weights = np.exp(ops / 0.5) / np.exp(ops / 0.5).sum(1, keepdims=True)
            of_pairs = np.exp(pairs / 0.5) / np.exp(pairs / 0.5).sum()
            inputs = np.zeros(node + 2)
            for weight, (u, v) in zip(of_pairs, pairs_of(node + 2), strict=True):
                inputs[u] += weight * (weight > 0.1)
                inputs[v] += weight * (weight > 0.1)
            np.testing.assert_allclose(mixed[kind][f"node{node}"]["ops"], np.where(weights > 0.1, weights, 0), atol=1e-6)
            np.testing.assert_allclose(mixed[kind][f"node{node}"]["inputs"], inputs, atol=1e-6)


def test_alphas_start_near_zero_and_have_the_papers_sizes(key):
    alpha = init_alpha(key, 3)
    sizes = {name: sum(node[name].size for kind in alpha.values() for node in kind.values()) for name in ("ops", "pairs")}
    assert sizes == {"ops": 126, "pairs": 20}
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(alpha)])
    assert 0.5e-3 < values.std() < 1.5e-3
    assert len(set(values)) == 146


def test_alphas_go_into_rows_of_a_log_and_come_back(key):
    several = [jax.tree.map(lambda leaf, times=times: times * leaf, init_alpha(key, 3)) for times in (1, 2)]
    rows = [named(alpha) for alpha in several]
    ops = several[1]["normal"]["node1"]["ops"]
    assert rows[1]["alpha/normal/node1/ops/2/conv_3x3"] == ops[2, PRIMITIVES.index("conv_3x3")] and len(rows[0]) == 146
    assert rows[1]["alpha/reduce/node2/pairs/5"] == several[1]["reduce"]["node2"]["pairs"][5]
    shuffled = [dict(sorted(row.items(), reverse=True)) for row in rows]
    jax.tree.map(lambda back, *own: np.testing.assert_array_equal(back, np.stack(own)), from_named(shuffled), *several)
    with pytest.raises(ValueError, match=r"the rows hold no alphas\. Usual cause: metrics of a run"):
        from_named([{"step": 1, "loss": 0.0}])


def test_a_genotype_takes_the_largest_logits(key):
    alpha = jax.tree.map(jnp.zeros_like, init_alpha(key, 2))
    alpha["normal"]["node1"]["ops"] = alpha["normal"]["node1"]["ops"].at[0, 4].set(1.0).at[2, 6].set(1.0)
    alpha["normal"]["node1"]["pairs"] = jnp.array([0.0, 1.0, 0.0])  # of (0, 1), (0, 2), (1, 2)
    found = jm.genotype(alpha)
    assert found.normal[1] == (("conv_3x3", 0), ("dil_conv_3x3", 2))
    assert found.reduce[0] == ((PRIMITIVES[0], 0), (PRIMITIVES[0], 1))


def test_alphas_of_another_space_have_no_genotype(key):
    alpha = init_alpha(key, 2)
    alpha["reduce"]["node1"]["ops"] = alpha["reduce"]["node1"]["ops"][:, :6]
    for other in (alpha, {"w": {}}):
        with pytest.raises(ValueError, match=r"genotype: the alphas must be those of cells of .*Usual cause: another search space"):
            jm.genotype(other)
    with pytest.raises(ValueError, match=r"derive: the genotype must be a jm.Genotype, got dict. .*jm.load_genotype reads one"):
        jm.derive(json.loads(json.dumps(jm.PUBLISHED["metanas-omniglot-v2"]._asdict())), 5)


@pytest.mark.parametrize("name", jm.PUBLISHED)
def test_published_genotypes_go_through_a_file(tmp_path, name):
    jm.save_genotype(tmp_path / "cells.json", jm.PUBLISHED[name])
    assert jm.load_genotype(tmp_path / "cells.json") == jm.PUBLISHED[name]
    with pytest.raises(FileExistsError):
        jm.save_genotype(tmp_path / "cells.json", jm.PUBLISHED[name])


GOOD = ((("conv_3x3", 0), ("skip_connect", 1)),)


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        (((("conv_9x9", 0), ("skip_connect", 1)),), "'conv_9x9' in normal node 0 is not one of max_pool_3x3"),
        (((("conv_3x3", 0), ("skip_connect", 2)),), "normal node 0 has input 2, but there are inputs 0 to 1.*node 0 is input 2"),
        (((("conv_3x3", 1), ("skip_connect", 1)),), r"normal node 0 must add up different inputs, at least one; got \[1, 1\]"),
        (((),), "must add up different inputs"),
        ((), "at least 1 node"),
        (((("conv_3x3", True), ("skip_connect", 0)),), "normal node 0 has input True"),
    ],
)
def test_impossible_genotypes_are_refused(tmp_path, normal, message):
    with pytest.raises(ValueError, match=message):
        check_genotype("derive", jm.Genotype(normal, GOOD))
    with pytest.raises(ValueError, match=message):
        jm.derive(jm.Genotype(normal, GOOD), 5)
    (tmp_path / "bad.json").write_text(json.dumps({"normal": normal, "reduce": GOOD}))
    with pytest.raises(ValueError, match=message):
        jm.load_genotype(tmp_path / "bad.json")


@pytest.mark.parametrize("normal", [(("conv_3x3", 0),), ((("conv_3x3", 0, 1), ("skip_connect", 1)),), ((1, 2),)])
def test_choices_are_pairs(normal):
    with pytest.raises(ValueError, match=r"derive: normal node 0 must hold \(operation, input\) pairs"):
        jm.derive(jm.Genotype(normal, GOOD), 5)


def test_what_an_operation_weighs_on_its_edge(key):
    alpha = init_alpha(key, 2)
    alpha["normal"]["node1"]["ops"] = jnp.zeros((3, 7)).at[1, 4].set(0.1 * np.log(6.0))
    alpha["normal"]["node1"]["pairs"] = jnp.array([1.0, 0.0, 0.0])
    found = weighed(alpha, 0.1)
    assert [(op, source) for op, source, _ in found["normal"][1]] == list(jm.genotype(alpha).normal[1])
    assert found["normal"][1][1][2] == pytest.approx(0.5)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"load_genotype: .*bad\.json is no text"):
        jm.load_genotype(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["Genotype(normal=[])", "[1, 2]", '{"normal": []}', '{"normal": 3, "reduce": []}'])
def test_files_that_hold_no_genotype_are_refused(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"load_genotype: .*bad\.json"):
        jm.load_genotype(tmp_path / "bad.json")
