"""Sum up a run in words, from the files of its workdir."""

import re
import shlex
import sys
from typing import Any

from etils import epath

from mae_jax.metrics import figure, writer

PERCENT = re.compile(
    r"top[15]|/(knn|fewshot|logistic|miou|pixel_accuracy)(?!.*_block$)|_mce$|_error_"
)  # metrics that are percentages
ERRORS = {
    "rmse": "this model",
    "rmse_mean_colour": "the mean colour of the visible patches",
    "rmse_interpolation": "linear interpolation between visible patches",
}


def lines(workdir: str, own_images: bool) -> list[str]:
    """Return the last numbers of a run, where its pictures are, and what to do next.

    Args:
      own_images: the run was on images of the user's own.
    """
    root = epath.Path(workdir)  # a pathlib.Path would make gs:/ of gs://
    file = root / "metrics.jsonl"
    metrics = writer.read(file) if file.exists() else []
    losses = [(line["step"], line["train/loss"]) for line in metrics if "train/loss" in line]
    text = [""]
    if losses:
        text.append(
            "training loss  "
            + " -> ".join(f"{loss:.3f} at step {step}" for step, loss in (losses[0], losses[-1]))
        )
    text += evaluations({name: x for line in metrics for name, x in line.items() if x is not None})
    for results in sorted(root.glob("results*.json")):
        text.append(f"results        {results}, and drawn in {results.with_suffix('.png').name}")
    if not losses:
        return text
    figure.loss_figure(file, root / "loss.png")
    images = f"{root / 'images'}/, " if (root / "images").exists() else ""
    command, quoted = f"{shlex.quote(sys.executable)} -m mae_jax train", shlex.quote(workdir)
    if own_images:
        following = f"measure it:  {command} --config=knn:init={quoted},source=folder:LABELLED"
    else:
        following = f"your own images:  {command} --config=folder --config.data.source=folder:PATH"
    return [
        *text,
        f"pictures       {images}curves in {root / 'loss.png'}",
        f"checkpoint     {root / 'checkpoints' / str(losses[-1][0])}",
        f"curves         tensorboard --logdir={quoted}  (pip install tensorboard)",
        f"next           {following} --workdir=DIR",
    ]


def evaluations(last: dict[str, Any]) -> list[str]:
    """Return a line for each of the last metrics of evaluators.

    Errors of hidden pixels come first, beside those of trivial predictors.
    """
    text, last = [], dict(last)
    if "eval/rmse" in last:
        images = f"{last['eval/images']:.0f} {kind_of_images(last.get('eval/trained_on', 0))}"
        text.append(f"error of hidden pixels on {images} (root mean square, of 255 levels):")
        for name, words in ERRORS.items():
            text.append(f"  {words:50}{last.pop(f'eval/{name}'):6.2f}")
        for name in ("loss", "images", "trained_on"):
            last.pop(f"eval/{name}", None)
    for name, value in last.items():
        if name.startswith("eval"):
            number = f"{value:.2f} %" if PERCENT.search(name) else f"{value:g}"
            text.append(f"{name:38} {number}")
    return text


def kind_of_images(trained_on: float) -> str:
    """Return what to call images of whose split this share is trained on."""
    if not trained_on:
        return "held-out images"
    return "training images" if trained_on >= 1 else "images, some of them training images"
