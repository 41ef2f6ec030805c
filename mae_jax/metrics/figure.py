"""Draw the curves of a run from its metrics.jsonl."""

import io
import os

from mae_jax import files
from mae_jax.errors import UserError
from mae_jax.metrics.writer import read

PANELS = {  # title -> {metric: (label, colour, line style)}
    "Loss": {
        "train/loss": ("training images", "C0", "-"),
        "eval/loss": ("evaluation images", "C1", "-"),
    },
    "Error of hidden pixels (RMSE, of 255 levels)": {
        "eval/rmse": ("this model", "C1", "-"),
        "eval/rmse_interpolation": ("interpolation of visible patches", "0.35", "--"),
        "eval/rmse_mean_colour": ("mean visible colour", "0.35", ":"),
    },
}


def loss_figure(metrics_jsonl: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw losses and, if there are any, errors on held-out images, as a PNG.

    Raises:
      UserError: the file has no train/loss yet.
    """
    lines = read(metrics_jsonl)
    measured = {name for line in lines for name, value in line.items() if value is not None}
    if "train/loss" not in measured:
        raise UserError(f"{os.fspath(metrics_jsonl)} holds no train/loss yet: nothing to draw")

    from matplotlib.figure import Figure

    panels = [title for title, curves in PANELS.items() if measured & curves.keys()]
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, (label, colour, style) in PANELS[title].items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                marker = "o" if len(points) < 20 else ""
                steps, numbers = zip(*points, strict=True)
                axis.plot(steps, numbers, style, color=colour, label=label, marker=marker)
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False)
        axis.grid(color="0.92")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    files.write_bytes(path, encoded.getvalue())
