"""Measure a pre-trained encoder without training: k-NN, logistic regression, few-shot accuracy.

    mae-jax train --config=configs/knn.py:init=WORKDIR --workdir=DIR

Hardware and hours: one pass over the training images and one over the test images, no update.
Expected: the paper has no such numbers, and we have not measured ImageNet. Others report low k-NN
accuracies for the features of MAE.

Arguments:
    init     workdir of a pre-training run
    variant  '' = as in that run's config, or B/16
    source   the dataset
    bank     the split that neighbours and few shots come from
    test     the split that is classified

--config.features=random (without init) measures an untrained encoder, and --config.features=pixels
the pixels themselves. MAE's best block is often not the last: --config.evals.logistic.layers=all
measures each, and --config.evals.logistic.layers=4,8 some of them; evals.knn.layers takes the same.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import parse_arg
from mae_jax.configs.linprobe import get_config as linprobe


def get_config(arg=None):
    args = parse_arg(
        arg, variant="", init="", source="imagenet2012", bank="train", test="validation"
    )
    config = linprobe(
        f"variant={args['variant']},init={args['init']},source={args['source']},select=0,"
        "batch_size=256"
    )
    config.train_for = "0 steps"
    config.data.split = args["bank"]
    common = dict(
        every="", source="", split=args["test"], bank_split=args["bank"], feature="cls",
        batch_size=1024,
    )  # fmt: skip
    config.evals = ConfigDict(
        dict(
            knn=dict(common, type="knn", ks=(1, 5, 20), temperature=0.07, layers="last"),
            logistic=dict(common, type="logistic", layers="last"),
            fewshot=dict(common, type="fewshot", shots=(1, 5, 10), draws=3),
        )
    )
    return config
