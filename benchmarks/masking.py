"""Measure what masking costs, and what it saves.

    bash benchmarks/run.sh masking [--variant=B/16,L/16,H/14] [--batches=16,4,4] [--rounds=1] ...

The cost is the share of a step that the shuffle, both gathers and the unshuffle take, forward and
backward, timed alone on arrays of the step's shapes. The saving compares the step with one whose
encoder sees mask tokens too, beside the paper's speed-ups (Table 2: 2.8 for L/16, 3.5 for H/14, on
TPU v3).
"""

import argparse
import json
import time

from benchmarks import ours, sides

PAPER = {"L/16": "2.8", "H/14": "3.5"}


def shuffling(args: argparse.Namespace) -> dict:
    """Time the masking alone: draw a mask, take the visible patches, put all tokens in place."""
    import jax
    import jax.numpy as jnp

    from mae_jax.models import masking
    from mae_jax.models.spec import ModelSpec

    config = ours.make_config(args)
    spec = ModelSpec.from_config(config.to_dict())
    batch, length, width = args.batch, spec.num_patches, spec.decoder.width
    kept = masking.num_kept(length, spec.mask_ratio)
    dtype = jnp.dtype(config.model.residual_dtype)

    @jax.jit
    def there_and_back(rng, patches_BLP, latent_BKE, token_11E, weight_BLE):
        mask = masking.keep_lowest(masking.random(rng, batch, spec.grid, spec.mask_ratio), kept)
        visible_BKP = jnp.take_along_axis(patches_BLP, mask.keep_BK[..., None], axis=1)

        def unshuffled(latent_BKE, token_11E):
            token_BHE = jnp.broadcast_to(token_11E, (batch, length - kept, width))
            both_BLE = jnp.concatenate([latent_BKE, token_BHE], axis=1)
            return jnp.take_along_axis(both_BLE, mask.restore_BL[..., None], axis=1)

        x_BLE, back = jax.vjp(unshuffled, latent_BKE, token_11E)
        return mask.mask_BL, visible_BKP, x_BLE, back(weight_BLE)

    arrays = (
        jnp.ones((batch, length, spec.patch_dim)),
        jnp.ones((batch, kept, width), dtype),
        jnp.ones((1, 1, width), dtype),
        jnp.ones((batch, length, width), dtype),
    )
    seconds = []
    for number in range(22):
        began = time.perf_counter()
        jax.block_until_ready(there_and_back(jax.random.key(number), *arrays))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.set_defaults(variant="B/16,L/16,H/14", steps=3)
    parser.add_argument("--batches", default="16,4,4", help="one for each variant")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shuffling", action="store_true")
    args = parser.parse_args()
    if args.shuffling:
        print(json.dumps(shuffling(args)))
        return
    rows, kept, panels = [], {}, {}
    for variant, batch in zip(args.variant.split(","), args.batches.split(","), strict=True):
        common = [f"--variant={variant}", f"--batch={batch}", f"--dtype={args.dtype}"]
        unroll = f"--unroll={args.unroll or 1}"
        command = sides.script("ours", *common, f"--steps={args.steps}", unroll)
        results = sides.take_turns(
            {
                "step": command,
                "with mask tokens": [*command, "--tokens_in_encoder"],
                "masking alone": sides.script("masking", "--shuffling", *common),
            },
            args.rounds,
        )
        step, full, alone = results.values()
        seconds, longer, masking = (sides.median(rounds) for rounds in results.values())
        work = [sides.median(rounds, "flops") for rounds in (full, step)]
        rows.append(
            [
                *(variant, batch, sides.cell(step), sides.cell(alone, "{:.1f} ms", per=1e-3)),
                *(sides.ratio(masking, seconds, "{:.2%}"), sides.cell(full)),
                *(sides.ratio(longer, seconds), sides.ratio(*work), PAPER.get(variant, "")),
            ]
        )
        panels[f"{variant}, seconds"] = dict(zip(results, (seconds, longer, masking), strict=True))
        kept |= {f"{variant}, {name}": rounds for name, rounds in results.items()}
    head = ["model", "batch", "step", "masking in it", "share", "step with mask tokens in encoder"]
    head += ["times longer", "times the FLOPs", "paper's speed-up"]
    sides.report("masking", args.dtype, head, rows, kept)
    sides.bars("masking", panels)


if __name__ == "__main__":
    main()
