#!/usr/bin/env bash
# What masked autoencoding is worth on 1,797 small digits: fine-tuning against training from
# scratch, probes against features that learned nothing, four mask ratios; three seeds of each.
#
#   bash launch/study.sh        about 20 minutes on 2 idle CPU cores; run it again and it goes on
#
# WORKDIR  where the runs, the table (study.md) and the figure go (default: workdir/study)
# PYTHON and VENV: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

workdir=${WORKDIR:-$root/workdir/study}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$root"
exec "$python" launch/study.py "$workdir"
