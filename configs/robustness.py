"""How a fine-tuned classifier does on images unlike those it learned from.

    mae-jax train --config=configs/robustness.py:init=WORKDIR --workdir=DIR

Arguments: init (workdir of a fine-tuning run, or of converted weights); v2, a, r, sketch (of
ImageNet-V2, -A, -R, -Sketch the tfds dataset, which `mae-jax prepare NAME` makes, or folder:PATH of
class folders; '' = not measured); c (ImageNet-C: folder:PATH of its unpacked archives, or
imagenet2012_corrupted if tfds's copy is prepared); source and split (images with the classes of the
fine-tuning, of which only the names are used; '' = those of that run, or ImageNet's: any of the
other sets will do, such as source=imagenet_a,split=test); variant ('' = as that run's config says).

Makes no update: it measures at step 0 and ends. What is not there is named and left out. Averaged
weights are measured where the run has them.

Paper's numbers, not measured here (Table 13; B/16, L/16, H/14, H/14 at 448; of ImageNet-C the mCE,
lower is better): C 51.7, 41.8, 33.8, 36.8; A 35.9, 57.1, 68.2, 76.7; R 48.3, 59.9, 64.4, 66.5;
Sketch 34.5, 45.3, 49.6, 50.9.
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
