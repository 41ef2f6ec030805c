#!/usr/bin/env bash
# Linters, type check and tests, with the locked packages.
#
#   bash launch/test.sh [PYTEST_ARGUMENT ...]        e.g. bash launch/test.sh tests/test_models.py -x
#
# PYTHON and VENV: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$python")/shellcheck" --external-sources launch/*.sh .ci/run
"$python" -m mypy
# The tests of a file stay in one process, where they share what they compiled; files go in their own
# order, because the one with the fewest tests (test_resume.py) takes the longest.
exec "$python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder "$@"
