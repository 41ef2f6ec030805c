"""Write the tables of PLAN.md and plan.png: what published models take on TPU pods, not run.

    pip install libtpu; python -m benchmarks.plan [PART_OF_A_NAME ...]

One step after another is compiled, a minute or more each, and kept in plan.json beside this file,
so that the script may be stopped and started again. A plan is made again only if its entry is
deleted from plan.json.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import sides
from mae_jax import files, topologies
from mae_jax.commands.plan import span

HERE = Path(__file__).parent
KEPT = HERE / "plan.json"
GIB, MIB = 2**30, 2**20
RULE, DATA, REMAT = {}, {"data": -1, "fsdp": 1}, {"model.remat": True}
LOOP, ONE_BLOCK = {"model.scan_unroll": 1}, {"model.decoder_depth": 1}
# arXiv 2111.06377, Table 2: hours of 800 epochs on 128 TPU v3 cores.
PAPER = (
    ("L/16", {}, 15.4),
    ("L/16", ONE_BLOCK, 11.6),
    ("L/16", {"masking.tokens_in_encoder": True} | REMAT, 42.4),
    ("H/14", {}, 34.5),
    ("H/14", ONE_BLOCK, 29.3),
)


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

    # As the paper's program was, as far as we know: data-parallel, with a loop over the blocks.
    for variant, change, _ in PAPER:
        add("paper", variant, 4096, "v3:8x8", DATA, change | LOOP)
    # By default, and in the layouts that it is compared with.
    for variant, topology in itertools.product(("B/16", "L/16", "H/14"), ("v5e:16x16", "v3:8x8")):
        add("recipe", variant, 4096, topology, RULE)
    for topology in ("v4:4x4x4", "v5p:4x4x4", "v6e:8x8"):
        add("recipe", "L/16", 4096, topology, RULE)
    for topology in ("v5e:16x16", "v3:8x8"):
        add("recipe", "L/16", 4096, topology, DATA)
    add("recipe", "L/16", 4096, "v5e:16x16", fsdp(256))
    add("recipe", "L/16", 4096, "v5e:16x16", RULE, LOOP)
    add("recipe", "L/16", 4096, "v5e:16x16", RULE, REMAT)
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
            *(
                f"--config.mesh.{axis}={size}"
                for axis, size in ({"data": -1} | entry["mesh"]).items()
            ),
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


def change_of(entry: dict) -> str:
    """Return the model and what is changed of its recipe as text."""
    changes = (f"{key.split('.')[-1]}={value}" for key, value in entry["change"].items())
    return " ".join([entry["variant"], *changes])


def recipe_row(entry: dict, result: dict) -> list[str]:
    """Return the row of a plan under HEAD."""
    memory, line = result["memory"], result.get("roofline") or {}
    seconds, clock = line.get("seconds", {}), result.get("clock") or {}
    links, rate = clock.get("links", {}), "?"
    if clock:
        rate = span([result["batch_size"] / step for step in clock["steps"]], ",.0f")
    return [
        change_of(entry),
        where(result),
        axes(result),
        {True: "yes", False: "**no**", None: "?"}[result["fits"]],
        *(number(memory.get(kind), GIB) for kind in ("parameters", "optimizer", "temporary")),
        f"{number(memory.get('total'), GIB)} of {number(memory['chip'], GIB)}",
        *exchanged(result),
        *(number(seconds.get(part), 1e-3, ".1f") for part in ("compute", "memory")),
        number(clock.get("step"), 1e-3, ".1f"),
        *(number(links.get(kind), 1e-3, ".1f") for kind in ("alone", "beside")),
        rate,
        span(clock["hours"], ".1f") if clock else number(line.get("hours"), 1, ".1f") + " or more",
    ]


HEAD = [
    *("model, batch 4096", "chips (cloud's name)", "mesh", "fits", "parameters", "optimizer"),
    *("temporary", "total", *EXCHANGES, "compute", "memory", "clock", "links alone"),
    *("links beside", "images/s", "hours"),
]


def paper_row(entry: dict, result: dict) -> list[str]:
    """Return the row of a plan for the paper's machine beside the paper's hours."""
    paper = next(
        hours
        for variant, change, hours in PAPER
        if (variant, change | LOOP) == (entry["variant"], entry["change"])
    )
    clock, line = result["clock"], result["roofline"]
    ours = clock["hours"][1]
    return [
        change_of(entry),
        *(number(seconds, 1e-3, ".1f") for seconds in (clock["step"], clock["links"]["alone"])),
        number(ours, 1, ".1f"),
        str(paper),
        number(ours / paper),
        number(line["hours"] / paper),
    ]


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
            [
                "run",
                "clock",
                "links alone",
                "hours",
                "paper's hours",
                "clock / paper",
                "roofline / paper",
            ],
            *(paper_row(*both) for both in part("paper")),
        ],
        "How the clock rates each chip": [
            ["chip", "GHz", "product", "addition", "hours are"],
            *(
                [kind, str(rating.ghz), f"{rating.product:.2f}", f"{rating.addition:.2f}", words]
                for kind, rating in topologies.CLOCKS.items()
                for words in ["a range" if rating.is_rough else "the clock's"]
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
    drawing, (axis,) = sides.panels(7, 4.8, 1)
    for label, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axis.set(
        xscale="log", xlabel="TPU v5p chips, 32 images each", ylabel="MiB sent per chip and step"
    )
    axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
    axis.set_ylim(bottom=0)
    axis.set_title("MAE ViT-L/16: what a step exchanges, by the compiled program")
    axis.grid(color="0.92")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
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
