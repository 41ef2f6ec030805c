"""Let the sides of a benchmark take turns, each in a process of its own, and write a report.

A side is a command whose last line is JSON: {"seconds": [...], ...}.
"""

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = Path(os.environ.get("BENCHMARK_OUT") or HERE / "out")
CPU = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for all sides: fewer page faults


def script(name: str, *options: str, python: str = sys.executable) -> list[str]:
    """Return the command that runs a script of this folder; `python` "" = it is not installed."""
    return [python, f"{HERE}/{name}.py", *options]


def take_turns(sides: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return the results of every round of every side.

    A side that fails has an "error" and is not run again. Every second round goes backwards, so
    that no side is always the first.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, command in list(sides.items())[:: -1 if number % 2 else 1]:
            if results[name] and "error" in results[name][-1]:
                continue
            results[name].append(run(command))
            short = {key: x for key, x in results[name][-1].items() if key != "seconds"}
            print(f"round {number + 1}: {name}: {short}", file=sys.stderr, flush=True)
    return results


def run(command: list[str]) -> dict[str, Any]:
    """Return what a command's last line of output says, or {"error": its last words}."""
    if not command[0]:
        return {"error": "could not be installed"}
    process = subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True)
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        words = (process.stderr or process.stdout).strip().splitlines() or ["no output"]
        return {"error": f"exit {process.returncode}: {words[-1][:200]}"}
    return json.loads(lines[-1])


def serve(sides: Mapping[str, Callable[[], Callable[[int], dict]]]) -> None:
    """Compile sides at the same time; then time those that stdin names, in lines of JSON.

    Args:
      sides: name -> a function that compiles, and returns (number of steps) -> a result.
    """
    compiled, lock = {}, threading.Lock()

    def say(**line: Any) -> None:
        with lock:
            print(json.dumps(line), flush=True)

    def compile_one(name: str) -> None:
        began = time.perf_counter()
        try:
            compiled[name] = sides[name]()
            say(ready=name, compile_seconds=time.perf_counter() - began)
        except Exception as error:  # the other sides go on
            say(ready=name, error=(str(error).splitlines() or [repr(error)])[0][:200])

    for name in sides:
        threading.Thread(target=compile_one, args=[name], daemon=True).start()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            say(result=compiled[asked["name"]](asked["steps"]))
        except Exception as error:
            say(result={"error": (str(error).splitlines() or [repr(error)])[0][:200]})
    os._exit(0)  # what still compiles is not waited for


def median(results: list[dict[str, Any]], key: str = "seconds") -> float | None:
    """Return the median over all rounds and their lists, or None if no round has the key."""
    rounds = [result[key] for result in results if result.get(key) is not None]
    numbers = [
        x for numbers in rounds for x in (numbers if isinstance(numbers, list) else [numbers])
    ]
    return statistics.median(numbers) if numbers else None


def cell(
    results: list[dict[str, Any]], form: str = "{:.2f} s", key: str = "seconds", per: float = 1
) -> str:
    """Return the median of a key, divided by `per`, as text; for seconds, or what went wrong."""
    number = median(results, key)
    if number is not None:
        return form.format(number / per)
    errors = [result["error"] for result in results if "error" in result and key == "seconds"]
    return "; ".join(dict.fromkeys(errors))


def ratio(above: float | None, below: float | None, form: str = "{:.2f}") -> str:
    """Return a quotient as text, or nothing where one of the two is missing."""
    return form.format(above / below) if above and below else ""


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def machine() -> str:
    """Return the processor, and how many of its cores this process may use."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", text)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {name[1] if name else platform.processor()}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def report(
    name: str,
    title: str,
    head: list[str],
    rows: list[list[str]],
    results: dict[str, list[dict[str, Any]]],
    notes: Iterable[str] = (),
    script: str = "run.sh",
) -> None:
    """Write out/NAME.json, and a table with date, machine, command and versions as out/NAME.md."""
    OUT.mkdir(exist_ok=True)
    named = [name] if script == "run.sh" else []
    facts = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": " ".join([f"bash benchmarks/{script}", *named, *sys.argv[1:]]),
    }
    versions: dict[str, str] = {}
    for rounds in results.values():
        versions |= rounds[0].get("versions", {})
    used = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = ["{date}, {machine}, `{command}`".format(**facts), f"{title}; {used}"]
    text = "\n\n".join([*lines, markdown(head, rows), *notes])
    (OUT / f"{name}.json").write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    (OUT / f"{name}.md").write_text(f"{text}\n")
    print(f"\n{text}\n\nin {OUT}")


def panels(width: float, height: float, count: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, side by side."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, list(drawing.subplots(1, count, squeeze=False)[0])


def bars(name: str, titled: Mapping[str, Mapping[str, float | None]]) -> None:
    """Draw out/NAME.png: a panel for each title, and in it a bar for each label with a number."""
    height = 0.6 + 0.3 * max(map(len, titled.values()))
    drawing, axes = panels(5 * len(titled), height, len(titled))
    for axis, (title, panel) in zip(axes, titled.items(), strict=True):
        numbers = {label: number for label, number in panel.items() if number is not None}
        ours = [label.startswith("ours") for label in numbers]
        colours = ["0.6" if any(ours) and not own else "C0" for own in ours]
        drawn = axis.barh(list(numbers), list(numbers.values()), color=colours)
        axis.bar_label(drawn, fmt=lambda number: f"{float(f'{number:.3g}'):,g}", padding=3)
        axis.set(title=title, xmargin=0.15, xticks=[])
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    drawing.savefig(OUT / f"{name}.png", dpi=130)
