"""Train: pre-train on images, from a config file."""

import json
import os
import re
import shlex
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mae_jax.errors import UserError

USAGE = """\
mae-jax train --config=FILE[:ARGUMENTS] [--workdir=DIR] [--config.KEY=VALUE ...]
    The same --workdir again goes on where the run stopped.
"""


def parse(argv: list[str], values: flags.FlagValues | None = None) -> tuple[ConfigDict, str]:
    """The locked config and the workdir of a command line; all flags are in `values` afterwards.

    Raises:
      UserError: no config file, an unknown key or argument, a value of the wrong type.
    """
    values = flags.FlagValues() if values is None else values
    whole = ["mae-jax train", *argv]
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, with arguments after a colon; --config.KEY=VALUE changes what it says",
        flag_values=values,
        sys_argv=whole,
    )
    flags.DEFINE_string(
        "workdir", None, "where the run lives; '' = workdir/CONFIG", flag_values=values
    )
    flags.DEFINE_bool(
        "distributed", False, "one of several hosts, of a TPU pod or a cluster", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of host 0, elsewhere", flag_values=values)
    flags.DEFINE_integer("num_hosts", None, "with --coordinator: of how many", flag_values=values)
    flags.DEFINE_integer("host", None, "with --coordinator: which one, from 0", flag_values=values)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)

    given = [arg for arg in argv if arg.startswith("--config")]
    for i, arg in enumerate(argv):
        name, _, path = arg.lstrip("-").partition("=")
        if name == "config":
            file = Path((path or "".join(argv[i + 1 : i + 2])).split(":")[0])
            if not file.is_file():
                raise UserError(f"--config: there is no file {str(file)!r} in {os.getcwd()}")
            # A config may import its neighbours: `from configs.common import ...`
            sys.path[:0] = [os.getcwd(), str(file.resolve().parent.parent)]
    try:
        rest = values(whole)[1:]
        if values.help:
            print(USAGE + values.get_help())
            raise SystemExit(0)
        if values.config is None:
            raise UserError("--config=FILE is missing, such as --config=configs/pretrain.py")
        config = values.config
        _ = config.task  # an error inside the config file surfaces here
    except flags.Error as error:
        # Of an error inside a config file, absl's message is the whole traceback.
        text = str(error).strip()
        text = text.splitlines()[-1] if "Traceback" in text else text
        raise UserError(text.removeprefix("ValueError: ")) from None
    except (AttributeError, KeyError) as error:
        what = " ".join(str(error.args[0]).split())
        raise UserError(f"{' '.join(given)}: no such key in the config: {what}") from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --name=value")
    if found := re.search(r'"(\w+)": NaN', config.to_json()):
        raise UserError(f"{' '.join(given)}: {found[1]} is not a number (nan)")
    config.lock()
    workdir = values.workdir or str(Path("workdir") / file.stem)
    return config, workdir


def summary(workdir: str) -> list[str]:
    """What a run came to, read from its own files: numbers, pictures, and what to do next."""
    from etils import epath

    from mae_jax import metrics
    from mae_jax.evals.reconstruct import kind

    root = epath.Path(workdir)  # a pathlib.Path would make gs:/ of gs://
    file = root / "metrics.jsonl"
    lines = metrics.read(file) if file.exists() else []
    losses = [line for line in lines if "train/loss" in line]
    evaluated = [line for line in lines if "eval/rmse" in line]
    text = [""]
    if losses:
        metrics.loss_figure(file, root / "loss.png")
        first, last = losses[0], losses[-1]
        text.append(
            f"training loss  {first['train/loss']:.3f} at step {first['step']}"
            f" -> {last['train/loss']:.3f} at step {last['step']}"
        )
    text += accuracies(lines)
    if evaluated:
        values = evaluated[-1]
        text.append(
            f"error of hidden pixels on {values['eval/images']:.0f}"
            f" {kind(values.get('eval/trained_on', 0))} (root mean square, of 255 levels):"
        )
        text += [
            f"  {words:50}{values[f'eval/{key}']:6.2f}"
            for key, words in (
                ("rmse", "this model"),
                ("rmse_mean_colour", "the mean colour of the visible patches"),
                ("rmse_interpolation", "linear interpolation between visible patches"),
            )
        ]
    text += [
        f"results        {file}, and drawn in {file.with_suffix('.png').name}"
        for file in sorted(root.glob("results*.json"))
    ]
    if not losses:
        return text
    pictures = f"{root / 'images'}/, " if (root / "images").exists() else ""
    return [
        *text,
        f"pictures       {pictures}curves in {root / 'loss.png'}",
        f"checkpoint     {root / 'checkpoints' / str(last['step'])}",
        f"curves         tensorboard --logdir={shlex.quote(workdir)}  (pip install tensorboard)",
        f"next           your own images:  {shlex.quote(sys.executable)} -m mae_jax train"
        " --config=configs/folder.py --config.data.source=folder:PATH --workdir=DIR",
    ]


