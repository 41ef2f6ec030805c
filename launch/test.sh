#!/usr/bin/env bash
# Run linters, the type check and the tests, with the locked packages and the compiler for TPUs.
#
#   bash launch/test.sh [PYTEST_ARGUMENT ...]        e.g. bash launch/test.sh tests/test_models.py -x
#
# PYTHON and VENV: see launch/setup.sh
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$python")/shellcheck" --external-sources launch/*.sh benchmarks/*.sh \
  tests/multihost/run.sh tests/slurm/run.sh .ci/run
"$python" -m mypy
# tests/test_plan.py compiles for TPUs. Their compiler is installed beside the environment's packages:
# inside, every start of JAX on a machine without TPUs would search for TPUs and print warnings.
libtpu=$(sed -n 's/^LIBTPU = "\(.*\)".*/\1/p' mae_jax/topologies.py)
if [ ! -e "$venv/libtpu/libtpu-$libtpu.dist-info" ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
    --target "$venv/libtpu" "libtpu==$libtpu"
fi
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # as launch/local.sh does
export PYTHONPATH=$venv/libtpu${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# The tests of a file run in one process, where they share compiled programs. Files keep their order,
# because the one with the fewest tests (test_resume.py) takes the longest. There is one process more
# than cores, up to four, because some tests wait.
workers=$("$python" -c 'import os; print(min(4, 1 + os.cpu_count()))')
exec "$python" -m pytest --numprocesses="$workers" --dist=loadfile --no-loadscope-reorder "$@"
