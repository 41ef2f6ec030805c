"""Measure a fine-tuned classifier on images unlike those that it learned from.

    mae-jax train --config=configs/robustness.py:init=WORKDIR --workdir=DIR

Hardware and hours: one pass over each set, no update; ImageNet-C has 75 copies of 50,000 images.
Expected: the paper's Table 13; we have not measured it. For ImageNet-C it has the mean corruption
error (lower is better), for the others top-1 accuracies in percent.

                     B/16  L/16  H/14  H/14 at 448
    ImageNet-C       51.7  41.8  33.8  36.8
    ImageNet-A       35.9  57.1  68.2  76.7
    ImageNet-R       48.3  59.9  64.4  66.5
    ImageNet-Sketch  34.5  45.3  49.6  50.9

Arguments:
    init             workdir of a fine-tuning run, or of converted weights
    v2, a, r, sketch ImageNet-V2, -A, -R and -Sketch: a tfds dataset, which `mae-jax prepare NAME`
                     makes, or folder:PATH of class folders; '' = do not measure
    c                ImageNet-C: folder:PATH of its unpacked archives, or imagenet2012_corrupted if
                     you have tfds's copy
    source, split    images with the classes of the fine-tuning, of which only the names are used;
                     '' = those of that run, or ImageNet's. Any of the sets above will do, such as
                     source=imagenet_a,split=test
    variant          '' = as in that run's config

Sets that are missing are named and left out. Averaged weights are measured if the run has them.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import parse_arg, pretraining
from mae_jax.configs.finetune import get_config as finetune


def get_config(arg=None):
    args = parse_arg(
        arg, init="", variant="", source="", split="", v2="imagenet_v2/matched-frequency",
        a="imagenet_a", r="imagenet_r", sketch="imagenet_sketch", c="",
    )  # fmt: skip
    found = pretraining(args["init"]) or {}
    config = finetune(f"init={args['init']},variant={args['variant']}")
    config.train_for = "0 steps"
    config.start = "averaged" if found.get("ema") else "finetuned"
    config.model.pool = found.get("model", {}).get("pool", config.model.pool)
    data = found.get("data", {})
    config.data.update(
        source=args["source"] or data.get("source", "imagenet2012"),
        split=args["split"] or data.get("split", "train"),
        data_dir=data.get("data_dir", ""),
    )
    config.evals = ConfigDict(
        dict(
            robustness=dict(
                type="robustness", every="", imagenet_v2=args["v2"], imagenet_a=args["a"],
                imagenet_r=args["r"], imagenet_sketch=args["sketch"], imagenet_c=args["c"],
                batch_size=1024,
            )
        )
    )  # fmt: skip
    config.hosts.stall_seconds = 0  # the measurement may take hours
    return config
