"""Label maps: the class of each pixel, read from PNG files and never interpolated."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_jax.data.bands import BadImage
from mae_jax.data.decode import MAX_PIXELS
from mae_jax.data.transforms import Box
from mae_jax.errors import UserError

IGNORED = 255  # in every map that `decode` returns: the pixel has no class
MOST_CLASSES = 255
NUMBERS = ("L", "P", "1", "I;16", "I;16B", "I")  # Pillow's modes whose pixels are class numbers

Colour = tuple[int, int, int]


MEANING = ("classes", "ignore", "shift", "palette")  # keys that say what labels mean


def meaning(cfg: Any, data: Any) -> dict[str, Any]:
    """Return what labels mean by config.evals.NAME, and where that does not say, by config.data."""
    return {key: cfg.get(key, data.get(key)) for key in MEANING if key in {*cfg, *data}}


@dataclass(frozen=True)
class Legend:
    """The meaning of the numbers, or the colours, of label maps.

    Args:
      names: of the classes, by their numbers from 0.
      ignore: the number of pixels without a class.
      shift: 0 means without a class, and class c is written as c + 1, as in ADE20K.
      colours: colour -> class number, or IGNORED; empty = the maps hold numbers.
    """

    names: tuple[str, ...]
    ignore: int = IGNORED
    shift: bool = False
    colours: dict[Colour, int] = field(default_factory=dict)

    @classmethod
    def from_config(cls, data: Any, root: str | os.PathLike | None = None) -> "Legend":
        """Return the legend of config.data: `classes`, `ignore`, `shift` and `palette`.

        The classes are those of `palette`, a file with a line "R G B NAME" for each class in order
        (the name "ignore" for colours without a class); else those of ROOT/classes.txt, a name in
        each line; else as many as `classes` says, without names.

        Raises:
          UserError: the classes are not known, are too many, or are given in two ways that differ;
            or their file cannot be read.
        """
        count, file = data.get("classes", 0), Path(data.get("palette", ""))
        names: tuple[str, ...] = ()
        colours: dict[Colour, int] = {}
        if data.get("palette", ""):
            names, colours = read_palette(file)
        elif root is not None and (file := Path(root) / "classes.txt").is_file():
            names = tuple(filter(None, map(str.strip, _read_lines(file, str(file)))))
        if not names and not count:
            raise UserError(
                "config.data.classes=0: how many classes do the label maps have? Give the number,"
                " or write their names into classes.txt beside the splits, one in each line"
            )
        if names and count not in (0, len(names)):
            raise UserError(
                f"config.data.classes={count}, and {file} names {len(names)}: change one of them,"
                " or leave classes at 0"
            )
        names = names or tuple(f"class {number}" for number in range(count))
        if len(names) > MOST_CLASSES:
            raise UserError(f"{len(names)} classes: at most {MOST_CLASSES} can be told apart")
        return cls(names, data.get("ignore", IGNORED), data.get("shift", False), colours)

    def read(self, file: bytes, name: str) -> np.ndarray:
        """Return a label map as uint8 [H, W]: class numbers, and IGNORED.

        Raises:
          BadImage: the file cannot be read.
          UserError: the map holds colours without a palette, or a number or colour of no class.
        """
        if self.colours:
            return self._of_colours(_pixels(file, name, "RGB"), name)
        number_HW = _pixels(file, name).astype(np.int32)
        unlabelled_HW = number_HW == self.ignore
        if self.shift:
            unlabelled_HW |= number_HW == 0
            number_HW = number_HW - 1
        wrong = ~unlabelled_HW & ((number_HW < 0) | (number_HW >= len(self.names)))
        if wrong.any():
            found = int(number_HW[wrong].max()) + self.shift
            raise UserError(
                f"{name}: its label map has the number {found}, and the {len(self.names)} classes"
                f" are {int(self.shift)} to {len(self.names) - 1 + self.shift}: give another"
                f" config.data.classes, config.data.ignore={found} if such pixels have no class, or"
                " config.data.shift=True if 0 means that and classes begin at 1"
            )
        return np.where(unlabelled_HW, IGNORED, number_HW).astype(np.uint8)

    def _of_colours(self, pixels_HWC: np.ndarray, name: str) -> np.ndarray:
        code_HW = pixels_HWC.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
        codes, index = np.unique(code_HW, return_inverse=True)
        drawn = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in codes]
        if unknown := [colour for colour in drawn if colour not in self.colours]:
            raise UserError(
                f"{name}: its label map has the colour {unknown[0]}, which is not in"
                " config.data.palette: add it with its class, or with the name ignore"
            )
        classes = np.array([self.colours[colour] for colour in drawn], np.uint8)
        return classes[index].reshape(code_HW.shape)


def read_palette(file: Path) -> tuple[tuple[str, ...], dict[Colour, int]]:
    """Return the names of classes, and colour -> class, from lines such as "128 0 0 building".

    Raises:
      UserError: the file cannot be read, or a line has another form.
    """
    text = _read_lines(file, f"config.data.palette={str(file)!r}")
    lines = [line.split(maxsplit=3) for line in text if line.strip()]
    names: list[str] = []
    colours: dict[Colour, int] = {}
    for line in lines:
        numbers = [int(x) if x.isdecimal() else -1 for x in line[:3]]
        if len(line) < 4 or not all(0 <= x <= 255 for x in numbers):
            raise UserError(
                f"config.data.palette={str(file)!r}: {' '.join(line)!r} is no line such as"
                " '128 0 0 building'"
            )
        colour = (numbers[0], numbers[1], numbers[2])
        name = line[3].strip()
        if name != "ignore" and name not in names:
            names.append(name)
        colours[colour] = IGNORED if name == "ignore" else names.index(name)
    return tuple(names), colours


def _read_lines(file: Path, what: str) -> list[str]:
    """Return the lines of a text in UTF-8, with or without a byte order mark.

    Args:
      what: the file or the key that names it, for the message.

    Raises:
      UserError: the file cannot be read, or is no such text.
    """
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is no text in UTF-8 ({error}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error}") from None


def _pixels(file: bytes, name: str, convert: str = "") -> np.ndarray:
    """Return the pixels of a PNG: numbers [H, W], or of the mode `convert`."""
    try:
        picture = Image.open(io.BytesIO(file), formats=("PNG",))
        if not 0 < picture.width * picture.height <= MAX_PIXELS:
            raise BadImage(f"its label map has {picture.width} x {picture.height} pixels")
        if not convert and picture.mode not in NUMBERS:
            raise UserError(
                f"{name}: its label map is a picture in colours ({picture.mode}), not of class"
                " numbers: give config.data.palette=FILE with a line for each class, such as"
                " '128 0 0 building'"
            )
        if convert:
            return np.asarray(picture.convert(convert))
        # Pillow scales grey of 2 and 4 bits, so that white is 255. Byte 24 is the bits.
        scale = {2: 85, 4: 17}.get(file[24], 1) if picture.mode == "L" else 1
        return np.asarray(picture) // scale if scale > 1 else np.asarray(picture)
    except (BadImage, UserError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds at broken files
        raise BadImage(f"its label map cannot be read: {error or type(error).__name__}") from error


def resize(map_HW: np.ndarray, box: Box, width: int, height: int) -> np.ndarray:
    """Resize a part of a map; each new pixel is the nearest old one.

    The result is that of Pillow's NEAREST, so that a map stays aligned with its image.
    """
    left, top, box_width, box_height = box
    rows = top + ((np.arange(height) + 0.5) * box_height / height).astype(int)
    columns = left + ((np.arange(width) + 0.5) * box_width / width).astype(int)
    return map_HW[rows[:, None], columns]
