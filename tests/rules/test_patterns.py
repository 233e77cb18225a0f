"""Patterns as text, grids, files and families."""

import itertools
import json

import jax
import numpy as np
import pytest

import jmeta as jm
from tests import toys

LAYERS = ("block1", "block2", "head")
TEXTS = {
    "full": ((1, 1, 1),),
    "head": ((0, 0, 1),),
    "body": ((1, 1, 0),),
    "suffix(2)*2, head": ((0, 1, 1), (0, 1, 1), (0, 0, 1)),
    "none, full": ((0, 0, 0), (1, 1, 1)),
    "block1+head": ((1, 0, 1),),
    "0.5:block2+head*3": ((0, 0.5, 1),) * 3,
}


@pytest.mark.parametrize("text, rows", TEXTS.items(), ids=list(TEXTS))
def test_text_and_numbers_give_the_same_pattern_and_text_comes_back(text, rows):
    found = jm.pattern(LAYERS, text)
    assert found == jm.pattern(LAYERS, rows) == jm.pattern(LAYERS, np.array(rows, float))
    assert str(found) == text
    assert hash(found) == hash(jm.pattern(LAYERS, rows))


def test_last_row_is_repeated_and_a_model_has_the_layers():
    assert jm.pattern(toys.net(), "full, head", steps=4).rows == ((1, 1, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1))
    assert jm.pattern(toys.net(), "full").layers == ("layer1", "layer2", "head")


def test_a_layer_that_is_called_head_and_is_not_the_last_is_meant_by_that_name():
    layers = ("head", "tail")
    assert jm.pattern(layers, "head").rows == ((1, 0),)
    assert [str(jm.pattern(layers, rows)) for rows in ([[1, 0]], [[0, 1]])] == ["head", "tail"]


def test_grid():
    lines = jm.pattern(LAYERS, "0.5:block2+head, full").grid().splitlines()
    assert [line.split() for line in lines] == [[*LAYERS], ["step", "1", ".", "0.5", "#"], ["step", "2", "#", "#", "#"]]
    assert len({len(line) for line in lines}) == 1


BAD = {
    "shape": (lambda: jm.pattern(LAYERS, [[1, 0]]), r"\[steps, 3\], a column for each of block1, block2, head, got shape \[1, 2\]"),
    "ragged": (lambda: jm.pattern(LAYERS, [[1, 0, 1], [1]]), "unequal length"),
    "one row bare": (lambda: jm.pattern(LAYERS, [1, 0, 1]), r"got shape \[3\]"),
    "empty": (lambda: jm.pattern(LAYERS, []), r"got shape \[0\]"),
    "infinite": (lambda: jm.pattern(LAYERS, [[1, 0, float("inf")]]), "finite"),
    "nothing": (lambda: jm.pattern(LAYERS, "none*3"), "updates nothing"),
    "unknown": (lambda: jm.pattern(LAYERS, "block7"), "'block7' is neither a layer nor full.*block1, block2, head"),
    "no number": (lambda: jm.pattern(LAYERS, "x:head"), "'x' in 'x:head' is no number"),
    "no step": (lambda: jm.pattern(LAYERS, "head,,head"), "is no step"),
    "no count": (lambda: jm.pattern(LAYERS, "head*0"), "is no step"),
    "too many rows": (lambda: jm.pattern(LAYERS, "head*3", steps=2), "3 rows for 2 steps"),
    "no layers": (lambda: jm.pattern(toys.quadratic(), "head"), "no layer names"),
    "no steps": (lambda: jm.patterns(LAYERS, 0), "steps must be at least 1"),
    "no names": (lambda: jm.patterns(toys.quadratic(), 2), "no layer names"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=list(BAD))
def test_bad_patterns_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_traced_pattern_is_refused_where_a_static_one_is_needed():
    with pytest.raises(TypeError, match="must be known before a program is traced"):
        jax.jit(lambda rows: jm.pattern(LAYERS, rows) and 0)(np.ones((2, 3)))
    with pytest.raises(TypeError, match="must be known before a program is traced"):
        jax.jit(lambda one: jm.pattern(LAYERS, [[one, 0, 1]]) and 0)(1.0)


def test_patterns_are_all_rows_and_all_suffixes_that_never_grow():
    found = jm.patterns(LAYERS, 2)
    rows = {each.rows for each in found}
    assert len(rows) == len(found)
    assert str(found[0]) == "full*2"
    constant = {(row, row) for row in itertools.product((0, 1), repeat=3) if any(row)}
    suffix = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
    falling = {(suffix[a], suffix[b]) for a, b in itertools.product(range(4), repeat=2) if a >= b and a}
    assert rows == constant | falling


@pytest.mark.parametrize("steps, fewest", [(10, 150), (30, 250), (200, 250)])
def test_of_many_patterns_those_that_change_once_remain(steps, fewest):
    found = jm.patterns([f"block{number}" for number in range(1, 5)] + ["head"], steps)
    assert all(len(set(each.rows)) <= 2 and len(each.rows) == steps for each in found)
    assert fewest < len(found) <= 300
    assert {f"head*{steps}", f"suffix(2), head*{steps - 1}"} <= {str(each) for each in found}


def test_files(tmp_path):
    given = jm.pattern(LAYERS, "0.5:block2+head, full")
    path = jm.save_pattern(tmp_path / "pattern.json", given)
    assert jm.load_pattern(path) == given
    with pytest.raises(FileExistsError):
        jm.save_pattern(path, given)
    for text in ("nonsense", "[]", json.dumps({"layers": ["a"]}), json.dumps({"best": 3})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="holds no pattern"):
            jm.load_pattern(tmp_path / "bad.json")
