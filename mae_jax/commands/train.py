"""Train: pre-train, fine-tune or probe on images, from a config file."""

from pathlib import Path

from mae_jax import files
from mae_jax.commands import recipes, running


def main(argv: list[str]) -> int:
    config, values, recipe = recipes.parse(argv, running.define, "train")
    workdir = values.workdir or str(Path("workdir") / recipe)
    for key in ("resume", "init_from"):
        files.require_place(config.get(key, ""), f"--config.{key}")
    files.require_place(workdir, "--workdir")
    running.connect([config], values, workdir)  # only now: JAX takes seconds to import
    if status := running.supervise(config, workdir, values.profile):
        return status
    import jax

    from mae_jax.metrics import summary

    if jax.process_index() == 0:
        own_images = config.data.source.startswith("folder:")
        print("\n".join(summary.lines(workdir, own_images)))
    return 0
