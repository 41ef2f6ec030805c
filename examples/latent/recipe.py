"""Pre-train on the features of a teacher, the moving average of the encoder.

    mae-jax train --config=examples/latent/recipe.py --workdir=DIR --config.data.source=folder:X

Expected: no number is known; nothing was tuned. Watch train/teacher_std, which a collapse brings
to 0, and measure with `--config=knn:init=ENCODER`, after

    mae-jax convert DIR ENCODER --to=ours --averaged --part=encoder

Arguments: as in configs/folder.py.
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.task = "latent.teacher"
    config.model.decoder = "latent.teacher"
    config.teacher = dict(
        decay=0.996,  # I-JEPA's; it grows linearly to
        last_decay=1.0,
        blocks=10,  # the mean of the last ones, of 12, as in data2vec 2.0
    )
    config.optim.clip_norm = 4.0
    del config.evals["reconstruct"]  # its pictures are of pixels
    return config
