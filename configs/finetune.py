"""Fine-tune a pre-trained encoder with labels: the recipe of the official repository.

    mae-jax train --config=configs/finetune.py:variant=B/16,init=WORKDIR --workdir=DIR

Hardware and hours: the official code took its authors 7 h 11 min for B/16 and 8 h 52 min for L/16
on 32 V100, and 13 h 9 min for H/14 on 64.
Expected: the paper's top-1 accuracies in percent, fine-tuned after 1600 epochs of pre-training, and
from scratch with averaged weights; we have not measured them.

    variant      fine-tuned  from scratch
    B/16         83.6        82.3
    L/16         85.9        82.6
    H/14         86.9        83.1
    H/14 at 448  87.8

Arguments:
    init        workdir of a pre-training run, or a checkpoint in it
    variant     '' = as in that run's config
    source      the dataset
    test        the split to measure on
    epochs      0 = the recipe's
    batch_size  0 = the recipe's
    image_size  0 = 224, or that of the pre-training; position embeddings are resized
    scratch     true, without init = the supervised baseline of the paper's Table 11
    small       true = for a few thousand labelled images on one machine: 20 epochs of batches of
                64, no mixing, no erasing, no RandAugment. It was tried on digits only.

B, L and H have recipes of their own, and another size takes that of the nearest depth. They go with
encoders that were pre-trained on normalised pixels, and differ from the paper's Table 9. No
settings were published for H at 448 (variant=H/14,image_size=448): it takes those of H at 224. Nor
was the pooling of supervised training from scratch: it takes that of fine-tuning.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import adopt, parse_arg, pretraining, without_decoder
from mae_jax.configs.pretrain import get_config as recipe

# Keys: the depths of B, L and H.
FINETUNE = {
    12: dict(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1),
    24: dict(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    32: dict(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3, mix_group=16),
}
SCRATCH = {
    12: dict(epochs=300, drop_path=0.1),
    24: dict(epochs=200, drop_path=0.2),
    32: dict(epochs=200, drop_path=0.2),
}


def get_config(arg=None):
    args = parse_arg(
        arg, variant="", init="", source="imagenet2012", test="validation", epochs=0, batch_size=0,
        image_size=0, scratch=False, small=False,
    )  # fmt: skip
    scratch, small = args["scratch"], args["small"]
    batch_size = args["batch_size"] or (64 if small else 4096 if scratch else 1024)

    config = recipe(f"batch_size={batch_size},image_size={args['image_size'] or 224}")
    config.task = "classify"
    config.init_from = args["init"]
    without_decoder(config)

    adopt(config, pretraining(args["init"]), args["variant"])
    if args["image_size"]:
        config.model.image_size = (args["image_size"],) * 2
    published = SCRATCH if scratch else FINETUNE
    size = published[min(published, key=lambda depth: abs(depth - config.model.depth))]

    config.train_for = f"{args['epochs'] or (20 if small else size['epochs'])} epochs"
    config.start = "normal" if scratch else "pretrained"  # or xavier, as for pre-training
    # n >= 0: train only the last n blocks (0.5: the last MLP), norm and head, as in Figure 9.
    config.trained_blocks = -1.0
    config.model.pool = "avg"  # or cls
    config.model.drop_path = size["drop_path"]  # of the last block
    config.smoothing = 0.1
    config.erase = 0.0 if scratch else 0.25  # share of the images that get a box of noise
    config.mix = ConfigDict(
        dict(
            mixup=0.8,  # alpha of its Beta distribution; 0 = none
            cutmix=1.0,
            # Images that share one draw of the mix: as many as the official code has on a GPU.
            group=min(size.get("mix_group", 32), batch_size),
        )
    )
    config.ema = 0.9999 if scratch else 0.0  # decay of the averaged weights; 0 = none
    config.optim = ConfigDict(
        dict(
            blr=1e-4 if scratch else size["blr"],
            b1=0.9,
            b2=0.95 if scratch else 0.999,
            weight_decay=0.3 if scratch else 0.05,
            layer_decay=1.0 if scratch else size["layer_decay"],
            warmup="20 epochs" if scratch else "5 epochs",
            min_lr=0.0 if scratch else 1e-6,
        )
    )
    config.data.update(
        source=args["source"], crop_scale=(0.08, 1.0), augment="rand-m9-mstd0.5-inc1"
    )
    if small:
        config.erase, config.ema, config.model.drop_path = 0.0, 0.0, 0.0
        config.mix.update(mixup=0.0, cutmix=0.0)
        config.optim.update(blr=4e-3, warmup="2 epochs")
        if not scratch:
            config.optim.layer_decay = 0.75
        config.data.update(crop_scale=(0.6, 1.0), augment="")
    accuracy = dict(
        type="accuracy",
        every="5 epochs" if small else "1 epochs",
        source="",
        split=args["test"],
        batch_size=256 if small else 1024,
    )
    config.evals = ConfigDict({"accuracy": accuracy})
    if config.ema:
        config.evals.averaged = dict(accuracy, predict="averaged_logits", prefix="eval_averaged")
    config.checkpoint.update(every="5 epochs", keep_every="")
    return config
