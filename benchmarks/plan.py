"""Write PLAN.md and plan.png: what published models take on TPU pods, compiled and not run.

    pip install libtpu; python benchmarks/plan.py [PART_OF_A_NAME ...]

One step after another is compiled, a minute or more each, and kept in plan.json beside this file,
so that the script may be stopped and started again. A plan is made again only if its entry is
deleted from plan.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mae_jax import files
from mae_jax.configs.common import model_sizes

HERE = Path(__file__).parent
KEPT = HERE / "plan.json"
GIB, MIB = 2**30, 2**20
# arXiv 2111.06377, Table 2: 800 epochs on 128 TPU v3 cores, decoder of 8 blocks.
PAPER_HOURS = {"L/16": 15.4, "H/14": 34.5}
DATA, REMAT = {"data": -1}, {"model.remat": True}


def fsdp(size: int) -> dict[str, int]:
    """Return a mesh that splits the state over so many chips."""
    return {"data": -1, "fsdp": size}


def entries() -> dict[str, dict]:
    """Return what is planned, by name."""
    entries: dict[str, dict] = {}

    def add(part, variant, batch, topology, mesh, change=None, slices=1):
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.items())
        changes = " ".join(f"{key}={value}" for key, value in (change or {}).items())
        times = f"{slices} x " if slices > 1 else ""
        name = " ".join(f"{part}: {variant} {batch} {times}{topology} {axes} {changes}".split())
        entries[name] = dict(
            part=part, variant=variant, batch=batch, topology=topology, mesh=mesh,
            change=change or {}, slices=slices,
        )  # fmt: skip

    # On the paper's machine.
    add("recipe", "L/16", 4096, "v3:8x8", DATA, REMAT)
    add("recipe", "L/16", 4096, "v3:8x8", DATA)
    add("recipe", "L/16", 4096, "v3:8x8", fsdp(128))
    add("recipe", "L/16", 4096, "v3:8x8", fsdp(128), REMAT)
    add("recipe", "H/14", 4096, "v3:8x8", DATA, REMAT)
    add("recipe", "H/14", 4096, "v3:8x8", DATA)
    add("recipe", "H/14", 4096, "v3:8x8", fsdp(128))
    add("recipe", "B/16", 4096, "v3:8x8", DATA)
    for topology in ("v4:4x4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8"):
        for variant in ("B/16", "L/16", "H/14"):
            add("recipe", variant, 4096, topology, DATA)
    # With all blocks in a row, in place of a loop over them.
    for variant, topology in (
        ("B/16", "v5e:16x16"),
        ("L/16", "v5e:16x16"),
        ("L/16", "v3:8x8"),
        ("L/16", "v4:4x4x4"),
        ("L/16", "v6e:8x8"),
    ):
        every = {"model.scan_unroll": model_sizes(variant)["depth"]}
        add("recipe", variant, 4096, topology, DATA, every)
    # The largest, on ever more chips of the smallest kind, 8 images per chip and pass.
    for variant, topologies in (
        ("2B/14", {"v5e:2x2": 4, "v5e:2x4": 8, "v5e:4x4": 16}),
        ("6.5B/14", {"v5e:2x4": 8, "v5e:4x4": 16, "v5e:4x8": 32, "v5p:4x4x4": 64}),
    ):
        for topology, chips in topologies.items():
            passes = {"grad_accum": 4096 // (8 * chips)}
            add("large", variant, 4096, topology, fsdp(chips), REMAT | passes)
    # 32 images per chip, on ever more chips; whole slices joined by the data-center network.
    pods = {8: "v5p:2x2x2", 32: "v5p:2x4x4", 128: "v5p:4x4x8", 512: "v5p:8x8x8"}
    for chips, topology in pods.items():
        for mesh in (DATA, fsdp(chips), fsdp(8)):
            add("scaling", "L/16", 32 * chips, topology, mesh)
    for slices in (2, 4, 8):
        add("scaling", "L/16", 32 * 64 * slices, "v5p:4x4x4", fsdp(64), slices=slices)
    return entries


def make(entry: dict) -> dict | None:
    """Run `mae-jax plan` for an entry in a process of its own; return None if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        config = f"configs/pretrain.py:variant={entry['variant']},batch_size={entry['batch']}"
        command = [
            *(sys.executable, "-m", "mae_jax", "plan", f"--config={config}", f"--json={out}"),
            *(f"--topology={entry['topology']}", f"--num_slices={entry['slices']}"),
            *(f"--config.mesh.{axis}={size}" for axis, size in entry["mesh"].items()),
            *(f"--config.{key}={value}" for key, value in entry["change"].items()),
        ]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            command, cwd=HERE.parent, env=env, capture_output=True, text=True, check=False
        )
        if not out.exists():
            print(f"{' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
            return None
        return json.loads(out.read_text())[0]


def number(value: float | None, unit: float = 1.0, form: str = ".2f") -> str:
    """Return a number as text, or '?' for an unknown one."""
    return "?" if value is None else format(value / unit, form)


def axes(result: dict) -> str:
    """Return the mesh as text."""
    return " ".join(f"{k}={n}" for k, n in result["mesh"].items() if n > 1)


def where(result: dict) -> str:
    """Return the chips as text."""
    times = f"{result['num_slices']} x " if result["num_slices"] > 1 else ""
    return f"{times}{result['topology']} ({times}{result['cloud']})"


def table(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, whose first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], ""]


