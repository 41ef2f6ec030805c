r"""The pre-training step: ours against Hugging Face's ViTMAEForPreTraining with fused AdamW.

    bash benchmarks/run.sh step [--variant=B/16,...] [--batches=16,...] [--dtype=float32] ...

Both sides have the same model, batch, precision and device; a step is forward, backward and update,
and images stay on the device. The peer runs eager, and compiled by torch.compile. On a CPU, ours
runs as one device, and as a device per core with FSDP. The best of each side over all batches
counts. Where one Python has JAX for the GPU, torch and transformers, run it without run.sh:

    TORCH_PYTHON=python3 PYTHONPATH=. python3 benchmarks/step.py --dtype=bfloat16 \
        --variant=B/16,L/16,H/14 --batches=64,128,256
"""

import argparse
import os
import sys

from benchmarks import ours, sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.add_argument("--batches", default="16", help="to try with every variant")
    parser.add_argument("--rounds", type=int, default=2)
    parser.set_defaults(steps=4)
    args = parser.parse_args()
    here_only = ("--rounds", "--variant", "--batch")
    given = [f"--steps={args.steps}", *(a for a in sys.argv[1:] if not a.startswith(here_only))]
    cores = f"--devices={len(os.sched_getaffinity(0))}"
    torch = os.environ.get("TORCH_PYTHON", "")
    kept, rows, verdicts, panels = {}, [], [], {}
    for variant in args.variant.split(","):
        rates: dict[str, float] = {}  # images per second of a side, at its best batch
        for batch in args.batches.split(","):
            what = [f"--variant={variant}", f"--batch={batch}", *given]
            results = sides.take_turns(
                {
                    "ours": sides.script("ours", *what),
                    "ours, a device per core": sides.script("ours", *what, cores),
                    "HF, eager": sides.script("huggingface", *what, python=torch),
                    "HF, torch.compile": sides.script(
                        "huggingface", "--compiled", *what, python=torch
                    ),
                },
                args.rounds,
            )
            kept[f"{variant}, batch {batch}"] = results
            for side, rounds in results.items():
                rows.append([variant, batch, side, *cells(rounds, int(batch), results["ours"])])
                if seconds := sides.median(rounds):
                    rates[side] = max(rates.get(side, 0), int(batch) / seconds)
        panels[f"{variant}, images/s"] = rates
        own = [rate for side, rate in rates.items() if side.startswith("ours")]
        peers = [rate for side, rate in rates.items() if not side.startswith("ours")]
        if own and peers:
            verdicts.append(f"{variant}: {max(own) / max(peers):.2f} of HF's best")
    head = ["model", "batch", "side", "images/s", "first step after", "peak memory", "MFU"]
    title = f"{args.dtype}; {sides.all_versions(results)}"
    text = "\n\n".join([title, sides.markdown(head, rows), *verdicts])
    sides.report("step", text, {"results": kept})
    sides.bars("step", panels)


def cells(rounds: list[dict], batch: int, own: list[dict]) -> list[str]:
    """Return images/s, time to the first step, memory and MFU of a side, or what went wrong.

    Args:
      own: the rounds of our side, which know the model's FLOPs and the chip's peak.
    """
    seconds = sides.median(rounds)
    if seconds is None:
        return [sides.errors(rounds), "", "", ""]
    flops, peak = own[0].get("flops"), own[0].get("peak_flops")
    return [
        f"{batch / seconds:.2f}",
        f"{sides.median(rounds, 'first_step'):.0f} s",
        f"{sides.median(rounds, 'peak_gib'):.1f} GiB",
        f"{100 * flops / seconds / peak:.1f} %" if flops and peak else "",
    ]


if __name__ == "__main__":
    main()