def accuracies(lines: list[dict]) -> list[str]:
    """The last top-1 accuracies of a metrics.jsonl, in words; probes, k-NN and few-shot."""
    last = {name: value for line in lines for name, value in line.items()}
    text = []
    for key in [name for name in last if name.endswith("/top1")]:
        prefix = key.removesuffix("/top1")
        row = [line for line in lines if key in line][-1]
        text.append(
            f"top-1 accuracy {row[key]:.2f} %, of {row[f'{prefix}/images']:.0f} images"
            + (f" ({prefix})" if prefix != "eval" else "")
        )
    if "eval/best_top1" in last:
        text.append(
            f"top-1 accuracy {last['eval/best_top1']:6.2f} % with blr={last['eval/best_blr']:g},"
            " the best on held-out training images"
        )
    for name, value in last.items():
        found = re.match(r"eval/(knn|fewshot)(\d+)_(cls|mean)$", name)
        if found:
            kind, number, feature = found.groups()
            words = f"{number} nearest" if kind == "knn" else f"fitted to {number} of each class"
            spread = last.get(f"{name}_std")
            more = "" if spread is None else f" +- {spread:.2f}"
            text.append(f"top-1 accuracy {value:6.2f} %{more}, {words}, feature {feature}")
        if found := re.match(r"eval/(imagenet_\w+)_top1$", name):
            images = last[f"eval/{found[1]}_images"]
            text.append(f"top-1 accuracy {value:6.2f} % on {found[1]}, of {images:,.0f} images")
        if name == "eval/imagenet_c_mce":
            text.append(f"mean corruption error (mCE) {value:.2f} % of AlexNet's on imagenet_c")
        elif name.startswith("eval/imagenet_c_error_"):
            text.append(
                f"  error {value:6.2f} % with {name.removeprefix('eval/imagenet_c_error_')}"
            )
    return text


def compilation_cache(workdir: str) -> str:
    """Where compiled programs are kept for the next start: beside the workdir, for all its like."""
    folder = workdir if "://" in workdir else os.path.abspath(workdir)
    return f"{os.path.dirname(folder.rstrip('/'))}/compilation_cache"


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    config, workdir = parse(argv, values)
    hosts = (values.coordinator, values.num_hosts, values.host)
    # Only now: JAX takes seconds to import, and a mistyped flag should not.
    import jax

    from mae_jax import commands, distributed, provenance, sharding, train
    from mae_jax.config import resolve
    from mae_jax.data import pipeline

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", compilation_cache(workdir))
    if values.distributed or hosts != (None, None, None):
        distributed.join(
            *hosts,
            connect_seconds=config.connect_seconds,
            heartbeat_seconds=config.heartbeat_seconds,
        )
    else:
        distributed.refuse_to_run_alone(os.environ)
    try:
        with distributed.watchdog(config.stall_seconds) as happened:
            with distributed.agreement("config and code") as facts:
                facts |= provenance.flat(
                    {"config": json.loads(config.to_json()), "workdir": workdir}
                )
                facts |= provenance.versions() | {"code of mae_jax": distributed.source_digest()}
            with distributed.agreement("data") as facts:
                mesh = sharding.make_mesh(**config.mesh)
                make_task = resolve(f"mae_jax.tasks.{config.task}.make_task", None)
                task = make_task(config, sharding.constrain_batch(mesh))
                facts["the number of examples"] = task.num_examples
            train.fit(config, workdir, task, mesh, happened)
    except train.NonFiniteError as error:  # on all hosts alike
        print(f"mae-jax train: {error}", file=sys.stderr)
        return 1
    except pipeline.WorkerLost as error:
        print(f"mae-jax train: {error}", file=sys.stderr)
        if jax.process_count() > 1:
            distributed.leave(distributed.PREEMPTED)
        return distributed.PREEMPTED
    except (Exception, KeyboardInterrupt) as error:
        if not distributed.alone_with(error):
            raise
        if (status := commands.explain("train", error)) is None:
            traceback.print_exc()
        distributed.leave(1 if status is None else status)
    if jax.process_index() == 0:
        print("\n".join(summary(workdir)))
    return 0
