"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each.

References:
  Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction, Science 2015
  (https://www.science.org/doi/10.1126/science.aab3050); data: https://github.com/brendenlake/omniglot, MIT licence.
  Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, ICML 2017 (https://arxiv.org/abs/1703.03400): the split of 1,200
  and 423 classes over all alphabets, of which their code keeps 100 of the 1,200 for validation.
"""

import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmeta.tasks.download import DAMAGE, cache_dir, download, open_npz, progress, read_keys, write_npz
from jmeta.tasks.images import (
    Images,
    Splits,
    from_arrays,
    open_tfds,
    read_picture,
    rotations,
    split_classes,
    take_classes,
)

BASE_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
ARCHIVES = {  # name: (bytes, sha256)
    "images_background.zip": (9_464_212, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    "images_evaluation.zip": (6_462_886, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
}
BACKGROUND, EVALUATION = 964, 659
DRAWINGS = 20
CUSTOMARY = (1100, 100, 423)


class Drawings(NamedTuple):
    """All drawings in the order of their source, one row each.

    Attributes:
      pixels: uint8 `[N, size, size]`, ink 255 on 0.
      alphabet: names `[N]`.
      character: int `[N]`, from 0 in each alphabet.
      background: bool `[N]`, whether the class is in the background set, else in the evaluation set.
    """

    pixels: np.ndarray
    alphabet: np.ndarray
    character: np.ndarray
    background: np.ndarray


def omniglot(
    source: str | os.PathLike | None = None,
    *,
    split: str = "customary",
    rotate: bool | None = None,
    size: int = 28,
    seed: int = 0,
    base_url: str = BASE_URL,
) -> Splits:
    """Loads Omniglot; ink is 255 on 0.

    Classes come by alphabet and character, and the drawings of a class in an order that depends on their pixels only,
    so the same seed gives the same arrays whatever the source.

    Args:
      source: None looks for `omniglot28.npz` (28 being the size) in `$JMETA_DATA_DIR`, then in the cache, and else
        downloads the two official archives (16 MB) and fills the cache. Or: a path to such a file; a folder prepared by
        tensorflow-datasets; a folder with `images_background` and `images_evaluation`, zipped or extracted.
      split: `"customary"`, 1,100 / 100 / 423 classes drawn from all alphabets by `seed`; or `"background"`, 964
        classes of 30 alphabets to train on and 659 of 20 others to test on, without validation classes.
      rotate: adds every training class turned by 90, 180 and 270 degrees as classes of their own; None means True,
        as is customary. Validation and test classes are never turned.
      size: height and width, by bilinear (antialiased) reduction of the 105 x 105 originals.
      seed: of the customary split.
      base_url: where the archives are, for a mirror.

    Returns:
      Splits of uint8 `[images, size, size, 1]`; names are like `"Greek/character03"`, turned ones `"...@90"`.

    Raises:
      ValueError: an argument or a source is not as above, or classes or drawings are missing.
      FileNotFoundError, ConnectionError: there is no such source, or it cannot be downloaded.
    """
    if split not in ("customary", "background"):
        raise ValueError(f"split: got {split!r}, expected 'customary' or 'background'")
    if size < 1:
        raise ValueError(f"size: got {size}, expected a positive number of pixels (105 is the original)")
    drawings = _automatic(size, base_url) if source is None else _load(Path(source), size)
    images, background = _arrange(drawings)
    if split == "background":
        train, valid = take_classes(images, np.flatnonzero(background)), None
        test = take_classes(images, np.flatnonzero(~background))
    else:
        train, valid, test = split_classes(images, CUSTOMARY, seed)
    return Splits(rotations(train) if rotate is None or rotate else train, valid, test)


def _automatic(size: int, base_url: str) -> Drawings:
    name = f"omniglot{size}.npz"
    given = os.environ.get("JMETA_DATA_DIR")
    if given and (Path(given) / name).is_file():
        return _from_npz(Path(given) / name, size)
    if given and not Path(given).is_dir():
        raise FileNotFoundError(
            f"JMETA_DATA_DIR: it names {given}, which is no folder. Mend the path, or unset it to download Omniglot."
        )
    cache = cache_dir() / name
    if cache.is_file():
        try:
            return _from_npz(cache, size)
        except ValueError as error:
            warnings.warn(f"the cached Omniglot is damaged and will be rebuilt: {error}", stacklevel=3)
    for archive, (length, sha256) in ARCHIVES.items():
        download(base_url.rstrip("/") + "/" + archive, cache_dir() / archive, size=length, sha256=sha256)
    drawings = _from_archives(cache_dir(), size)
    _to_npz(cache, drawings)
    return drawings


def _load(source: Path, size: int) -> Drawings:
    if not source.exists():
        raise FileNotFoundError(f"source: nothing at {source}")
    if source.is_file():
        return _from_npz(source, size)
    if (source / "omniglot").is_dir():
        return _from_tfds(source, size)
    return _from_archives(source, size)


def _from_npz(path: Path, size: int) -> Drawings:
    keys = ("images", "alphabet_id", "char_in_alphabet", "split", "alphabet_names")
    with open_npz(path) as file:
        pixels, alphabet, character, split, names = read_keys(file, path, keys)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size):
        raise ValueError(
            f"{path}: images are {pixels.dtype} {pixels.shape}, expected uint8 [N, {size}, {size}] for size={size}; "
            "for another size pass the tensorflow-datasets folder or the official archives as source="
        )
    if not len(pixels) == len(alphabet) == len(character) == len(split) or alphabet.max() >= len(names):
        raise ValueError(f"{path}: arrays of different lengths; usual cause: not a file written by jmeta")
    return Drawings(pixels, names[alphabet], character.astype(int), split == 0)


def _to_npz(path: Path, drawings: Drawings) -> None:
    names, ids = np.unique(drawings.alphabet, return_inverse=True)
    split = np.where(drawings.background, 0, 1)
    _, classes = np.unique(np.stack([split, ids, drawings.character]), axis=1, return_inverse=True)
    write_npz(
        path,
        images=drawings.pixels,
        class_id=classes.astype(np.int16).ravel(),
        alphabet_id=ids.astype(np.uint8),
        char_in_alphabet=drawings.character.astype(np.int16),
        split=split.astype(np.uint8),
        alphabet_names=names,
    )


def _from_tfds(folder: Path, size: int) -> Drawings:
    parts = [open_tfds("omniglot", split, folder) for split in ("train", "test")]
    names = np.array(parts[0].dataset_info.features["alphabet"].names)
    examples = [(part[i], part is parts[0]) for part in parts for i in range(len(part))]
    pixels = _decode([example["image"] for example, _ in examples], size)
    alphabet = names[[int(example["alphabet"]) for example, _ in examples]]
    character = np.array([int(example["alphabet_char_id"]) for example, _ in examples])
    return Drawings(pixels, alphabet, character, np.array([background for _, background in examples]))


def _from_archives(folder: Path, size: int) -> Drawings:
    rows, files = [], []
    for background, name in ((True, "images_background"), (False, "images_evaluation")):
        for (alphabet, character, _), content in _pictures(folder, name):
            rows.append((alphabet, int(character.removeprefix("character")) - 1, background))
            files.append(content)
    alphabet, character, background = (np.array(column) for column in zip(*rows, strict=True))
    return Drawings(_decode(files, size), alphabet, character, background)


def _pictures(folder: Path, name: str) -> list[tuple[tuple[str, ...], bytes]]:
    """(alphabet, character, file name) and bytes of every drawing in `name`, extracted or zipped."""
    if (folder / name).is_dir():
        found = [(path.parts, path.read_bytes()) for path in (folder / name).rglob("character*/*.png")]
    elif (folder / f"{name}.zip").is_file():
        try:
            with zipfile.ZipFile(folder / f"{name}.zip") as file:
                members = [m for m in file.namelist() if m.endswith(".png") and not m.startswith("__MACOSX")]
                found = [(tuple(m.split("/")), file.read(m)) for m in members]
        except DAMAGE as error:
            raise ValueError(f"source: {folder / name}.zip is damaged ({error}); download it again") from error
    else:
        raise FileNotFoundError(
            f"source: {folder} holds neither {name}/ nor {name}.zip, nor omniglot/ as prepared by tensorflow-datasets"
        )
    drawings = [(parts[-3:], content) for parts, content in found if len(parts) > 2 and parts[-1][0] != "."]
    if not drawings or any(not parts[-2].removeprefix("character").isdecimal() for parts, _ in drawings):
        raise ValueError(f"source: {name} in {folder} is not laid out as {name}/ALPHABET/characterNN/*.png")
    return drawings


def _decode(files: Sequence[bytes], size: int) -> np.ndarray:
    with progress(f"decoding {len(files)} Omniglot drawings to {size} x {size}", len(files)) as advance:
        pixels = np.empty((len(files), size, size), np.uint8)
        for i, content in enumerate(files):
            pixels[i] = _shrink(read_picture(io.BytesIO(content), None, 1)[..., 0], size)
            advance(1)
    return pixels


def _shrink(paper: np.ndarray, size: int) -> np.ndarray:
    """Ink 255 on 0 from dark ink on light paper, whose paper is 1 or 255 according to who decoded it."""
    from PIL import Image

    light = np.where(paper == paper.max(), 255, 0).astype(np.uint8)
    return 255 - np.asarray(Image.fromarray(light).resize((size, size), Image.Resampling.BILINEAR))


def _arrange(drawings: Drawings) -> tuple[Images, np.ndarray]:
    """Groups drawings by class; returns also which classes are background ones."""
    # tensorflow-datasets keeps no drawer, so drawings are ordered by what every source has
    marks = [zlib.crc32(pixels.tobytes()) for pixels in drawings.pixels]
    names = [f"{a}/character{c + 1:02d}" for a, c in zip(drawings.alphabet, drawings.character, strict=True)]
    order = np.argsort(marks, kind="stable")
    images = from_arrays(drawings.pixels[order], np.array(names)[order])
    background = dict(zip(names, drawings.background, strict=True))
    kinds = np.array([background[name] for name in images.names])
    if (kinds.sum(), (~kinds).sum()) != (BACKGROUND, EVALUATION) or not (images.count == DRAWINGS).all():
        raise ValueError(
            f"source: {kinds.sum()} background and {(~kinds).sum()} evaluation classes of {images.count.min()} to "
            f"{images.count.max()} drawings, expected {BACKGROUND} and {EVALUATION} of {DRAWINGS} (usual cause: an "
            "interrupted extraction or copy)"
        )
    return images, kinds
