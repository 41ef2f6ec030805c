"""Measure how time and memory of the pre-training step grow with batch, image and model.

    bash benchmarks/run.sh growth [--variant=B/16] [--dtype=float32] ...

Per image, so that a flat line is linear growth. Two things leave it: the decoder's attention, which
is quadratic in the number of patches and sees all of them; and at small batches the update, which
costs the same for any batch.
"""

import argparse

from benchmarks import ours, sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.set_defaults(steps=2, batch=4)
    args = parser.parse_args()
    points = [("batch", args.variant, batch, 224) for batch in (2, 4, 8, 16, 32)]
    points += [("image size", args.variant, 1, size) for size in (224, 448, 672, 896)]
    points += [("model", model, 4, 224) for model in ("Ti/16", "S/16", "B/16", "L/16", "H/14")]
    rows, results = [], {}
    for grows, variant, batch, size in points:
        name = f"{variant} at {size}, batch {batch}"
        if name not in results:
            command = sides.script(
                "ours",
                *(f"--variant={variant}", f"--batch={batch}", f"--image_size={size}"),
                *(f"--dtype={args.dtype}", f"--steps={args.steps}", f"--unroll={args.unroll or 1}"),
                *(["--remat"] if args.remat else []),
            )
            results |= sides.take_turns({name: command}, 1)
        rounds = results[name]
        seconds, flops = sides.median(rounds), sides.median(rounds, "flops")
        rows.append(
            [
                *(grows, name, sides.cell(rounds), sides.ratio(seconds, batch, "{:.3f} s")),
                sides.cell(rounds, "{:.0f}", "flops", per=batch * 1e9),
                sides.ratio(flops, seconds and seconds * 1e9, "{:.0f}"),
                sides.cell(rounds, "{:.1f} GiB", "peak_gib"),
            ]
        )
    head = ["grows", "what", "step", "per image", "GFLOPs per image", "GFLOP/s", "peak memory"]
    figure(results, points)
    sides.report("growth", args.dtype, head, rows, results, ["![](growth.png)"])


def figure(results: dict, points: list[tuple]) -> None:
    """Draw out/growth.png: seconds per GFLOP by batch, image size and model."""
    drawing, panels = sides.panels(10, 3.4, 3)
    for axis, grows in zip(panels, ("batch", "image size", "model"), strict=True):
        measured = []
        for kind, variant, batch, size in points:
            result = results[f"{variant} at {size}, batch {batch}"]
            if kind == grows and (seconds := sides.median(result)):
                flops = result[0]["flops"]
                x = {"batch": batch, "image size": size, "model": flops / batch / 1e9}
                measured.append((x[grows], 1e9 * seconds / flops, variant))
        axis.plot([x for x, *_ in measured], [y for _, y, _ in measured], "o-")
        for i, (x, y, variant) in enumerate(measured if grows == "model" else ()):
            offset = (0, -14 if i % 2 else 7)  # below and above by turns
            axis.annotate(variant, (x, y), offset, textcoords="offset points", ha="center")
        axis.set(xscale="log", xlabel="GFLOPs per image" if grows == "model" else grows)
        axis.margins(x=0.12)
        axis.set_ylim(0, 1.15 * max((y for _, y, _ in measured), default=1))
        ticks = [50, 100, 200] if grows == "model" else [x for x, *_ in measured]
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.set_ylabel("seconds per GFLOP" if grows == "batch" else "")
        axis.grid(color="0.92")
    drawing.savefig(sides.OUT / "growth.png", dpi=130)


if __name__ == "__main__":
    main()
