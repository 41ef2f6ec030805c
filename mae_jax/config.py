"""Reading configs: durations, functions by name, and the checks that need no data and no device."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any


def steps(duration: str, batch_size: int, steps_per_epoch: int) -> int:
    """A duration such as '800 epochs', '1000 steps' or '5e6 examples', in steps; '' is 0.

    Fractions of an epoch are rounded to the nearest step, a positive duration to at least one step.

    Raises:
      ValueError: it is not a number and a unit.
    """
    if not duration:
        return 0
    try:
        number, unit = duration.split()
        value = float(number)
        per_unit = {"step": 1.0, "epoch": steps_per_epoch, "example": 1 / batch_size}
        count = value * per_unit[unit.removesuffix("s")]
        if not 0 <= count < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(
            f"{duration!r} is not a duration: write a number and a unit, such as '800 epochs',"
            " '1000 steps' or '5e6 examples'"
        ) from None
    return max(round(count), 1) if value else 0


def resolve(name: str, module: Any) -> Callable:
    """The function `name` of `module`, or, for a dotted path, of the module that it names.

    Raises:
      ValueError: there is no such function; the nearest names are given.
    """
    path, _, attribute = name.rpartition(".")
    if path:
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise ValueError(f"{name!r}: cannot import {path!r} ({error})") from error
    found = getattr(module, attribute, None)
    if not callable(found) or attribute.startswith("_"):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(
            f"{module.__name__} has no function {attribute!r}{nearest(attribute, known)}"
        )
    return found


def nearest(name: str, known: list[str]) -> str:
    """'; nearest: ...' for an error message, or all the names if none is near."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; nearest: {', '.join(close)}" if close else f"; there are: {', '.join(sorted(known))}"
