#!/usr/bin/env bash
# The published protocol on CIFAR-10 on one GPU, in two calls of ten minutes after the installation:
# pre-training with its probes; then fine-tuning and training from scratch.
#
#   bash benchmarks/proof.sh DATA [--limit=540] [--config.KEY=VALUE ...]
#   bash benchmarks/proof.sh DATA tune [--limit=540] [--config.KEY=VALUE ...]
#
# DATA holds train/CLASS/*.jpg and test/CLASS/*.jpg, see docs/cifar10.md. A run that takes longer than the
# limit is stopped, and the table has what it reached; the same call goes on with it. For CPUs, --share=0.02
# makes 2 % of the steps and measures on 2 % of the images, --config.model.dtype=float32 trains faster
# there, and --small takes the small model of docs/cifar10.md. The table is printed, and kept in
# WORKDIR/proof.md.
#
# WORKDIR     the folder of the runs (default: workdir/proof)
# GPU_PYTHON  see gpu.sh
set -euo pipefail

# Paths are those of the folder that the user is in.
absolute() { case $1 in /* | -*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
[ $# = 0 ] || set -- "$(absolute "$1")" "${@:2}"
[ -z "${WORKDIR:-}" ] || WORKDIR=$(absolute "$WORKDIR")

TORCH_PYTHON=''
# shellcheck source=benchmarks/gpu_python.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/gpu_python.sh"
cd "$root"
exec "$GPU_PYTHON" benchmarks/proof.py "${WORKDIR:-$root/workdir/proof}" "$@"
