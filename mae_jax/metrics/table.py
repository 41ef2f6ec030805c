"""The table of a sweep: what its runs measured, beside the paper's numbers."""

import csv
import io
import os
import re
import statistics
from collections.abc import Mapping, Sequence

from etils import epath

from mae_jax.metrics import writer

ACCURACY = re.compile(
    r"eval/((knn\d+|logistic|fewshot\d+)_(cls|mean)|miou(_knn\d+_(cosine|l2)|_logistic)?|(best_)?top1)"
)
BLOCK = re.compile(r"_block\d+$")
OTHERS = {"train/loss": "training loss", "eval/rmse": "RMSE of 255 levels"}
PAPER = ("paper, fine-tuned", "paper, linear")


def measured(workdir: str | os.PathLike) -> dict[str, float]:
    """Return the last numbers of a run, by the names of columns; {} before its end.

    Of accuracies by block, the last block's and the best one's are returned; which is best other
    images decided where the run has asked them.
    """
    file = epath.Path(workdir) / "metrics.jsonl"
    lines = writer.read(file) if file.exists() else []
    last = {name: x for line in lines for name, x in line.items() if x is not None}
    found: dict[str, float] = {}
    for name, value in last.items():
        words = name.removeprefix("eval/")
        if ACCURACY.fullmatch(name):
            found[words] = value
        elif BLOCK.search(name) and ACCURACY.match(name):
            column = BLOCK.sub("", words)
            if (chosen := last.get(f"eval/{column}_best")) is not None:
                found[f"{column}, best block"] = chosen
            else:
                best = f"{column}, best block of these images"
                found[best] = max(value, found.get(best, value))
    if not found:
        return {}
    return dict(sorted(found.items())) | {
        words: last[name] for name, words in OTHERS.items() if name in last
    }


Runs = Mapping[str, Sequence[Mapping[str, float]]]  # row -> what each of its runs measured
Paper = Mapping[str, Sequence[float]]  # row -> as PAPER


def columns(runs: Runs) -> list[str]:
    """Return the names of columns: all that any run measured."""
    return list(dict.fromkeys(words for row in runs.values() for run in row for words in run))


def cell(values: Sequence[float]) -> str:
    """Return mean, standard deviation and number of runs as text."""
    if not values:
        return "not run"
    mean = statistics.mean(values)
    form = ".3f" if abs(mean) < 5 else ".1f"
    if len(values) == 1:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {statistics.stdev(values):{form}} ({len(values)})"


def markdown(runs: Runs, paper: Paper) -> str:
    """Return the table as Markdown: mean ± standard deviation (runs) where there are several."""
    names, beside = columns(runs), PAPER if paper else ()
    head = ["row", *names, *beside]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, found in runs.items():
        cells = [cell([run[name] for run in found if name in run]) for name in names]
        cells += [f"{x}" for x in paper.get(row, ["-"] * len(beside))]
        lines.append(f"| {' | '.join([row, *cells])} |")
    return "\n".join(lines) + "\n"


def comma_separated(runs: Runs, paper: Paper) -> str:
    """Return the table as CSV: a line for each run that has ended, with all digits."""
    names, text = columns(runs), io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["row", *names, *PAPER])
    for row, found in runs.items():
        for run in found:
            if run:
                write([row, *(run.get(name, "") for name in names), *paper.get(row, ("", ""))])
    return text.getvalue()


def figure(runs: Runs, paper: Paper) -> bytes:
    """Return a PNG: a panel for each accuracy by row, and one for the paper's linear probe."""
    from matplotlib.figure import Figure

    panels = {
        words: {row: [run[words] for run in found if words in run] for row, found in runs.items()}
        for words in columns(runs)
        if words not in OTHERS.values()
    }
    if paper:
        panels[PAPER[1]] = {row: [paper[row][1]] if row in paper else [] for row in runs}
    drawn = Figure(
        figsize=(1 + 3 * max(len(panels), 1), 1.5 + 0.3 * len(runs)), layout="constrained"
    )
    axes = drawn.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for axis, (words, values) in zip(axes, panels.items(), strict=False):
        for place, found in enumerate(values.values()):
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0
                axis.errorbar(statistics.mean(found), place, xerr=spread, fmt="o", color="C0")
        axis.set_title(words, fontsize=9)
        axis.grid(axis="x", color="0.92")
    axes[0].set_yticks(range(len(runs)), list(runs))
    axes[0].invert_yaxis()
    encoded = io.BytesIO()
    drawn.savefig(encoded, format="png", dpi=110)
    return encoded.getvalue()
