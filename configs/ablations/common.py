"""Pieces that ablations share: the recipe that they change, its measures, and their arguments.

Arguments of every file here:
    base    imagenet: L/16 for 800 epochs on plain pixels, as in the paper's Table 1; or cifar10,
            configs/cifar10.py; or digits, configs/digits.py, in minutes on a CPU
    data    cifar10: folder of its images
    small   cifar10: the model for CPUs
    epochs  0 = those of the base; digits: hundreds of steps
    seeds   runs of each row
    blr     base learning rate, of which some rows take a share; 0 = that of the base
"""

from ml_collections import ConfigDict

from mae_jax.configs.cifar10 import get_config as cifar10_recipe
from mae_jax.configs.common import choose, parse_arg
from mae_jax.configs.digits import get_config as digits_recipe
from mae_jax.configs.pretrain import get_config as pretrain_recipe


def sweep(arg, rows, paper=()):
    """Return the base of an ablation with its rows.

    Args:
      arg: the argument of the recipe.
      rows: name -> changes, nested as in the config; or a function of the base that returns them.
      paper: name of a row -> (fine-tuned, linear probe), the paper's top-1 accuracies in percent.
    """
    args = parse_arg(arg, base="imagenet", data="", small=True, epochs=0, seeds=1, blr=0.0)
    bases = {"imagenet": imagenet, "cifar10": cifar10, "digits": digits}
    config, splits = choose(args, "base", bases)(args)
    if args["data"] and args["base"] != "cifar10":
        raise ValueError(f"config argument data={args['data']!r} is for base=cifar10 only")
    config.optim.blr = args["blr"] or config.optim.blr
    measure = dict(every="", source="", feature="cls", layers="all", batch_size=500, **splits)
    config.evals.knn = dict(measure, type="knn", ks=(20,), temperature=0.07)
    config.evals.logistic = dict(measure, type="logistic")
    rows = rows(config) if callable(rows) else rows
    # A ConfigDict sorts its keys, so that the order of the rows is kept beside them.
    config.sweep = ConfigDict(
        dict(order=tuple(rows), rows=rows, paper=dict(paper), seeds=args["seeds"])
    )
    return config


def imagenet(args):
    config = pretrain_recipe(f"variant=L/16,epochs={args['epochs'] or 800}")
    config.target.name = "pixels"
    return config, dict(bank_split="train", split="validation")


def cifar10(args):
    given = {name: args[name] for name in ("data", "small", "epochs")}
    config = cifar10_recipe(",".join(f"{name}={x}" for name, x in given.items()))
    return config, dict(bank_split="train[:10000]", split="test")


def digits(args):
    config = digits_recipe()
    if args["epochs"]:
        config.train_for = f"{100 * args['epochs']} steps"
    return config, dict(bank_split="train", split="test")
