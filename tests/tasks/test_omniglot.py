import functools
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmeta.tasks import omniglot as module
from jmeta.tasks.download import extract_zip, write_npz
from jmeta.tasks.images import take_classes
from jmeta.tasks.omniglot import omniglot


def real(name):
    path = Path(os.environ.get("JMETA_DATA_DIR") or os.devnull) / name
    if not path.is_file():
        pytest.skip(f"needs {name} in $JMETA_DATA_DIR")
    return path


def drawing(number):
    """A 105 x 105 one-bit picture as in the archives, dark ink on light paper, that shows a number."""
    paper = np.ones((105, 105), bool)
    bits = [(number >> bit) & 1 for bit in range(15)]
    for bit, value in enumerate(bits):
        if value or bit == 14:
            paper[10 + 17 * (bit // 3) : 22 + 17 * (bit // 3), 10 + 30 * (bit % 3) : 30 + 30 * (bit % 3)] = False
    file = io.BytesIO()
    Image.fromarray(paper).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Both archives with all 1,623 classes of two drawings."""
    folder = tmp_path_factory.mktemp("archives")
    number = 0
    for name, classes, alphabets in (("images_background", 964, "BDA"), ("images_evaluation", 659, "EC")):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            for i in range(classes):
                character = f"{name}/{alphabets[i % len(alphabets)]}/character{i // len(alphabets) + 1:02d}"
                for drawer in (2, 1):
                    file.writestr(f"{character}/{i:04d}_{drawer:02d}.png", drawing(number))
                    number += 1
            file.writestr(f"__MACOSX/{name}/A/character01/._0001_01.png", b"")
    return folder


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch, tmp_path):
    monkeypatch.setenv("JMETA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "DRAWINGS", 2)


@pytest.fixture
def base_url(archives, monkeypatch):
    sums = {p.name: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in archives.glob("*.zip")}
    monkeypatch.setattr(module, "ARCHIVES", sums)
    monkeypatch.delenv("JMETA_DATA_DIR", raising=False)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(archives))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def assert_equal(one, other):
    for a, b in zip(filter(None, one), filter(None, other), strict=True):
        assert a.names == b.names
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_downloads_once_and_mends_a_damaged_cache(base_url, tmp_path, monkeypatch):
    first = omniglot(base_url=base_url)
    assert [len(part.names) for part in first if part] == [4400, 100, 423]
    assert_equal(first, omniglot(base_url="http://127.0.0.1:9/"))
    cache = tmp_path / "cache" / "omniglot28.npz"
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="damaged and will be rebuilt"):
        assert_equal(first, omniglot(base_url="http://127.0.0.1:9/"))
    assert cache.read_bytes() == whole
    monkeypatch.setenv("JMETA_DATA_DIR", str(cache.rename(tmp_path / "omniglot28.npz").parent))
    assert_equal(first, omniglot(base_url="http://127.0.0.1:9/"))


def test_sources_agree_and_splits_are_as_named(archives, tmp_path):
    zipped = omniglot(archives, split="background", rotate=False)
    for name in ("images_background", "images_evaluation"):
        extract_zip(archives / f"{name}.zip", tmp_path / name)
        (tmp_path / name / name).rename(tmp_path / "moved")
        (tmp_path / "moved").rename(tmp_path / name / "nested")
    assert zipped.valid is None and [len(zipped.train.names), len(zipped.test.names)] == [964, 659]
    assert zipped.train.names[:2] == ("A/character01", "A/character02") and zipped.test.names[0] == "C/character01"
    extracted = omniglot(tmp_path, split="background", rotate=False)
    assert_equal(zipped, extracted)
    turned = omniglot(archives, split="background", size=14)
    assert len(turned.train.names) == 4 * 964 and turned.train.names[-1].endswith("@270")
    assert turned.test.names == zipped.test.names and turned.test.pixels.shape == (1318, 14, 14, 1)
    write_npz(tmp_path / "few.npz", **part_of_a_file())
    with pytest.raises(ValueError, match="1 background and 0 evaluation classes of 3 to 3 drawings"):
        omniglot(tmp_path / "few.npz")


def part_of_a_file():
    ids = np.zeros(3, np.uint8)
    return {"images": np.zeros((3, 28, 28), np.uint8), "alphabet_id": ids, "char_in_alphabet": ids, "split": ids,
            "alphabet_names": np.array(["A"])}  # fmt: skip


def test_ink_is_high_whoever_decoded_it():
    paper = np.array(Image.open(io.BytesIO(drawing(5)))).astype(np.uint8)
    ink = module._shrink(paper, 28)
    np.testing.assert_array_equal(ink, module._shrink(paper * 255, 28))
    assert ink[0, 0] == 0 and ink.max() == 255 and 0.02 < (ink / 255).mean() < 0.2


def test_seed_picks_the_customary_split(archives):
    drawings = module._load(archives, 7)
    images, _ = module._arrange(drawings)
    splits = [module.split_classes(images, module.CUSTOMARY, seed) for seed in (0, 0, 1)]
    names = [set(part.names) for parts in splits for part in parts]
    assert names[:3] == names[3:6] and names[0] != names[6]
    assert not names[0] & names[1] | names[1] & names[2] | names[0] & names[2]


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="split: got 'lake'"):
        omniglot(tmp_path, split="lake")
    with pytest.raises(ValueError, match="size: got 0"):
        omniglot(tmp_path, size=0)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        omniglot(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds neither images_background/ nor"):
        omniglot(tmp_path)
    write_npz(tmp_path / "a.npz", **part_of_a_file())
    with pytest.raises(ValueError, match=r"\(3, 28, 28\), expected uint8 \[N, 20, 20\]"):
        omniglot(tmp_path / "a.npz", size=20)
    (tmp_path / "images_background").mkdir()
    with pytest.raises(ValueError, match="is not laid out as"):
        omniglot(tmp_path)


def test_real_omniglot(monkeypatch):
    monkeypatch.setattr(module, "DRAWINGS", 20)
    splits = omniglot(real("omniglot28.npz"), split="background", rotate=False)
    assert splits.train.pixels.shape == (19280, 28, 28, 1) and splits.test.pixels.shape == (13180, 28, 28, 1)
    for part in (splits.train, splits.test):
        assert 0.06 < (part.pixels / 255).mean() < 0.1
        assert np.median(part.pixels[:, 0, 0]) == 0 and part.pixels.max() == 255
    assert "Greek/character03" in splits.train.names and "Tengwar/character01" in splits.test.names


def test_tfds_folder_gives_the_same_arrays(monkeypatch, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(module, "DRAWINGS", 20)
    with tarfile.open(real("omniglot_tfds_arrayrecord_3.0.0.tgz")) as file:
        file.extractall(tmp_path, filter="data")
    prepared, packed = omniglot(tmp_path, rotate=False), omniglot(real("omniglot28.npz"), rotate=False)
    assert_equal(prepared, packed)
    assert "tensorflow" not in sys.modules
    assert len(take_classes(packed.train, [0]).pixels) == 20
