import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmeta.tasks.images import (
    from_arrays,
    from_folder,
    from_npz,
    from_tfds,
    invert,
    read_picture,
    rotations,
    split_classes,
    split_images,
    take_classes,
)

GREY = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
LABELS = np.array([2, 0, 2, 5, 0, 2])


def save(path: Path, value, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_from_arrays_groups_by_label():
    images = from_arrays(GREY, LABELS, ["a", "b", "c", "d", "e", "f"])
    assert images.pixels.shape == (6, 4, 4, 1) and images.pixels.dtype == np.uint8
    assert images.names == ("a", "c", "f")
    assert images.start.tolist() == [0, 2, 5] and images.count.tolist() == [2, 3, 1]
    np.testing.assert_array_equal(images.pixels[2:5, ..., 0], GREY[[0, 2, 5]])


def test_from_arrays_takes_floats_and_string_labels():
    images = from_arrays(np.array([[[0.0, 1.0]], [[0.5, 0.25]]], np.float32), ["zebra", "ant"])
    assert images.names == ("ant", "zebra")
    assert images.pixels[..., 0].tolist() == [[[128, 64]], [[0, 255]]]


@pytest.mark.parametrize(
    "images, labels, names, error, text",
    [
        (GREY[0], LABELS, None, ValueError, r"images: got shape \(4, 4\)"),
        (GREY, LABELS[:3], None, ValueError, "labels: got shape"),
        (GREY, LABELS * 0.5, None, TypeError, "labels: got dtype float64"),
        (GREY.astype(np.int64), LABELS, None, TypeError, "images: got dtype int64"),
        (GREY.astype(np.float32), LABELS, None, ValueError, "expected.*0, 1"),
        (GREY * np.nan, LABELS, None, ValueError, "nan"),
        (GREY, LABELS, ["a", "b", "c"], ValueError, "names: 3 names for labels from 0 to 5"),
    ],
)
def test_from_arrays_refuses(images, labels, names, error, text):
    with pytest.raises(error, match=text):
        from_arrays(images, labels, names)


def test_from_npz_finds_its_keys(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, images=GREY, class_id=LABELS, class_names=np.array(list("abcdef")))
    assert from_npz(path).names == ("a", "c", "f")
    np.savez(path, pictures=GREY, kinds=LABELS)
    with pytest.raises(ValueError, match="no images: 'images'; it holds kinds, pictures"):
        from_npz(path)
    assert from_npz(path, "pictures", "kinds").names == ("0", "2", "5")


def test_from_npz_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at"):
        from_npz(tmp_path / "none.npz")
    path = tmp_path / "data.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 255, (6, 40, 40), np.uint8), labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"not a whole .npz"):
        from_npz(path)
    path.write_bytes(whole[:2000] + b"\0" * 50 + whole[2050:])
    with pytest.raises(ValueError, match="cannot read 'images'"):
        from_npz(path)
    np.save(tmp_path / "one.npy", GREY)
    with pytest.raises(ValueError, match=r"single array in .npy"):
        from_npz(tmp_path / "one.npy")


def test_from_folder_orders_naturally_and_ignores_other_files(tmp_path):
    for name, value in {"c10/a.PNG": 10, "c2/x10.png": 4, "c2/x9.JPG": 3, "c2/.x.png": 9, ".git/x.png": 1}.items():
        save(tmp_path / name, value)
    (tmp_path / "c2" / "notes.txt").write_text("no picture")
    images = from_folder(tmp_path)
    assert images.names == ("c2", "c10") and images.count.tolist() == [2, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [3, 4, 10]
    save(tmp_path / "c10" / "b.png", (255, 0, 0), mode="RGB")
    assert from_folder(tmp_path).pixels.shape == (4, 4, 4, 3)
    assert from_folder(tmp_path, size=2, channels=1).pixels.shape == (4, 2, 2, 1)


def test_from_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        from_folder(tmp_path / "none")
    save(tmp_path / "flat.png", 1)
    with pytest.raises(NotADirectoryError, match="is a file"):
        from_folder(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="no class folders"):
        from_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a holds no pictures"):
        from_folder(tmp_path)
    save(tmp_path / "a" / "1.png", 1)
    save(tmp_path / "a" / "2.png", 1, size=(5, 4))
    with pytest.raises(ValueError, match=r"1.png is \(4, 4\).*2.png is \(4, 5\); .*pass size="):
        from_folder(tmp_path)
    (tmp_path / "a" / "2.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"2.png: not a readable picture"):
        from_folder(tmp_path)
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"2.png: not a readable picture"):
        from_folder(tmp_path)


def test_read_picture_keeps_what_is_seen(tmp_path):
    Image.new("LA", (3, 3), (0, 0)).save(tmp_path / "transparent.png")
    assert read_picture(tmp_path / "transparent.png", None, 1).min() == 255
    Image.fromarray(np.full((3, 3), 1 << 15, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png", None, 3).tolist() == [[[128] * 3] * 3] * 3
    sideways = Image.new("L", (2, 1))
    sideways.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    save(tmp_path / "class" / "upright.png", 7, size=(1, 2))
    sideways.save(tmp_path / "class" / "turned.png", exif=exif)
    assert from_folder(tmp_path).pixels[..., 0].tolist() == [[[255], [0]], [[7], [7]]]
    paper = io.BytesIO()
    Image.new("1", (4, 4), 1).save(paper, "PNG")
    assert read_picture(paper, 2, 1).tolist() == [[[255]] * 2] * 2
    with pytest.raises(ValueError, match="channels: got 4"):
        read_picture(paper, 2, 4)


def test_rotations_turn_every_class():
    images = take_classes(from_arrays(GREY, LABELS), [1, 0])
    turned = rotations(images)
    assert turned.names[:4] == ("2", "0", "2@90", "0@90") and len(turned.names) == 8
    for name, turns in (("0", 0), ("0@90", 1), ("0@180", 2), ("0@270", 3)):
        one = take_classes(turned, [turned.names.index(name)])
        np.testing.assert_array_equal(one.pixels[..., 0], [np.rot90(GREY[i], turns) for i in (1, 4)])
    with pytest.raises(ValueError, match="square"):
        rotations(from_arrays(GREY[:, :3], LABELS))


def test_split_classes_is_disjoint_and_seeded():
    images = from_arrays(np.arange(40, dtype=np.uint8).reshape(20, 1, 2), np.repeat(np.arange(10), 2))
    parts = split_classes(images, (5, 3), seed=1)
    names = [name for part in parts for name in part.names]
    assert [len(part.names) for part in parts] == [5, 3] and len(set(names)) == 8
    assert names == [name for part in split_classes(images, (5, 3), seed=1) for name in part.names]
    assert names != [name for part in split_classes(images, (5, 3), seed=2) for name in part.names]
    for part in parts:
        for first, name in zip(part.start, part.names, strict=True):
            assert part.pixels[first, 0, 0, 0] == 4 * int(name)
    for sizes in ((8, 3), (0, 1), ()):
        with pytest.raises(ValueError, match="sizes: got"):
            split_classes(images, sizes, seed=1)


@pytest.mark.parametrize("ids, text", [([3], "from 0 to 2"), ([-1], "from 0 to 2"), ([], "ids"), ([1, 1], "twice")])
def test_take_classes_refuses(ids, text):
    with pytest.raises(ValueError, match=text):
        take_classes(from_arrays(GREY, LABELS), ids)


def test_invert_is_its_own_inverse():
    images = from_arrays(GREY, LABELS)
    assert invert(images).pixels.max() == 255
    np.testing.assert_array_equal(invert(invert(images)).pixels, images.pixels)


def test_from_tfds_names_what_it_cannot_open(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(RuntimeError, match=r"cannot open 'no_such_data_set'.*DatasetNotFound.*tfds build"):
        from_tfds("no_such_data_set", data_dir=tmp_path)


def test_from_tfds_reads_a_prepared_folder(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    archive = Path(os.environ.get("JMETA_DATA_DIR") or tmp_path) / "omniglot_tfds_arrayrecord_3.0.0.tgz"
    if not archive.is_file():
        pytest.skip("needs omniglot_tfds_arrayrecord_3.0.0.tgz in $JMETA_DATA_DIR")
    import tarfile

    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    images = from_tfds("omniglot", split="test[:60]", data_dir=tmp_path, size=20)
    assert images.pixels.shape == (60, 20, 20, 3) and images.count.sum() == 60
    assert images.names[0].rsplit("_", 1)[1].isdigit()
    assert images.pixels.mean() > 200  # dark ink on light paper
    assert "tensorflow" not in sys.modules


def test_split_images_leaves_every_class_disjoint_images_in_each_part():
    images = from_arrays(np.arange(11, dtype=np.uint8).reshape(11, 1, 1), [0] * 5 + [1] * 6)
    parts = split_images(images, [3, 2], seed=1)
    for label, own in enumerate((range(5), range(5, 11))):
        seen = [part.pixels[part.start[label] : part.start[label] + part.count[label]].ravel().tolist() for part in parts]
        assert [len(each) for each in seen] == [3, 2] and len({*seen[0], *seen[1]}) == 5 and {*seen[0], *seen[1]} <= set(own)
    assert parts[0].names == images.names
    np.testing.assert_array_equal(split_images(images, [3, 2], seed=1)[0].pixels, parts[0].pixels)
    with pytest.raises(ValueError, match="at most 5, the images of class '0'"):
        split_images(images, [3, 3], seed=0)
