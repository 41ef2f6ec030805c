"""What masking costs, and what it saves.

    bash benchmarks/run.sh masking [--variant=B/16,L/16,H/14] [--batches=16,4,4] [--rounds=1] ...

The share of a step that the shuffle, both gathers and the unshuffle take, forward and backward,
timed alone on arrays of the step's shapes; and the step against one whose encoder sees mask tokens
too, beside the speed-ups of the paper (Table 2: 2.8 for L/16, 3.5 for H/14, on TPU v3).
"""

import argparse
import json
import sys
import time

from benchmarks import ours, sides

PAPER = {"L/16": "2.8", "H/14": "3.5"}


def shuffling(args: argparse.Namespace) -> dict:
    """Seconds of: scores to mask, patches to visible ones, latents and tokens back into place."""
    import jax
    import jax.numpy as jnp

    from mae_jax.models import masking

    config = ours.make_config(args)
    m = config.model
    grid = tuple(image // patch for image, patch in zip(m.image_size, m.patch_size, strict=True))
    batch, length = args.batch, grid[0] * grid[1]
    kept = masking.num_kept(length, config.mask_ratio)
    dtype = jnp.dtype(m.residual_dtype)
    patches_BLP = jnp.ones((batch, length, m.patch_size[0] * m.patch_size[1] * m.channels))

    @jax.jit
    def there_and_back(rng, patches_BLP, latent_BKE, token_11E, weight_BLE):
        mask = masking.keep_lowest(masking.random(rng, batch, grid, config.mask_ratio), kept)
        visible_BKP = jnp.take_along_axis(patches_BLP, mask.keep_BK[..., None], axis=1)

        def unshuffled(latent_BKE, token_11E):
            token_BHE = jnp.broadcast_to(token_11E, (batch, length - kept, m.decoder_width))
            both_BLE = jnp.concatenate([latent_BKE, token_BHE], axis=1)
            return jnp.take_along_axis(both_BLE, mask.restore_BL[..., None], axis=1)

        x_BLE, back = jax.vjp(unshuffled, latent_BKE, token_11E)
        return mask.mask_BL, visible_BKP, x_BLE, back(weight_BLE)

    arrays = (
        patches_BLP,
        jnp.ones((batch, kept, m.decoder_width), dtype),
        jnp.ones((1, 1, m.decoder_width), dtype),
        jnp.ones((batch, length, m.decoder_width), dtype),
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
    parser.add_argument("--batches", default="16,4,4", help="of these variants")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shuffling", action="store_true")
    args = parser.parse_args()
    if args.shuffling:
        print(json.dumps(shuffling(args)))
        return
    rows, kept, panels = [], {}, {}
    for variant, batch in zip(args.variant.split(","), args.batches.split(","), strict=True):
        common = [f"--variant={variant}", f"--batch={batch}", f"--dtype={args.dtype}"]
        step = [sys.executable, f"{sides.HERE}/ours.py", *common, f"--steps={args.steps}"]
        step += [f"--unroll={args.unroll or 1}"]
        results = sides.take_turns(
            {
                "step": step,
                "with mask tokens": [*step, "--tokens_in_encoder"],
                "masking": [sys.executable, __file__, "--shuffling", *common],
            },
            args.rounds,
        )
        masked, full, alone = (sides.median(found) for found in results.values())
        work = [found[0].get("flops") for found in results.values()]
        kept[variant] = results
        panels[f"{variant}, seconds"] = {
            "step": masked,
            "with mask tokens": full,
            "masking alone": alone,
        }
        rows.append(
            [
                variant,
                batch,
                f"{masked:.2f} s" if masked else sides.errors(results["step"]),
                f"{1e3 * alone:.1f} ms" if alone else sides.errors(results["masking"]),
                f"{100 * alone / masked:.2f} %" if alone and masked else "",
                f"{full:.2f} s" if full else sides.errors(results["with mask tokens"]),
                f"{full / masked:.2f}" if full and masked else "",
                f"{work[1] / work[0]:.2f}" if work[0] and work[1] else "",
                PAPER.get(variant, ""),
            ]
        )
    head = ["model", "batch", "step", "masking in it", "share", "step with mask tokens in encoder"]
    head += ["times longer", "times the FLOPs", "paper's speed-up"]
    title = f"{args.dtype}; {sides.all_versions(results)}"
    sides.report("masking", f"{title}\n\n{sides.markdown(head, rows)}", {"results": kept})
    sides.bars("masking", panels)


if __name__ == "__main__":
    main()
