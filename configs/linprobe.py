"""The published linear probe of a pre-trained encoder, and a sweep over its learning rate.

    mae-jax train --config=configs/linprobe.py:init=WORKDIR --workdir=DIR

Arguments: init (workdir of a pre-training run), variant ('' = as the config of that run says, or
B/16), source, test (the split to measure on), epochs (0 = 90; 50 suffice for L and H), batch_size
(0 = 16384), select (percent of the training images held out to choose the best rate of the sweep;
0 = no sweep, all images are trained on: the published setting to the letter), head (linear or
attentive), small=true (for a few thousand labelled images on one machine: AdamW in place of LARS,
whose published rates barely move a head in a few hundred steps; other defaults 20 epochs of batches
of 64, a milder crop, and 20 percent held out. It was tried on digits alone).

Several heads are trained at once on the same frozen features, one for each base rate. Reported are
config.optim.blr, the published rate unless small (eval/top1), and the one that is best on the
held-out share (eval/best_top1).

Paper's numbers, not measured here (top-1, norm-pix, 1600 epochs of pre-training): B/16 68.0, L/16
75.8, H/14 76.6; the official code gave its authors 67.8, 76.0, 77.2 in 2 h 20 min for B on 32 V100.
The attentive head is not of the paper, and its settings were not tuned.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import adopt, parse_arg, pretraining
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(
        arg, variant="", init="", source="imagenet2012", test="validation", epochs=0,
        batch_size=0, select=-1, head="linear", small=False,
    )  # fmt: skip
    linear, small = args["head"] == "linear", args["small"]
    batch_size = args["batch_size"] or (64 if small else 16384)
    select = args["select"] if args["select"] >= 0 else (20 if small else 1)

    config = recipe(f"batch_size={batch_size}")
    config.task = "probe"
    config.train_for = f"{args['epochs'] or (20 if small else 90)} epochs"
    config.init_from = args["init"]
    config.features = "pretrained"  # or random, pixels: what features that learned nothing give
    for key in ("mask_ratio", "masking", "target", "online_probe"):
        del config[key]
    for key in ("decoder_width", "decoder_depth", "decoder_heads"):
        del config.model[key]

    config.probe = ConfigDict(
        dict(
            head=args["head"],
            pool="cls",  # or global_pool; of a linear head
            bn_group=min(512, batch_size),  # images that share statistics; of a linear head
            attention_heads=8,  # of an attentive head
        )
    )
    config.optim = ConfigDict(
        dict(
            name="lars" if linear else "adamw",
            blr=0.1 if linear else 1e-3,
            sweep=(0.01, 0.03, 0.3, 1.0) if linear else (1e-4, 3e-4, 3e-3),  # more rates
            momentum=0.9,  # of lars
            b1=0.9,  # of adamw
            b2=0.999,
            weight_decay=0.0 if linear else 0.05,
            warmup="10 epochs",
            min_lr=0.0,
        )
    )
    config.data.update(source=args["source"], crop="probe", crop_scale=(0.08, 1.0))
    if small:
        config.optim.update(warmup="2 epochs")
        config.data.crop_scale = (0.8, 1.0)
        if linear:
            config.optim.update(name="adamw", blr=0.04, sweep=(0.004, 0.012, 0.12, 0.4))
    if select:
        config.data.split = f"train[:{100 - select}%]"
    else:
        config.optim.sweep = ()
    config.evals = ConfigDict(
        dict(
            probe=dict(
                type="probe",
                every="10 epochs",
                source="",
                split=args["test"],
                select_split=f"train[{100 - select}%:]" if select else "",
                batch_size=1024,
            )
        )
    )
    config.checkpoint.update(every="5 epochs", keep_every="")

    adopt(config, pretraining(args["init"]), args["variant"])
    return config
