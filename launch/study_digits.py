"""Make the runs of the study on digits, each with `mae-jax train` on one core, and their tables.

    python launch/study_digits.py WORKDIR      (see launch/study.sh)

Every number is measured on the 360 test images, on which nothing was chosen. The tables are written
to study.md and drawn in study.png.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import study
from study import SEEDS, Run, over_seeds, table

RECIPE = "configs/digits.py"
RATIOS = (0.25, 0.5, 0.75, 0.9)
LABELS = (1, 10, 100)
RATIO_COLUMNS = ("fine-tuned, 10 % of labels", "linear probe", "5 nearest")
KNN = "eval/knn5_cls"
PROBE = "eval/best_top1"  # with the rate that is best on held-out training images


def runs() -> Iterator[Run]:
    """Yield all runs, each after the one that it starts from."""
    for seed in SEEDS:
        for ratio in RATIOS:
            pretrained = f"pretrain-{ratio}-{seed}"
            yield Run(pretrained, f"{RECIPE}:task=pretrain,mask_ratio={ratio}", seed)
        for ratio in RATIOS:
            pretrained = f"pretrain-{ratio}-{seed}"
            tasks = ("linear", "knn") + (("attentive",) if ratio == 0.75 else ())
            for task in tasks:
                yield Run(f"{task}-{ratio}-{seed}", f"{RECIPE}:task={task}", seed, pretrained)
            for labels in LABELS if ratio == 0.75 else (10,):
                arguments = f"{RECIPE}:task=finetune,labels={labels}"
                yield Run(f"finetune-{ratio}-{labels}-{seed}", arguments, seed, pretrained)
        for labels in LABELS:
            yield Run(
                f"finetune-scratch-{labels}-{seed}", f"{RECIPE}:task=finetune,labels={labels}", seed
            )
        for task in ("linear", "attentive", "knn"):
            yield Run(f"{task}-random-{seed}", f"{RECIPE}:task={task}", seed)
            yield Run(f"{task}-pixels-{seed}", f"{RECIPE}:task={task},pixels=true", seed)


def top1(root: Path, task: str, variant: object) -> tuple[float, float]:
    """Return mean and standard deviation of the top-1 accuracy of the runs TASK-VARIANT-SEED."""
    key = {"linear": PROBE, "attentive": PROBE, "knn": KNN}.get(task, "eval/top1")
    return over_seeds(root, f"{task}-{variant}", key)


def main() -> int:
    root = Path(sys.argv[1])
    if status := study.run([*runs()], root):
        return status
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
