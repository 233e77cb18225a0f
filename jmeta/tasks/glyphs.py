"""Glyphs: letters and digits of many scripts drawn from the fonts that matplotlib ships; needs no download.

A class is a character, its 20 drawings are the font files that have it times small random affine changes. Whole groups
of characters go to one split, so that a test character is unseen for real: cases and other forms of one letter (by
Unicode name) and look-alikes (by rendering) share a group, and of characters that are hardly told apart one is kept.

Left out are letters that Unicode decomposes (accents, ligatures, presentation and mathematical forms), marks smaller
than half a letter, and letters that differ from others of their script by dots or by a number of strokes only: Arabic
letters, the w and long vowel forms of Canadian syllabics, Ogham.

References:
  The DejaVu fonts, https://dejavu-fonts.github.io; the STIX fonts, https://www.stixfonts.org; names, categories and
  decompositions: Unicode Character Database, as in Python's `unicodedata`.
"""

import hashlib
import os
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmeta.tasks.download import cache_dir, open_npz, progress, read_keys, write_npz
from jmeta.tasks.images import Splits, from_arrays, take_classes

VERSION = 1  # of the cached file: raise it when the drawings change
DRAWINGS = 20
VALID, TEST = 0.12, 0.24  # shares of the classes
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
REFERENCES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
EM = 64  # font size in pixels, before reduction
SMALLEST = 0.44  # of EM: smaller marks would be blown up to letter size
SAME = 0.94  # correlation from which two characters count as one
SKIPPED = r"ARABIC LETTER|OGHAM|CANADIAN SYLLABICS .*(W|AA|EE|II|OO|UU)\S*$"
FORMS = {"CAPITAL", "SMALL", "LETTER", "FINAL", "DIGRAPH", "LIGATURE"}


def glyphs(*, size: int = 28, seed: int = 0, cache: str | os.PathLike | None = None) -> Splits:
    """Loads the glyphs, and draws them at the first call (some seconds); ink is 255 on 0.

    Args:
      size: height and width.
      seed: of the affine changes and of the split.
      cache: folder of the drawn file `glyphs-<version>-<size>-<seed>.npz`; None is `cache_dir()`.

    Returns:
      Splits of uint8 `[images, size, size, 1]` with 20 images a class, 64 / 12 / 24 % of the classes. Names are like
      `"U+0416 Ж"`.

    Raises:
      ValueError: `size` below 8.
      FileNotFoundError: matplotlib comes without its fonts.
    """
    if size < 8:
        raise ValueError(f"size: got {size}, expected at least 8 pixels (28 is customary)")
    folder = cache_dir() if cache is None else Path(cache)
    path = folder / f"glyphs-{VERSION}-{size}-{seed}.npz"
    if path.is_file():
        try:
            return _splits(*_read(path, size))
        except ValueError as error:
            warnings.warn(f"the cached glyphs are damaged and will be drawn again: {error}", stacklevel=2)
    pixels, names, parts = _build(size, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_npz(path, pixels=pixels, names=names, parts=parts, sha256=_digest(pixels, names, parts))
    return _splits(pixels, names, parts)


def _read(path: Path, size: int) -> list[np.ndarray]:
    with open_npz(path) as file:
        pixels, names, parts, digest = read_keys(file, path, ("pixels", "names", "parts", "sha256"))
    if pixels.shape != (len(names), DRAWINGS, size, size) or len(parts) != len(names):
        raise ValueError(f"{path}: pixels of shape {pixels.shape} for {len(names)} classes")
    if str(digest) != _digest(pixels, names, parts):
        raise ValueError(f"{path}: the checksum does not fit the content")
    return [pixels, names, parts]


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def _splits(pixels: np.ndarray, names: np.ndarray, parts: np.ndarray) -> Splits:
    labels = np.repeat(np.arange(len(names)), DRAWINGS)
    images = from_arrays(pixels.reshape(-1, *pixels.shape[2:]), labels, names.tolist())
    train, valid, test = (take_classes(images, np.flatnonzero(parts == part)) for part in range(3))
    return Splits(train, valid, test)


def _build(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels `[classes, 20, size, size]`, names `[classes]` and split `[classes]` (0, 1, 2) of all classes."""
    fonts, cover = _fonts()
    chars = _candidates(fonts, cover)
    likeness = _likeness(chars, fonts, cover)
    kept = _distinct(likeness)
    groups = _groups(chars, likeness)[kept]
    rng = np.random.default_rng(seed)
    parts = _deal(groups, rng)
    pixels = np.empty((len(kept), DRAWINGS, size, size), np.uint8)
    with progress(f"drawing {len(kept)} glyphs {DRAWINGS} times, once", len(kept)) as advance:
        for row, i in enumerate(kept):
            files = [name for name in FONTS if chars[i] in cover[name]]
            for j in range(DRAWINGS):
                pixels[row, j] = _draw(_ink(fonts[files[j % len(files)]], chars[i]), size, rng)
            advance(1)
    return pixels, np.array([f"U+{ord(chars[i]):04X} {chars[i]}" for i in kept]), parts


def _fonts() -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Every font, and the characters it has."""
    import matplotlib
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = {name: folder / f"{name}.ttf" for name in FONTS}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"glyphs: no font at {missing[0]} (usual cause: a system package of matplotlib without its fonts; install "
            "matplotlib by pip)"
        )
    fonts, cover = {}, {}
    for name, path in paths.items():
        # the basic layout draws code points as they are, the same with and without the raqm library
        fonts[name] = ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)
        with TTFont(path, lazy=True) as file:
            cover[name] = {chr(code) for code, glyph in (file.getBestCmap() or {}).items() if glyph != ".notdef"}
    return fonts, cover


