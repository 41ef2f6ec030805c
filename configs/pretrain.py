"""Pre-train a masked autoencoder on ImageNet-1k: the published recipe.

    mae-jax train --config=configs/pretrain.py:variant=L/16,epochs=800 --workdir=DIR

Hardware and hours: L/16 for 800 epochs took the paper's authors 15.4 hours on 128 TPU v3 cores.
Expected: the paper's top-1 accuracies in percent after 1600 epochs; we have not measured them.

    variant  fine-tuned  linear probe
    B/16     83.6        68.0
    L/16     85.9        75.8
    H/14     86.9        76.6

Arguments:
    variant     Ti/16, S/16, B/16, L/16, H/14, 2B/14 or 6.5B/14
    epochs      the paper has 1600 for its main results and 800 for its ablations
    batch_size  images of one update
    image_size  height and width in pixels
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import compute, hosts, model_sizes, parse_arg, reading


def get_config(arg=None):
    args = parse_arg(arg, variant="B/16", epochs=800, batch_size=4096, image_size=224)

    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.train_for = f"{args['epochs']} epochs"
    config.batch_size = args["batch_size"]  # of one update, over all devices and passes
    config.grad_accum = 1  # passes of an update; each takes its share of the batch

    config.mask_ratio = 0.75
    config.masking = dict(name="random")  # or block, grid, or a dotted path
    config.target = dict(name="norm_pixels")  # or pixels, or a dotted path

    config.model = dict(
        image_size=(args["image_size"],) * 2,  # (height, width)
        channels=3,
        **model_sizes(args["variant"]),  # width, depth, heads, patch_size
        mlp_ratio=4.0,
        decoder_width=512,
        decoder_depth=8,
        decoder_heads=16,
        **compute(),
    )

    config.optim = dict(
        blr=1.5e-4, b1=0.9, b2=0.95, weight_decay=0.05, warmup="40 epochs", min_lr=0.0
    )

    config.data = dict(
        source="imagenet2012",  # a tfds dataset, folder:PATH, bundled:photos, bundled:digits
        split="train",
        crop="random_resized",  # or fixed, center
        crop_scale=(0.2, 1.0),  # share of the image's area
        crop_ratio=(3 / 4, 4 / 3),  # width / height
        flip=0.5,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        **reading(),
    )

    config.evals = dict(
        reconstruct=dict(
            type="reconstruct",
            every="20 epochs",
            source="",  # '' = the source of the training images
            split="validation[:512]",
            images=512,
            batch_size=128,
            bands=(),  # one or three to show, such as (4, 3, 2); () = the first ones
        )
    )

    # -1: all devices that remain. fsdp=0: up to 16 TPUs, or 8 GPUs, share the state; 1 on CPUs.
    config.mesh = dict(data=-1, fsdp=0, tensor=1)
    config.checkpoint = dict(every="5 epochs", keep=2, keep_every="100 epochs")
    config.log_every = "50 steps"
    config.hosts = hosts()
    config.resume = ""  # workdir of another run: continue its whole state
    config.init_from = ""  # workdir of another run: start from its parameters
    return config
