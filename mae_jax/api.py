"""The commands as Python functions, for people who do not want flags."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mae_jax import files
from mae_jax.commands import embed as embed_command
from mae_jax.commands import feature_file, recipes, running
from mae_jax.errors import UserError
from mae_jax.pretrained import load


def pretrain(
    data: str,
    out: str,
    *,
    variant: str = "S/16",
    steps: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[Any, dict]:
    """Pre-train on images, as `mae-jax train --config=folder` does; return (model, params).

    The same call again goes on where the first one stopped, and returns at once when that is done.

    Args:
      data: a folder of images, or another data source such as bundled:photos.
      out: the workdir.
      variant: the network, such as B/16.
      steps: the length of the run; None = that of the recipe, 800 epochs.
      config: further keys of the recipe, as on the command line: {"data.workers": 0}.

    Raises:
      UserError: something cannot work here.
    """
    files.require_place(out, "out")
    source = f"folder:{data}" if os.path.isdir(data) else data
    changes = {"data.source": source}
    if steps is not None:
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps={steps!r}: give a whole number from 1, or None")
        changes["train_for"] = f"{steps} steps"
    if twice := changes.keys() & (config or {}):
        raise UserError(f"config has {sorted(twice)}, which other arguments say: give each once")
    for key, value in (config or {}).items():
        if not key or isinstance(value, Mapping):
            raise UserError(f"config has {key!r}: {value!r}: write it as 'data.workers': 0")
    flags = [f"--config.{key}={_value(x)}" for key, x in {**changes, **(config or {})}.items()]
    recipe, *_ = recipes.parse(
        [f"--config=folder:variant={variant}", *flags], running.define, "train"
    )
    running.run(recipe, out)
    return load(out)


def embed(
    weights: str | os.PathLike,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    **options: Any,
) -> dict[str, Any]:
    """Write features of images, as `mae-jax embed` does, and return what it wrote.

    The same call again goes on where the first one stopped, and reads the file when that is done.

    Args:
      weights: whatever `load` reads.
      images: a folder, image files, text files with a path in every line, or one data source.
      out: a new file, .npy or .parquet.
      options: the command's flags: feature="mean", layer=4, batch_size=256, image_size=224.

    Returns:
      A row for each image: `name`, `label` (-1 = none), `error` ('' = none) and `features`,
      float32, (images, ...), NaN where the image cannot be read. Those of a .npy stay on the disk
      until they are used.

    Raises:
      UserError: something cannot work here.
    """
    several = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    paths = [os.fspath(path) for path in several]
    given = {name: value for name, value in options.items() if value is not None}
    flags = [f"--{name}={_flag(name, value)}" for name, value in given.items()]
    embed_command.main([*flags, f"--out={os.fspath(out)}", "--", os.fspath(weights), *paths])
    return feature_file.read(out)


def _value(value: Any) -> Any:
    """Return a value without NumPy's types, whose text no flag reads."""
    if isinstance(value, tuple | list):
        return tuple(map(_value, value))
    if isinstance(value, np.generic | np.ndarray):
        return _value(value.tolist())
    return value


def _flag(name: str, value: Any) -> str:
    """Return a value as a flag has it: (0.5, 0.25) as '0.5,0.25', an image size as '224x224'."""
    value = _value(value)
    if isinstance(value, tuple):
        return ("x" if name == "image_size" else ",").join(map(str, value))
    return str(value)
