"""Pre-train a small masked autoencoder on scikit-learn's 1,797 handwritten digits, and measure it.

    mae-jax train --config=configs/digits.py --workdir=DIR
    mae-jax train --config=configs/digits.py:task=finetune,init=DIR,labels=10 --workdir=DIR_tuned
    mae-jax train --config=configs/digits.py:task=linear,init=DIR --workdir=DIR_linear

Hardware and time: 2 CPU cores; `bash launch/study.sh digits` makes all runs and a table in 20
minutes. It needs scikit-learn (the extra `quickstart`) and no download.
Expected: our own numbers, in docs/study.md.

Arguments:
    task        pretrain, finetune, linear, attentive or knn
    init        workdir of the pre-training; '' = from scratch, or features that learned nothing
    mask_ratio  of the pre-training
    labels      for finetune: percent of the training images, 1, 10 or 100
    pixels      true = linear, attentive and knn see the pixels
    seed

Digits are not mirrored, and little is cut away. The rates of fine-tuning and of training from
scratch were chosen from 3e-3, 1e-2 and 3e-2 on the last fifth of the training images (with 1 and 10
percent of the labels; 100 percent takes the rate of 10). Probes choose theirs on the last tenth.
Nothing was chosen on the 360 test images.
"""

from mae_jax.configs.common import choose, parse_arg
from mae_jax.configs.finetune import get_config as finetune_recipe
from mae_jax.configs.knn import get_config as knn_recipe
from mae_jax.configs.linprobe import get_config as probe_recipe
from mae_jax.configs.pretrain import get_config as pretrain_recipe

SOURCE = "source=bundled:digits,test=test"
# Percent of the labels -> images, batch size, steps.
LABELS = {1: (14, 14, 300), 10: (144, 36, 600), 100: (1437, 48, 800)}

# Percent of the labels -> base rate; training from scratch makes twice the steps.
FINETUNED_BLR = {1: 3e-2, 10: 1e-2, 100: 1e-2}
SCRATCH_BLR = {1: 3e-2, 10: 3e-2, 100: 3e-2}


def get_config(arg=None):
    args = parse_arg(
        arg, task="pretrain", init="", mask_ratio=0.75, labels=100, pixels=False, seed=0
    )
    make = {
        "pretrain": pretrain, "finetune": finetune, "linear": probe, "attentive": probe, "knn": knn
    }  # fmt: skip
    config = choose(args, "task", make)(args)
    config.seed = args["seed"]
    config.model.update(
        image_size=(12, 12), channels=1, patch_size=(2, 2), width=64, depth=4, heads=2,
        dtype="float32", scan_unroll=4,
    )  # fmt: skip
    config.data.update(
        source="bundled:digits", mean=(0.5,), std=(0.5,), crop_scale=(0.6, 1.0), flip=0.0
    )
    config.checkpoint.update(every="1000 steps", keep_every="")
    config.log_every = "100 steps"
    return config


def pretrain(args):
    config = pretrain_recipe("batch_size=64")
    config.train_for = "1000 steps"
    config.mask_ratio = args["mask_ratio"]
    config.model.update(decoder_width=32, decoder_depth=2, decoder_heads=1)
    config.optim.update(blr=8e-3, warmup="50 steps")
    config.target.name = "pixels"
    config.evals.reconstruct.update(every="", split="test", images=64, batch_size=64)
    return config


def finetune(args):
    images, batch_size, steps = choose(args, "labels", LABELS)
    scratch = not args["init"]
    config = finetune_recipe(
        f"init={args['init']},{SOURCE},batch_size={batch_size},scratch={scratch}"
    )
    steps *= 2 if scratch else 1
    config.train_for = f"{steps} steps"
    # Each seed sees other labelled images, unless it sees all of them.
    first = args["seed"] % (1437 // images) * images
    config.data.split = f"train[{first}:{first + images}]"
    config.data.augment = ""
    config.model.drop_path = 0.0
    config.erase = 0.0
    config.mix.update(mixup=0.0, cutmix=0.0)
    config.ema = 0.0
    config.optim.update(
        blr=(SCRATCH_BLR if scratch else FINETUNED_BLR)[args["labels"]],
        b2=0.999, weight_decay=0.05, layer_decay=1.0 if scratch else 0.75, min_lr=0.0,
        warmup=f"{steps // 10} steps",
    )  # fmt: skip
    config.evals = {"accuracy": config.evals.accuracy}
    config.evals.accuracy.update(every="", batch_size=120)
    return config


def probe(args):
    config = probe_recipe(
        f"init={args['init']},{SOURCE},batch_size=128,select=10,head={args['task']}"
    )
    config.train_for = "500 steps"
    config.features = "pixels" if args["pixels"] else config.features
    if not args["pixels"] and not args["init"]:
        config.features = "random"
    config.probe.update(bn_group=128, attention_heads=4)
    # A step of LARS moves a head by its rate: few steps need larger rates than the published 0.1.
    linear = args["task"] == "linear"
    config.optim.update(
        blr=1.0 if linear else 1e-2,
        sweep=(3.0, 10.0, 30.0, 100.0) if linear else (1e-3, 3e-3, 3e-2),
        warmup="50 steps",
    )
    config.evals.probe.update(every="", batch_size=120)
    return config


def knn(args):
    config = knn_recipe(f"init={args['init']},{SOURCE}")
    if args["pixels"] or not args["init"]:
        config.features = "pixels" if args["pixels"] else "random"
    for cfg in config.evals.values():
        cfg.batch_size = 120
    return config
