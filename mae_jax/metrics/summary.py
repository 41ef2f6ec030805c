"""What a run came to, in words, read from the files of its workdir."""

import re
import shlex
import sys

from etils import epath

from mae_jax.metrics import figure, writer


def lines(workdir: str, own_images: bool) -> list[str]:
    """Return what a run came to, read from its own files: numbers, pictures, what to do next.

    Args:
      own_images: the run was on images of the user's own.
    """
    root = epath.Path(workdir)  # a pathlib.Path would make gs:/ of gs://
    file = root / "metrics.jsonl"
    metrics = writer.read(file) if file.exists() else []
    losses = [line for line in metrics if "train/loss" in line]
    text = ["", *training(losses), *accuracies(metrics), *reconstruction(metrics)]
    text += [
        f"results        {file}, and drawn in {file.with_suffix('.png').name}"
        for file in sorted(root.glob("results*.json"))
    ]
    if not losses:
        return text
    figure.loss_figure(file, root / "loss.png")
    pictures = f"{root / 'images'}/, " if (root / "images").exists() else ""
    text += [
        f"pictures       {pictures}curves in {root / 'loss.png'}",
        f"checkpoint     {root / 'checkpoints' / str(losses[-1]['step'])}",
        f"curves         tensorboard --logdir={shlex.quote(workdir)}  (pip install tensorboard)",
    ]
    command = f"{shlex.quote(sys.executable)} -m mae_jax train"
    if own_images:
        return [
            *text,
            f"next           measure it:  {command} --config=knn:init={shlex.quote(workdir)},"
            "source=folder:LABELLED --workdir=DIR",
        ]
    return [
        *text,
        f"next           your own images:  {command} --config=folder"
        " --config.data.source=folder:PATH --workdir=DIR",
    ]


def training(losses: list[dict]) -> list[str]:
    """Return a line with the first and the last training loss."""
    if not losses:
        return []
    first, last = losses[0], losses[-1]
    return [
        f"training loss  {first['train/loss']:.3f} at step {first['step']}"
        f" -> {last['train/loss']:.3f} at step {last['step']}"
    ]


def reconstruction(metrics: list[dict]) -> list[str]:
    """Return the last errors of hidden pixels beside those of trivial predictors."""
    evaluated = [line for line in metrics if "eval/rmse" in line]
    if not evaluated:
        return []
    last = evaluated[-1]
    rows = {
        "rmse": "this model",
        "rmse_mean_colour": "the mean colour of the visible patches",
        "rmse_interpolation": "linear interpolation between visible patches",
    }
    return [
        f"error of hidden pixels on {last['eval/images']:.0f}"
        f" {kind_of_images(last.get('eval/trained_on', 0))} (root mean square, of 255 levels):",
        *(f"  {words:50}{last[f'eval/{key}']:6.2f}" for key, words in rows.items()),
    ]


def accuracies(metrics: list[dict]) -> list[str]:
    """Return the last top-1 accuracies of a metrics.jsonl, a line each."""
    last = {name: value for line in metrics for name, value in line.items()}
    text = []
    for key in [name for name in last if name.endswith("/top1")]:
        prefix = key.removesuffix("/top1")
        row = [line for line in metrics if key in line][-1]
        text.append(
            f"top-1 accuracy {row[key]:.2f} %, of {row[f'{prefix}/images']:.0f} images"
            + (f" ({prefix})" if prefix != "eval" else "")
        )
    if "eval/best_top1" in last:
        text.append(
            f"top-1 accuracy {last['eval/best_top1']:6.2f} % with blr={last['eval/best_blr']:g},"
            " the best on held-out training images"
        )
    for name, value in last.items():
        found = re.match(r"eval/(knn|fewshot)(\d+)_(cls|mean)$", name)
        if found:
            kind, number, feature = found.groups()
            words = f"{number} nearest" if kind == "knn" else f"fitted to {number} of each class"
            spread = last.get(f"{name}_std")
            more = "" if spread is None else f" +- {spread:.2f}"
            text.append(f"top-1 accuracy {value:6.2f} %{more}, {words}, feature {feature}")
        if found := re.match(r"eval/(imagenet_\w+)_top1$", name):
            images = last[f"eval/{found[1]}_images"]
            text.append(f"top-1 accuracy {value:6.2f} % on {found[1]}, of {images:,.0f} images")
        if name == "eval/imagenet_c_mce":
            text.append(f"mean corruption error (mCE) {value:.2f} % of AlexNet's on imagenet_c")
        elif name.startswith("eval/imagenet_c_error_"):
            text.append(
                f"  error {value:6.2f} % with {name.removeprefix('eval/imagenet_c_error_')}"
            )
    return text


def kind_of_images(trained_on: float) -> str:
    """Return what to call images of whose split this share is trained on."""
    if not trained_on:
        return "held-out images"
    return "training images" if trained_on >= 1 else "images, some of them training images"
