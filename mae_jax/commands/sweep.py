"""Sweep: make the runs of an ablation in turn, and one table of what they measured."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mae_jax import files
from mae_jax.commands import cli, recipes, running
from mae_jax.config import OPTIONAL_KEYS, leaves
from mae_jax.errors import UserError, nearest

OPEN_GROUPS = ("masking.", "target.")  # their options are those of the function they name


def define(values: flags.FlagValues) -> None:
    """Define the flags of `mae-jax sweep`: those of `mae-jax train`, and these."""
    running.define(values)
    text = "rows, or runs such as ROW-1, with commas between several: what a Slurm array calls"
    flags.DEFINE_list("only", [], text, flag_values=values)
    text = "show rows, parameters, FLOPs and hours, and run nothing"
    flags.DEFINE_bool("dry_run", False, text, flag_values=values)
    text = "chips that --dry_run counts the hours of"
    flags.DEFINE_string("topology", "h100:1", text, flag_values=values)
    text = "fraction of the chips' peak that --dry_run assumes"
    flags.DEFINE_float("mfu", 0.4, text, flag_values=values)
    text = "examples of the dataset, for --dry_run, if it is not here"
    flags.DEFINE_integer("num_examples", None, text, lower_bound=1, flag_values=values)


def expand(config: ConfigDict) -> dict[str, dict[str, ConfigDict]]:
    """Return row -> run -> config; with several seeds the runs of a row are named ROW-SEED.

    Raises:
      UserError: the recipe has no rows, or one of them changes a key that there is not.
    """
    if "sweep" not in config:
        raise UserError(
            "this recipe has no config.sweep: give one of"
            f" {', '.join(f'configs/{x}.py' for x in ('encoders', *recipes.names('ablations')))}"
        )
    known = {key for key, _ in leaves(config)} | set(OPTIONAL_KEYS)
    expanded: dict[str, dict[str, ConfigDict]] = {}
    for row in config.sweep.order:
        changes = config.sweep.rows[row]
        for key, _ in leaves(changes):
            if key not in known and not key.startswith(OPEN_GROUPS):
                raise UserError(f"row {row!r}: no such key {key!r}{nearest(key, known)}")
        expanded[row] = {}
        for seed in range(config.seed, config.seed + config.sweep.seeds):
            run = config.copy_and_resolve_references()
            with run.unlocked():
                del run["sweep"]
                run.update(changes)
                run.seed = seed
            expanded[row][row if config.sweep.seeds == 1 else f"{row}-{seed}"] = run
    return expanded


def require_no_row_sets(config: ConfigDict, overrides: Collection[str]) -> None:
    """Check that no row sets a key that the command line sets: the row was made before, and wins.

    Raises:
      UserError: a row does.
    """
    for row in config.sweep.order:
        for key, _ in leaves(config.sweep.rows[row]):
            if key in overrides:
                raise UserError(
                    f"--config.{key}: row {row!r} sets it itself, perhaps as a share of what the"
                    " recipe has: give --config=...:blr=RATE for the rate, or leave it out"
                )


def chosen(rows: Mapping[str, Mapping[str, ConfigDict]], only: list[str]) -> dict[str, ConfigDict]:
    """Return the runs that --only names; all, if it names none.

    Raises:
      UserError: there is no such row or run.
    """
    runs = {name: run for row in rows.values() for name, run in row.items()}
    for name in only:
        if name not in rows and name not in runs:
            raise UserError(
                f"--only={name}: there is no such row{nearest(name, dict.fromkeys([*rows, *runs]))}"
            )
    wanted = {name for row in rows for name in rows[row] if {row, name} & set(only)}
    return {name: run for name, run in runs.items() if name in wanted or not only}


def cost(config: ConfigDict, values: flags.FlagValues) -> dict[str, Any]:
    """Return parameters, GFLOPs per image, steps and hours of a run, counted from its sizes."""
    import jax

    from mae_jax import plan, tasks, topologies
    from mae_jax.config import steps
    from mae_jax.data.pipeline import steps_per_epoch

    topology = topologies.parse(values.topology)
    recipes.without_data(config, values.num_examples, None)
    task = tasks.build(config)
    per_epoch = 1
    if steps(config.train_for, config.batch_size, per_epoch):  # else no batch is read
        per_epoch = steps_per_epoch(len(task.examples), config.batch_size)
    total = steps(config.train_for, config.batch_size, per_epoch)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    gflops = plan.count_gflops(task, config, topology.devices)
    result = dict(
        device_kind=topology.device_kind or "",
        devices=topology.devices,
        batch_size=config.batch_size,
        gflops=gflops,
        steps=total,
    )
    return {
        "parameters": f"{sum(x.size for x in jax.tree.leaves(params)):,}",
        "GFLOPs per image: forward": f"{gflops['forward_per_image']:.3g}",
        "step": f"{gflops['step_per_image']:.3g}",
        "steps": f"{total:,}",
        "hours": plan.hours(result, values.mfu),
    }


def show_costs(runs: Mapping[str, ConfigDict], values: flags.FlagValues) -> None:
    """Print what each run takes, and all of them together."""
    from rich.console import Console
    from rich.table import Table

    costs = {name: cost(run, values) for name, run in runs.items()}
    hours = [x["hours"] for x in costs.values() if x["hours"] is not None]
    where = f"{values.topology} at {values.mfu:.0%} of the peak, without reading and measuring"
    table = Table(title=f"Hours on {where}")
    for words in ("run", *next(iter(costs.values()))):
        table.add_column(words, justify="left" if words == "run" else "right")
    for name, x in costs.items():
        cells = x | {"hours": "?" if x["hours"] is None else f"{x['hours']:.3g}"}
        table.add_row(name, *cells.values())
    Console(highlight=False, width=110).print(table)
    print(f"{len(costs)} runs, {f'{sum(hours):.3g}' if hours else '?'} hours")


def write_table(config: ConfigDict, rows: Mapping[str, Mapping[str, Any]], workdir: str) -> None:
    """Write table.md, table.csv and table.png of all that has ended, and print the first."""
    from mae_jax.metrics import table

    runs = {
        row: [table.measured(os.path.join(workdir, name)) for name in names]
        for row, names in rows.items()
    }
    paper = config.sweep.paper.to_dict()
    text = table.markdown(runs, paper)
    contents = {
        "table.md": text.encode(),
        "table.csv": table.comma_separated(runs, paper).encode(),
        "table.png": table.figure(runs, paper),
    }
    for name, content in contents.items():
        files.write_bytes(os.path.join(workdir, name), content)
    print(f"\n{text}\nwritten to {', '.join(os.path.join(workdir, name) for name in contents)}")


def main(argv: list[str]) -> int:
    argv = [arg.replace("--dry-run", "--dry_run") for arg in argv]  # as other tools spell it
    config, values, recipe = recipes.parse(argv, define, "sweep")
    rows = expand(config)
    require_no_row_sets(config, re.findall(r"--config\.([\w.]+)", " ".join(argv)))
    runs = chosen(rows, values.only)
    if values.profile:
        raise UserError("--profile is for one run: give it to `mae-jax train`")
    if values.dry_run:
        cli.check_mfu(values.mfu)
        show_costs(runs, values)
        return 0
    workdir = values.workdir or str(Path("workdir") / recipe)
    files.require_place(workdir, "--workdir")
    running.connect(list(runs.values()), values, workdir)
    import jax

    from mae_jax import tasks

    for run in runs.values():  # what cannot work is refused before the first run
        tasks.build(run)
    status = 0
    try:
        for number, (name, run) in enumerate(runs.items(), 1):
            if jax.process_index() == 0:
                print(f"\n--- run {number} of {len(runs)}: {name}", flush=True)
            ended = running.supervise(run, os.path.join(workdir, name))
            status = max(status, ended)
            if ended > 1:  # 1: its loss is not finite, and the other rows can do without it
                break
    finally:
        if jax.process_index() == 0 and ("://" in workdir or os.path.isdir(workdir)):
            write_table(config, rows, workdir)
    return status
