"""Train the published linear probe of a pre-trained encoder, and a sweep over its learning rate.

    mae-jax train --config=configs/linprobe.py:init=WORKDIR --workdir=DIR

Hardware and hours: the official code took its authors 2 h 20 min for B/16 on 32 V100.
Expected: top-1 accuracies in percent after 1600 epochs of pre-training on normalised pixels; we
have not measured them.

    variant  paper  official code
    B/16     68.0   67.8
    L/16     75.8   76.0
    H/14     76.6   77.2

Arguments:
    init        workdir of a pre-training run
    variant     '' = as in that run's config, or B/16
    source      the dataset
    test        the split to measure on
    epochs      0 = 90; 50 suffice for L and H
    batch_size  0 = 16384
    select      percent of the training images that are held out to choose the best rate of the
                sweep; 0 = no sweep, and all images are trained on, exactly as published
    head        linear or attentive; the attentive head is not the paper's and was not tuned
    small       true = for a few thousand labelled images on one machine: 20 epochs of batches of
                64, a milder crop, 20 percent held out, and AdamW in place of LARS, whose published
                rates barely move a head in a few hundred steps. It was tried on digits only.

Several heads are trained at once on the same frozen features, one for each base rate. The results
are eval/top1, of the rate config.optim.blr (the published one unless small), and eval/best_top1, of
the rate that is best on the held-out images.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import adopt, parse_arg, pretraining, without_decoder
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(
        arg, variant="", init="", source="imagenet2012", test="validation", epochs=0,
        batch_size=0, select=-1, head="linear", small=False,
    )  # fmt: skip
    linear, small = args["head"] == "linear", args["small"]
    batch_size = args["batch_size"] or (64 if small else 16384)
    if not -1 <= args["select"] < 100:
        raise ValueError(f"config argument select={args['select']}: give a percentage below 100")
    select = args["select"] if args["select"] >= 0 else (20 if small else 1)

    config = recipe(f"batch_size={batch_size}")
    config.task = "probe"
    config.train_for = f"{args['epochs'] or (20 if small else 90)} epochs"
    config.init_from = args["init"]
    config.features = "pretrained"  # or random, pixels: baselines that have learned nothing
    without_decoder(config)

    config.probe = ConfigDict(
        dict(
            head=args["head"],
            pool="cls",  # or global_pool, for a linear head
            bn_group=min(512, batch_size),  # images that share statistics, for a linear head
            attention_heads=8,  # for an attentive head
        )
    )
    config.optim = ConfigDict(
        dict(
            name="lars" if linear else "adamw",
            blr=0.1 if linear else 1e-3,
            # base rates of more heads
            sweep=(0.01, 0.03, 0.3, 1.0) if linear else (1e-4, 3e-4, 3e-3),
            momentum=0.9,  # for lars
            b1=0.9,  # b1 and b2: for adamw
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
