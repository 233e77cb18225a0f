"""Labelled images on the host: one NumPy array grouped by class, whatever the source.

Loaders (`from_arrays`, `from_npz`, `from_folder`, `from_tfds`) all return `Images`; `rotations`, `take_classes`,
`split_classes` and `invert` map `Images` to `Images`. Nothing here touches the accelerator.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jmeta.tasks.download import open_npz, read_keys

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
LABEL_KEYS = ("labels", "class_id", "y")
NAME_KEYS = ("class_names", "names")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


class Images(NamedTuple):
    """Pictures grouped by class.

    Attributes:
      pixels: uint8 `[images, height, width, channels]`; the images of one class are neighbours.
      start: int32 `[classes]`, index of each class's first image.
      count: int32 `[classes]`, images of each class.
      names: one per class.
    """

    pixels: np.ndarray
    start: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    names: tuple[str, ...]

    def __repr__(self) -> str:
        """`Images(964 classes, 19,280 images of 28 x 28 x 1)`."""
        if not hasattr(self.pixels, "shape"):  # a tree of the same form
            return tuple.__repr__(self)
        count, *size = self.pixels.shape
        return f"Images({len(self.names):,} classes, {count:,} images of {' x '.join(map(str, size))})"


class Splits(NamedTuple):
    """Disjoint classes for meta-training, model selection and the reported score."""

    train: Images
    valid: Images | None
    test: Images


def from_arrays(images: Any, labels: Any, names: Sequence[str] | None = None) -> Images:
    """Groups an array of images by label.

    Args:
      images: `[N, H, W]` or `[N, H, W, C]`, uint8, or float in [0, 1].
      labels: `[N]`, integers or strings; classes come in the sorted order of the labels present.
      names: with integer labels, `names[label]` is what a class is called.

    Returns:
      Images of uint8 `[N, H, W, C]`.

    Raises:
      ValueError: shapes, value ranges, labels or names do not fit together.
      TypeError: a dtype other than those above.

    >>> images = from_arrays(np.zeros((4, 28, 28), np.uint8), ["cat", "dog", "cat", "cat"])
    >>> images.names, images.start.tolist(), images.count.tolist()
    (('cat', 'dog'), [0, 3], [3, 1])
    """
    pixels, labels = np.asarray(images), np.asarray(labels)
    if pixels.ndim not in (3, 4) or 0 in pixels.shape:
        raise ValueError(f"images: got shape {pixels.shape}, expected a non-empty [N, H, W] or [N, H, W, C]")
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.shape[2] == pixels.shape[3] > 4:
        raise ValueError(
            f"images: got shape {pixels.shape}, expected channels last, [N, H, W, C] (usual cause: arrays made for PyTorch; give "
            "images.transpose(0, 2, 3, 1))"
        )
    if labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"labels: got shape {labels.shape} for {len(pixels)} images, expected one label an image "
            "(usual cause: one-hot labels, or the labels of another split)"
        )
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        labels = labels.astype(str)
    if labels.dtype.kind not in "iuU":
        raise TypeError(f"labels: got dtype {labels.dtype}, expected integers or strings (usual cause: labels read as floats)")
    values, ids = np.unique(labels, return_inverse=True)
    called = _names(values, names)
    pixels = _bytes(pixels)
    return _group(pixels[..., None] if pixels.ndim == 3 else pixels, ids, called)


def from_npz(path: str | os.PathLike, images: str = "images", labels: str | None = None) -> Images:
    """Reads images and labels from an `.npz` file.

    Args:
      path: the file.
      images: key of the images; as for `from_arrays`.
      labels: key of the labels; None tries `labels`, `class_id`, `y`.

    Returns:
      Images, whose names come from `class_names` or `names` where the file has such a key.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or lacks a key (the message lists those it has).
    """
    wanted = [labels] if labels else list(LABEL_KEYS)
    with open_npz(path) as file:
        found = next((key for key in wanted if key in file), None)
        if images not in file or found is None:
            missing = f"images: {images!r}" if images not in file else f"labels: {', '.join(wanted)}"
            raise ValueError(f"{path}: no {missing}; it holds {', '.join(sorted(file))}. Name them by images= and labels=")
        named = [key for key in NAME_KEYS if key in file][:1]
        pixels, ids, *names = read_keys(file, path, (images, found, *named))
    return from_arrays(pixels, ids, names[0].tolist() if names and ids.dtype.kind in "iu" else None)


def from_folder(path: str | os.PathLike, size: int | None = None, channels: int | None = None) -> Images:
    """Reads a folder that holds one folder of pictures a class.

    Hidden files and files that are not png, jpg, jpeg, bmp, gif or webp are passed over. Classes and files come in
    natural order (`a2` before `a10`). The headers of all pictures are checked before the first one is decoded.

    Args:
      path: the folder of class folders.
      size: height and width to resize to, ignoring proportions; None keeps pictures that are all of one size.
      channels: 1 for grey, 3 for colour; None means 1 where every picture is grey, else 3.

    Returns:
      Images of uint8 `[N, height, width, channels]`; a class is named like its folder.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` is no folder.
      ValueError: no classes, a class without pictures, an unreadable picture, or sizes that differ with `size=None`.
    """
    _check_shape(size, channels)
    files = _class_files(Path(path))
    paths = [file for folder in files.values() for file in folder]
    headers = [_header(file) for file in paths]
    if size is None:
        other = next((i for i, header in enumerate(headers) if header[0] != headers[0][0]), 0)
        if other:
            raise ValueError(
                f"size: {paths[0]} is {headers[0][0]} (height, width), {paths[other]} is {headers[other][0]}; "
                "where pictures differ pass size=, for example size=84"
            )
    if channels is None:
        channels = 1 if all(grey for _, grey in headers) else 3
    pixels = np.stack([read_picture(file, size, channels) for file in paths])
    ids = np.repeat(np.arange(len(files)), [len(folder) for folder in files.values()])
    return _group(pixels, ids, tuple(files))


def read_picture(path: str | os.PathLike | IO[bytes], size: int | None, channels: int) -> np.ndarray:
    """Decodes one picture.

    Transparent pictures are laid on white, the camera's orientation tag is obeyed, animations give their first frame.

    Args:
      path: a file name or an open binary file.
      size: height and width to resize to (bilinear, antialiased), or None for the picture's own.
      channels: 1 or 3.

    Returns:
      uint8 `[height, width, channels]`.

    Raises:
      ValueError: the file is not a readable picture.
    """
    from PIL import Image, ImageOps

    _check_shape(size, channels)
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    if picture.mode.startswith("I"):
        # 16 bits a pixel: PIL would clip at 255 and leave white
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(picture, np.uint8)
    return pixels[..., None] if channels == 1 else pixels


def from_tfds(name: str, split: str = "train", data_dir: str | os.PathLike | None = None, size: int | None = None) -> Images:
    """Reads any tensorflow-datasets data set with features `image` and `label`, without TensorFlow.

    Args:
      name: as for `tfds.data_source`, e.g. `"mnist"` or `"omniglot:3.0.0"`.
      split: `"train"`, `"test[:10%]"`, ...
      data_dir: where it is, or will be, prepared (array_record format); None is tfds's own default.
      size: height and width to resize to; needed where the data set's images differ in size.

    Returns:
      Images of the classes that the split has.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      RuntimeError: it can be neither found nor prepared (many data sets need TensorFlow or a network to be prepared).
      ValueError: no `image` and `label` features, or images that differ in size with `size=None`.
    """
    source = open_tfds(name, split, data_dir)
    features = source.dataset_info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"name: {name} has features {', '.join(sorted(features))}; expected 'image' and 'label'")
    shape = features["image"].shape
    if size is None and None in shape[:2]:
        raise ValueError(f"size: the images of {name} have no fixed size ({shape}); pass size=, for example size=84")
    height, width = (size, size) if size else shape[:2]
    channels = 1 if shape[-1] == 1 else 3
    pixels = np.empty((len(source), height, width, channels), np.uint8)
    labels = np.empty(len(source), np.int64)
    for i in range(len(source)):
        example = source[i]
        pixels[i], labels[i] = read_picture(io.BytesIO(example["image"]), size, channels), example["label"]
    return from_arrays(pixels, labels, getattr(features["label"], "names", None))


def open_tfds(name: str, split: str, data_dir: str | os.PathLike | None) -> Any:
    """Opens (and, where it can, downloads and prepares) a data source whose images stay encoded bytes."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "from_tfds needs tensorflow-datasets and array_record (TensorFlow itself is not needed): "
            "pip install tensorflow-datasets array_record"
        ) from error
    try:
        # Encoded bytes: tfds decodes by OpenCV or Pillow, whichever is there, and they disagree on 1-bit images.
        return tfds.data_source(name, split=split, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:  # its own kinds, and network, import and file errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RuntimeError(
            f"name: tfds cannot open {name!r}, split {split!r}, data_dir {data_dir} ({reason}). Usual "
            "causes: a wrong name or split; files prepared as tfrecord; a preparation that needs TensorFlow. "
            f"Prepare it elsewhere with 'tfds build {name} --file_format=array_record' and pass data_dir="
        ) from error


def rotations(images: Images) -> Images:
    """Adds every class again turned by 90, 180 and 270 degrees (counter-clockwise) as classes of their own.

    Returns:
      Four times the classes: all of them upright, then all at 90, ...; names get `@90`, `@180`, `@270`.

    Raises:
      ValueError: images are not square.

    >>> rotations(from_arrays(np.zeros((2, 28, 28), np.uint8), ["A", "B"])).names
    ('A', 'B', 'A@90', 'B@90', 'A@180', 'B@180', 'A@270', 'B@270')
    """
    if images.pixels.shape[1] != images.pixels.shape[2]:
        raise ValueError(f"images: rotations need square images, got {images.pixels.shape[1:3]}; load them with size=")
    number = len(images.pixels)
    return Images(
        np.concatenate([np.rot90(images.pixels, turn, axes=(1, 2)) for turn in range(4)]),
        np.concatenate([images.start + turn * number for turn in range(4)]).astype(np.int32),
        np.tile(images.count, 4),
        images.names + tuple(f"{name}@{angle}" for angle in (90, 180, 270) for name in images.names),
    )


def take_classes(images: Images, ids: Sequence[int] | np.ndarray) -> Images:
    """Keeps the classes with the given indices, in the order given.

    Raises:
      ValueError: an index is out of range or comes twice, or there is none.
    """
    ids, classes = np.asarray(ids), len(images.names)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= classes:
        raise ValueError(f"ids: got {ids}, expected a list of class indices from 0 to {classes - 1}")
    if len(np.unique(ids)) != len(ids):
        raise ValueError(f"ids: a class comes twice in {ids}; two classes of one task would be the same")
    count = images.count[ids]
    rows = np.concatenate([np.arange(int(images.count[i])) + images.start[i] for i in ids])
    return Images(images.pixels[rows], _starts(count), count, tuple(images.names[i] for i in ids))


def split_classes(images: Images, sizes: Sequence[int], seed: int) -> list[Images]:
    """Divides the classes at random into disjoint groups.

    Args:
      images: what to divide.
      sizes: classes of each group; classes beyond their sum are left out.
      seed: of `np.random.default_rng`. Within a group, classes keep their order.

    Raises:
      ValueError: a size below 1, or more classes asked for than there are.
    """
    classes = len(images.names)
    if not sizes or min(sizes) < 1 or sum(sizes) > classes:
        raise ValueError(
            f"sizes: got {tuple(sizes)} (sum {sum(sizes)}) for {classes} classes, expected sizes of at "
            "least 1 whose sum is at most the number of classes"
        )
    order = np.random.default_rng(seed).permutation(classes)
    parts = np.split(order, np.cumsum(sizes))[: len(sizes)]
    return [take_classes(images, np.sort(part)) for part in parts]


def split_images(images: Images, sizes: Sequence[int], seed: int) -> list[Images]:
    """Divides the images of every class at random into disjoint groups, so that all groups have all classes.

    Args:
      images: what to divide.
      sizes: images of a class in each group; those beyond their sum are left out.
      seed: of `np.random.default_rng`. Within a group, images keep their order.

    Raises:
      ValueError: a size below 1, or more images asked for than the smallest class has.

    >>> drawn = from_arrays(np.zeros((40, 28, 28), np.uint8), np.arange(40) // 20)
    >>> [part.count.tolist() for part in split_images(drawn, [15, 5], seed=0)]
    [[15, 15], [5, 5]]
    """
    fewest = int(np.argmin(images.count))
    if not sizes or min(sizes) < 1 or sum(sizes) > images.count[fewest]:
        raise ValueError(
            f"sizes: got {tuple(sizes)} (sum {sum(sizes)}), expected sizes of at least 1 whose sum is at most "
            f"{images.count[fewest]}, the images of class {images.names[fewest]!r}"
        )
    rng = np.random.default_rng(seed)
    each = zip(images.start, images.count, strict=True)
    chosen = np.stack([start + rng.permutation(count)[: sum(sizes)] for start, count in each])
    parts = (np.sort(part, 1) for part in np.split(chosen, np.cumsum(sizes)[:-1], 1))
    counts = [np.full(len(images.names), size, np.int32) for size in sizes]
    pairs = zip(parts, counts, strict=True)
    return [Images(images.pixels[part.ravel()], _starts(count), count, images.names) for part, count in pairs]


def invert(images: Images) -> Images:
    """Swaps dark and light: for dark ink on light paper, so that ink is high as in `omniglot` and `glyphs`."""
    return images._replace(pixels=255 - images.pixels)


def _group(pixels: np.ndarray, ids: np.ndarray, names: tuple[str, ...]) -> Images:
    count = np.bincount(ids, minlength=len(names)).astype(np.int32)
    return Images(np.ascontiguousarray(pixels[np.argsort(ids, kind="stable")]), _starts(count), count, names)


def _starts(count: np.ndarray) -> np.ndarray:
    return (np.cumsum(count) - count).astype(np.int32)


def _bytes(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise TypeError(
            f"images: got dtype {pixels.dtype}, expected uint8 or float in [0, 1]; for integers in 0..255 use .astype('uint8')"
        )
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images: floats from {low} to {high}, expected [0, 1] (usual causes: 0..255 kept as "
            "float, or images already standardised by mean and deviation)"
        )
    return np.rint(pixels * 255).astype(np.uint8)


def _names(values: np.ndarray, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(str(value) for value in values)
    if values.dtype.kind == "U":
        raise ValueError("names: string labels are already the names; leave names=None")
    if values.min() < 0 or values.max() >= len(names):
        raise ValueError(
            f"names: {len(names)} names for labels from {values.min()} to {values.max()}; expected "
            "names[label] for every label (usual cause: labels that count from 1)"
        )
    return tuple(str(names[value]) for value in values)


def _check_shape(size: int | None, channels: int | None) -> None:
    if size is not None and (not isinstance(size, int | np.integer) or size < 1):
        raise ValueError(f"size: got {size!r}, expected a positive integer (height and width), or None")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: got {channels!r}, expected 1 (grey) or 3 (colour)")


def _natural(path: Path) -> tuple:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.casefold())], path.name


def _class_files(path: Path) -> dict[str, list[Path]]:
    if not path.exists():
        raise FileNotFoundError(f"path: no folder at {path}")
    if not path.is_dir():
        raise NotADirectoryError(f"path: {path} is a file, expected a folder with one folder of pictures a class")
    folders = sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural)
    if not folders:
        raise ValueError(
            f"path: {path} holds no class folders, expected CLASS/picture.png in it (usual cause: the pictures lie directly in it)"
        )
    files = {folder.name: sorted((p for p in folder.iterdir() if is_picture(p)), key=_natural) for folder in folders}
    for name, pictures in files.items():
        if not pictures:
            raise ValueError(
                f"path: class folder {path / name} holds no pictures ({' '.join(SUFFIXES)}); "
                "usual cause: a folder one level too high, such as one that holds train/ and test/"
            )
    return files


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name; hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _header(path: Path) -> tuple[tuple[int, int], bool]:
    """Height and width as it will be decoded, and whether it is grey, without decoding it."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            # without the first test PIL decodes a PNG in search of a tag; orientations 5 to 8 swap the axes
            turned = "exif" in picture.info and picture.getexif().get(0x0112, 1) >= 5
            width, height = picture.size
            return (width, height) if turned else (height, width), picture.mode in GREY_MODES
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error}); remove it or replace it") from error
