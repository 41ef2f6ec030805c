#!/usr/bin/env bash
# Watch a masked autoencoder learn from a few photographs: a few minutes on 2 CPU cores.
#
#   bash launch/quickstart.sh [--config.KEY=VALUE ...]
#
# It needs python3 (3.11 or newer) with pip. Training starts from small weights that come with the code
# (weights/cifar10-s-pixels; --config.init_from= starts from none). The same command again continues a
# run that was stopped, or says that the run is finished.
#
# WORKDIR          the folder of the results (default: workdir/quickstart in the checkout)
# PYTHON and VENV  see launch/setup.sh
set -euo pipefail

here=$PWD
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

workdir=${WORKDIR:-$root/workdir/quickstart}
case $workdir in /* | *://*) ;; *) workdir=$here/$workdir ;; esac
cd "$root"
start=$root/workdir/cifar10-s-pixels
mkdir -p "$root/workdir"
[ -e "$start/config.json" ] || "$python" -m mae_jax convert weights/cifar10-s-pixels "$start" --to=ours
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: fewer page faults on CPUs
exec "$python" -m mae_jax train --config=configs/quickstart.py --config.init_from="$start" \
  --workdir="$workdir" "$@"