def _candidates(fonts: dict[str, Any], cover: dict[str, set[str]]) -> list[str]:
    """Letters and digits in a reference font and one more, by code point."""
    files = defaultdict(list)
    for name in (*REFERENCES, *FONTS):
        for char in cover[name]:
            files[char].append(name)
    return [
        char
        for char, names in sorted(files.items())
        if names[0] in REFERENCES
        and len(set(names)) > 1
        and unicodedata.category(char) in ("Lu", "Ll", "Lo", "Nd")
        and unicodedata.normalize("NFKD", char) == char
        and not re.match(SKIPPED, unicodedata.name(char, "ARABIC LETTER"))
        and max(_ink(fonts[names[0]], char).size) >= SMALLEST * EM
    ]


def _ink(font: Any, char: str) -> Any:
    """The glyph as a grey PIL image, cut to its ink; one black pixel where there is none."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(char)
    image = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(image).text((-left, -top), char, fill=255, font=font)
    return image.crop(image.getbbox() or (0, 0, 1, 1))


def _likeness(chars: Sequence[str], fonts: dict[str, Any], cover: dict[str, set[str]]) -> np.ndarray:
    """Largest correlation of any two characters over the reference fonts and two ways to align: `[chars, chars]`."""
    best = np.full((len(chars), len(chars)), -1.0, np.float32)
    for name in REFERENCES:
        rows = [i for i, char in enumerate(chars) if char in cover[name]]
        inks = [_ink(fonts[name], chars[i]) for i in rows]
        for align in (_by_box, _by_moments):
            flat = _blur(np.stack([align(ink) for ink in inks])).reshape(len(rows), -1)
            flat -= flat.mean(1, keepdims=True)
            flat /= np.linalg.norm(flat, axis=1, keepdims=True)
            best[np.ix_(rows, rows)] = np.maximum(best[np.ix_(rows, rows)], flat @ flat.T)
    return best


def _by_box(ink: Any) -> np.ndarray:
    """Aligned by the box of the ink, 20 pixels: finds shapes that are equal but for their size and place."""
    return _sample(ink, (ink.size[0] / 2, ink.size[1] / 2), max(ink.size) / 20)


def _by_moments(ink: Any) -> np.ndarray:
    """Aligned by centre and spread of the ink, 5.5 pixels, which a dot or a serif moves less than it moves the box."""
    mass = np.asarray(ink, np.float32)
    y, x = np.mgrid[: mass.shape[0], : mass.shape[1]] + 0.5
    total = mass.sum()
    centre = (mass * x).sum() / total, (mass * y).sum() / total
    spread = np.sqrt((mass * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)).sum() / total)
    return _sample(ink, centre, spread / 5.5)


def _sample(ink: Any, centre: tuple[float, float], scale: float, side: int = 24) -> np.ndarray:
    from PIL import Image

    left, top = (middle - scale * side / 2 for middle in centre)
    matrix = (scale, 0, left, 0, scale, top)
    return np.asarray(ink.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def _blur(pixels: np.ndarray) -> np.ndarray:
    padded = np.pad(pixels.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    height, width = pixels.shape[1:]
    return np.add.reduce([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])


def _distinct(likeness: np.ndarray) -> list[int]:
    """Characters in order, without those too like an earlier one."""
    kept: list[int] = []
    for i in range(len(likeness)):
        if not kept or likeness[i, kept].max() < SAME:
            kept.append(i)
    return kept


def _base(char: str) -> str:
    """The letter behind a form: `LATIN E` for e, E, small capital E and e with stroke."""
    words = unicodedata.name(char).split(" WITH ")[0].split()
    return " ".join(word for word in words if word not in FORMS)


def _groups(chars: Sequence[str], likeness: np.ndarray) -> np.ndarray:
    """One label a group, `[chars]`: forms of one letter and look-alikes, linked through any number of others."""
    bases = np.unique([_base(char) for char in chars], return_inverse=True)[1]
    linked = (likeness >= SAME) | (bases[:, None] == bases)
    labels = np.arange(len(chars))
    while True:
        least = np.where(linked, labels, len(chars)).min(1)
        if (least == labels).all():
            return labels
        labels = least


def _deal(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Split 0, 1 or 2 of every class: the largest group is for train, others at random fill test, then valid."""
    labels, counts = np.unique(groups, return_counts=True)
    room = {2: round(TEST * len(groups)), 1: round(VALID * len(groups))}
    parts = np.zeros(len(groups), np.int64)
    for i in rng.permutation(np.flatnonzero(labels != labels[counts.argmax()])):
        part = next((part for part, left in room.items() if counts[i] <= left), 0)
        parts[groups == labels[i]] = part
        if part:
            room[part] -= int(counts[i])
    return parts


def _draw(ink: Any, size: int, rng: np.random.Generator) -> np.ndarray:
    """The glyph at about two thirds of the frame, a little turned, sheared, scaled and moved."""
    from PIL import Image

    turn, shear = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(-0.08, 0.08)
    zoom, shift = rng.uniform(0.9, 1.1) * 0.68 * size / max(ink.size), rng.uniform(-1, 1, 2) * size / 28
    forward = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [[1, shear], [0, 1]]
    inverse = np.linalg.inv(2 * forward)  # drawn at twice the size and averaged down, against jagged edges
    centre = np.array(ink.size) / 2 - inverse @ (size + 2 * shift)
    matrix = (*inverse[0], centre[0], *inverse[1], centre[1])
    large = ink.transform((2 * size, 2 * size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(large.resize((size, size), Image.Resampling.BOX))
