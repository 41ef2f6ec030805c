"""Draw the curves of a run from its metrics.jsonl."""

import io
import os
from typing import Any

from mae_jax import files
from mae_jax.errors import UserError
from mae_jax.metrics.writer import read

ERRORS = {  # metric -> label, colour, line style
    "eval/rmse": ("this model", "C1", "-"),
    "eval/rmse_interpolation": ("interpolation of visible patches", "0.35", "--"),
    "eval/rmse_mean_colour": ("mean visible colour", "0.35", ":"),
}


def loss_figure(metrics_jsonl: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw losses, learning rate and, if there are any, errors on held-out images, as a PNG.

    Raises:
      UserError: the file has no train/loss yet.
    """
    lines = read(metrics_jsonl)

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    if not series("train/loss")[0]:
        raise UserError(f"{os.fspath(metrics_jsonl)} holds no train/loss yet: nothing to draw")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if series("eval/rmse")[0] else 1
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]

    def plot(axis: Any, name: str, label: str, colour: str, style: str = "-") -> None:
        steps, values = series(name)
        marker = "o" if style == "-" and len(steps) < 20 else ""
        axis.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3)

    plot(axes[0], "train/loss", "training images", "C0")
    if series("eval/loss")[0]:
        plot(axes[0], "eval/loss", "evaluation images", "C1")
    axes[0].set(title="Loss on hidden patches" if panels == 2 else "Loss", xlabel="step")
    axes[0].legend(frameon=False)
    _add_rate(axes[0], *series("train/lr"))
    if panels == 2:
        for name, (label, colour, style) in ERRORS.items():
            plot(axes[1], name, label, colour, style)
        axes[1].set(title="Error of hidden pixels (RMSE, of 255 levels)", xlabel="step")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.spines["top"].set_visible(False)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    files.write_bytes(path, encoded.getvalue())


def _add_rate(axis: Any, steps: list[int], rates: list[float]) -> None:
    """Draw the learning rate behind the curves of `axis`, with its own scale on the right."""
    behind = axis.twinx()
    behind.plot(steps, rates, color="0.8", linewidth=1, zorder=0)
    behind.set_ylabel("learning rate", color="0.5")
    behind.set_ylim(bottom=0)
    behind.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    behind.tick_params(colors="0.5", labelsize=8)
    behind.spines["top"].set_visible(False)
    axis.set_zorder(behind.get_zorder() + 1)
    axis.patch.set_visible(False)
