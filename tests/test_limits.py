"""Every value of every recipe is refused by name, or taken, when it is zero, negative, huge, not a
number or of another type; what is refused is refused before anything is written."""

import functools
import importlib
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from PIL import Image
from segments import write_folder
from tiny import DECODER, GREY, MODEL

from mae_jax import limits
from mae_jax.commands import running
from mae_jax.commands.recipes import names
from mae_jax.config import OPTIONAL_KEYS
from mae_jax.errors import UserError

KINDS = ("zero", "negative", "huge", "nan", "type")
# Pattern of a key -> which of the wrong-looking values work: 0 often does. Whatever is not listed
# must be refused.
LEGAL = {
    "bands:model.channel_groups": "zero",
    "linprobe:optim.blr": "",  # a head that cannot learn
    "knn:optim.blr": "",
    "segment:optim.blr": "",
    "data.classes": "zero",  # as many as classes.txt names
    "data.ignore": "zero",
    "optim.power": "zero",
    "finetune:ema": "",  # its averaged weights are evaluated
    "seed": "zero",
    "smoothing": "zero",
    "erase": "zero",
    "ema": "zero",
    "mix.mixup": "zero",
    "mix.cutmix": "zero",
    "trained_blocks": "zero negative",  # -1 = all
    "model.drop_path": "zero",
    "model.block.layer_scale": "zero",
    "model.block.registers": "zero",
    "model.block.rope": "zero",
    "model.scan_unroll": "zero",
    "model.decoder_maps": "zero",  # all
    "optim.blr": "zero",
    "optim.min_lr": "zero",
    "optim.weight_decay": "zero",
    "optim.b1": "zero",
    "optim.b2": "zero",
    "optim.momentum": "zero",
    "data.flip": "zero",
    "data.max_bad_fraction": "zero",
    "data.mean": "zero negative",
    "data.workers": "zero negative",  # -1 = as many as the cores allow
    "mesh.*": "zero negative",  # -1 = what remains
    "hosts.stall_seconds": "zero",  # never
    "checkpoint.keep_every": "zero",
    "checkpoint.every": "zero",
    "log_every": "zero",
    "train_for": "zero",
    "optim.warmup": "zero",
    "evals.*.every": "zero",
    "evals.*.prefix": "zero negative huge nan",  # any text
    "init_from": "zero negative huge nan",  # looked for by `run`: the next test
    "resume": "zero negative huge nan",
    "data.data_dir": "zero negative huge nan",  # not looked at for the bundled images
}


@functools.cache
def pairs():
    """Return a folder of images with label maps, of which no pixel is a 0 or without a class."""
    root = write_folder(Path(tempfile.mkdtemp()) / "pairs", train=9, test=3, size=(16, 16))
    for file in root.rglob("labels/*.png"):
        Image.fromarray(np.asarray(Image.open(file)) % 2 + 1).save(file)
    return root


def recipe(name):
    """Return a recipe with a small model, on digits or pairs that need no download."""
    arguments = {"finetune": "scratch=true", "knn": "", "linprobe": "", "robustness": ""}
    config = importlib.import_module(f"mae_jax.configs.{name}").get_config(arguments.get(name, ""))
    config.model.update(MODEL | {"image_size": (16, 16)})
    if "decoder_width" in config.model:
        config.model.update(DECODER)
    config.data.update(GREY, source="bundled:digits", split="train[:64]", augment="")
    config.batch_size = 16
    if name.startswith("segment"):
        config.features, config.init_from, config.head.layers = "random", "", "last"
        config.data.update(source=f"segfolder:{pairs()}", split="train[:8]")
        config.batch_size = 8
        del config.data["augment"]
    elif "features" in config:
        config.features, config.init_from = "random", ""
        config.probe.update(bn_group=8, attention_heads=4)
    if name == "bands":
        config.model.channel_groups, config.evals.reconstruct.bands = ((0,),), (1,)
    if "mix" in config:
        config.mix.group = 8
    if name == "robustness":
        config.start = "xavier"
        for key in config.evals.robustness:
            if key.startswith("imagenet"):
                config.evals.robustness[key] = ""
        config.evals.robustness.imagenet_r = "bundled:digits"
    for cfg in config.evals.values():
        cfg.batch_size = 16
        if "split" in cfg:
            cfg.split = "test[:2]" if name.startswith("segment") else "test[:16]"
        if "source" in cfg:
            cfg.source = ""
        if "bank_split" in cfg:
            cfg.update(bank_split=config.data.split)
            cfg.update({key: (1,) for key in ("ks", "shots") if key in cfg})
        if "select_split" in cfg:
            cfg.select_split = "train[64:80]"
    return config


