"""Why the nearest patch gains nothing on CamVid: what the metric of features and the scenes do.

    python docs/logs/camvid/nearest.py WORKDIR DATA

WORKDIR is that of `bash launch/study.sh camvid DATA`. Counts mIoU of the 10 nearest patches and of
the nearest, by the encoder of WORKDIR/pretrain-0 and by the same without training.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from sklearn.metrics import jaccard_score

import mae_jax
from mae_jax.evals.knn import unit
from mae_jax.models.patchify import patchify
from mae_jax.models.vit import Encoder

SIZE, PATCH, CLASSES = (160, 120), 8, 11


def read(data, split, images=100):
    """Return images (N, H, W, 3), and the class of each pixel of each patch (N * L, E)."""
    files = sorted((data / split / "images").iterdir())
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:images]]
    pictures, maps = [], []
    for file in files:
        (label,) = (data / split / "labels").glob(f"{file.stem}.*")
        pictures.append(np.asarray(Image.open(file).convert("RGB").resize(SIZE, Image.BICUBIC)))
        maps.append(np.asarray(Image.open(label).resize(SIZE, Image.NEAREST)))
    pixels = patchify(np.stack(maps)[..., None], (PATCH, PATCH))
    return np.stack(pictures), np.asarray(pixels).reshape(-1, PATCH * PATCH)


def features(root, images, trained):
    model, params = mae_jax.load(str(root / "pretrain-0"))
    if not trained:
        start = Encoder(model.spec).init(jax.random.key(0), model.patches(images[:1]))
        params = {"encoder": start["params"]}
    encode = jax.jit(model.encode)
    parts = [np.asarray(encode(params, images[i : i + 20])) for i in range(0, len(images), 20)]
    return np.concatenate(parts)[:, 1:]


def standardised(bank, query):
    mean, deviation = bank.mean((0, 1)), bank.std((0, 1)) + 1e-6
    return tuple(((x - mean) / deviation).reshape(-1, x.shape[-1]) for x in (bank, query))


def whitened(bank, query):
    """Turn features so that every direction has the same variance over the bank."""
    variance, directions = np.linalg.eigh(np.cov(bank.T))
    turn = directions / np.sqrt(variance + 1e-3)
    return bank @ turn, query @ turn


def miou(bank, query, bank_pixels, pixels):
    bank, query = unit(bank), unit(query)
    nearest = jax.jit(lambda x: jax.lax.top_k(x @ bank.T, 10)[1])
    starts = range(0, len(query), 1000)
    found = np.concatenate([np.asarray(nearest(query[i : i + 1000])) for i in starts])
    known, result = pixels < CLASSES, []
    for k in (1, 10):
        votes = bank_pixels[found[:, :k]]
        count = np.stack([(votes == number).sum(1) for number in range(CLASSES)], -1)
        predicted = count.argmax(-1)
        result.append(jaccard_score(pixels[known], predicted[known], average="macro"))
    return f"{100 * result[0]:.1f} (nearest), {100 * result[1]:.1f} (10 nearest)"


def main():
    root, data = map(Path, sys.argv[1:])
    bank_images, bank_pixels = read(data, "train")
    for split in ("val", "test"):
        images, pixels = read(data, split)
        for trained in (True, False):
            bank, query = (features(root, x, trained) for x in (bank_images, images))
            scenes = tuple(x - x.mean(1, keepdims=True) for x in (bank, query))
            kinds = {
                "standardised": standardised(bank, query),
                "whitened": whitened(*standardised(bank, query)),
                "less each image's mean, whitened": whitened(*standardised(*scenes)),
            }
            for words, (x, y) in kinds.items():
                name = "pre-trained" if trained else "untrained"
                print(f"{split} {name}, {words}: {miou(x, y, bank_pixels, pixels)}", flush=True)


if __name__ == "__main__":
    main()
