"""The examples of docs/forking.md at the smallest size, and their modules."""

import contextlib
import importlib
import sys
from pathlib import Path

import jax

from mae_jax.commands import recipes, running
from mae_jax.metrics import writer

ROOT = Path(__file__).parents[1]
NAMES = ("mask", "target", "decoder", "source", "evaluator", "objective")
TINY = {
    "model.image_size": (32, 32), "model.width": 16, "model.depth": 1, "model.heads": 2,
    "model.decoder_width": 32, "model.decoder_depth": 1, "model.decoder_heads": 2,
    "model.dtype": "float32", "batch_size": 16, "train_for": "2 steps", "optim.warmup": "1 steps",
    "log_every": "1 steps", "data.workers": 0,
}  # fmt: skip
DIGITS = {"data.source": "bundled:digits", "data.split": "train[:64]"}


@contextlib.contextmanager
def left_no_modules():
    """Leave as they were the path, to whose front recipes put folders, and the modules."""
    path, before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (*NAMES, "latent"):
            del sys.modules[name]


def config_of(example, argument="", **keys):
    """Return the example's recipe, as the command line makes it, at the smallest size."""
    path = ROOT / "examples" / example / "recipe.py"
    colon = f":{argument}" if argument else ""
    flags = [f"--config.{key}={value}" for key, value in (TINY | keys).items()]
    return recipes.parse([f"--config={path}{colon}", *flags], running.define, "train")[0]


def module_of(name):
    """Return a module of the examples, as a recipe finds it."""
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module(name)


def run(config, workdir):
    """Run a config, and return the logged values by name."""
    running.run(config, workdir, devices=jax.devices()[:1])
    values: dict[str, list] = {}
    for line in writer.read(workdir / "metrics.jsonl"):
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    return values
