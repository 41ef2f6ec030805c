"""Resolve splits and slices of them, such as train[:90%], to ranges of images."""

import re
from collections.abc import Iterable

import tensorflow_datasets as tfds

from mae_jax.errors import UserError

Ranges = tuple[tuple[str, int, int], ...]  # (split, first image, one after the last)


def canonical(split: str, names: Iterable[str]) -> str:
    """Return a split in which val and valid stand for 'validation', unless `names` has them."""
    known = set(names)

    def name(match: re.Match) -> str:
        return match[0] if match[0] in known else "validation"

    return re.sub(r"\b(val|valid)\b", name, split, flags=re.IGNORECASE)


def parse(split: str, lengths: dict[str, int], source: str) -> Ranges:
    """Return the ranges of a split: 'train[:50%]+test' -> (('train', 0, 50), ('test', 0, 20)).

    Args:
      split: names and slices of splits by tfds's own rules, in images or percents.
      lengths: how many images each split of the source has.
      source: the name of the source, for error messages.

    Raises:
      UserError: it names no split, is empty, or counts in shards, which not every source has.
    """
    if re.search(r"\[[^\]]*shard", split):
        raise UserError(
            f"split {split!r} of {source!r} counts in shards: count images or percents, such as"
            " 'train[:5000]' or 'train[:90%]'"
        )
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
        for name, length in lengths.items()
    }
    have = ", ".join(f"{name} ({length:,})" for name, length in lengths.items())
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"split {split!r} of {source!r} is neither one of {have} nor a slice of them such as"
            f" 'train[:90%]': {reason}"
        ) from None
    ranges = tuple(
        (p.splitname, p.from_ or 0, lengths[p.splitname] if p.to is None else p.to) for p in parts
    )
    if any(start >= end for _, start, end in ranges):
        raise UserError(f"split {split!r} of {source!r} is empty; the source has {have}")
    return ranges


def locate(ranges: Ranges, source: object) -> Ranges:
    """Return ranges whose splits begin with the source, so that two sources can be compared."""
    return tuple((f"{source} {split}", start, end) for split, start, end in ranges)
