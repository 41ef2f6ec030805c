"""The values that the numbers and durations of a config may have, checked before all else.

What depends on several values (a width and its heads, a batch and its mesh), and what a name stands
for, is checked by whoever reads them.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from mae_jax.config import leaves, steps
from mae_jax.errors import UserError


class Range(NamedTuple):
    """The numbers from `low` to `high`; `ends` are brackets as in mathematics: ( leaves low out."""

    low: float
    high: float
    ends: str = "[]"
    whole: bool = False
    several: bool = False  # a tuple of such numbers

    def holds(self, value: Any) -> bool:
        """Return whether a value is such a number, or a tuple of them."""
        if self.several:
            one = self._replace(several=False)
            return isinstance(value, tuple | list) and all(map(one.holds, value))
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return above and below

    def __str__(self) -> str:
        kind = f"{'whole ' * self.whole}number"
        kind = f"{kind}s, each" if self.several else f"a {kind}"
        if self.ends == "[]":
            return f"{kind} from {self.low:,} to {self.high:,}"
        above = f"above {self.low:,}" if self.ends[0] == "(" else f"at least {self.low:,}"
        below = f"below {self.high:,}" if self.ends[1] == ")" else f"at most {self.high:,}"
        return f"{kind} {above} and {below}"


class Tuples(NamedTuple):
    """Tuples of what `numbers` allows."""

    numbers: Range

    def holds(self, value: Any) -> bool:
        """Return whether a value is a tuple, each of whose members `numbers` allows."""
        return isinstance(value, tuple | list) and all(map(self.numbers.holds, value))

    def __str__(self) -> str:
        return f"tuples of {self.numbers}"


def whole(low: int, high: int, several: bool = False) -> Range:
    """Return the whole numbers from `low` to `high`."""
    return Range(low, high, whole=True, several=several)


def several(low: float, high: float, ends: str = "[]") -> Range:
    """Return the tuples of numbers from `low` to `high`."""
    return Range(low, high, ends, several=True)


SHARE = Range(0, 1)
# Pattern of a key -> what its value may be. Upper limits are far above what anybody uses: they only
# catch a slip of the hand.
NUMBERS: dict[str, Range | Tuples] = {
    "seed": whole(0, 2**32 - 1),
    "batch_size": whole(1, 2**24),
    "grad_accum": whole(1, 2**16),
    "mask_ratio": Range(0, 1, "()"),
    "masking.cell": whole(1, 2**14),
    "masking.sigma_*": Range(0, 1000, "(]"),
    "target.components": whole(1, 2**20),
    "sweep.seeds": whole(1, 1000),
    "smoothing": SHARE,
    "erase": SHARE,
    "ema": Range(0, 1, "[)"),
    "trained_blocks": Range(-1, 1000),
    "mix.group": whole(1, 2**24),
    "mix.*": Range(0, 1000),  # parameters of a Beta distribution; 0 = none
    "model.block.registers": whole(0, 2**12),
    "model.block.layer_scale": Range(0, 1000),
    "model.block.rope": Range(0, 10**9),
    "model.block.eps": Range(0, 1, "(]"),
    "model.cls_tokens": whole(1, 2**12),
    "model.channel_groups": Tuples(whole(0, 1023, several=True)),
    "model.channels": whole(1, 1024),
    "model.decoder_maps": whole(0, 1001),
    "model.decoder_share": Range(0, 1, "(]"),
    "model.*depth": whole(1, 1000),
    "model.*width": whole(1, 2**16),
    "model.*heads": whole(1, 2**12),
    "model.mlp_ratio": Range(0, 64, "(]"),
    "model.drop_path": Range(0, 1, "[)"),
    "model.*_size": whole(1, 2**14, several=True),
    "model.scan_unroll": whole(0, 1000),
    "optim.blr": Range(0, 10**4),
    "optim.min_lr": Range(0, 10**4),
    "optim.sweep": several(0, 10**4, "(]"),
    "optim.weight_decay": Range(0, 1000),
    "optim.layer_decay": Range(0, 1, "(]"),
    "optim.eps": Range(0, 1, "(]"),
    "optim.clip_norm": Range(0, 10**6),
    "optim.cooldown": Range(0, 1, "(]"),
    "optim.b[12]": Range(0, 1, "[)"),
    "optim.momentum": Range(0, 1, "[)"),
    "probe.bn_group": whole(1, 2**24),
    "probe.attention_heads": whole(1, 2**12),
    "optim.power": Range(0, 1000),
    "data.classes": whole(0, 255),
    "data.ignore": whole(0, 2**16 - 1),
    "data.scales": several(0, 100, "(]"),
    "data.flip": SHARE,
    "data.repeat": whole(1, 2**12),
    "data.max_bad_fraction": SHARE,
    "data.crop_scale": several(0, 1, "(]"),
    "data.crop_ratio": several(0, 100, "(]"),
    "data.mean": several(-1000, 1000),
    "data.std": several(0, 1000, "(]"),
    "data.value_range": several(-(10**9), 10**9),
    "data.workers": whole(-1, 2**16),
    "evals.*.temperature": Range(0, 1000, "(]"),
    "evals.*.batch_size": whole(1, 2**24),
    "evals.*.bands": whole(1, 1024, several=True),
    "evals.*.images": whole(1, 2**31),
    "evals.*.classes": whole(0, 255),
    "evals.*.ignore": whole(0, 2**16 - 1),
    "evals.*.stride": Range(0, 1, "(]"),
    "evals.*.draws": whole(1, 1000),
    "evals.*.ks": whole(1, 2**31, several=True),
    "evals.*.shots": whole(1, 2**31, several=True),
    "mesh.*": whole(-1, 2**24),
    "checkpoint.keep": whole(1, 2**24),
    "hosts.stall_seconds": Range(0, 10**6),
    "hosts.*": whole(1, 10**6),
}
DURATIONS = ("train_for", "log_every", "checkpoint.*every", "evals.*.every", "optim.warmup")
SWITCHES = (
    "masking.roll", "masking.tokens_in_encoder", "online_probe", "model.block.qk_norm",
    "model.float32_sums", "model.remat", "data.synthetic", "data.shift", "data.distort", "frozen",
    "evals.*.of_training_images", "evals.*.shift",
)  # fmt: skip
TEXTS = (
    "task", "resume", "init_from", "optim.schedule", "start", "features", "*.name", "probe.head",
    "*.pool", "model.*dtype", "model.attention", "model.block.norm", "model.decoder", "head.layers",
    "data.source", "data.split", "data.crop", "data.augment", "data.data_dir", "data.resizer",
    "data.palette", "evals.*.type", "evals.*.source", "evals.*split", "evals.*.feature",
    "evals.*.layers", "evals.*.prefix", "evals.*.predict", "evals.*.imagenet_*",
    "evals.*.distances", "evals.*.bank_dtype", "evals.*.palette",
)  # fmt: skip


def check(config: Mapping[str, Any]) -> None:
    """Check every number, switch, text and duration of a config by itself.

    Numbers under other keys, which a fork may add, must be finite.

    Raises:
      UserError: the first value that cannot work.
    """
    for key, value in leaves(config):
        limit = next((NUMBERS[pattern] for pattern in NUMBERS if matches(key, (pattern,))), None)
        if limit and not limit.holds(value):
            raise UserError(f"config.{key}={value!r}: give {limit}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value!r}: give a finite number")
        if matches(key, SWITCHES) and not isinstance(value, bool):
            raise UserError(f"config.{key}={value!r}: give True or False")
        if matches(key, TEXTS) and not isinstance(value, str):
            raise UserError(f"config.{key}={value!r}: give text in quotes")
        if matches(key, DURATIONS):
            try:
                steps(value, batch_size=2**24, steps_per_epoch=1)  # other units come later
            except UserError as error:
                raise UserError(f"config.{key}: {error}") from None


@cache
def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a key is one of some patterns, in which * stands for any text."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
