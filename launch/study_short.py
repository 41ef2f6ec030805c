"""Make the shortest study: the recipe of CIFAR-10 on nine photographs, in a minute of 2 cores.

    python launch/study_short.py WORKDIR      (see launch/study.sh)

The photographs lie in Python wheels. A class is a photograph: crops of 32 x 32 pixels, from its
left 60 % for training and from the rest for the test.
"""

import sys
from pathlib import Path

import numpy as np
import study
from PIL import Image
from study import Run, last_value

from mae_jax.data import bundled

LOGISTIC, KNN = "eval/logistic_cls", "eval/knn20_cls"
CROPS = {"train": 100, "test": 40}  # of each photograph
SIDE, SHORT = 32, 160  # of a crop, and the short side of the photograph that it is cut from


def write_crops(folder: Path) -> None:
    """Write SPLIT/CLASS/NUMBER.png, the same in every run."""
    rng = np.random.default_rng(0)
    for module, names in bundled.PICTURES.items():
        for path in (bundled.folder_of(module) / name for name in names):
            if path.stem == "motorcycle_right":  # the other half of a stereo pair
                continue
            picture = Image.open(path).convert("RGB")
            scale = SHORT / min(picture.size)
            picture = picture.resize([round(scale * side) for side in picture.size])
            cut = int(0.6 * picture.width)
            for split, start, end in (("train", 0, cut), ("test", cut, picture.width)):
                (folder / split / path.stem).mkdir(parents=True, exist_ok=True)
                for number in range(CROPS[split]):
                    left = rng.integers(start, end - SIDE + 1)
                    top = rng.integers(picture.height - SIDE + 1)
                    crop = picture.crop((left, top, left + SIDE, top + SIDE))
                    crop.save(folder / split / path.stem / f"{number}.png")


def main() -> int:
    root = Path(sys.argv[1])
    write_crops(root / "images")
    recipe = f"configs/cifar10.py:data={root / 'images'},small=true"
    shorter = {
        "train_for": "100 steps", "batch_size": 64, "optim.blr": 4e-3, "optim.warmup": "20 steps",
        "evals": {},
    }  # fmt: skip
    pretrain = [f"--config.{key}={value}" for key, value in shorter.items()]
    frozen = ["--config.data.split=train"]
    for name in ("knn", "logistic"):
        frozen += [f"--config.evals.{name}.{x}" for x in ("bank_split=train", "layers=last")]
    runs = [
        Run("pretrain", f"{recipe},task=pretrain", overrides=tuple(pretrain)),
        Run("knn-mae", f"{recipe},task=knn", init="pretrain", overrides=tuple(frozen)),
        Run("knn-random", f"{recipe},task=knn", overrides=tuple(frozen)),
    ]
    if status := study.run(runs, root):
        return status
    print("\n| top-1 accuracy, % | logistic regression | 20 nearest |\n|---|---|---|")
    for name, words in (("knn-mae", "MAE"), ("knn-random", "untrained")):
        cells = (f"{last_value(root, name, key):.1f}" for key in (LOGISTIC, KNN))
        print(f"| {words} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
