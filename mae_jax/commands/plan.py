"""Plan: does a run fit on TPUs or GPUs, and how long would it take? Needs none of them."""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mae_jax.commands import cli, recipes
from mae_jax.errors import UserError

# Images/s that one core reads: JPEGs of 103 kB to 224 px, Pillow (benchmarks/RESULTS.md, input).
READ_PER_CORE = 247


def define(values: flags.FlagValues) -> None:
    """Define the flags of `mae-jax plan`."""
    integer = partial(flags.DEFINE_integer, flag_values=values)
    flags.DEFINE_list(
        "topology",
        None,
        "what to plan for, with commas between several: TPU chips (v3:8x8, v4:4x4x4, v5e:16x16,"
        " v5p:4x4x4, v6e:16x16), which need libtpu; CPU devices (cpu:8); GPUs (gpu:8, h100:8)",
        flag_values=values,
    )
    integer("num_slices", 1, "TPU slices, joined by the data-center network")
    for what in ("examples", "classes"):
        text = f"{what} of a dataset that is not here (but ImageNet-1k's)"
        integer(f"num_{what}", None, text, lower_bound=1)
    flags.DEFINE_bool(
        "search_batch", False, "find the largest batch per chip that fits", flag_values=values
    )
    flags.DEFINE_float(
        "mfu", 0.4, "fraction of peak assumed for the hours on GPUs", flag_values=values
    )
    flags.DEFINE_string("json", None, "write the plans to this file, too", flag_values=values)


def check(values: flags.FlagValues) -> None:
    """Raise UserError if a flag has a value that cannot work."""
    if not values.topology:
        raise UserError("--topology=NAME is missing, such as --topology=v5e:16x16 or cpu:8")
    cli.check_mfu(values.mfu)
    if values.json and Path(values.json).is_dir():
        raise UserError(f"--json={values.json} is a folder: name a file")
    if values.json and not Path(values.json).absolute().parent.is_dir():
        raise UserError(f"--json={values.json}: there is no such folder")