EXCHANGES = {
    "gathered": ("all-gather",),
    "summed": ("all-reduce", "reduce-scatter"),
    "passed on": ("collective-permute", "all-to-all"),
}


def exchanged(result: dict) -> list[str]:
    """Return the MiB of payload of each of EXCHANGES."""
    rows = result.get("collectives", [])
    return [
        number(sum(row["bytes"] for row in rows if row["kind"] in kinds), MIB, ".0f")
        for kinds in EXCHANGES.values()
    ]


def recipe_row(entry: dict, result: dict) -> list[str]:
    """Return the row of a plan under HEAD."""
    memory, line = result["memory"], result.get("roofline") or {}
    seconds = line.get("seconds", {})
    change = " ".join(f"{key.split('.')[-1]}={value}" for key, value in entry["change"].items())
    return [
        f"{entry['variant']} {change}".strip(),
        where(result),
        axes(result),
        {True: "yes", False: "**no**", None: "?"}[result["fits"]],
        *(number(memory.get(kind), GIB) for kind in ("parameters", "optimizer", "temporary")),
        f"{number(memory.get('total'), GIB)} of {number(memory['chip'], GIB)}",
        *exchanged(result),
        *(number(seconds.get(part), 1e-3, ".1f") for part in ("compute", "memory", "links")),
        number(line.get("hours"), 1, ".1f"),
        number(result.get("hours"), 1, ".1f"),
    ]


HEAD = [
    *("model, batch 4096", "chips (cloud's name)", "mesh", "fits", "parameters", "optimizer"),
    *("temporary", "total", *EXCHANGES),
    *("compute", "memory", "links", "hours, roofline", "hours, at 40 % MFU"),
]


INTRODUCTION = """\
Does a recipe fit, and how long does it take?

    python benchmarks/plan.py

Every row is `configs/pretrain.py`, 800 epochs, compiled ahead of time for chips that were not
there. **Nothing was run on a TPU.** [RESULTS.md](RESULTS.md) has another estimate, by the
compiler's own count of cycles, which meets the paper's hours on TPU v3 within 0.85 to 1.05.

| column | what it says |
| --- | --- |
| total | the compiler's peak, in GiB per device, of what the chip has; a device of v3 is a core |
| parameters, optimizer, temporary | parts of the total |
| gathered, summed, passed on | what a device exchanges in a step: MiB of payload of all-gathers, \
of all-reduces and reduce-scatters, and of permutes and all-to-alls in the compiled program |
| compute, memory, links | **estimates**, ms of a step at the peaks in `mae_jax/flops.py`; memory \
is counted op by op, as if nothing stayed on the chip between two ops |
| hours, roofline | of 800 epochs, by the longest of the three |
| hours, at 40 % MFU | the same if 40 % of the peak arithmetic is reached: an assumption |"""
RECIPES = """\
All recipes fit. L/16 takes 7.46 GiB of a v3 core with data parallelism, 5.73 with `remat`, 3.23
with FSDP over all 128. `scan_unroll` of all blocks puts them in a row, in place of a loop that
copies what it keeps for the way back: a step of L/16 then moves 30 % (v3), 22 % (v4) or 16 % (v5e)
less memory. With FSDP over 64 chips or more the compiler gathers weights by all-reduces, too, so
that they stand under "summed"."""
AGAINST = """\
The authors' hours are of 128 TPU v3 cores (Table 2, 800 epochs, TensorFlow). The roofline is the
least time of our program when every array goes through main memory at its peak: 30 to 45 % of those
hours."""
LARGEST = """\
Gradients are accumulated over passes of 8 images per chip. The 2B encoder fits on 4 chips of v5e;
6.5B needs 16."""
SCALING = """\
32 images per chip. What is exchanged is MiB of payload per chip and step; the last column is what a
chip sends to other slices, over the data-center network. Data parallelism exchanges the same on 8
chips as on 512."""


