"""The other side of the learning benchmark: IcarusWizard's MAE (MIT), trained by PyTorch.

It takes the classes of their model.py as they are; the loop is ours, with their loss and optimizer
and our schedule. Prints a line of JSON.
"""

import argparse
import collections.abc
import importlib.machinery
import json
import math
import sys
import types

import numpy as np


class Absent(types.ModuleType):
    """A module of which every name is an empty class: what timm 0.3.2 imports and never uses."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def leave_out(*names: str) -> None:
    """Put `Absent` in the place of modules, each after its parent."""
    for name in names:
        module = sys.modules[name] = Absent(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if isinstance(sys.modules.get(parent), Absent):
            setattr(sys.modules[parent], child, module)


def train(model, images, args) -> list[float]:
    """Train, and return the loss of every step."""
    import torch

    batch, total = args.batch_size, args.epochs * (len(images) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    peak, warmup, losses = args.blr * batch / 256, max(total // 10, 1), []
    order = np.random.default_rng(args.seed)
    for step in range(total):
        place = step % (total // args.epochs)
        if place == 0:
            shuffled = order.permutation(len(images))
        share = (step - warmup) / max(total - warmup, 1)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        chosen = images[np.sort(shuffled[place * batch : (place + 1) * batch])]
        x = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 127.5 - 1
        predicted, mask = model(x)
        loss = ((predicted - x) ** 2 * mask).mean() / 0.75
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def features(model, images) -> np.ndarray:
    """Return the class token after the last norm, (N, D), of whole images."""
    import torch

    encoder, found = model.encoder, []
    encoder.shuffle.ratio = 0.0
    with torch.no_grad():
        for start in range(0, len(images), 500):
            x = torch.from_numpy(images[start : start + 500]).permute(0, 3, 1, 2)
            found.append(encoder(x.float() / 127.5 - 1)[0][0].numpy())
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("peer", "arrays", "out"):
        parser.add_argument(f"--{name}")
    for name in ("seed", "epochs", "batch_size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--blr", type=float)
    args = parser.parse_args()
    leave_out("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    leave_out("torchvision.datasets", "torch._six")
    sys.modules["torch._six"].container_abcs = collections.abc
    sys.path[:0] = [args.peer]

    import torch
    from model import MAE_ViT

    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # their masks
    arrays = np.load(args.arrays)
    model = MAE_ViT(32, 4, 128, 6, 4, 2, 4)
    losses = train(model, arrays["train"], args)
    model.eval()
    bank, test = (features(model, arrays[name]) for name in ("bank", "test"))
    np.savez(args.out, losses=losses, bank=bank, test=test)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
