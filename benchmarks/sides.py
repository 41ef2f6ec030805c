"""What all benchmarks share: sides that take turns, each in a process of its own, and a report.

A side is a command that prints one line of JSON last: {"seconds": [...], ...}.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "out"
CPU = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for both sides: fewer page faults


def take_turns(sides: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The results of every round of every side; one that fails says why and is not run again.

    Every second round goes backwards, so that no side is always the first.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, command in list(sides.items())[:: -1 if number % 2 else 1]:
            if results[name] and "error" in results[name][-1]:
                continue
            results[name].append(run(command))
            said = results[name][-1]
            short = {key: value for key, value in said.items() if key != "seconds"}
            print(f"round {number + 1}: {name}: {short}", file=sys.stderr, flush=True)
    return results


def run(command: list[str]) -> dict[str, Any]:
    """What a command's last line of output says, or {"error": its last words}."""
    if not command[0]:
        return {"error": "could not be installed"}
    process = subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True)
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        words = (process.stderr or process.stdout).strip().splitlines() or ["no output"]
        return {"error": f"exit {process.returncode}: {words[-1][:200]}"}
    return json.loads(lines[-1])


def median(results: list[dict[str, Any]], key: str = "seconds") -> float | None:
    """Over all rounds; of lists, over all that is in them. None if there is nothing."""
    found = [r[key] for r in results if r.get(key) is not None]
    values = [v for x in found for v in (x if isinstance(x, list) else [x])]
    return statistics.median(values) if values else None


def errors(results: list[dict[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(r["error"] for r in results if "error" in r))


def versions(*packages: str) -> dict[str, str]:
    """Of what is installed here."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def all_versions(results: dict[str, list[dict[str, Any]]]) -> str:
    """Of every side, once."""
    found = {k: v for side in results.values() for k, v in side[0].get("versions", {}).items()}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def machine() -> str:
    """Processor and cores that this process may use."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def report(name: str, text: str, data: dict[str, Any]) -> None:
    """Writes out/NAME.json and out/NAME.md, with the date, machine and command, and prints it."""
    OUT.mkdir(exist_ok=True)
    command = " ".join(["bash benchmarks/run.sh", name, *sys.argv[1:]])
    head = f"{date.today().isoformat()}, {machine()}, `{command}`"
    data = {"date": date.today().isoformat(), "machine": machine(), "command": command} | data
    (OUT / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (OUT / f"{name}.md").write_text(f"{head}\n\n{text}\n")
    print(f"\n{head}\n\n{text}\n\nin {OUT}")


def bars(name: str, panels: Mapping[str, Mapping[str, float | None]]) -> None:
    """Draws out/NAME.png: a panel for each title, in it a bar for each label of known value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (5 * len(panels), 0.6 + 0.3 * max(map(len, panels.values())))
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        known = {label: value for label, value in values.items() if value is not None}
        sides = any(label.startswith("ours") for label in known)
        colours = ["0.6" if sides and not label.startswith("ours") else "C0" for label in known]
        drawn = axis.barh(list(known), list(known.values()), color=colours)
        axis.bar_label(drawn, fmt=lambda value: f"{float(f'{value:.3g}'):,g}", padding=3)
        axis.set(title=title, xmargin=0.15, xticks=[])
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    drawing.savefig(OUT / f"{name}.png", dpi=130)