def document(plans: dict[str, dict]) -> str:
    """Return the text of PLAN.md."""
    made = [(entry, plans[name]) for name, entry in entries().items() if name in plans]
    missing = [name for name in entries() if name not in plans]
    made_by = {json.dumps(r["versions"], sort_keys=True) for _, r in made}
    text = [
        "# What published models take on TPU pods",
        "",
        INTRODUCTION,
        "",
        "## Recipes",
        "",
        RECIPES,
        "",
        *table([HEAD, *(recipe_row(e, r) for e, r in made if e["part"] == "recipe")]),
        "## Against the paper's hours",
        "",
        AGAINST,
        "",
        *table(
            [["model", "mesh", "hours, roofline", "paper's hours", "roofline / paper"]]
            + [
                [
                    " ".join([e["variant"], *(f"{k}={v}" for k, v in e["change"].items())]),
                    axes(r),
                    number(r["roofline"]["hours"], 1, ".1f"),
                    str(PAPER_HOURS[e["variant"]]),
                    f"{r['roofline']['hours'] / PAPER_HOURS[e['variant']]:.0%}",
                ]
                for e, r in made
                if e["topology"] == "v3:8x8" and e["variant"] in PAPER_HOURS and "roofline" in r
            ]
        ),
        "## The largest, with FSDP",
        "",
        LARGEST,
        "",
        *table([HEAD, *(recipe_row(e, r) for e, r in made if e["part"] == "large")]),
        "## Weak scaling of L/16",
        "",
        SCALING,
        "",
        *table(
            [["chips", "where", "mesh", *EXCHANGES, "sent to slices"]]
            + [
                [
                    str(r["devices"]),
                    where(r),
                    axes(r),
                    *exchanged(r),
                    number(sent_to_slices(r), MIB, ".0f") if r["num_slices"] > 1 else "-",
                ]
                for e, r in made
                if e["part"] == "scaling" and r["fits"]
            ]
        ),
        "![Bytes exchanged per chip and step](plan.png)",
        "",
        f"Versions: {'; '.join(sorted(made_by))}.",
    ]
    if missing:
        text += ["", "Not compiled yet: " + "; ".join(missing) + "."]
    return "\n".join(text) + "\n"


def sent_to_slices(result: dict) -> float:
    """Return the bytes that a device sends to other slices."""
    return sum(row["sent"] for row in result["collectives"] if row["axes"] == "slices")


def figure(plans: dict[str, dict]) -> None:
    """Draw the bytes that a chip sends per step, by the number of chips."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for name, entry in entries().items():
        result = plans.get(name, {})
        if entry["part"] != "scaling" or not result.get("fits"):
            continue
        sent = sum(row["sent"] for row in result["collectives"])
        size = entry["mesh"].get("fsdp", 1)
        label = "data-parallel" if size == 1 else "hybrid: FSDP over 8, data over the rest"
        label = "FSDP over all chips" if size == result["devices"] > 8 else label
        if entry["slices"] > 1:
            slow = sent_to_slices(result)
            curves.setdefault("slices of 64: to other slices", []).append((result["devices"], slow))
            label, sent = "slices of 64: FSDP inside, to neighbours", sent - slow
        curves.setdefault(label, []).append((result["devices"], sent))
    drawing = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    axis = drawing.subplots()
    for label, points in curves.items():
        axis.plot(*zip(*((x, y / MIB) for x, y in sorted(points)), strict=True), "o-", label=label)
    axis.set(
        xscale="log", xlabel="TPU v5p chips, 32 images each", ylabel="MiB sent per chip and step"
    )
    axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
    axis.set_ylim(bottom=0)
    axis.set_title("MAE ViT-L/16: what a step exchanges, by the compiled program")
    axis.grid(color="0.92")
    if curves:
        axis.legend(frameon=False)
    drawing.savefig(HERE / "plan.png", dpi=130)


def main(parts: list[str]) -> None:
    plans = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name, entry in entries().items():
        if name in plans or not all(part in name for part in parts):
            continue
        print(name, flush=True)
        if (made := make(entry)) is None:
            continue
        plans[name] = made
        files.write_json(KEPT, plans)
    (HERE / "PLAN.md").write_text(document(plans))
    figure(plans)


if __name__ == "__main__":
    main(sys.argv[1:])
