"""Plan: does a run fit on TPUs or GPUs, and how long would it take? Needs none of them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mae_jax.errors import UserError

USAGE = """\
mae-jax plan --config=FILE[:ARGUMENTS] --topology=NAME[,NAME ...] [--config.KEY=VALUE ...]
             [FLAG ...]

Compiles the training step ahead of time and reads the program. Nothing is measured.

  --topology       shapes of TPU chips (v3:8x8, v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16), for
                   which libtpu must be installed; CPU devices (cpu:8); GPUs (gpu:8, h100:8)
  --num_slices     TPU slices, joined by the data-center network (default 1)
  --json           write the plans to this file, too
  --mfu            fraction of peak to assume for the hours of the recipe (default 0.4)
  --search_batch   look for the largest batch per chip that fits, by compiling several
  --num_examples   of the dataset, where it is not on this machine (ImageNet-1k's is known)
  --num_classes    of its labels, likewise
  --cache          folder of plans made before (default ~/.cache/mae_jax/plans)

The mesh is that of the config or of --config.mesh.AXIS=N; where none is given, the first that fits:
data-parallel, then FSDP over more and more chips. The status is 1 if a plan does not fit.
"""
# tfds has these numbers only once a dataset is prepared: image-net.org/challenges/LSVRC/2012.
PUBLISHED = {"imagenet2012": {"train": (1_281_167, 1000), "validation": (50_000, 1000)}}
GIB = 2**30


def parse(argv: list[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The config and the flags.

    Raises:
      UserError: something is missing, unknown or of the wrong type.
    """
    from mae_jax.commands import train

    values = flags.FlagValues()
    flags.DEFINE_list("topology", None, "", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "", flag_values=values)
    flags.DEFINE_string("json", None, "", flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "", flag_values=values)
    flags.DEFINE_bool("search_batch", False, "", flag_values=values)
    flags.DEFINE_integer("num_examples", None, "", flag_values=values)
    flags.DEFINE_integer("num_classes", None, "", flag_values=values)
    flags.DEFINE_string("cache", "~/.cache/mae_jax/plans", "", flag_values=values)
    config, _ = train.parse(argv, values)
    if not values.topology:
        raise UserError("--topology=NAME is missing, such as --topology=v5e:16x16 or cpu:8")
    if not 0 < values.mfu <= 1:
        raise UserError(f"--mfu={values.mfu} is a fraction of the chips' peak: choose 0.3 to 0.6")
    if values.json and not Path(values.json).absolute().parent.is_dir():
        raise UserError(f"--json={values.json}: there is no such folder")
    for name in ("workdir", "coordinator", "num_hosts", "host"):
        if values[name].value is not None:
            raise UserError(f"--{name} has no meaning for a plan, which runs nothing")
    return config, values


def without_data(config: ConfigDict, examples: int | None, classes: int | None) -> int:
    """Puts a source in place of the config's that has its length only; returns that.

    Raises:
      UserError: nothing tells how many examples it has.
    """
    from mae_jax.data import sources

    data, given = config.data, classes
    if examples is None:
        try:
            source = sources.open_source(data.source, data.split, data.data_dir)
            examples, classes = len(source), source.num_classes
        except sources.NotPrepared as error:
            published = PUBLISHED.get(data.source, {}).get(data.split)
            if published is None:
                raise UserError(
                    f"{data.source!r} is not on this machine, and its number of examples is not"
                    " known: give --num_examples=N, and --num_classes=N if it has labels"
                ) from error
            examples, classes = published
        classes = given or classes
    with config.unlocked():
        data.source, data.split = f"counted:{examples}:{classes or 0}", ""
    return examples


def best(
    config: ConfigDict,
    where: Any,
    make_task: Callable,
    folder: Path,
    given: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The plan on the config's mesh, or on the first one that fits if none was given.

    Raises:
      UserError: see `plan.plan`; of several meshes, what the last one said.
    """
    import jax

    from mae_jax import plan, sharding, train

    devices = plan.devices(where)
    # A GPU that is not there is not compiled for; its arrays are laid out on CPU devices.
    compiled = where.is_tpu or where.kind == "cpu" or devices[0].platform == "gpu"
    meshes = [dict(config.mesh)]
    if not given and compiled:
        mesh = sharding.make_mesh(devices=devices)
        task = make_task(config, sharding.constrain_batch(mesh))
        state = train.lay_out(task, task.optimizer(1, 1)[0], config, mesh)[0]
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        meshes = list(plan.meshes(where, held + 2 * parameters)) or meshes
    refused, result = None, None
    for sizes in meshes:
        try:
            mesh = sharding.make_mesh(**sizes, devices=devices)
            shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())

            def make(mesh: Any = mesh, shape: str = shape) -> dict:
                if compiled:
                    say(f"{where.name}: compiling for mesh {shape} (a large step takes minutes)")
                return plan.plan(config, where, mesh, make_task, compiled)

            result = plan.remembered(folder, config, where, dict(mesh.shape), make)
        except ValueError as error:
            refused = error
            continue
        if result["fits"] is not False:
            break
    if result is None:
        raise refused or ValueError(f"{where.name}: no mesh fits")
    return result


def search(
    config: ConfigDict, run: Callable[[ConfigDict], dict], start: dict, examples: int
) -> int:
    """The largest batch per chip that fits, within a quarter; 0 if not even one image does."""
    mesh = start["mesh"]
    ways = mesh["data"] * mesh["fsdp"] * config.grad_accum
    most = min(examples // ways, 2**14)

    def fits(share: int) -> bool:
        trial = config.copy_and_resolve_references()
        with trial.unlocked():
            trial.batch_size = share * ways
            trial.mesh = ConfigDict(mesh)
        return run(trial)["fits"] is not False

    share = config.batch_size // ways
    low, high = (share, None) if start["fits"] is not False else (0, share)
    while high is None or high - low > max(low // 4, 1):
        trial = 2 * low if high is None else max((low + high) // 2, 1)
        if trial > most:
            break
        low, high = (trial, high) if fits(trial) else (low, trial)
    return low * config.grad_accum


def report(results: list[dict], mfu: float) -> list[Any]:
    """What rich prints: one table of all topologies, and the details of each."""
    from rich.table import Table

    from mae_jax import flops, plan

    def amount(number: float | None, unit: float = 1.0, form: str = ".2f") -> str:
        return "?" if number is None else format(number / unit, form)

    table = Table(title="Plans: compiled, not run; times are estimates")
    for name in ("topology", "cloud", "mesh", "fits", "GiB per device", "step at best", "limit"):
        table.add_column(name)
    table.add_column("img/s at best")
    table.add_column(f"hours, if {mfu:.0%} MFU is reached")
    for r in results:
        memory, line = r["memory"], r.get("roofline")
        slices = f"{r['num_slices']} x " if r["num_slices"] > 1 else ""
        table.add_row(
            f"{slices}{r['topology']}",
            f"{slices}{r['cloud']}" if r["cloud"] else "-",
            " ".join(f"{axis}={size}" for axis, size in r["mesh"].items() if size > 1) or "1",
            {True: "yes", False: "NO", None: "?"}[r["fits"]],
            f"{amount(memory.get('total'), GIB)} of {amount(memory['chip'], GIB)}",
            f"{1e3 * line['step']:.1f} ms" if line else "?",
            line["bound"] if line else "?",
            f"{r['batch_size'] / line['step']:,.0f}" if line else "?",
            amount(plan.hours(r, mfu), form=".1f"),
        )
    parts: list[Any] = [table]
    for r in results:
        memory, work, chip = r["memory"], r["gflops"], flops.chip(r["device_kind"])
        per_device = r["batch_size"] / r["devices"]
        text = [
            f"\n{r['topology']}: {r['devices']} devices ({r['device_kind']}), {r['parameters']:,}"
            f" parameters, {per_device:g} images per device, {r['steps']:,} steps",
            "  memory per device, GiB: "
            + ", ".join(
                f"{kind} {amount(memory[kind], GIB)}"
                for kind in ("parameters", "optimizer", "other", "batch", "temporary")
                if memory.get(kind)
            )
            + (" (temporary: activations, gradients, buffers)" if "temporary" in memory else ""),
            f"  work (analytic): {work['forward_per_image']:.1f} GFLOPs forward per image,"
            f" {work['step_per_image']:.1f} per image and step,"
            f" {work['step_per_device'] / 1e3:.2f} TFLOPs per device and step",
        ]
        if not r["compiled"]:
            text.append(
                "  not compiled: there is no such GPU here. Temporary memory and what is exchanged"
                " are not known; the rest is analytic"
            )
        if line := r.get("roofline"):
            times = ", ".join(
                f"{part} {1e3 * seconds:.2f} ms"
                for part, seconds in line["seconds"].items()
                if seconds is not None
            )
            text.append(
                f"  least time of a step (estimate, all overlapped): {times}; that is"
                f" {line['mfu']:.0%} MFU and {line['hours']:.1f} h for the recipe"
            )
            text.append(
                f"  from peaks: {chip.tflops:g} TFLOP/s bf16, {chip.hbm_rate or '?'} GB/s memory,"
                f" {chip.link_rate or '?'} GB/s links ({chip.source})"
                if chip
                else ""
            )
        if r.get("advice"):
            text.append(f"  does not fit; what may: {r['advice']}")
        if "largest_batch" in r:
            text.append(f"  largest batch per device that fits: {r['largest_batch']} images")
        parts.append("\n".join(text))
        if r.get("collectives"):
            exchanged = Table(title=f"{r['topology']}: exchanged in a step, MiB per device")
            for name in ("collective", "mesh axes", "what", "payload", "sent"):
                exchanged.add_column(name)
            for row in r["collectives"]:
                size = [f"{row[key] / 2**20:,.2f}" for key in ("bytes", "sent")]
                exchanged.add_row(row["kind"], row["axes"], row["what"], *size)
            parts.append(exchanged)
    return parts


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    config, values = parse(argv)
    # Where libtpu is installed and no TPU is, JAX would look for one, long and loudly.
    if any(name.startswith("v") for name in values.topology):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from mae_jax import plan
    from mae_jax.config import resolve

    places = [plan.topology(name, values.num_slices) for name in values.topology]
    asked = any(arg.lstrip("-").startswith("config.mesh") for arg in argv)
    given = asked or dict(config.mesh) != {"data": -1, "fsdp": 1, "tensor": 1}
    examples = without_data(config, values.num_examples, values.num_classes)
    make_task = resolve(f"mae_jax.tasks.{config.task}.make_task", None)
    folder, console = Path(values.cache).expanduser(), Console(stderr=True, highlight=False)
    results = []
    # The largest number of simulated devices first: it can be chosen once.
    for where in sorted(places, key=lambda place: -place.chips * (not place.is_tpu)):

        def run(config: ConfigDict, where: Any = where, given: bool = True) -> dict:
            return best(config, where, make_task, folder, given, console.print)

        result = run(config, given=given)
        if values.search_batch:
            result["largest_batch"] = search(config, run, result, examples)
        if result["fits"] is False:
            result["advice"] = plan.advice(result, config)
        results.append(result)
    results.sort(key=lambda result: values.topology.index(result["topology"]))
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for part in report(results, values.mfu):
        out.print(part, markup=False) if isinstance(part, str) else out.print(part)
    if values.json:
        for result in results:
            result |= {"assumed_mfu": values.mfu, "hours": plan.hours(result, values.mfu)}
        Path(values.json).write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["fits"] is False for result in results))
