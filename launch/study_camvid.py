"""Make the runs of the study on CamVid, each with `mae-jax train` on one core, and their table.

    python launch/study_camvid.py WORKDIR DATA      (see launch/study.sh)

The table is written to study.md and drawn in study.png.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import study
from study import SEEDS, Run, values

from mae_jax.metrics.table import cell

CIFAR = "cifar10-s"
# Word of the table -> the run that an encoder starts from; '' = nothing.
STARTS = {"CamVid": "pretrain", "cifar10-s": CIFAR, "none": ""}
MEASURES = {  # word of the table -> (task, metric)
    "logistic regression": ("frozen", "eval/miou_logistic"),
    "nearest patch": ("frozen", "eval/miou_knn1_cosine"),
    "10 nearest": ("frozen", "eval/miou_knn10_cosine"),
    "linear head": ("linear", "eval/miou"),
    "fine-tuned": ("tuned", "eval/miou"),
}


def recipe(data: str, **arguments: object) -> str:
    """Return the --config of a run."""
    given = {"data": data} | arguments
    return "configs/camvid.py:" + ",".join(f"{name}={x}" for name, x in given.items())


def runs(data: str) -> Iterator[Run]:
    """Yield pre-training, then each measure of each start, seed by seed."""
    yield from (Run(f"pretrain-{seed}", recipe(data), seed) for seed in SEEDS)
    for seed in SEEDS:
        for task in ("frozen", "linear", "tuned"):
            for start in STARTS.values():
                init = f"{start}-{seed}" if start == "pretrain" else start
                if task == "frozen" and start == CIFAR and seed:
                    continue  # nothing in it depends on the seed
                yield Run(f"{task}-{start or 'none'}-{seed}", recipe(data, task=task), seed, init)
    yield Run("frozen-pixels-0", recipe(data, task="frozen", features="pixels"))


def table(root: Path) -> list[str]:
    """Return the lines of the table; without finished runs a cell says "not run"."""
    columns = {words: start or "none" for words, start in STARTS.items()} | {"pixels": "pixels"}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for words, (task, key) in MEASURES.items():
        cells = (cell(values(root, f"{task}-{start}", key)) for start in columns.values())
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def draw(root: Path) -> None:
    """Draw a bar for each measure of each start, with its spread, and a dot for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panel = figure.subplots()
    for number, (words, start) in enumerate(STARTS.items()):
        panel.bar(0, 0, color=f"C{number}", label=words)  # for the legend, whatever has been run
        for place, (task, key) in enumerate(MEASURES.values()):
            if found := values(root, f"{task}-{start or 'none'}", key):
                at = place + 0.25 * (number - 1)
                panel.bar(at, statistics.mean(found), 0.22, color=f"C{number}")
                panel.plot([at] * len(found), found, "k.", markersize=4)
    panel.set_xticks(range(len(MEASURES)), MEASURES)
    panel.set_ylabel("mIoU, %")
    panel.legend(title="pre-trained on")
    figure.savefig(root / "study.png", dpi=110)


def main() -> int:
    root, data = Path(sys.argv[1]), sys.argv[2]
    if not all((Path(data) / split / "labels").is_dir() for split in ("train", "test")):
        print(f"{data} holds no {{train,test}}/labels: see docs/dense.md", file=sys.stderr)
        return 2
    if not (root / CIFAR).exists():
        root.mkdir(parents=True, exist_ok=True)
        convert = ["convert", CIFAR, str(root / CIFAR), "--to=ours"]
        subprocess.run([sys.executable, "-m", "mae_jax", *convert], check=True)
        (root / f"{CIFAR}.done").touch()
    status = study.run([*runs(data)], root)
    text = ["mIoU in percent; mean ± standard deviation (seeds) where there are several.", ""]
    text += table(root)
    study.write(text, root, draw)
    return status


if __name__ == "__main__":
    sys.exit(main())
