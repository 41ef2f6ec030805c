"""What a pre-trained encoder tells apart without training: k nearest neighbours, and few-shot.

    mae-jax train --config=configs/knn.py:init=WORKDIR --workdir=DIR

Arguments: init (workdir of a pre-training run), variant ('' = as the config of that run says, or
B/16), source, bank (the split that neighbours and few shots come from), test (the split that is
classified). Makes no update: it measures at step 0 and ends. --config.features=random (without
init) or pixels gives the same of an untrained encoder, or of the pixels themselves.

The paper has no number for either; others found k-NN on MAE's features low.
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
            knn=dict(common, type="knn", ks=(1, 5, 20), temperature=0.07),
            fewshot=dict(common, type="fewshot", shots=(1, 5, 10), draws=3),
        )
    )
    return config
