"""Compare encoders: the same measure of each, in turn, and one table.

    mae-jax sweep --config=encoders:init=MAE+DINOV2+DINOV3,image_size=224 --workdir=DIR

Each is a workdir of ours. Weights of others are converted once, for example
`mae-jax convert dinov2-small DINOV2 --to=ours`; docs/dense.md lists what is read. Their image sizes
differ, so give one that all their patches divide: 224 for patches of 14 and 16 pixels.

Hardware and hours: those of the measure, for each encoder. Expected: nothing, until we measure it.

Arguments:
    init        workdirs, with + between them
    measure     knn, segment_frozen, segment, linprobe or finetune: the recipe that measures each
    image_size  0 = each encoder's own, or the measure's
    seeds       runs of each encoder
and all arguments of the measure but init, such as source=segfolder:PATH.
"""

from ml_collections import ConfigDict

from mae_jax.configs.common import choose, parse_arg
from mae_jax.configs.finetune import get_config as finetune
from mae_jax.configs.knn import get_config as knn
from mae_jax.configs.linprobe import get_config as linprobe
from mae_jax.configs.segment import get_config as segment
from mae_jax.configs.segment_frozen import get_config as segment_frozen

OWN = dict(init="", measure="knn", image_size=0, seeds=1)
MEASURES = dict(
    knn=knn,
    segment_frozen=segment_frozen,
    segment=segment,
    linprobe=linprobe,
    finetune=finetune,
)


def get_config(arg=None):
    items = [item for item in (arg or "").split(",") if item]
    own = [item for item in items if item.partition("=")[0] in OWN]
    rest = [item for item in items if item not in own]
    args = parse_arg(",".join(own), **OWN)
    recipe, paths = choose(args, "measure", MEASURES), [x for x in args["init"].split("+") if x]
    names = [path.rstrip("/").split("/")[-1].replace(".", "_") for path in paths]
    if not paths or len(set(names)) < len(names):
        raise ValueError(
            f"config argument init={args['init']!r}: give workdirs that end in different names,"
            " with + between them"
        )

    def measured(path):
        config = recipe(",".join([*rest, f"init={path}"]))
        if args["image_size"]:
            config.model.image_size = (args["image_size"],) * 2
        return config

    config = recipe(",".join(rest))  # of no encoder: a row is what its own says otherwise
    rows = {name: changes(config, measured(path)) for name, path in zip(names, paths, strict=True)}
    config.sweep = ConfigDict(dict(order=tuple(names), rows=rows, paper={}, seeds=args["seeds"]))
    return config


def changes(old, new):
    """Return the values of `new` that `old` lacks or has otherwise, as nested dicts."""
    found: dict = {}
    for key, value in new.items():
        if isinstance(value, ConfigDict):
            inner = changes(old.get(key, {}), value)
            found |= {key: inner} if inner else {}
        elif key not in old or old[key] != value:
            found[key] = value
    return found
