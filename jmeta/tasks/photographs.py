"""Photographs in the shape of mini-ImageNet: 84 x 84 in colour, 64 classes to train on, 16 to choose with, 20 to test on.

References:
  Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, Matching Networks for One Shot Learning, NeurIPS 2016
  (https://arxiv.org/abs/1606.04080): mini-ImageNet. Ravi, Larochelle, Optimization as a Model for Few-Shot Learning, ICLR 2017:
  its division into 64, 16 and 20 classes.

Differs from the papers in: any classes of photographs are taken; where they are not divided already, the division is a seeded one.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmeta.tasks.images import Images, Splits, from_folder, from_npz, split_classes, take_classes

PARTS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}


def photographs(
    source: str | os.PathLike,
    *,
    size: int = 84,
    channels: int = 3,
    classes: Sequence[int] = (64, 16, 20),
    without: Sequence[str] = (),
    seed: int = 0,
) -> Splits:
    """Classes of photographs to train on, to choose with and to test on.

    Args:
      source: a folder with the folders train, val (or valid, validation) and test, in each a folder of pictures a class, as
        mini-ImageNet is handed around; or a folder of pictures a class, or an .npz file for `from_npz`, whose classes are then
        divided at random.
      size: height and width that pictures are resized to.
      channels: 3, or 1 for grey.
      classes: how many to train on, to choose with and to test on, where the source does not tell; others are left out.
      without: names of classes to leave out, such as the "Faces_easy" of Caltech-101, which repeat its "Faces".
      seed: of the division.

    Returns:
      `Splits` of uint8 `[N, size, size, channels]`; `valid` is None where the source has no folder for it.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: a class to leave out is not there, a class stands in two of the folders train, val and test, or there are fewer
        classes than asked for; see also `from_folder`, `from_npz`.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"source: nothing at {path}")
    if path.is_dir() and all((path / name).is_dir() for name in ("train", "test")):
        folders = {part: next((path / name for name in names if (path / name).is_dir()), None) for part, names in PARTS.items()}
        parts: Any = {part: folder and from_folder(folder, size, channels) for part, folder in folders.items()}
        _check_names(path, [name for part in parts.values() if part for name in part.names], without)
        return Splits(**{part: images and _left(images, without) for part, images in parts.items()})
    images = from_folder(path, size, channels) if path.is_dir() else _resized(from_npz(path), size, channels)
    _check_names(path, images.names, without)
    return Splits(*split_classes(_left(images, without), classes, seed))


def _check_names(path: Path, names: Sequence[str], without: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"source: class {twice[0]!r} stands in two of the folders of {path}, but few-shot tests are on classes that were not "
            "trained on. Usual cause: folders made for ordinary classification; give one folder with all classes."
        )
    missing = sorted(set(without) - set(names))
    if missing:
        raise ValueError(f"without: there is no class {missing[0]!r}; there are {', '.join(sorted(names))}.")


def _left(images: Images, without: Sequence[str]) -> Images:
    """Without the classes of those names."""
    kept = [number for number, name in enumerate(images.names) if name not in without]
    return images if len(kept) == len(images.names) else take_classes(images, kept)


def _resized(images: Images, size: int, channels: int) -> Images:
    """The images in another size or in grey, where they are not so already (bilinear, antialiased)."""
    if images.pixels.shape[1:] == (size, size, channels):
        return images
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    pictures = (Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels) for pixels in images.pixels)
    pixels = np.stack([np.asarray(each.convert(mode).resize((size, size), Image.Resampling.BILINEAR)) for each in pictures])
    return images._replace(pixels=pixels.reshape(len(pixels), size, size, channels))
