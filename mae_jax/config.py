"""Read configs: durations in steps, and functions and classes by name."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from mae_jax.errors import UserError, nearest

# Keys of older recipes and workdirs. A key that gets another name, or that goes, is added here.
RENAMED_KEYS = {
    "connect_seconds": "hosts.connect_seconds",
    "heartbeat_seconds": "hosts.heartbeat_seconds",
    "stall_seconds": "hosts.stall_seconds",
}
REMOVED_KEYS = {
    "data.prefetch": "the constant PREFETCH of mae_jax/data/workers.py",
    "data.threads": "the constant THREADS of mae_jax/data/workers.py",
}


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of a config as the command line has it, such as optim.blr, and its value."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def steps(duration: str, batch_size: int, steps_per_epoch: int) -> int:
    """Return a duration such as '800 epochs', '1000 steps' or '5e6 examples' in steps.

    '' is 0. Fractions of an epoch are rounded to the nearest step, a positive duration to at least
    one step.

    Raises:
      UserError: `duration` is not a number and a unit, is part of a step, or 2**31 steps or more.
    """
    if duration == "":
        return 0
    per_unit = {"step": 1.0, "epoch": steps_per_epoch, "example": 1 / batch_size}
    try:
        number, unit = duration.split()
        count = float(number) * per_unit[unit.removesuffix("s")]
        if not 0 <= count < float("inf"):
            raise ValueError
    except (AttributeError, ValueError, KeyError):
        raise UserError(
            f"{duration!r} is not a duration: write a number and a unit, such as '800 epochs',"
            " '1000 steps' or '5e6 examples'"
        ) from None
    if unit.startswith("step") and count % 1:
        raise UserError(f"{duration!r} is part of a step: give a whole number of steps")
    if count >= 2**31:
        raise UserError(f"{duration!r} is {count:.3g} steps: a run has less than 2**31")
    return max(round(count), 1) if float(number) else 0


def resolve(name: str, home: ModuleType, member: str = "") -> Any:
    """Return what a name in a config stands for.

    Args:
      name: the name of a function or class in `home`, or a dotted path to one of a fork.
      home: our module or package with the choices.
      member: where the choices are modules (tasks, evaluators), the class to take from each; a
        dotted path may then also name a module with a class of this name.

    Raises:
      UserError: there is nothing of that name, or it cannot be called.
    """
    path, _, attribute = name.rpartition(".")
    module = _import(name if path else f"{home.__name__}.{name}") if member else None
    parent = _import(path) if path else home
    if module:
        resolved = getattr(module, member, None)
    elif parent is None:
        raise UserError(f"{name!r}: cannot import {path!r}: there is no such module")
    else:
        resolved = getattr(parent, attribute, None) if path or attribute in choices(home) else None
    if not callable(resolved):
        if module:
            raise UserError(f"{name!r} is a module without {member}")
        where = f"{path} has no {attribute!r}" if path else f"{name!r} is unknown"
        raise UserError(where + nearest(attribute, choices(parent or home)))
    return resolved


def choices(home: ModuleType) -> list[str]:
    """Return the names of the public functions of a module, or of the modules of a package."""
    if hasattr(home, "__path__"):
        return [module.name for module in pkgutil.iter_modules(home.__path__)]
    return [
        name
        for name, member in vars(home).items()
        if inspect.isfunction(member) and member.__module__ == home.__name__ and name[0] != "_"
    ]


def _import(path: str) -> ModuleType | None:
    """Return a module, or None if there is none of that name; errors inside it are raised."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(error.name + ".")):
            return None
        raise UserError(f"cannot import {path!r}: {error}") from error
