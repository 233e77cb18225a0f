"""Photographs: divided at random, or as their folders are."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

import jmeta as jm


@pytest.fixture
def npz(tmp_path, rng):
    """Ten classes of two pictures whose red is the class's number."""
    pixels = rng.integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
    pixels[..., 0] = np.repeat(np.arange(10), 2)[:, None, None]
    names = [f"class{number}" for number in range(10)]
    np.savez(tmp_path / "all.npz", images=pixels, labels=np.repeat(np.arange(10), 2), class_names=names)
    return tmp_path / "all.npz"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_classes_of_a_file_are_divided_by_the_seed(npz):
    splits: Any = jm.photographs(npz, size=12, classes=(4, 2, 3), without=["class7"], seed=1)
    names = [part.names for part in splits]
    assert [len(each) for each in names] == [4, 2, 3] and len(set(sum(names, ()))) == 9 and "class7" not in sum(names, ())
    for part in splits:
        assert [f"class{number}" for number in part.pixels[part.start, 0, 0, 0]] == list(part.names)
    for seed in (1, 2):
        again: Any = jm.photographs(npz, size=12, classes=(4, 2, 3), without=["class7"], seed=seed)
        assert (names == [part.names for part in again]) == (seed == 1)


def test_pictures_of_a_file_are_resized_and_made_grey_as_those_of_a_folder_are(npz, tmp_path):
    images = jm.from_npz(npz)
    for number, (pixels, row) in enumerate(zip(images.pixels, np.repeat(np.arange(10), 2), strict=True)):
        folder = tmp_path / "folders" / images.names[row]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for size, channels in ((6, 3), (6, 1), (12, 1)):
        wanted: Any = jm.photographs(tmp_path / "folders", size=size, channels=channels, classes=(5, 2, 3))
        found: Any = jm.photographs(npz, size=size, channels=channels, classes=(5, 2, 3))
        for own, other in zip(found, wanted, strict=True):
            assert own.pixels.shape[1:] == (size, size, channels) and own.names == other.names
            np.testing.assert_array_equal(own.pixels, other.pixels)


@pytest.mark.parametrize("valid", ["val", "valid", None])
def test_folders_that_are_divided_already_are_taken_so(tmp_path, valid):
    for number, part in enumerate(filter(None, ("train", valid, "test"))):
        for name in ("a", "b"):
            (tmp_path / part / f"{part}-{name}").mkdir(parents=True)
            Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / part / f"{part}-{name}" / "0.png")
    splits = jm.photographs(tmp_path, size=8, without=["test-b"])
    assert splits.train.names == ("train-a", "train-b") and splits.test.names == ("test-a",)
    assert (splits.valid and splits.valid.names) == (valid and (f"{valid}-a", f"{valid}-b"))
    assert splits.train.pixels.shape == (2, 8, 8, 3)


def test_one_class_cannot_stand_in_two_parts(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (9, 7)).save(tmp_path / part / "cat" / "0.png")
    with pytest.raises(ValueError, match="source: class 'cat' stands in two of the folders"):
        jm.photographs(tmp_path, size=8)


def test_what_is_not_there_is_told(npz, tmp_path):
    with pytest.raises(FileNotFoundError, match="source: nothing at"):
        jm.photographs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without: there is no class 'class11'; there are class0, class1"):
        jm.photographs(npz, size=12, without=["class11"])
    with pytest.raises(ValueError, match=r"sizes: got \(64, 16, 20\) \(sum 100\) for 10 classes"):
        jm.photographs(npz, size=12)
