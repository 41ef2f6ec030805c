"""Estimate the speed of pre-training on a GPU, from the runs that were measured on one.

A step moves data for most of its time. The time of an image is taken as

    a * FLOPs / peak + b * (bfloat16 bytes of all tokens that enter blocks) / memory rate

with a and b fitted to the measured runs of the same attention. b is how often a block moves
something as large as its tokens, over the share of the memory rate that it reaches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mae_jax import flops
from mae_jax.models.masking import num_kept
from mae_jax.models.spec import ModelSpec, ViTSpec


class Run(NamedTuple):
    """A measured pre-training step of one GPU; the batch stays on the device."""

    spec: ModelSpec
    attention: str  # cudnn or xla
    device_kind: str
    images_per_second: float


def _mae(width: int, depth: int, heads: int, patch: int, image: int, decoder: ViTSpec) -> ModelSpec:
    encoder = ViTSpec(width, depth, heads, 4 * width)
    return ModelSpec((image, image), (patch, patch), 3, encoder, decoder)


L_16 = _mae(1024, 24, 16, 16, 224, ViTSpec(512, 8, 16, 2048))
B_16 = _mae(768, 12, 12, 16, 224, ViTSpec(512, 8, 16, 2048))
TI_2 = _mae(192, 12, 3, 2, 32, ViTSpec(192, 4, 3, 768))
# benchmarks/RESULTS.md, "On one H100 (2026-11-26)": bfloat16, batches of 128, 256 and 512. A new
# run of benchmarks/gpu.sh adds its rows here.
MEASURED = (
    Run(L_16, "cudnn", "NVIDIA H100", 2195),
    Run(B_16, "cudnn", "NVIDIA H100", 3940),
    Run(TI_2, "cudnn", "NVIDIA H100", 16540),
    Run(L_16, "xla", "NVIDIA H100", 1472),
    Run(B_16, "xla", "NVIDIA H100", 2979),
    Run(TI_2, "xla", "NVIDIA H100", 12260),
)
# The fit misses a measured run by 8 % at most; two machines of one kind differed by 10 % and more.
SPREAD, SPREAD_ELSEWHERE = 0.15, 0.3


def least_seconds(spec: ModelSpec, device_kind: str) -> np.ndarray:
    """Return the seconds of an image by arithmetic at the peak, and of one pass over its tokens.

    Raises:
      KeyError: the peaks of the device are not known.
    """
    chip = flops.chip(device_kind)
    if chip is None or chip.hbm_rate is None or spec.decoder is None:
        raise KeyError(device_kind)
    kept = num_kept(spec.num_patches, spec.mask_ratio)
    seen = spec.num_patches if spec.tokens_in_encoder else kept
    seen += spec.cls_tokens + spec.encoder.registers
    numbers = spec.encoder.depth * spec.encoder.width * seen
    numbers += spec.decoder.depth * spec.decoder.width * (spec.cls_tokens + spec.num_patches)
    arithmetic = 3 * flops.mae(spec, kept) / (chip.tflops * 1e12)
    return np.array([arithmetic, 2 * numbers / (chip.hbm_rate * 1e9)])


def of_plan(config: Mapping[str, Any], spec: ModelSpec | None, result: Mapping[str, Any]) -> dict:
    """Return the images/s and hours of a plan's run on GPUs, as ranges; {} where no run is alike.

    What several GPUs exchange is not counted.

    Args:
      spec: of the masked autoencoder; None = the plan is of something else.
      result: what `plan.plan` knows without a program.
    """
    kind, model = result["device_kind"], config["model"]
    known = kind.startswith(("NVIDIA A100", "NVIDIA H")) and model["dtype"] == "bfloat16"
    if not known or spec is None or spec.decoder is None or model["remat"]:
        return {}
    attention = "xla" if model["attention"] == "xla" else "cudnn"
    rates = [result["devices"] * x for x in images_per_second(spec, attention, kind)]
    images = result["batch_size"] * result["steps"]
    return {"images_per_second": rates, "hours": [images / rate / 3600 for rate in rates[::-1]]}


def images_per_second(spec: ModelSpec, attention: str, device_kind: str) -> tuple[float, float]:
    """Return a range for one GPU in bfloat16: wider for GPUs on which nothing was measured."""
    runs = [run for run in MEASURED if run.attention == attention]
    parts = np.array([least_seconds(run.spec, run.device_kind) for run in runs])
    rates = np.array([run.images_per_second for run in runs])
    # Each run counts by its relative error.
    fitted, *_ = np.linalg.lstsq(parts * rates[:, None], np.ones(len(runs)))
    rate = 1 / float(least_seconds(spec, device_kind) @ fitted)
    known = any(device_kind.startswith(run.device_kind) for run in runs)
    spread = SPREAD if known else SPREAD_ELSEWHERE
    return rate * (1 - spread), rate * (1 + spread)