def best_plan(config: ConfigDict, topology: Any, mesh_given: bool = True) -> dict[str, Any]:
    """Return the plan for the config's mesh.

    If the user gave no mesh, the config's is compared with two others: the state split over all
    chips of a slice, and data-parallel. The first that fits is returned.
    """
    from mae_jax import plan, topologies
    from mae_jax.mesh import make_mesh, sizes_of

    devices = topologies.devices(topology)
    # There is no compiler for a GPU that is not here; its arrays are laid out on CPU devices.
    compiled = topology.is_tpu or topology.kind == "cpu" or devices[0].platform == "gpu"
    asked = [dict(config.mesh)]
    if topology.clock and not mesh_given:
        alternatives = (len(devices) // topology.slices, 1)
        asked += [{"data": -1, "fsdp": fsdp, "tensor": 1} for fsdp in alternatives]
    meshes: list[dict[str, int]] = []
    for sizes in asked:
        mesh = sizes_of(sizes, len(devices), topology.platform, topology.slices)
        meshes += [mesh] * (mesh not in meshes)

    plans: list[dict[str, Any]] = []
    for mesh in meshes:
        text = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
        print(f"{topology.name}: mesh {text} (a large step compiles for minutes)", file=sys.stderr)
        try:
            made = make_mesh(**mesh, devices=devices)
            plans.append(plan.plan(config, topology, made, compiled))
        except UserError:
            if not plans:
                raise
    best = next((result for result in plans if result["fits"] is not False), plans[0])
    return best | {"compared": [compared(result) for result in plans]}


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a plan that a comparison of meshes shows."""
    names = ("mesh", "hosts", "batch_size", "fits", "memory", "clock")
    return {name: result[name] for name in names if name in result}


def largest_batch(
    config: ConfigDict, plan_for: Callable[[ConfigDict], dict], start: dict, examples: int
) -> int:
    """Return the largest batch per chip that fits, within a quarter; 0 if one image does not.

    Args:
      start: the plan of `config`; its mesh is kept.
      examples: in the dataset; a batch cannot have more.
    """
    mesh = start["mesh"]
    ways = mesh["data"] * mesh["fsdp"] * config.grad_accum
    most = min(examples // ways, 2**14)

    def fits(share: int) -> bool:
        trial = config.copy_and_resolve_references()
        with trial.unlocked():
            trial.batch_size = share * ways
            trial.mesh = ConfigDict(mesh)
        return bool(plan_for(trial)["fits"])

    share = config.batch_size // ways
    low, high = (share, None) if start["fits"] else (0, share)
    while high is None or high - low > max(low // 4, 1):
        trial = 2 * low if high is None else max((low + high) // 2, 1)
        if trial > most:
            break
        low, high = (trial, high) if fits(trial) else (low, trial)
    return low * config.grad_accum


def facts(result: dict) -> dict[str, str]:
    """Return the cells of a plan's column in the table, by the names of the rows."""
    memory, gflops = result["memory"], result["gflops"]
    slices = f"{result['num_slices']} x " if result["num_slices"] > 1 else ""
    mesh = [f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1]
    cells = {
        "cloud": f"{slices}{result['cloud']}" if result["cloud"] else "-",
        "devices": f"{result['devices']} x {result['device_kind']}",
        "mesh": " ".join(mesh) or "1",
        "parameters": f"{result['parameters']:,}",
        "steps": f"{result['steps']:,}",
        "images per device": f"{result['batch_size'] / result['devices']:g}",
        "GFLOPs per image: forward, step": f"{gflops['forward_per_image']:.1f},"
        f" {gflops['step_per_image']:.1f}",
        "TFLOPs per device and step": f"{gflops['step_per_device'] / 1e3:.2f}",
        "fits": {True: "yes", False: "NO", None: "?"}[result["fits"]],
        "GiB per device": f"{gib(memory.get('total'))} of {gib(memory['chip'])}",
    }
    for kind in ("parameters", "optimizer", "other", "batch", "temporary"):
        if memory.get(kind):
            words = kind.replace("temporary", "activations, gradients, buffers")
            cells[f"  {words}"] = gib(memory[kind])
    if "largest_batch" in result:
        cells["largest batch per device"] = str(result["largest_batch"])
    for row in result.get("collectives", ()):
        words = f"MiB by {row['kind']} over {row['axes']}, {row['dtype']}"
        cells[words] = f"{row['bytes'] / 2**20:,.2f}, sends {row['sent'] / 2**20:,.2f}"
    if line := result.get("roofline"):
        cells["step at best (estimate)"] = f"{1e3 * line['step']:.1f} ms, by {line['bound']}"
        for part, seconds in line["seconds"].items():
            if seconds is not None:
                cells[f"  {part}"] = f"{1e3 * seconds:.2f} ms"
        cells["MFU at best"] = f"{line['mfu']:.0%}"
        cells["hours at best"] = f"{line['hours']:.1f}"
    if "clock" in result:
        cells |= clock_facts(result)
    elif line := result.get("gpu"):
        cells["images/s, from runs of one GPU"] = span(line["images_per_second"], ",.0f")
        cells["hours, from runs of one GPU"] = span(line["hours"], ".1f")
    elif result["hours"] is not None:
        cells[f"hours at {result['assumed_mfu']:.0%} MFU"] = f"{result['hours']:.1f}"
    return cells


def span(values: Iterable[float], form: str) -> str:
    """Return a range as text: one number where both ends are written alike."""
    return " to ".join(dict.fromkeys(format(value, form) for value in sorted(values)))


def clock_facts(result: dict) -> dict[str, str]:
    """Return the cells of a plan's time by the compiler's clock, by the names of the rows."""
    line = result["clock"]
    rates = [result["batch_size"] / seconds for seconds in line["steps"]]
    cores = [rate / result["hosts"] / READ_PER_CORE for rate in rates]
    cells = {
        "step by the compiler's clock": f"{1e3 * line['step']:.1f} ms",
        "  not in it: links, nothing beside": f"{1e3 * line['links']['alone']:.1f} ms",
        "  not in it: links beside products": f"{1e3 * line['links']['beside']:.1f} ms",
    }
    for row in line["unrated"]:
        copies = " beside" if row["beside"] else ""
        cells[f"  not in it: MiB by {row['kind']}{copies}"] = f"{row['bytes'] / 2**20:,.0f}"
    return cells | {
        "images/s": span(rates, ",.0f"),
        "reading cores per host": span(cores, ".0f"),
        "hours": span(line["hours"], ".1f"),
    }


def compare(result: dict) -> Any:
    """Return the table of the meshes that a plan was compared with."""
    from rich.table import Table

    words = ("step by the compiler's clock", "  not in it: links, nothing beside", "images/s")
    title = f"{result['topology']}: the mesh of the recipe, and others"
    table = Table("mesh", *words, "reading cores per host", "GiB per device", title=title)
    for other in result["compared"]:
        mesh = " ".join(f"{axis}={size}" for axis, size in other["mesh"].items() if size > 1)
        cells = clock_facts(other) if "clock" in other else {}
        row = [cells.get(word, "-").strip() for word in (*words, "reading cores per host")]
        table.add_row(mesh or "1", *row, gib(other["memory"].get("total")))
    return table


def gib(size: float | None) -> str:
    """Return bytes as text."""
    return "?" if size is None else f"{size / 2**30:.2f}"


def show(results: list[dict]) -> None:
    """Print a table with a column for each plan, and notes on the plans below it."""
    from rich.console import Console
    from rich.table import Table

    from mae_jax import flops

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    columns = [facts(result) for result in results]
    names = [result["topology"] for result in results]
    table = Table("per step and device", *names, title="Plans: compiled, not run")
    for words in dict.fromkeys(words for cells in columns for words in cells):
        table.add_row(words, *(cells.get(words, "-") for cells in columns))
    console.print(table)
    for result in results:
        if len(result["compared"]) > 1:
            console.print(compare(result))
    for name, result in zip(names, results, strict=True):
        lines = []
        if not result["compiled"]:
            why = "there is no such GPU here"
            if result["fits"] is False:
                why = "the state alone takes more memory than there is"
            lines.append(
                f"not compiled: {why}. Temporary memory and what is exchanged are not known; the"
                " rest follows from sizes"
            )
        if "advice" in result:
            lines.append(f"does not fit; what may help: {result['advice']}")
        if chip := flops.chip(result["device_kind"]):
            lines.append(
                f"peaks: {chip.tflops:g} TFLOP/s bf16, {chip.hbm_rate or '?'} GB/s memory,"
                f" {chip.link_rate or '?'} GB/s links ({chip.source})"
            )
        for line in lines:
            console.print(f"{name}: {line}", markup=False)


def main(argv: list[str]) -> int:
    config, values, _ = recipes.parse(argv, define, "plan")
    check(values)
    # Where libtpu is installed and no TPU is, JAX would look for one, long and loudly.
    if any(name.startswith("v") for name in values.topology):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mae_jax import files, plan, topologies

    asked = [topologies.parse(name, values.num_slices) for name in values.topology]
    for topology in asked:
        if values.search_batch and not topology.is_tpu:
            raise UserError(
                f"--search_batch on {topology.name}: the memory of a batch is known for TPUs only,"
                " such as v5e:2x2"
            )
    topologies.simulate(asked)
    mesh_given = any(arg.lstrip("-").startswith("config.mesh") for arg in argv)
    mesh_given |= dict(config.mesh) != {"data": -1, "fsdp": 0, "tensor": 1}
    examples = recipes.without_data(config, values.num_examples, values.num_classes)
    results = []
    for topology in asked:
        result = best_plan(config, topology, mesh_given)
        if values.search_batch:
            plan_for = partial(best_plan, topology=topology)
            result["largest_batch"] = largest_batch(config, plan_for, result, examples)
        if result["fits"] is False:
            result["advice"] = plan.advice(result, config)
        result |= {"assumed_mfu": values.mfu, "hours": plan.hours(result, values.mfu)}
        results.append(result)
    show(results)
    if values.json:
        files.write_json(values.json, results)
    return int(any(result["fits"] is False for result in results))
