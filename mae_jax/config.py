"""Read configs: durations in steps, and functions and classes by name."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from mae_jax.errors import UserError, nearest, refuse

# Keys of older recipes and workdirs. Whoever renames or removes a key adds it here.
RENAMED_KEYS = {
    "connect_seconds": "hosts.connect_seconds",
    "heartbeat_seconds": "hosts.heartbeat_seconds",
    "stall_seconds": "hosts.stall_seconds",
}
REMOVED_KEYS = {
    "data.prefetch": "the constant PREFETCH of mae_jax/data/workers.py",
    "data.threads": "the constant THREADS of mae_jax/data/workers.py",
}
# Keys that a recipe need not name, and what a config without them means. On the command line they
# can be given like any other.
OPTIONAL_KEYS: dict[str, Any] = {
    "data.augment": "",  # or jitter-b0.4-c0.4-s0.4-h0.1, rand-m9-mstd0.5-inc1, a dotted path
    "data.repeat": 1,  # masks of each image that is read; an epoch has as many masks as images
    "data.value_range": (),  # that become 0 and 1, such as (0, 10000), of bands; () = of 8 bits
    "masking.cell": 2,  # of models/masks.py
    "masking.roll": True,
    "masking.sigma_coarse": 2.0,
    "masking.sigma_fine": 0.5,
    "masking.tokens_in_encoder": False,  # True: the encoder sees mask tokens too (Table 1c)
    "model.block.eps": 1e-6,  # of models/block_options.py
    "model.block.layer_scale": 0.0,
    "model.block.norm": "layer",
    "model.block.qk_norm": False,
    "model.block.registers": 0,
    "model.block.rope": 0.0,
    "model.channel_groups": (),  # of the task channel_groups, such as ((0, 1, 2), (3, 4))
    "model.cls_tokens": 1,
    "model.decoder": "mae",  # a module of models/ with a class Decoder, or a dotted path
    "model.decoder_maps": 0,  # of the task crossmae: encoder blocks that it reads; 0 = all
    "model.decoder_share": 0.25,  # of the task crossmae: of all patches, that are predicted
    "model.float32_sums": False,  # True: gradients are summed over devices in float32
    "online_probe": False,  # True: train a linear classifier of the cls token beside the model
    "optim.clip_norm": 0.0,  # of the whole gradient; 0 = not clipped
    "optim.cooldown": 0.2,  # of the schedule wsd: the share of the run that falls
    "optim.eps": 1e-8,  # of AdamW
    "optim.name": "adamw",  # or lion, muon
    "optim.schedule": "cosine",  # or wsd: warm-up, stable, decay
    "target.components": 96,  # of the target pca
}


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of a config as the command line has it, such as optim.blr, and its value."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def refuse_unread(config: Mapping[str, Any], *keys: str) -> None:
    """Check that optional keys which a task does not read are left at their defaults.

    Raises:
      UserError: one is not.
    """
    for key in keys:
        group, name = key.split(".")
        value = config[group].get(name, OPTIONAL_KEYS[key])
        if value != OPTIONAL_KEYS[key]:
            refuse(key, value, f"task {config['task']!r} does not read it: leave it out")


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


def resolve(name: str, *homes: ModuleType, member: str = "") -> Any:
    """Return what a name in a config stands for.

    Args:
      name: the name of a function or class in `homes`, or a dotted path to one of a fork.
      homes: our modules or packages with the choices, searched in turn.
      member: where the choices are modules (tasks, evaluators), the class to take from each; a
        dotted path may then also name a module with a class of this name.

    Raises:
      UserError: there is nothing of that name, or it cannot be called.
    """
    path, _, attribute = name.rpartition(".")
    module = _import(name if path else f"{homes[0].__name__}.{name}") if member else None
    parents: list[Any] = [_import(path)] if path else list(homes)
    if module:
        resolved = getattr(module, member, None)
    elif parents[0] is None:
        raise UserError(
            f"{name!r}: cannot import {path!r}: there is no such module; run"
            " from the folder that holds it, or set PYTHONPATH"
        )
    else:
        holders = [home for home in parents if path or attribute in choices(home)]
        resolved = getattr(holders[0], attribute, None) if holders else None
    if not callable(resolved):
        if module:
            raise UserError(f"{name!r} is a module without {member}")
        where = f"{path} has no {attribute!r}" if path else f"{name!r} is unknown"
        known = [choice for home in parents for choice in choices(home)]
        raise UserError(where + nearest(attribute, known))
    return resolved


def resolve_group(
    group: Mapping[str, Any], key: str, *homes: ModuleType, others: tuple[str, ...] = ()
) -> Callable:
    """Return the function that config.KEY.name stands for, with the group's other keys bound to it.

    Args:
      group: config.KEY.
      homes: see `resolve`.
      others: keys of the group that are not for the function.

    Raises:
      UserError: there is no such function, or it has no keyword-only parameter of some key's name.
    """
    function = resolve(group["name"], *homes)
    options = {name: x for name, x in group.items() if name not in ("name", *others)}
    if not options:
        return function
    known = inspect.getfullargspec(function).kwonlyargs
    for name in options:
        if name not in known:
            raise UserError(
                f"config.{key}.{name}: {group['name']!r} has no option {name!r}"
                + (nearest(name, known) if known else " and no other")
            )
    return partial(function, **options)


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
