"""The commands as Python functions, for people who do not want flags."""

import os
from collections.abc import Mapping
from typing import Any

from mae_jax.commands import recipes, train
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
    source = f"folder:{data}" if os.path.isdir(data) else data
    changes = {"data.source": source} | ({"train_for": f"{steps} steps"} if steps else {})
    flags = [f"--config.{key}={value}" for key, value in {**changes, **(config or {})}.items()]
    recipe, *_ = recipes.parse(
        [f"--config=folder:variant={variant}", *flags], train.define, "train"
    )
    train.run(recipe, out)
    return load(out)
