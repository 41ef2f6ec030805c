"""Street scenes of CamVid, small: pre-train on them, and measure what patches know.

    mae-jax train --config=configs/camvid.py:data=PATH --workdir=DIR
    mae-jax train --config=configs/camvid.py:data=PATH,task=tuned,init=DIR --workdir=DIR_tuned

PATH holds {train,test}/{images,labels} and classes.txt with 11 names, see docs/dense.md. The
network is that of weights/cifar10-s at 160 x 120 pixels: width 128, 6 blocks, patches of 8; in
float32.

Hardware and time: `bash launch/study.sh camvid PATH` makes all its runs, in hours of 2 CPU cores.
Expected: docs/dense.md. Rates are the best of a few, on the 101 images of val.

Arguments:
    data      folder of pairs
    task      pretrain; frozen (k-NN and logistic regression of patches); linear (a trained head);
              tuned (the encoder too)
    init      workdir of the pre-training, of these images or others; '' = from scratch, or an
              encoder without training
    features  frozen, linear: pixels = the pixels of a patch themselves
    epochs    0 = pretrain 40, linear 8, tuned 12
    seed
"""

from mae_jax.configs.common import choose, parse_arg
from mae_jax.configs.pretrain import get_config as pretrain_recipe
from mae_jax.configs.segment import get_config as segment_recipe
from mae_jax.configs.segment_frozen import get_config as frozen_recipe


def get_config(arg=None):
    args = parse_arg(
        arg, data="", task="pretrain", init="", features="pretrained", epochs=0, seed=0
    )
    tasks = {"pretrain": pretrain, "frozen": frozen, "linear": heads, "tuned": heads}
    config = choose(args, "task", tasks)(args)
    config.seed = args["seed"]
    config.model.update(
        image_size=(120, 160), patch_size=(8, 8), width=128, depth=6, heads=4, dtype="float32"
    )
    config.data.source = f"segfolder:{args['data']}"
    config.data.update(mean=(0.492, 0.483, 0.447), std=(0.245, 0.243, 0.261))  # of cifar10-s
    config.log_every = "20 steps"
    return config


def pretrain(args):
    config = pretrain_recipe(f"epochs={args['epochs'] or 40},batch_size=32")
    config.model.update(decoder_width=64, decoder_depth=2, decoder_heads=2)
    config.init_from = args["init"]
    config.optim.update(blr=1.6e-2, warmup="4 epochs")
    config.evals.reconstruct.update(every="", split="test", images=200, batch_size=40)
    config.checkpoint.update(every="10 epochs", keep_every="")
    return config


def frozen(args):
    pairs = f"init={args['init']},source=segfolder:{args['data']},ignore=11,test=test"
    config = frozen_recipe(pairs)
    config.features = features(args)
    config.data.split = "train[:100]"
    for cfg in config.evals.values():  # the bank and the test, one image in three
        cfg.update(bank_split="train[:100]", split="test[:100]")
    config.evals.knn.update(ks=(1, 10), distances="cosine", layers="last", batch_size=32)
    config.evals.logistic.batch_size = 32
    return config


def heads(args):
    tuned = args["task"] == "tuned"
    config = segment_recipe(
        f"init={args['init']},source=segfolder:{args['data']},ignore=11,test=test,recipe=short,"
        f"batch_size=8,finetune={'true' if tuned else 'false'}"
    )
    config.features = features(args)
    config.train_for = f"{args['epochs'] or (12 if tuned else 8)} epochs"
    config.optim.update(blr=0.16 if tuned else 5.0, warmup="1 epochs")
    config.evals.segment.every = ""
    config.checkpoint.every = "2 epochs"
    return config


def features(args):
    known = {name: name for name in ("pretrained", "random", "pixels")}
    chosen = choose(args, "features", known)
    return chosen if chosen == "pixels" or args["init"] else "random"
