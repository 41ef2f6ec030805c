"""Segment without training: by the nearest patches, and by logistic regression of each patch.

    mae-jax train --config=segment_frozen:init=WORKDIR,source=segfolder:PATH --workdir=DIR

PATH/SPLIT/images and PATH/SPLIT/labels hold images and PNG maps of class numbers; docs/dense.md.
For ADE20K: mae-jax prepare ade20k --zip=ADEChallengeData2016.zip --out=PATH, and shift=true.

Hardware and hours: for k-NN and for logistic regression one pass over both splits. What stays in
device memory, divided by the devices, is patches x width x 4 bytes (ADE20K at 224 with L/16: 16 GB;
8 GB with --config.evals.knn.bank_dtype=float16), and for logistic regression twice that and 5 GB
for the classes, by the compiler: 37 GB, an H100 or 4 GPUs of 16 GB. We have not measured the hours.
Expected: mIoU in percent of MAE L/16 at 224, k-NN / logistic regression, that of CAPI's paper
(arXiv 2502.08769); we have not measured it, and B and H were not published.

    ADE20K     Cityscapes   VOC 2012
    21.5/27.4  32.8/38.5    53.7/61.5

Arguments:
    init        workdir of a pre-training run
    variant     '' = as in that run's config, or B/16
    source      pairs of images and label maps
    bank        the split that patches are compared with
    test        the split that is segmented
    classes     0 = as many as PATH/classes.txt names
    ignore      the number of pixels without a class
    shift       true = 0 means without a class, and classes begin at 1, as in ADE20K
    image_size  0 = as in pre-training; image and map are stretched to it, and the map's pixels at
                this size are what is counted

--config.features=random (without init) measures an untrained encoder, and --config.features=pixels
the pixels themselves. MAE's best block is often not the last:
--config.evals.logistic.layers=all measures each, at the cost of a pass for each.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import parse_arg
from mae_jax.configs.segment import get_config as segment


def get_config(arg=None):
    args = parse_arg(
        arg, variant="", init="", source="segfolder:ade20k", bank="train", test="validation",
        classes=0, ignore=255, shift=False, image_size=0,
    )  # fmt: skip
    kept = {key: args[key] for key in args if key not in ("bank", "test")}
    config = segment("recipe=short," + ",".join(f"{k}={v}" for k, v in kept.items() if v != ""))
    config.train_for = "0 steps"
    config.data.split = args["bank"]
    common = dict(
        every="", source="", split=args["test"], bank_split=args["bank"], batch_size=64,
        layers="last",
    )  # fmt: skip
    config.evals = ConfigDict(
        dict(
            knn=dict(
                common, type="patch_knn", ks=(1, 3, 10, 30), distances="cosine,l2",
                bank_dtype="float32",
            ),
            logistic=dict(common, type="patch_logistic"),
        )
    )  # fmt: skip
    return config
