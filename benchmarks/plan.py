"""Write the tables of PLAN.md and plan.png: what published models take on TPU pods, not run.

    pip install libtpu; python -m benchmarks.plan [PART_OF_A_NAME ...]

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

from benchmarks import sides
from mae_jax import files

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
        name = f"{part}: {variant} {batch} {times}{topology} {axes} {changes}".strip()
        entries[name] = dict(
            part=part, variant=variant, batch=batch, topology=topology, mesh=mesh,
            change=change or {}, slices=slices,
        )  # fmt: skip

    # On the paper's machine.
    for variant, mesh, change in (
        ("L/16", DATA, REMAT),
        ("L/16", DATA, {}),
        ("L/16", fsdp(128), {}),
        ("L/16", fsdp(128), REMAT),
        ("H/14", DATA, REMAT),
        ("H/14", DATA, {}),
        ("H/14", fsdp(128), {}),
        ("B/16", DATA, {}),
    ):
        add("recipe", variant, 4096, "v3:8x8", mesh, change)
    for topology in ("v4:4x4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8"):
        for variant in ("B/16", "L/16", "H/14"):
            add("recipe", variant, 4096, topology, DATA)
    # With all blocks in a row, in place of a loop over them.
    add("recipe", "B/16", 4096, "v5e:16x16", DATA, {"model.scan_unroll": 12})
    for topology in ("v5e:16x16", "v3:8x8", "v4:4x4x4", "v6e:8x8"):
        add("recipe", "L/16", 4096, topology, DATA, {"model.scan_unroll": 24})
    # The largest, on ever more chips of the smallest kind, 8 images per chip and pass.
    for variant, topology, chips in (
        ("2B/14", "v5e:2x2", 4),
        ("2B/14", "v5e:2x4", 8),
        ("2B/14", "v5e:4x4", 16),
        ("6.5B/14", "v5e:2x4", 8),
        ("6.5B/14", "v5e:4x4", 16),
        ("6.5B/14", "v5e:4x8", 32),
        ("6.5B/14", "v5p:4x4x4", 64),
    ):
        passes = {"grad_accum": 4096 // (8 * chips)}
        add("large", variant, 4096, topology, fsdp(chips), REMAT | passes)
    # 32 images per chip, on ever more chips; whole slices joined by the data-center network.
    for chips, topology in {8: "2x2x2", 32: "2x4x4", 128: "4x4x8", 512: "8x8x8"}.items():
        for mesh in (DATA, fsdp(chips), fsdp(8)):
            add("scaling", "L/16", 32 * chips, f"v5p:{topology}", mesh)
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


def hours_row(entry: dict, result: dict) -> list[str]:
    """Return the row of a plan for the paper's machine beside the paper's hours."""
    paper, ours = PAPER_HOURS[entry["variant"]], result["roofline"]["hours"]
    model = " ".join([entry["variant"], *(f"{k}={v}" for k, v in entry["change"].items())])
    return [model, axes(result), number(ours, 1, ".1f"), str(paper), f"{ours / paper:.0%}"]


def scaling_row(entry: dict, result: dict) -> list[str]:
    """Return the row of a plan with what its chips exchange."""
    slow = number(sent_to_slices(result), MIB, ".0f") if result["num_slices"] > 1 else "-"
    return [str(result["devices"]), where(result), axes(result), *exchanged(result), slow]


def document(text: str, plans: dict[str, dict]) -> str:
    """Return the text of PLAN.md with its tables and its last line made anew."""
    planned = entries()
    made = [(entry, plans[name]) for name, entry in planned.items() if name in plans]

    def part(name: str) -> list[tuple[dict, dict]]:
        return [(entry, result) for entry, result in made if entry["part"] == name]

    tables = {
        "Recipes": [HEAD, *(recipe_row(*both) for both in part("recipe"))],
        "Against the paper's hours": [
            ["model", "mesh", "hours, roofline", "paper's hours", "roofline / paper"],
            *(
                hours_row(entry, result)
                for entry, result in part("recipe")
                if entry["topology"] == "v3:8x8" and entry["variant"] in PAPER_HOURS
                if result["fits"]
            ),
        ],
        "The largest, with FSDP": [HEAD, *(recipe_row(*both) for both in part("large"))],
        "Weak scaling of L/16": [
            ["chips", "where", "mesh", *EXCHANGES, "sent to slices"],
            *(scaling_row(*both) for both in part("scaling") if both[1]["fits"]),
        ],
    }
    for heading, (head, *rows) in tables.items():
        before, title, section = text.partition(f"## {heading}\n")
        prose, _, rest = section.partition("\n| ")
        _, _, after = rest.partition("\n\n")
        text = f"{before}{title}{prose}\n{sides.markdown(head, rows)}\n\n{after}"
    versions = sorted({json.dumps(result["versions"], sort_keys=True) for _, result in made})
    missing = "; ".join(name for name in planned if name not in plans) or "nothing"
    before, _, _ = text.partition("Versions: ")
    return f"{before}Versions: {'; '.join(versions)}.\n\nNot compiled yet: {missing}.\n"


def sent_to_slices(result: dict) -> float:
    """Return the bytes that a device sends to other slices."""
    return sum(row["sent"] for row in result["collectives"] if row["axes"] == "slices")


def figure(plans: dict[str, dict]) -> None:
    """Draw the bytes that a chip sends per step, by the number of chips."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, entry in entries().items():
        result = plans.get(name, {})
        if entry["part"] != "scaling" or not result.get("fits"):
            continue
        chips, slow = result["devices"], sent_to_slices(result)
        size = entry["mesh"].get("fsdp", 1)
        label = "data-parallel" if size == 1 else "hybrid: FSDP over 8, data over the rest"
        label = "FSDP over all chips" if size == chips > 8 else label
        if entry["slices"] > 1:
            curves.setdefault("slices of 64: to other slices", []).append((chips, slow / MIB))
            label = "slices of 64: FSDP inside, to neighbours"
        sent = sum(row["sent"] for row in result["collectives"]) - slow
        curves.setdefault(label, []).append((chips, sent / MIB))
    drawing, (axis,) = sides.panels(7, 4.2, 1)
    for label, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axis.set(
        xscale="log", xlabel="TPU v5p chips, 32 images each", ylabel="MiB sent per chip and step"
    )
    axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
    axis.set_ylim(bottom=0)
    axis.set_title("MAE ViT-L/16: what a step exchanges, by the compiled program")
    axis.grid(color="0.92")
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
    page = HERE / "PLAN.md"
    page.write_text(document(page.read_text(), plans))
    figure(plans)


if __name__ == "__main__":
    main(sys.argv[1:])
