"""Pieces that recipes share: typed arguments, sizes of models, settings that are rarely changed."""

import ast
import json

from etils import epath
from ml_collections import ConfigDict

# width, depth, heads. Sources: Ti and S: arXiv 2012.12877; B and L: arXiv 2010.11929; H: MAE. The
# parameter counts of B, L and H agree with the official ones (tests/test_models.py). 2B and 6.5B:
# widths and depths of arXiv 2303.13496, where 12 * width^2 * depth gives 1.89e9 and 6.44e9; their
# numbers of heads are from memory and were not checked.
SIZES = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
    "2B": (2560, 24, 32),
    "6.5B": (4096, 32, 32),
}


def parse_arg(arg, **defaults):
    """Parse the argument of a recipe, such as 'variant=L/16,epochs=1600', into a dict.

    Each value gets the type of its default.

    Raises:
      ValueError: a key that is not among the defaults, or a value of another type.
    """
    args = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults or not equals:
            raise ValueError(
                f"config argument {item!r}: write key=value with one of {', '.join(defaults)},"
                " several separated by commas"
            )
        kind = type(defaults[key])
        try:
            args[key] = typed(text, kind)
        except (ValueError, KeyError):
            raise ValueError(f"config argument {key}={text!r}: wants a {kind.__name__}") from None
    return args


def to_arg(args):
    """Return what `parse_arg` parses: the argument of a recipe as text."""
    return ",".join(f"{key}={value}" for key, value in args.items())


def typed(text, kind):
    """Return a text as a value of a type; raise ValueError or KeyError if it is none."""
    if kind is tuple:
        try:
            return tuple(ast.literal_eval(text))
        except (SyntaxError, TypeError) as error:
            raise ValueError(text) from error
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)


def choose(args, key, choices):
    """Return what an argument of a recipe chooses.

    Raises:
      ValueError: it is none of the choices.
    """
    if args[key] not in choices:
        raise ValueError(f"{key}={args[key]!r}: give one of {', '.join(map(str, choices))}")
    return choices[args[key]]


def model_sizes(variant):
    """Return width, depth, heads and patch_size of a variant such as 'L/16'.

    Raises:
      ValueError: the size is unknown or the patch is not a number.
    """
    size, _, patch = variant.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"variant {variant!r}: write SIZE/PATCH such as B/16, with a SIZE of {', '.join(SIZES)}"
        )
    width, depth, heads = SIZES[size]
    return {"width": width, "depth": depth, "heads": heads, "patch_size": (int(patch),) * 2}


def compute():
    """Return the part of config.model that changes only speed, memory and rounding."""
    return dict(
        dtype="bfloat16",  # of matrix products; parameters and losses are float32
        residual_dtype="float32",  # of the tokens between blocks
        scan_unroll=0,  # blocks per iteration of their loop; 0: all, without a loop, but 1 on CPUs
        remat=False,  # True: compute activations again in the backward pass, to save memory
        attention="auto",  # cudnn where it can run (NVIDIA GPUs, 16 bits), else xla, our own
    )


def reading():
    """Return the part of config.data that says where and how images are read."""
    return dict(
        data_dir="",  # folder of the tfds datasets; '' = where tfds keeps them
        resizer="pillow",  # the reference; or fast: a quarter of its time, nearly equal pixels
        workers=-1,  # processes that read; -1 = as the cores allow, 0 = threads
        max_bad_fraction=0.01,  # share of unreadable images above which the run stops
        synthetic=False,  # True: one random batch for ever, to time the model without its input
    )


def hosts():
    """Return config.hosts: how long the hosts of a run wait, in seconds."""
    return ConfigDict(
        dict(
            connect_seconds=50,  # for each other at the start
            heartbeat_seconds=100,  # for a sign of life of a host; then all hosts end
            stall_seconds=600,  # for the end of a step; then they print all stacks; 0: never
        )
    )


def without_decoder(config):
    """Remove what a config has for pre-training only: masks, target and decoder."""
    for key in ("mask_ratio", "masking", "target"):
        del config[key]
    for key in ("decoder_width", "decoder_depth", "decoder_heads"):
        del config.model[key]


def pretraining(path):
    """Return the config of the run that made a checkpoint, as a dict; None if there is none.

    Args:
      path: the run's workdir, or a checkpoint in it; '' gives None.
    """
    if not path:
        return None
    folder = epath.Path(path)
    for parent in (folder, folder.parent, folder.parent.parent):
        if (parent / "config.json").exists():
            config = json.loads((parent / "config.json").read_text())
            return config if "model" in config else None  # transformers has such files, too
    return None


def adopt(config, pretrained, variant):
    """Give `config` the images and the network of the run that it starts from.

    Args:
      pretrained: what `pretraining` returned; None: the network is `variant`, or B/16.
      variant: another network than that of `pretrained`; '' = the same.
    """
    if pretrained is not None:
        for key in ("image_size", "channels", "width", "depth", "heads", "patch_size", "mlp_ratio"):
            value = pretrained["model"][key]
            config.model[key] = tuple(value) if isinstance(value, list) else value
        if "cls_tokens" in pretrained["model"]:
            config.model.cls_tokens = pretrained["model"]["cls_tokens"]
        if groups := pretrained["model"].get("channel_groups"):
            config.model.channel_groups = tuple(map(tuple, groups))
        if block := pretrained["model"].get("block"):
            config.model.block = ConfigDict(block)
        data = pretrained["data"]
        for key in ("mean", "std", "value_range"):
            config.data[key] = tuple(data.get(key, ()))
    if pretrained is None or variant:
        config.model.update(model_sizes(variant or "B/16"))