def wrong(kind, value):
    """Return a value that looks wrong in the place of `value`; None if this type has none."""
    if isinstance(value, tuple | list):
        if kind == "type":
            return "text"
        return tuple(wrong(kind, x) for x in value) if value else None
    if isinstance(value, bool):
        return "yes" if kind == "type" else None
    if isinstance(value, str):
        unit = value.split()[-1] if value.endswith(("steps", "epochs")) else ""
        text = {"zero": "0", "negative": "-1", "huge": "1e30", "nan": "nan", "type": 5}[kind]
        return f"{text} {unit}" if unit and kind != "type" else text
    whole = isinstance(value, int)
    huge = 10**18 if whole else 1e30
    numbers = {"zero": 0, "negative": -1, "huge": huge, "nan": float("nan"), "type": "text"}
    return numbers[kind] if whole or kind in ("nan", "type") else float(numbers[kind])


def is_legal(name, key, kind):
    for candidate in (f"{name}:{key}", key):
        for pattern, kinds in LEGAL.items():
            if fnmatchcase(candidate, pattern):
                return kind in kinds.split()
    return False


def changed(config, key, value):
    flat = flatten_dict(config.to_dict())
    flat[tuple(key.split("."))] = value
    return ConfigDict(unflatten_dict(flat), type_safe=False)


def accept(config):
    """Do what `mae-jax train` does with a config before it writes anything."""
    limits.check(config)
    running.build(config)


@functools.cache
def works(name):
    """Return a recipe that is accepted as it is."""
    config = recipe(name)
    accept(config)
    return config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [x for x in names() if x != "encoders"])  # others' rows
def test_a_wrong_value_is_refused_by_the_name_of_its_key(name, kind):
    config = works(name)
    failures = []
    for path, value in flatten_dict(config.to_dict()).items():
        key, bad = ".".join(path), wrong(kind, value)
        if bad is None or is_legal(name, key, kind):
            continue
        try:
            accept(changed(config, key, bad))
        except UserError as error:
            if path[-1] not in str(error) and str(bad) not in str(error):
                failures.append(f"{key}={bad!r}: {error}")
        except Exception as error:
            failures.append(f"{key}={bad!r}: {error!r}")
        else:
            failures.append(f"{key}={bad!r} was taken")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("key", OPTIONAL_KEYS)
def test_a_key_that_no_recipe_names_has_its_limits_too(key):
    config, default = recipe("pretrain"), OPTIONAL_KEYS[key]
    limits.check(changed(config, key, default))
    for kind in ("type", "nan", "negative"):
        bad = wrong(kind, default)
        if bad is not None and (kind == "type" or not isinstance(default, str)):
            with pytest.raises(UserError, match=f"config.{key}="):
                limits.check(changed(config, key, bad))


@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_a_run_that_starts_from_nothing_leaves_nothing(key, tmp_path):
    config = changed(recipe("pretrain"), key, str(tmp_path / "missing"))
    with pytest.raises(UserError, match=f"config.{key}=.*holds no checkpoint"):
        running.run(config, tmp_path / "new" / "workdir")
    assert not list(tmp_path.iterdir())


def test_a_missing_start_is_named_before_data_that_are_missing_too(tmp_path):
    config = recipe("finetune")
    config.init_from, config.data.source = str(tmp_path / "missing"), "folder:nowhere"
    with pytest.raises(UserError, match="config.init_from=.*holds no checkpoint"):
        running.run(config, tmp_path / "new")


@pytest.mark.parametrize("duration", ["1.5 steps", "1e30 epochs", "-1 steps", "5 weeks", "many"])
def test_a_duration_that_cannot_be_is_refused_by_its_key(duration):
    config = changed(recipe("pretrain"), "train_for", duration)
    with pytest.raises(UserError, match="config.train_for: '.*'"):
        accept(config)


def test_a_function_that_is_no_target_is_refused():
    with pytest.raises(UserError, match="math.sqrt"):
        accept(changed(recipe("pretrain"), "target.name", "math.sqrt"))


@pytest.mark.parametrize("kind", ["zero", "negative"])
@pytest.mark.parametrize("name", ["pretrain", "finetune", "linprobe"])
def test_the_legal_values_together_take_a_step(name, kind, tmp_path):
    config = recipe(name)
    for path, value in flatten_dict(config.to_dict()).items():
        key = ".".join(path)
        if is_legal(name, key, kind) and not isinstance(value, str) and path[0] != "mesh":
            config = changed(config, key, wrong(kind, value))
    config.train_for, config.optim.warmup = "1 steps", "0 steps"
    state = running.run(config, tmp_path, devices=jax.devices()[:1])
    assert int(state.step) == 1
