"""Make the runs of the study on digits, each with `mae-jax train` on one core, and their tables.

    python launch/study.py WORKDIR      (see launch/study.sh)

Every number is measured on the 360 test images, on which nothing was chosen. The tables are written
to study.md and drawn in study.png.
"""

import json
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SEEDS = (0, 1, 2)
RATIOS = (0.25, 0.5, 0.75, 0.9)
LABELS = (1, 10, 100)
RATIO_COLUMNS = ("fine-tuned, 10 % of labels", "linear probe", "5 nearest")
KNN = "eval/knn5_cls"
PROBE = "eval/best_top1"  # with the rate that is best on held-out training images


class Run(NamedTuple):
    """A run of the study."""

    name: str
    arguments: str  # of the recipe configs/digits.py, without init and seed
    seed: int
    init: str = ""  # name of the run that it starts from


def runs() -> Iterator[Run]:
    """Yield all runs, each after the one that it starts from."""
    for seed in SEEDS:
        for ratio in RATIOS:
            pretrained = f"pretrain-{ratio}-{seed}"
            yield Run(pretrained, f"task=pretrain,mask_ratio={ratio}", seed)
        for ratio in RATIOS:
            pretrained = f"pretrain-{ratio}-{seed}"
            tasks = ("linear", "knn") + (("attentive",) if ratio == 0.75 else ())
            for task in tasks:
                yield Run(f"{task}-{ratio}-{seed}", f"task={task}", seed, pretrained)
            for labels in LABELS if ratio == 0.75 else (10,):
                arguments = f"task=finetune,labels={labels}"
                yield Run(f"finetune-{ratio}-{labels}-{seed}", arguments, seed, pretrained)
        for labels in LABELS:
            yield Run(f"finetune-scratch-{labels}-{seed}", f"task=finetune,labels={labels}", seed)
        for task in ("linear", "attentive", "knn"):
            yield Run(f"{task}-random-{seed}", f"task={task}", seed)
            yield Run(f"{task}-pixels-{seed}", f"task={task},pixels=true", seed)


def execute(run: Run, root: Path, core: int) -> None:
    """Make a run on one core, unless it was made before.

    Raises:
      RuntimeError: the run failed; the message has the end of its log.
    """
    done, log = root / f"{run.name}.done", root / f"{run.name}.log"
    if done.exists():
        return
    init = f",init={root / run.init}" if run.init else ""
    config = f"--config=configs/digits.py:{run.arguments},seed={run.seed}{init}"
    command = [sys.executable, "-m", "mae_jax", "train", config, f"--workdir={root / run.name}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # saves time in page faults
    }
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        if process.wait() != 0:
            raise RuntimeError(f"{run.name} failed:\n{log.read_text()[-2000:]}\nAll of it: {log}")
    done.touch()


def execute_all(root: Path) -> None:
    """Make all runs, as many at a time as there are cores."""
    started = time.monotonic()
    study = list(runs())
    missing = [run for run in study if not (root / f"{run.name}.done").exists()]
    print(f"{len(study)} runs, {len(study) - len(missing)} of them done before", flush=True)
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    futures: dict[str, Future] = {}

    def work(run: Run) -> None:
        if run.init in futures:  # submitted earlier, and so finished or running
            futures[run.init].result()
        core = cores.get()
        try:
            execute(run, root, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        for run in missing:
            futures[run.name] = pool.submit(work, run)
        try:
            for number, run in enumerate(missing, 1):
                futures[run.name].result()
                minutes = (time.monotonic() - started) / 60
                remaining = minutes / number * (len(missing) - number)
                print(f"{number}/{len(missing)}  {run.name}  {remaining:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def last_value(root: Path, name: str, key: str) -> float:
    """Return the last value of a metric of a run."""
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [metrics[key] for metrics in map(json.loads, lines) if key in metrics][-1]


def over_seeds(root: Path, name: str, key: str) -> tuple[float, float]:
    """Return mean and sample standard deviation of a metric over the seeds."""
    values = [last_value(root, f"{name}-{seed}", key) for seed in SEEDS]
    return statistics.mean(values), statistics.stdev(values)


def top1(root: Path, task: str, variant: object) -> tuple[float, float]:
    """Return mean and standard deviation of the top-1 accuracy of the runs TASK-VARIANT-SEED."""
    key = {"linear": PROBE, "attentive": PROBE, "knn": KNN}.get(task, "eval/top1")
    return over_seeds(root, f"{task}-{variant}", key)


def table(head: list[str], rows: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Return the lines of a Markdown table; a cell is a mean and a standard deviation."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in cells) + " |")
    return [*lines, ""]


def main() -> int:
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    try:
        execute_all(root)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1

    tuned = {
        f"{labels} %": [top1(root, "finetune", f"{start}-{labels}") for start in ("scratch", 0.75)]
        for labels in LABELS
    }
    kinds = {"linear": "linear probe", "attentive": "attentive probe", "knn": "5 nearest"}
    frozen = {
        words: [top1(root, kind, what) for what in (0.75, "random", "pixels")]
        for kind, words in kinds.items()
    }
    ratios = {
        f"{ratio}": [
            top1(root, "finetune", f"{ratio}-10"),
            top1(root, "linear", ratio),
            top1(root, "knn", ratio),
            over_seeds(root, f"pretrain-{ratio}", "eval/rmse"),
        ]
        for ratio in RATIOS
    }
    text = [
        "Top-1 accuracy in percent on 360 test images: mean ± standard deviation of three seeds.",
        "",
        *table(["labels", "from scratch", "MAE, then fine-tuned"], tuned),
        *table(["frozen features", "MAE", "random encoder", "pixels"], frozen),
        *table(["mask ratio", *RATIO_COLUMNS, "RMSE of 255"], ratios),
    ]
    (root / "study.md").write_text("\n".join(text))
    draw(root / "study.png", tuned, frozen, ratios)
    print("\n".join(text))
    print(f"table  {root / 'study.md'}\nfigure {root / 'study.png'}")
    return 0


def draw(path: Path, tuned: dict, frozen: dict, ratios: dict) -> None:
    """Draw a panel for each table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for panel, rows, names in (
        (left, tuned, ("from scratch", "MAE, fine-tuned")),
        (middle, frozen, ("MAE", "random encoder", "pixels")),
        (right, ratios, RATIO_COLUMNS),
    ):
        for column, name in enumerate(names):
            mean, spread = zip(*(cells[column] for cells in rows.values()), strict=True)
            position = [x + (column - (len(names) - 1) / 2) * 0.08 for x in range(len(rows))]
            style = "o-" if panel is not middle else "o"
            panel.errorbar(position, mean, spread, fmt=style, capsize=3, label=name)
        panel.set_xticks(range(len(rows)), list(rows))
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize=8)
    left.set_xlabel("labelled training images")
    right.set_xlabel("mask ratio")
    left.set_ylabel("top-1 accuracy, %")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
