"""What the configs share: typed arguments of get_config, and the sizes of the published models."""

import json

from etils import epath
from ml_collections import ConfigDict

# width, depth, heads. Ti and S: arXiv 2012.12877; B and L: arXiv 2010.11929; H: as MAE uses it. All
# of B, L and H agree with the official parameter counts (tests/test_models.py). 2B and 6.5B: widths
# and depths of arXiv 2303.13496, where 12 * width^2 * depth gives 1.89e9 and 6.44e9; their numbers
# of heads are from memory and were not checked.
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
    """'variant=L/16,epochs=1600' -> a dict of the defaults' types.

    Raises:
      ValueError: a key that is not among the defaults, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults or not equals:
            raise ValueError(
                f"config argument {item!r}: write key=value with one of {', '.join(defaults)},"
                " several separated by commas"
            )
        kind = type(defaults[key])
        try:
            values[key] = (
                {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            )
        except (ValueError, KeyError):
            raise ValueError(f"config argument {key}={text!r}: wants a {kind.__name__}") from None
    return values


def model_sizes(variant):
    """'L/16' -> width, depth, heads, patch_size.

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
        scan_unroll=1,  # blocks per round of the loop over blocks; the depth: no loop
        remat=False,  # True: compute activations again in the backward pass, to save memory
        attention="xla",  # or cudnn, on NVIDIA GPUs
    )


def reading():
    """Return the part of config.data that says how images are read."""
    return dict(
        data_dir="",  # folder of the tfds datasets; '' = where tfds keeps them
        resizer="pillow",  # the reference; or fast: a quarter of its time, nearly equal pixels
        workers=0,  # reading processes; 0 = threads of this process
        max_bad_fraction=0.01,  # share of unreadable images above which the run stops
        synthetic=False,  # True: the same random batch for ever, to time the model without input
    )


def hosts():
    """Return config.hosts: when hosts of a distributed run give each other up, in seconds."""
    return ConfigDict(
        dict(
            connect_seconds=50,  # at the start, hosts wait this long for each other
            heartbeat_seconds=100,  # all hosts end when one was not heard from for this long
            stall_seconds=600,  # all stacks are printed when no step ends for this long; 0: never
        )
    )


def pretraining(path):
    """The config (a dict) of the run that a checkpoint is of, or None if it is not to be found.

    Args:
      path: its workdir, or a checkpoint in there.
    """
    if not path:
        return None
    folder = epath.Path(path)
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "config.json").exists():
            found = json.loads((place / "config.json").read_text())
            return found if "model" in found else None  # such as that of transformers
    return None


def adopt(config, found, variant):
    """Takes images and network of the run that is gone on from; `variant` says another network.

    Args:
      found: what `pretraining` gave. None: the network is `variant`, or B/16.
    """
    if found is not None:
        for key in ("image_size", "channels", "width", "depth", "heads", "patch_size", "mlp_ratio"):
            value = found["model"][key]
            config.model[key] = tuple(value) if isinstance(value, list) else value
        config.data.update(mean=tuple(found["data"]["mean"]), std=tuple(found["data"]["std"]))
    if found is None or variant:
        config.model.update(model_sizes(variant or "B/16"))
