"""Find a recipe and change it as the command line says, for `train` and `plan`."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mae_jax import configs
from mae_jax.config import REMOVED_KEYS, RENAMED_KEYS
from mae_jax.errors import UserError, nearest

INSTALLED = Path(configs.__path__[0])
USAGE = """\
mae-jax {command} --config=RECIPE[:ARGUMENTS] [--config.KEY=VALUE ...] [FLAG ...]

  RECIPE     {recipes},
             or a Python file with a function get_config(arg)
  ARGUMENTS  such as variant=L/16,epochs=800; the first lines of a recipe's file explain them
  KEY=VALUE  changes a value of the recipe, such as --config.mask_ratio=0.9"""


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None], command: str
) -> tuple[ConfigDict, flags.FlagValues, str]:
    """Return the locked config, all flags, and the name of the recipe.

    Args:
      argv: the command line after the command's name.
      define: defines the command's own flags.
      command: its name, for the help and for messages.

    Raises:
      UserError: no recipe, an unknown key or argument, a value of the wrong type.
      SystemExit: after printing the help that was asked for.
    """
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(argv):
        print(USAGE.format(command=command, recipes=", ".join(names())))
        print(values.get_help(include_special_flags=False))
        raise SystemExit(0)
    given = " ".join(arg for arg in argv if re.match(r"--?config\b", arg))
    argv, file = _with_path(argv)
    _refuse_old(re.findall(r"--?config\.([\w.]+)", given))

    whole = [f"mae-jax {command}", *argv]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=whole)
    try:
        rest = values(whole)[1:]
        config = values.config
        _ = config.task  # an error inside the recipe surfaces here
    except flags.Error as error:
        # For an error inside a recipe, absl's message is the whole traceback.
        text = str(error).strip()
        text = text.splitlines()[-1] if "Traceback" in text else text
        raise UserError(re.sub(r"^(ValueError|mae_jax.errors.UserError): ", "", text)) from None
    except (AttributeError, KeyError) as error:
        what = " ".join(str(error.args[0]).split())
        raise UserError(f"{given}: no such key in the config: {what}") from None
    except ModuleNotFoundError as error:
        hint = "; the installed recipes are mae_jax.configs" if error.name == "configs" else ""
        raise UserError(f"--config={file}: {error}{hint}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --name=value")
    if not_a_number := re.search(r'"(\w+)": NaN', config.to_json()):
        raise UserError(f"{given}: {not_a_number[1]} is not a number (nan)")
    _refuse_old(_keys(config))
    config.lock()
    return config, values, file.stem


def names() -> list[str]:
    """Return the names of the installed recipes."""
    return sorted({path.stem for path in INSTALLED.glob("*.py")} - {"__init__", "common"})


def find(name: str) -> Path:
    """Return the file of a recipe.

    Args:
      name: an installed recipe, such as `pretrain`, or the path of a Python file. Where there is no
        file configs/NAME.py, that path stands for the installed recipe.

    Raises:
      UserError: there is neither.
    """
    path = Path(name)
    installed = INSTALLED / f"{path.stem}.py"
    if name in names():
        return installed
    if path.is_file():
        return path
    if path.parent == Path("configs") and path.suffix == ".py" and path.stem in names():
        return installed
    raise UserError(
        f"--config: there is no file {name!r} in {os.getcwd()}, and no recipe of that name"
        + nearest(path.stem, names())
    )


def _with_path(argv: list[str]) -> tuple[list[str], Path]:
    """Return the command line with the path of the recipe's file in it, and that path.

    Also let the file import modules of the current folder, and of the folder above its own, as in
    `from configs.pretrain import get_config`.
    """
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-config"):
            after = i + 1 if equals else i + 2
            value = value if equals else "".join(argv[i + 1 : after])
            name, colon, arguments = value.partition(":")
            file = find(name)
            folder = file.resolve().parent
            above = [] if folder == INSTALLED.resolve() else [str(folder.parent)]
            sys.path[:0] = [path for path in [os.getcwd(), *above] if path not in sys.path]
            argv = [*argv[:i], f"--config={file}{colon}{arguments}", *argv[after:]]
            return argv, file
    raise UserError("--config=RECIPE is missing, such as --config=configs/pretrain.py")


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config as the command line has them, such as optim.blr."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _refuse_old(keys: Iterable[str]) -> None:
    """Raise a UserError for the first key that was renamed or removed."""
    for key in keys:
        if key in RENAMED_KEYS:
            raise UserError(f"config.{key} is now config.{RENAMED_KEYS[key]}")
        if key in REMOVED_KEYS:
            raise UserError(f"config.{key} is now {REMOVED_KEYS[key]}: leave the key out")
