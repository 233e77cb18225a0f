import numpy as np
import pytest

from jmeta.tasks import glyphs as module
from jmeta.tasks.download import open_npz, write_npz
from jmeta.tasks.glyphs import glyphs

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="module")
def drawn(folder):
    return glyphs(cache=folder)


def characters(images):
    return [name.split(" ", 1)[1] for name in images.names]


def test_sizes(drawn):
    classes = np.array([len(part.names) for part in drawn])
    assert classes.sum() >= 700
    np.testing.assert_allclose(classes / classes.sum(), (0.64, 0.12, 0.24), atol=0.01)
    for part in drawn:
        assert part.pixels.shape == (20 * len(part.names), 28, 28, 1) and (part.count == 20).all()
    name = drawn.test.names[0]
    assert name == f"U+{ord(name[-1]):04X} {name[-1]}"


def test_every_drawing_has_ink_and_none_is_cut(drawn):
    for part in drawn:
        ink = part.pixels[..., 0]
        assert (ink / 255).mean((1, 2)).min() > 0.015
        assert ink[:, [0, -1]].max() == 0 and ink[:, :, [0, -1]].max() == 0


def test_drawings_of_a_class_differ(drawn):
    flat = drawn.test.pixels.reshape(-1, 20, 784)
    assert all(len(np.unique(drawings, axis=0)) == 20 for drawings in flat)


def test_look_alikes_are_one_class(drawn):
    every = {char for part in drawn for char in characters(part)}
    for alike in ("AΑАᎪ", "cCсϹ", "oOоΟօ", "xX×хΧ", "1Ilӏ", "pрρ", "HНΗ"):
        assert len(every & set(alike)) == 1, alike
    assert not every & set("éèêＡ𝐀ﬁªﻼب")  # decomposed, or differing by dots only
    assert {"a", "A", "Ж", "7", "ש"} <= every


def test_forms_of_a_letter_share_a_split(drawn):
    bases = [{module._base(char) for char in characters(part)} for part in drawn]
    assert not (bases[0] & bases[1] or bases[0] & bases[2] or bases[1] & bases[2])
    assert module._base("ø") == module._base("O") == "LATIN O" != module._base("ɔ")


def test_unseen_characters_look_like_no_seen_one(drawn):
    def means(part):
        flat = part.pixels.reshape(len(part.names), 20, -1).mean(1)
        flat = flat - flat.mean(1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    between = means(drawn.test) @ np.concatenate([means(drawn.train), means(drawn.valid)]).T
    assert np.quantile(between.max(1), 0.9) < 0.95 and between.max() < 0.99


def test_classes_can_be_told_apart(drawn):
    # nearest neighbour in pixels, 5-way 1-shot; Omniglot's evaluation classes give 0.45
    pixels = drawn.test.pixels.reshape(-1, 20, 784) / 255
    rng, hits = np.random.default_rng(0), []
    for _ in range(200):
        shots = pixels[rng.choice(len(pixels), 5, replace=False)][:, rng.permutation(20)[:6]]
        distance = ((shots[:, 1:, None] - shots[None, None, :, 0]) ** 2).sum(-1)
        hits.append((distance.argmin(-1) == np.arange(5)[:, None]).mean())
    assert 0.75 < np.mean(hits) < 0.95


def test_drawing_again_gives_the_same(drawn, folder):
    pixels, names, parts = module._build(28, 0)
    with open_npz(folder / "glyphs-1-28-0.npz") as file:
        np.testing.assert_array_equal(file["pixels"], pixels)
        assert file["names"].tolist() == names.tolist() and file["parts"].tolist() == parts.tolist()


@pytest.mark.parametrize("damage", ["cut", "shape", "content", "keys"])
def test_damaged_cache_is_drawn_again(drawn, folder, tmp_path, monkeypatch, damage):
    source = folder / "glyphs-1-28-0.npz"
    with open_npz(source) as file:
        arrays = {key: file[key] for key in file}
    changed = {"shape": {"pixels": arrays["pixels"][:5]}, "content": {"names": arrays["names"][::-1]}}
    path = tmp_path / source.name
    if damage == "cut":
        path.write_bytes(source.read_bytes()[:-1000])
    else:
        write_npz(path, **{} if damage == "keys" else arrays | changed[damage])
    calls = []
    monkeypatch.setattr(module, "_build", lambda *args: calls.append(args) or [arrays[k] for k in ("pixels", "names", "parts")])
    with pytest.warns(UserWarning, match="cached glyphs are damaged"):
        again = glyphs(cache=tmp_path)
    np.testing.assert_array_equal(again.test.pixels, drawn.test.pixels)
    assert glyphs(cache=tmp_path).test.names == drawn.test.names and calls == [(28, 0)]


def test_groups_are_dealt_by_seed():
    groups = np.repeat(np.arange(80), [120] + [1, 2, 3] * 26 + [4])
    deals = [module._deal(groups, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert (deals[0] == deals[1]).all() and (deals[0] != deals[2]).any()
    for parts in deals:
        assert all(len(set(parts[groups == group])) == 1 for group in range(80))
        assert (parts[groups == 0] == 0).all()
        np.testing.assert_allclose(np.bincount(parts) / len(parts), (0.64, 0.12, 0.24), atol=0.01)


def test_refuses_tiny_sizes():
    with pytest.raises(ValueError, match="size: got 4"):
        glyphs(size=4)
