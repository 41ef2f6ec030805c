"""Find a recipe and change it as the command line says, for the commands that take one."""

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mae_jax import configs, limits
from mae_jax.config import OPTIONAL_KEYS, REMOVED_KEYS, RENAMED_KEYS, leaves
from mae_jax.configs.common import typed
from mae_jax.errors import UserError, nearest

INSTALLED = Path(configs.__path__[0])
# tfds knows these numbers only once a dataset is prepared: image-net.org/challenges/LSVRC/2012.
PUBLISHED = {
    ("imagenet2012", "train"): (1_281_167, 1000),
    ("imagenet2012", "validation"): (50_000, 1000),
}
USAGE = """\
mae-jax {command} --config=RECIPE[:ARGUMENTS] [--config.KEY=VALUE ...] [FLAG ...]

  RECIPE     {recipes}
             or a Python file with a function get_config(arg)
  ARGUMENTS  such as variant=L/16,epochs=800; the first lines of a recipe's file explain them
  KEY=VALUE  changes a value of the recipe, such as --config.mask_ratio=0.9"""


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None], command: str
) -> tuple[ConfigDict, flags.FlagValues, str]:
    """Return the locked config, all flags, and the name of the recipe, from a command line.

    Args:
      argv: the command line after the command's name.
      define: defines the command's own flags.
    """
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(argv):
        indent = " " * 13
        known = ["encoders", *names("ablations")] if command == "sweep" else names()
        recipes = textwrap.fill(
            f"{', '.join(known)},", 98, initial_indent=indent, subsequent_indent=indent
        )
        print(USAGE.format(command=command, recipes=recipes.lstrip()))
        print(values.get_help(include_special_flags=False))
        raise SystemExit(0)
    given = " ".join(arg for arg in argv if re.match(r"--config\b", arg))
    argv, optional = _take_optional(_last_of_each(argv))
    argv, file = _with_path(argv)
    keys = re.findall(r"--config\.([\w.]+)", given)
    _refuse_old(keys)
    whole = [f"mae-jax {command}", *argv]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=whole)
    try:
        rest = values(whole)[1:]
        config = values.config
        _ = config.task  # an error inside the recipe surfaces here
        for key, value in optional.items():
            _require_home(key, config, file.stem)
            for name in reversed(key.split(".")):
                value = {name: value}
            with config.unlocked():
                config.update(value)
    except flags.Error as error:
        # For an error inside a recipe, absl's message is the whole traceback.
        text = str(error).strip()
        text = text.splitlines()[-1] if "Traceback" in text else text
        text = re.sub(r"\('Non-boolean argument to boolean flag', .*\)", "give true or false", text)
        raise UserError(re.sub(r"^(ValueError|mae_jax.errors.UserError): ", "", text)) from None
    except (AttributeError, KeyError) as error:
        if "has no attribute 'get_config'" in str(error):
            raise UserError(f"--config={file}: the file has no function get_config(arg)") from None
        _refuse_unknown(keys, file, whole)
        key = " ".join(str(error.args[0]).split())
        raise UserError(f"{given}: no such key in the config: {key}") from None
    except TypeError:  # of a key inside a value that has none
        _refuse_unknown(keys, file, whole)
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"--config={file}: {error}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --name=value")
    _refuse_old(key for key, _ in leaves(config))
    limits.check(config)
    config.lock()
    return config, values, file.stem


def without_data(config: ConfigDict, examples: int | None, classes: int | None) -> int:
    """Replace the config's source by one that only has its length; return the length."""
    from mae_jax.data import sources

    data = config.data
    if examples is None:
        try:
            source = sources.open_source(data.source, data.split, data.data_dir)
            examples, own_classes = len(source), source.num_classes
        except sources.NotPrepared as error:
            if (data.source, data.split) not in PUBLISHED:
                raise UserError(
                    f"{data.source!r} is not on this machine, and its number of examples is not"
                    " known: give --num_examples=N, and --num_classes=N if it has labels"
                ) from error
            examples, own_classes = PUBLISHED[data.source, data.split]
        classes = classes or own_classes
    with config.unlocked():
        data.source, data.split = f"counted:{examples}:{classes or 0}", ""
    return examples


