#!/usr/bin/env bash
# launch/slurm.sh on a real Slurm: a cluster of two nodes on this machine, made and ended by the test.
#
#   sudo apt-get install slurm-wlm munge
#   sudo bash tests/slurm/run.sh [PYTEST_ARGUMENT ...]        about 10 minutes on 2 idle cores
#
# It adds the names of the nodes to /etc/hosts, and takes them away again.
#
# PYTHON and VENV: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../launch/setup.sh"
cd "$root"
for program in munged slurmctld slurmd sbatch; do
  PATH=$PATH:/usr/sbin command -v "$program" > /dev/null ||
    fail "$program is missing: apt-get install slurm-wlm munge"
done
[ "$(id -u)" = 0 ] || fail "Slurm's daemons start as root: sudo bash tests/slurm/run.sh"
PATH=$PATH:/usr/sbin exec "$python" -m pytest -o addopts="" -v tests/slurm/cluster.py "$@"
