"""Images that cannot be read: why, how many, and when they are too many to train on."""

import dataclasses
import math
from typing import Any

import numpy as np

from mae_jax.data.bands import BadImage, WrongBands
from mae_jax.data.decode import Picture, decode
from mae_jax.data.folder import FolderSource
from mae_jax.data.sources import Source
from mae_jax.errors import UserError

SEARCHED = 2000  # records; a source with no more is searched for every unreadable one
LISTED = 50  # unreadable records in an error message


def read(
    source: Source, index: int, channels: int, dtype: type[np.number] = np.uint8
) -> tuple[dict[str, Any], Picture]:
    """Return a record of a source and its decoded image.

    Raises:
      BadImage: the image cannot be read.
    """
    record = source[index]
    if "unreadable" in record:
        raise BadImage(record["unreadable"])
    return record, decode(record["image"], channels, dtype=dtype)


def describe(
    source: Source, index: int, channels: int, dtype: type[np.number] = np.uint8
) -> str | None:
    """Return 'NAME: why it cannot be read', or None if a record can be read."""
    try:
        read(source, index, channels, dtype)
        return None
    except BadImage as error:
        return f"{source[index]['name']}: {error}"


def require_bands(source: Source, channels: int, dtype: type[np.number], way_out: str = "") -> None:
    """Raise UserError if the first file of a folder does not have the wanted bands.

    Args:
      way_out: what the user can do about it, in place of the advice that `WrongBands` gives.
    """
    if isinstance(source, FolderSource):
        try:
            read(source, 0, channels, dtype)
        except WrongBands as error:
            text = f"{error}".partition(":")[0] + f": {way_out}" if way_out else f"{error}"
            raise UserError(f"{source[0]['name']}: {text}") from None
        except BadImage:  # one bad image is no reason to stop
            pass


@dataclasses.dataclass
class BadImageLog:
    """The distinct unreadable records that a run has met; too many of them stop it."""

    source: Source
    max_bad_fraction: float
    channels: int = 3
    dtype: type[np.number] = np.uint8
    _reasons: dict[int, str] = dataclasses.field(default_factory=dict, init=False)

    @property
    def count(self) -> int:
        return len(self._reasons)

    def add(self, bad: np.ndarray) -> list[str]:
        """Add the records in `bad` of a batch; return a line to log for each that is new here.

        Raises:
          UserError: more than `max_bad_fraction` of the source is unreadable; the message lists it.
        """
        new = sorted({int(index) for index in bad if index >= 0} - self._reasons.keys())
        for index in new:
            reason = describe(self.source, index, self.channels, self.dtype)
            name = self.source[index]["name"]
            self._reasons[index] = reason or f"{name}: was unreadable for a moment"
        # The product may round below a count that the fraction allows: 0.29 of 100 is below 29
        if new and self.count / len(self.source) > self.max_bad_fraction:
            raise UserError(self._too_many())
        return [f"unreadable, replaced by another image: {self._reasons[index]}" for index in new]

    def _too_many(self) -> str:
        so_far = " so far"
        if len(self.source) <= SEARCHED:
            so_far = ""
            for index in set(range(len(self.source))) - self._reasons.keys():
                if reason := describe(self.source, index, self.channels, self.dtype):
                    self._reasons[index] = reason
        lines = [self._reasons[index] for index in sorted(self._reasons)]
        if len(lines) > LISTED:
            lines[LISTED:] = [f"... and {len(lines) - LISTED:,} more"]
        listed, fraction = "\n  ".join(lines), self.count / len(self.source)
        return (
            f"{self.count:,} of {len(self.source):,} images{so_far} ({fraction:.2%}) cannot be"
            f" read, more than config.data.max_bad_fraction={self.max_bad_fraction} allows:\n"
            f"  {listed}\nRemove or replace them, or train without them:"
            f" --config.data.max_bad_fraction={math.ceil(fraction * 100) / 100}"
        )
