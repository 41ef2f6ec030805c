"""Masked autoencoding on CIFAR-10: a published protocol for a GPU, a small one for CPUs.

    mae-jax train --config=configs/cifar10.py:data=PATH --workdir=DIR
    mae-jax train --config=configs/cifar10.py:data=PATH,small=true --workdir=DIR
    mae-jax train --config=configs/cifar10.py:data=PATH,task=finetune,init=DIR --workdir=DIR_tuned

PATH holds train/CLASS/*.jpg and test/CLASS/*.jpg. Without data=, tfds's cifar10 is read.

Hardware and time: ViT-Ti/2 for 150 epochs, under 10 minutes of one H100 (not yet run). The small
model for 40 epochs, about an hour of 2 CPU cores; `bash launch/study.sh cifar10 PATH` makes all its
runs.
Expected: for ViT-Ti/2 a course repository publishes a loss of .0401 (pixels in [-1, 1], no norm per
patch), a linear probe of 53.1 %, 82.2 % fine-tuned and 73.0 % from scratch. The small model's
numbers are our own, in docs/cifar10.md.

Arguments:
    data        folder of the images; '' = tfds's cifar10
    task        pretrain, finetune, linear, attentive or knn
    small       true: width 128, 6 blocks, patch 4, a decoder of 64 x 2; in float32, for CPUs
    init        workdir of the pre-training; '' = from scratch, or features that learned nothing
    epochs      0 = pretrain 150, finetune 50; small: pretrain 40, finetune by its labels
    longer      finetune: multiplies the epochs
    mask_ratio  of the pre-training
    labels      finetune: percent of the training images, 1, 10 or 100
    pixels      true = linear, attentive and knn see the pixels
    blr         of finetune; 0 = the recipe's
    seed

Rates of the small model were chosen on training images that the runs did not see.
"""

from mae_jax.configs.common import choose, parse_arg
from mae_jax.configs.finetune import get_config as finetune_recipe
from mae_jax.configs.knn import get_config as knn_recipe
from mae_jax.configs.linprobe import get_config as probe_recipe
from mae_jax.configs.pretrain import get_config as pretrain_recipe

IMAGES = 50_000
# Percent of the labels -> epochs and batch size of the small model.
LABELS = {1: (40, 50), 10: (10, 64), 100: (2, 128)}


def get_config(arg=None):
    args = parse_arg(
        arg, data="", task="pretrain", small=False, init="", epochs=0, longer=1, mask_ratio=0.75,
        labels=100, pixels=False, blr=0.0, seed=0,
    )  # fmt: skip
    make = {
        "pretrain": pretrain, "finetune": finetune, "linear": probe, "attentive": probe, "knn": knn
    }  # fmt: skip
    config = choose(args, "task", make)(args)
    config.seed = args["seed"]
    config.model.update(image_size=(32, 32), channels=3, width=192, depth=12, heads=3)
    config.model.patch_size = (2, 2)
    config.data.source = f"folder:{args['data']}" if args["data"] else "cifar10"
    if args["small"]:
        config.model.update(width=128, depth=6, heads=4, patch_size=(4, 4), dtype="float32")
        config.data.update(mean=(0.492, 0.483, 0.447), std=(0.245, 0.243, 0.261))
    else:  # as published: pixels in [-1, 1] as they are, nothing cropped or mirrored
        config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3, crop="center", flip=0.0)
    config.log_every = "100 steps"
    return config


def pretrain(args):
    small = args["small"]
    epochs = args["epochs"] or (40 if small else 150)
    config = pretrain_recipe(f"epochs={epochs},batch_size={256 if small else 512}")
    config.mask_ratio = args["mask_ratio"]
    config.model.update(decoder_width=192, decoder_depth=4, decoder_heads=3)
    if small:
        config.model.update(decoder_width=64, decoder_depth=2, decoder_heads=2)
        config.optim.blr = 1e-3
    else:
        config.target.name = "pixels"
    config.optim.warmup = f"{epochs / 10:g} epochs"
    config.evals.reconstruct.update(
        every="25 epochs", split="test[:5%]", images=500, batch_size=100
    )
    config.checkpoint.update(every="2 epochs" if small else "25 epochs", keep_every="")
    return config


def finetune(args):
    labels, small, scratch = args["labels"], args["small"], not args["init"]
    epochs, batch_size = choose(args, "labels", LABELS)
    if not small:
        epochs, batch_size = 50, 128
    if args["longer"] < 1:
        raise ValueError(f"longer={args['longer']}: give 1 or more")
    epochs = (args["epochs"] or epochs) * args["longer"]
    config = finetune_recipe(
        f"init={args['init']},test=test,epochs={epochs},batch_size={batch_size},small=true,"
        f"scratch={scratch}"
    )
    # Each seed sees other labelled images, unless it sees all of them.
    count = IMAGES * labels // 100
    first = args["seed"] * count % IMAGES
    config.data.split = f"train[{first}:{first + count}]"
    config.model.pool = "avg" if small else "cls"
    config.optim.warmup = f"{epochs / 10:g} epochs"
    if not small:  # as published
        config.smoothing = 0.0
        config.optim.update(blr=1e-3, b2=0.999, weight_decay=0.05, layer_decay=1.0, min_lr=0.0)
    if args["blr"]:
        config.optim.blr = args["blr"]
    config.evals.accuracy.update(every="", batch_size=500)
    config.checkpoint.every = f"{max(1, epochs // 20)} epochs"
    return config


def probe(args):
    config = probe_recipe(
        f"init={args['init']},test=test,batch_size=512,epochs=3,select=10,small=true,"
        f"head={args['task']}"
    )
    config.features = "pixels" if args["pixels"] else config.features
    if not args["pixels"] and not args["init"]:
        config.features = "random"
    config.probe.attention_heads = 4
    config.evals.probe.update(every="", batch_size=500)
    config.checkpoint.every = "1 epochs"
    return config


def knn(args):
    config = knn_recipe(f"init={args['init']},bank=train[:10000],test=test")
    if args["pixels"] or not args["init"]:
        config.features = "pixels" if args["pixels"] else "random"
    layers = "last" if args["pixels"] else "all"
    for cfg in config.evals.values():
        cfg.batch_size = 500
    config.evals.knn.layers = config.evals.logistic.layers = layers
    del config.evals["fewshot"]
    return config
