"""Resolve the crop and the augmentation that config.data names, and check its values."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.config import resolve
from mae_jax.data import augment, crops, jitter, transforms
from mae_jax.data.decode import Picture
from mae_jax.errors import UserError

Crop = Callable[[Picture, tuple[int, int], np.random.Generator], np.ndarray]
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def check(data: ConfigDict, channels: int = 3) -> None:
    """Check the names and ranges of config.data, for such images, before anything is opened."""
    make_crop(data)
    augmentation = make_augment(data)
    for_photographs = isinstance(augmentation, augment.RandAugment | jitter.ColourJitter)
    if for_photographs and channels not in (1, 3):
        raise UserError(
            f"config.data.augment={data.augment!r} is for images of 1 or 3 channels, and"
            f" config.model.channels={channels}: set augment to ''"
        )
    for name in ("crop_scale", "crop_ratio"):
        if len(data[name]) != 2 or data[name][0] > data[name][1]:
            raise UserError(f"config.data.{name}={data[name]!r}: give two numbers (low, high)")
    value_range = tuple(data.get("value_range", ()))
    if value_range and (len(value_range) != 2 or value_range[0] >= value_range[1]):
        raise UserError(
            f"config.data.value_range={value_range!r}: give the values that become 0 and 1, such as"
            " (0, 10000), or () for 8-bit images"
        )
    if value_range and for_photographs:
        raise UserError(
            f"config.data.augment={data.augment!r} is for 8-bit images, and"
            f" config.data.value_range={value_range!r} is given: set augment to ''"
        )


def make_crop(data: ConfigDict) -> Crop:
    """Return the function that config.data.crop names, one of `crops` or of a fork."""
    resizer = data.get("resizer", "pillow")
    settings = dict(scale=tuple(data.crop_scale), ratio=tuple(data.crop_ratio), resizer=resizer)
    crop = _resolve("crop", data.crop, "picture, size, rng", settings)
    require_resizer(resizer)
    if resizer != "pillow" and "resizer" not in crop.keywords:
        raise UserError(
            f"config.data.resizer={resizer!r} is for the crops random_resized and probe, not for"
            f" {data.crop!r}: leave it at pillow"
        )
    return crop


def require_resizer(resizer: str) -> None:
    """Raise a UserError if a config.data.resizer is unknown, or not installed here."""
    if resizer not in transforms.RESIZERS:
        raise UserError(f"config.data.resizer={resizer!r}: give pillow or fast")
    if resizer == "fast" and importlib.util.find_spec("cykooz_resizer") is None:
        raise UserError("config.data.resizer='fast': pip install cykooz-resizer, or give 'pillow'")


def make_augment(data: ConfigDict) -> Augment | None:
    """Return what config.data.augment names: RandAugment, jitter, a fork's function, or None."""
    name = data.get("augment", "")
    if "." in name and "-" not in name:
        return _resolve("augment", name, "image, rng", {})
    if name.startswith("jitter"):
        return jitter.parse(name)
    return augment.parse(name) if name else None


def _resolve(key: str, name: str, arguments: str, settings: dict[str, Any]) -> functools.partial:
    """Return the function that config.data.KEY names, bound to the settings that it takes."""
    try:
        function = resolve(name, crops)
        keywords = inspect.getfullargspec(function).kwonlyargs
        bound = functools.partial(function, **{k: v for k, v in settings.items() if k in keywords})
        inspect.signature(bound).bind(*arguments.split(", "))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"config.data.{key}={name!r} is no function ({arguments}) -> uint8 [H, W, C]: {error}"
        ) from error
    return bound