def names(folder: str = "") -> list[str]:
    """Return the names of the installed recipes, or of those in a folder: ablations/masks."""
    stems = {path.stem for path in (INSTALLED / folder).glob("*.py")} - {"__init__", "common"}
    return sorted((Path(folder) / stem).as_posix() for stem in stems)


def find(name: str) -> Path:
    """Return the file of an installed recipe, such as `pretrain`, or that of a path.

    Where there is no file configs/NAME.py, that path stands for the installed recipe.
    """
    path, known = Path(name), [*names(), *names("ablations")]
    if path.is_file() and name not in known:
        return path
    recipe = re.sub(r"^configs/(.*)\.py$", r"\1", path.as_posix())
    if recipe in known:
        return INSTALLED / f"{recipe}.py"
    raise UserError(
        f"--config: there is no file {name!r} in {os.getcwd()}, and no recipe of that name"
        + nearest(path.stem, known)
    )


def _with_path(argv: list[str]) -> tuple[list[str], Path]:
    """Return the command line with the path of the recipe's file in it, and that path.

    Also let the file import modules of the current folder, and of the folder above its own, as in
    `from configs.pretrain import get_config`.
    """
    if sum(arg.partition("=")[0] == "--config" for arg in argv) > 1:
        raise UserError("--config is given twice: give one recipe")
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag == "--config":
            after = i + 1 if equals else i + 2
            name, colon, arguments = (value or "".join(argv[i + 1 : after])).partition(":")
            file = find(name)
            above = [str(file.resolve().parent.parent)] if str(file) == name else []
            sys.path[:0] = [path for path in [os.getcwd(), *above] if path not in sys.path]
            return [*argv[:i], f"--config={file}{colon}{arguments}", *argv[after:]], file
    raise UserError("--config=RECIPE is missing, such as --config=configs/pretrain.py")


def _last_of_each(argv: list[str]) -> list[str]:
    """Return a command line without the values of keys that are given again; absl joins tuples."""
    last = {arg.partition("=")[0]: i for i, arg in enumerate(argv)}
    return [
        arg
        for i, arg in enumerate(argv)
        if not re.match(r"--config\.[\w.]+=", arg) or last[arg.partition("=")[0]] == i
    ]


def _refuse_unknown(keys: Iterable[str], file: Path, whole: list[str]) -> None:
    """Raise a UserError for the first key that a recipe does not have."""
    whole = [whole[0], *(arg for arg in whole if arg.startswith("--config="))]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=whole)
    values(whole)
    known = {key for key, _ in leaves(values.config)} | set(OPTIONAL_KEYS)
    for key in keys:
        if key not in known:
            raise UserError(f"config.{key}: {file.stem} has no such key{nearest(key, known)}")


def _take_optional(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command line without OPTIONAL_KEYS, and the values that it gave them.

    ml_collections refuses a key that the recipe does not have.
    """
    rest, taken = [], {}
    for arg in argv:
        key, _, text = arg.removeprefix("--config.").partition("=")
        if not arg.startswith("--config.") or key not in OPTIONAL_KEYS:
            rest.append(arg)
            continue
        kind = type(OPTIONAL_KEYS[key])
        try:
            taken[key] = typed(text, kind)
        except (ValueError, KeyError):
            raise UserError(f"{arg}: write --config.{key}=VALUE, with a {kind.__name__}") from None
    return rest, taken


def _require_home(key: str, config: ConfigDict, recipe: str) -> None:
    """Raise a UserError for an optional key beside which the recipe has nothing, such as masks."""
    home = "model.decoder_width" if key.startswith("model.decoder") else key.rpartition(".")[0]
    home = home.removesuffix(".block")
    if home and home not in {*config, *(name for name, _ in leaves(config))}:
        raise UserError(f"config.{key}: recipe {recipe} has no config.{home}: leave the key out")


def _refuse_old(keys: Iterable[str]) -> None:
    """Raise a UserError for the first key that was renamed or removed."""
    for key in keys:
        if key in RENAMED_KEYS:
            raise UserError(f"config.{key} is now config.{RENAMED_KEYS[key]}")
        if key in REMOVED_KEYS:
            raise UserError(f"config.{key} is now {REMOVED_KEYS[key]}: leave the key out")
