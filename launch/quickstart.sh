#!/usr/bin/env bash
# Watch a masked autoencoder learn from a few photographs: a few minutes on 2 CPU cores.
#
#   bash launch/quickstart.sh [--config.KEY=VALUE ...]
#
# Needs python3 (3.11 or newer) with pip. Run again, it goes on where it was stopped, or says that it is
# finished. PYTHON and VENV: see launch/setup.sh. WORKDIR: where the results go (default: workdir/quickstart
# in the checkout).
set -euo pipefail

here=$PWD
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

workdir=${WORKDIR:-$root/workdir/quickstart}
case $workdir in /* | *://*) ;; *) workdir=$here/$workdir ;; esac
cd "$root"
exec "$python" -m mae_jax train --config=configs/quickstart.py --workdir="$workdir" "$@"
