"""Open damaged copies of a weight file, under limits of time and memory: python fuzz_weights.py.

    python tests/fuzz_weights.py FILE_OR_FOLDER MUTATIONS

Prints how many were opened and how many refused; any other end of an attempt ends the program.
"""

import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

from mae_jax.errors import UserError
from mae_jax.interop.open import open_weights

SECONDS, BYTES = 20, 2 * 2**30  # for one attempt; of address space more than at the start
HEADS = {"heads": 2, "decoder_heads": 2}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with some of them changed, removed or repeated."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(changed) or 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0:
                changed[start : start + length] = rng.randbytes(length)
            case 1:
                del changed[start : start + length]
            case 2:
                changed[start:start] = changed[start : start + length] * rng.choice((1, 2, 50))
            case 3:
                changed[start : start + length] = b"\xff" * length
            case 4:
                changed[start : start + length] = b"\0" * length
            case 5:
                del changed[start : None if rng.random() < 0.1 else start + 1]
    return bytes(changed)


def damaged(file: Path, rng: random.Random) -> bytes:
    """Return a damaged file; of half of the archives only the pickle, so that no sum tells."""
    content = file.read_bytes()
    if not zipfile.is_zipfile(file) or rng.random() < 0.5:
        head = rng.random() < 0.5  # where safetensors, JSON and zip say what they hold
        return mutate(content[:4000], rng) + content[4000:] if head else mutate(content, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            part = old.read(info)
            is_pickle = info.filename.endswith("data.pkl")
            new.writestr(info.filename, mutate(part, rng) if is_pickle else part)
    return buffer.getvalue()


def main() -> None:
    source, count = Path(sys.argv[1]), int(sys.argv[2])
    open_weights(source, **HEADS)  # works as it is, and has imported everything
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, -1))
    rng, outcomes = random.Random(0), {"opened": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / source.name
        for _ in range(count):
            if source.is_dir():
                shutil.copytree(source, copy, dirs_exist_ok=True)
                file = copy / rng.choice(sorted(x.name for x in source.iterdir()))
                file.write_bytes(damaged(source / file.name, rng))
            else:
                copy.write_bytes(damaged(source, rng))
            signal.alarm(SECONDS)  # its default action ends the program
            try:
                open_weights(copy, **HEADS)
                outcomes["opened"] += 1
            except UserError:
                outcomes["refused"] += 1
    print(outcomes)


if __name__ == "__main__":
    main()
