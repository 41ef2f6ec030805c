"""Make the runs of the study on CIFAR-10, each with `mae-jax train` on one core, and their tables.

    python launch/study_cifar10.py WORKDIR DATA      (see launch/study.sh)

Rates are chosen on training images that the runs do not learn from; test images are used once. Runs
that are not finished are left out of the tables, which say of how many seeds each number is. The
tables are written to study.md and drawn in study.png, also when the study was stopped.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import study
from study import SEEDS, Run, last_value, values

from mae_jax.metrics.table import cell

LABELS = (1, 10, 100)
RATIOS = (0.25, 0.5, 0.75, 0.9)
RATES = {"tuned": (2e-3, 4e-3, 8e-3, 1.6e-2), "scratch": (1e-3, 2e-3, 4e-3, 8e-3)}
KINDS = ("block", "grid")
SHORT = 4  # epochs of pre-training in comparisons of masks
FULL = "pretrain"
KNN, LOGISTIC = "eval/knn20_cls", "eval/logistic_cls"
PROBE, TUNED = "eval/best_top1", "eval/top1"


def recipe(data: str, **arguments: object) -> str:
    """Return the --config of a run of the small model."""
    given = {"data": data, "small": "true"} | arguments
    return "configs/cifar10.py:" + ",".join(f"{name}={x}" for name, x in given.items())


def chosen_rates(root: Path) -> dict[str, float]:
    """Return the rate of fine-tuning and of scratch that is best on held-out training images."""
    best = {}
    for start, rates in RATES.items():
        tried = {
            rate: last_value(root, name, TUNED)
            for rate in rates
            if (root / f"{(name := f'rate-{start}-{rate}')}.done").exists()
        }
        if len(tried) == len(rates):
            best[start] = max(tried, key=tried.__getitem__)
    return best


def first_runs(data: str) -> Iterator[Run]:
    """Yield pre-training, k-NN and logistic regression, and the choice of rates."""
    yield Run(FULL, recipe(data, task="pretrain"))
    yield from frozen(data, "knn")
    for start, rates in RATES.items():
        for rate in rates:
            # 5,000 labels, measured on the end of the training images.
            config = recipe(data, task="finetune", labels=10, epochs=10, blr=rate)
            split = "--config.evals.accuracy.split=train[45000:]"
            init = FULL if start == "tuned" else ""
            yield Run(f"rate-{start}-{rate}", config, 0, init, (split,))


def frozen(data: str, task: str) -> Iterator[Run]:
    """Yield a task on frozen features: of the model, of one without training, and pixels."""
    yield Run(f"{task}-mae", recipe(data, task=task), 0, FULL)
    yield Run(f"{task}-random", recipe(data, task=task))
    yield Run(f"{task}-pixels", recipe(data, task=task, pixels="true"))


def other_runs(data: str, rates: dict[str, float]) -> Iterator[Run]:
    """Yield fine-tuning against scratch, probes, and the comparisons of masks; the longest last."""
    yield from labelled(data, rates, 10)
    yield from masks(data)
    yield from labelled(data, rates, 1)
    yield from frozen(data, "linear")
    yield from frozen(data, "attentive")
    yield from labelled(data, rates, 100)


def labelled(data: str, rates: dict[str, float], labels: int) -> Iterator[Run]:
    """Yield fine-tuning against scratch, with so many percent of the labels."""
    for seed in SEEDS if labels < 100 else SEEDS[:1]:
        for start, longer in (("tuned", 1), ("scratch", 1), ("scratch", 2)):
            config = recipe(data, task="finetune", labels=labels, longer=longer, blr=rates[start])
            init = FULL if start == "tuned" else ""
            yield Run(f"{start}{longer}-{labels}-{seed}", config, seed, init)


def masks(data: str) -> Iterator[Run]:
    """Yield short pre-trainings with other masks, and what their features are worth."""
    short = {
        f"ratio-{ratio}": (recipe(data, epochs=SHORT, mask_ratio=ratio), ()) for ratio in RATIOS
    }
    for kind in KINDS:
        short[f"mask-{kind}"] = (recipe(data, epochs=SHORT), (f"--config.masking.name={kind}",))
    tokens = ("--config.masking.tokens_in_encoder=True",)
    short["tokens-in-encoder"] = (recipe(data, epochs=SHORT), tokens)
    for name, (config, overrides) in short.items():
        yield Run(name, config, 0, "", overrides)
    for name in short:
        yield Run(f"knn-{name}", recipe(data, task="knn"), 0, name)


def blocks(root: Path, name: str, key: str) -> dict[int, float]:
    """Return block -> accuracy, of the run NAME; {} if it is not finished."""
    if not (root / f"{name}.done").exists():
        return {}
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    found = {metric: x for line in lines for metric, x in json.loads(line).items()}
    start = f"{key}_block"
    return {int(x.removeprefix(start)): found[x] for x in found if x.startswith(start)}


def tables(root: Path) -> list[str]:
    """Return the lines of all tables."""

    def row(name: str, *cells: list[float]) -> str:
        return f"| {name} | " + " | ".join(map(cell, cells)) + " |"

    def head(*names: str) -> list[str]:
        return ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]

    kinds = (("MAE", "mae"), ("untrained", "random"), ("pixels", "pixels"))
    probes = (("logistic regression", "knn", LOGISTIC), ("20 neighbours", "knn", KNN))
    probes += (("linear probe", "linear", PROBE), ("attentive probe", "attentive", PROBE))
    lines = head("frozen features, last block", *(words for words, _ in kinds))
    for words, task, key in probes:
        lines.append(row(words, *(values(root, f"{task}-{kind}", key) for _, kind in kinds)))
    for words, key in (("logistic regression", LOGISTIC), ("20 neighbours", KNN)):
        lines += head(f"{words}, block", *map(str, range(1, 7)))
        for kind in ("mae", "random"):
            found = blocks(root, f"knn-{kind}", key)
            lines.append(
                row(dict(mae="MAE", random="untrained")[kind], *([x] for x in found.values()))
            )
    lines += head("labels", "fine-tuned", "from scratch", "scratch, twice the updates")
    for labels in LABELS:
        starts = ("tuned1", "scratch1", "scratch2")
        lines.append(row(f"{labels} %", *(values(root, f"{x}-{labels}", TUNED) for x in starts)))
    lines += head(
        f"{SHORT} epochs", "logistic, chosen block", "20 neighbours, best block", "RMSE of 255"
    )
    names = [f"ratio-{ratio}" for ratio in RATIOS] + [f"mask-{kind}" for kind in KINDS]
    for name in (*names, "tokens-in-encoder"):
        chosen = values(root, f"knn-{name}", f"{LOGISTIC}_best")
        nearest = blocks(root, f"knn-{name}", KNN).values()
        best = [max(nearest)] if nearest else []
        lines.append(row(name, chosen, best, values(root, name, "eval/rmse")))
    lines += head("rate", "fine-tuned", "from scratch")
    for rate in sorted({*RATES["tuned"], *RATES["scratch"]}):
        starts = (values(root, f"rate-{start}-{rate}", TUNED) for start in RATES)
        lines.append(row(f"{rate}", *starts))
    return lines


def draw(root: Path) -> None:
    """Draw accuracy by labels, by block and by mask ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    starts = {"tuned1": "MAE, fine-tuned", "scratch1": "from scratch", "scratch2": "scratch, twice"}
    for start, words in starts.items():
        found = {labels: values(root, f"{start}-{labels}", TUNED) for labels in LABELS}
        found = {labels: numbers for labels, numbers in found.items() if numbers}
        spread = [statistics.stdev(x) if len(x) > 1 else 0 for x in found.values()]
        means = [statistics.mean(x) for x in found.values()]
        left.errorbar([f"{x} %" for x in found], means, spread, fmt="o-", capsize=3, label=words)
    for kind, words in (("mae", "MAE"), ("random", "untrained")):
        for key, name, style in ((LOGISTIC, "logistic", "o-"), (KNN, "20 neighbours", "o--")):
            found = blocks(root, f"knn-{kind}", key)
            middle.plot(found.keys(), found.values(), style, label=f"{words}, {name}")
    panels = (
        ("logistic, chosen block", lambda run: values(root, run, f"{LOGISTIC}_best")),
        ("20 neighbours, best block", lambda run: blocks(root, run, KNN).values()),
    )
    for name, measured in panels:
        found = {x: measured(f"knn-ratio-{x}") for x in RATIOS}
        best = {ratio: max(numbers) for ratio, numbers in found.items() if numbers}
        right.plot(best.keys(), best.values(), "o-", label=name)
    middle.margins(y=0.5)  # room for the legend
    for panel, words in ((left, "labelled images"), (middle, "block"), (right, "mask ratio")):
        panel.set_xlabel(words)
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize=8)
    left.set_ylabel("top-1 accuracy, %")
    figure.savefig(root / "study.png", dpi=110)


def main() -> int:
    root, data = Path(sys.argv[1]), sys.argv[2]
    if not any((Path(data) / "train").glob("*/*")):
        print(f"{data} holds no train/CLASS/*.jpg: give the folder of CIFAR-10", file=sys.stderr)
        return 2
    status = study.run([*first_runs(data)], root)
    rates = chosen_rates(root)
    if not status:
        status = study.run([*other_runs(data, rates)], root)
    text = ["Top-1 accuracy in percent; mean ± standard deviation (seeds) where there are several."]
    text += tables(root)
    study.write(text, root, draw)
    return status


if __name__ == "__main__":
    sys.exit(main())
