#!/usr/bin/env bash
# Four hosts, hosts in network namespaces, and runs in a bucket: too slow for every change, and the
# second needs root.
#
#   bash tests/multihost/run.sh [PYTEST_ARGUMENT ...]        about 10 minutes on 2 idle cores
#
# PYTHON and VENV: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../launch/setup.sh"
cd "$root"
exec "$python" -m pytest tests/multihost/four_hosts.py tests/multihost/namespaces.py \
  tests/multihost/bucket.py "$@"
