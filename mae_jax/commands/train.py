"""Train: pre-train on images, from a config file."""

import importlib
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags


def parse(argv: list[str]) -> tuple[ConfigDict, str]:
    """The locked config and the workdir of a command line.

    Raises:
      ValueError: no config file, an unknown key or argument, a value of the wrong type.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file, with arguments after a colon", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", None, "where the run lives; '' = workdir/CONFIG", flag_values=values
    )
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)

    given = [arg for arg in argv if arg.startswith("--config")]
    for i, arg in enumerate(argv):
        name, _, path = arg.lstrip("-").partition("=")
        if name == "config":
            file = Path((path or argv[i + 1]).split(":")[0])
            if not file.is_file():
                raise ValueError(f"--config: there is no file {str(file)!r} in {os.getcwd()}")
            # A config may import its neighbours: `from configs.common import ...`
            sys.path[:0] = [os.getcwd(), str(file.resolve().parent.parent)]
    try:
        rest = values(["mae-jax train", *argv])[1:]
        if values.help:
            print(values.main_module_help() or values.get_help())
            raise SystemExit(0)
        if values.config is None:
            raise ValueError("--config=FILE is missing, such as --config=configs/pretrain.py")
        config = values.config
        config.task  # an error inside the config file surfaces here
    except flags.Error as error:
        raise ValueError(str(error)) from None
    except AttributeError as error:
        raise ValueError(f"{' '.join(given)}: no such key in the config: {error}") from None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; options are written --name=value")
    config.lock()
    workdir = values.workdir or str(Path("workdir") / file.stem)
    return config, workdir


def main(argv: list[str]) -> int:
    config, workdir = parse(argv)
    # Only now: JAX takes seconds to import, and a mistyped flag should not.
    from mae_jax import sharding, train

    mesh = sharding.make_mesh(**config.mesh)
    module = importlib.import_module(f"mae_jax.tasks.{config.task}")
    task = module.make_task(config, sharding.constrain_batch(mesh))
    train.fit(config, workdir, task, mesh)
    return 0
