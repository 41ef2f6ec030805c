"""The published pre-training recipe on ImageNet-1k.

    mae-jax train --config=configs/pretrain.py:variant=L/16,epochs=800 --workdir=DIR

Arguments: variant (Ti/16, S/16, B/16, L/16, H/14, 2B/14, 6.5B/14), epochs (1600 for the paper's
main results, 800 for its ablations), batch_size, image_size.

Paper's numbers, not measured here (fine-tuned / linear-probe top-1, norm-pix, 1600 epochs): B/16
83.6 / 68.0, L/16 85.9 / 75.8, H/14 86.9 / 76.6. L/16 for 800 epochs took the authors 15.4 h on 128
TPU v3 cores.
"""

from ml_collections import ConfigDict

from configs.common import model_sizes, parse_arg


def get_config(arg=None):
    args = parse_arg(arg, variant="B/16", epochs=800, batch_size=4096, image_size=224)

    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.train_for = f"{args['epochs']} epochs"
    config.batch_size = args["batch_size"]  # of one update, over all devices and passes
    config.grad_accum = 1  # passes per update

    config.mask_ratio = 0.75
    config.masking = ConfigDict(
        dict(
            name="random",  # or block, grid, or a dotted path
            tokens_in_encoder=False,  # True: the encoder sees mask tokens too, as in Table 1c
        )
    )
    config.target = ConfigDict({"name": "norm_pixels"})  # or pixels, or a dotted path

    config.online_probe = False  # train a linear classifier of the cls token beside the model

    config.model = ConfigDict(
        dict(
            image_size=(args["image_size"],) * 2,  # (height, width)
            channels=3,
            **model_sizes(args["variant"]),
            mlp_ratio=4.0,
            decoder_width=512,
            decoder_depth=8,
            decoder_heads=16,
            # How it is run; changes nothing but speed, memory and rounding.
            dtype="bfloat16",
            residual_dtype="float32",
            scan_unroll=1,  # blocks per round of their loop; all of them: no loop
            remat=False,
            attention="xla",  # or cudnn, on NVIDIA GPUs
        )
    )

    config.optim = ConfigDict(
        dict(
            blr=1.5e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, warmup="40 epochs", min_lr=0.0
        )
    )

    config.data = ConfigDict(
        dict(
            source="imagenet2012",  # a tfds dataset, folder:PATH, bundled:photos, bundled:digits
            split="train",
            data_dir="",  # '' = where tfds keeps its datasets
            crop="random_resized",  # or fixed, center
            crop_scale=(0.2, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            resizer="pillow",  # the reference; or fast: a quarter of its time, and nearly equal
            flip=0.5,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            workers=0,  # reading processes; 0 = threads of this one
            threads=16,
            prefetch=4,  # batches
            max_bad_fraction=0.01,
            synthetic=False,  # one random batch for ever: is the model slow, or the input?
        )
    )

    config.evals = ConfigDict(
        dict(
            reconstruct=dict(
                type="reconstruct",
                every="20 epochs",
                source="",  # '' = the source of the training images
                split="validation[:512]",
                images=512,
                batch_size=128,
            )
        )
    )

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.checkpoint = ConfigDict(dict(every="5 epochs", keep=2, keep_every="100 epochs"))
    config.log_every = "50 steps"
    config.connect_seconds = 50  # hosts wait so long for each other at the start
    config.heartbeat_seconds = 100  # all hosts end when one was not heard of for so long
    config.stall_seconds = 600  # when no step ends for so long, all stacks are printed; 0: never
    config.resume = ""  # another run's workdir: go on from its whole state
    config.init_from = ""  # another run's workdir: start from its parameters
    return config
