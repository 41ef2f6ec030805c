"""Segment with a linear head: on a frozen encoder, or fine-tuned with it.

    mae-jax train --config=configs/segment.py:init=WORKDIR,source=segfolder:PATH --workdir=DIR

PATH/SPLIT/images and PATH/SPLIT/labels hold images and PNG maps of class numbers; docs/dense.md.
For ADE20K: mae-jax prepare ade20k --zip=ADEChallengeData2016.zip --out=PATH, and shift=true.

Hardware and hours: with recipe=dinov2 40,000 steps of 16 crops of 512 pixels; the encoder runs
forward only. One GPU of 24 GB holds B/16. We have not measured the hours.
Expected: mIoU on ADE20K in percent, frozen, one layer, as others report; we have not measured it.

    variant  DINOv2's paper  Pixio's paper
    L/16     -               34.2 (36.2 at block 18)
    H/14     33.3            35.1 (38.4 at block 20)

Arguments:
    init        workdir of a pre-training run; patches of 14 want an image_size such as 518
    variant     '' = as in that run's config, or B/16
    source      pairs of images and label maps
    test        the split to measure on
    recipe      dinov2 (crops of 512, scales 0.5 to 2, distortion, 40,000 steps, a polynomial rate),
                or short (60 epochs, crops of the size of the pre-training, scales 1 to 2)
    classes     0 = as many as PATH/classes.txt names
    ignore      the number of pixels without a class
    shift       true = 0 means without a class, and classes begin at 1, as in ADE20K
    layers      1 = the last block; 4 = the last four, joined
    finetune    true = train the encoder too, at a rate that falls from block to block
    image_size  0 = the recipe's
    batch_size  0 = 16

--config.features=random (without init) measures an untrained encoder, or with finetune=true trains
one from scratch; --config.features=pixels puts the head on the pixels of a patch themselves. MAE's
best block is often not the last: --config.head.layers=18, or several, such as 6,12,18,24.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import adopt, parse_arg, pretraining, without_decoder
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(
        arg, variant="", init="", source="segfolder:ade20k", test="validation", recipe="dinov2",
        classes=0, ignore=255, shift=False, layers=1, finetune=False, image_size=0, batch_size=0,
    )  # fmt: skip
    if args["recipe"] not in ("dinov2", "short"):
        raise ValueError(f"config argument recipe={args['recipe']!r}: write dinov2 or short")
    long, batch_size = args["recipe"] == "dinov2", args["batch_size"] or 16
    config = recipe(f"batch_size={batch_size}")
    config.task = "segment"
    config.train_for = "40000 steps" if long else "60 epochs"
    config.init_from = args["init"]
    config.features = "pretrained"  # or random, pixels: baselines that have learned nothing
    config.frozen = not args["finetune"]
    without_decoder(config)
    adopt(config, pretraining(args["init"]), args["variant"])
    if args["image_size"] or long:
        config.model.image_size = (args["image_size"] or 512,) * 2
    config.model.drop_path = 0.1 if args["finetune"] else 0.0  # of the last block
    depth = config.model.depth
    last = range(max(depth - args["layers"], 0) + 1, depth + 1)
    config.head = ConfigDict(
        dict(layers="last" if args["layers"] == 1 else ",".join(map(str, last)))
    )
    config.optim = ConfigDict(
        dict(
            # Rates are per 256 images: 1e-3 for 16 of them, and 1e-4 when the encoder is trained.
            blr=1.6e-3 if args["finetune"] else 1.6e-2,
            b1=0.9,
            b2=0.999,
            weight_decay=0.05 if args["finetune"] else 1e-4,
            layer_decay=0.65,  # of the rate, from block to block, when the encoder is trained
            warmup="1500 steps" if long else "3 epochs",
            power=1.0,  # of the polynomial by which the rate falls
            min_lr=0.0,
        )
    )
    for key in ("crop", "crop_scale", "crop_ratio"):
        del config.data[key]
    config.data.update(source=args["source"], flip=0.5)
    config.data.classes = args["classes"]
    config.data.ignore = args["ignore"]
    config.data.shift = args["shift"]
    config.data.palette = ""  # a file of "R G B NAME", for maps of colours
    config.data.scales = (0.5, 2.0) if long else (1.0, 2.0)  # 1: as large as covers a crop
    config.data.distort = True  # brightness, contrast, saturation and hue
    config.evals = ConfigDict(
        dict(
            segment=dict(
                type="segment",
                every="4000 steps" if long else "20 epochs",
                source="",
                split=args["test"],
                batch_size=16,
                stride=2 / 3,  # of the sliding window, as a share of its size
            )
        )
    )
    config.checkpoint.update(every="2000 steps" if long else "5 epochs", keep_every="")
    return config
