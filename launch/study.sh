#!/usr/bin/env bash
# Measure what pre-training is worth on 1,797 small digits: fine-tuning against training from scratch,
# probes against features that have learned nothing, and four mask ratios, with three seeds each.
#
#   bash launch/study.sh
#
# It takes about 20 minutes on 2 idle CPU cores. The same command again continues where it was stopped.
#
# WORKDIR          the folder of the runs, the table (study.md) and the figure (default: workdir/study)
# PYTHON and VENV  see launch/setup.sh
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

workdir=${WORKDIR:-$root/workdir/study}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$root"
exec "$python" launch/study.py "$workdir"
