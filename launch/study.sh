#!/usr/bin/env bash
# Measure what pre-training is worth: fine-tuning against training from scratch, frozen features
# against those that have learned nothing, and masks.
#
#   bash launch/study.sh cifar10 DATA     50,000 photographs of 32 pixels: 8 hours of 2 CPU cores
#   bash launch/study.sh camvid DATA      street scenes and what their patches know: 2 hours of 2 cores
#   bash launch/study.sh digits           1,797 digits: 20 minutes
#   bash launch/study.sh short            nine photographs inside Python wheels: a minute
#
# DATA: see docs/cifar10.md and docs/dense.md. Ctrl-C stops the study, whose
# runs save where they are; the same command again continues.
#
# WORKDIR          the folder of the runs, the table (study.md) and the figure
#                  (default: workdir/study-NAME)
# PYTHON and VENV  see launch/setup.sh
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
refuse() {
  echo "$*" >&2
  exit 1
}
usage="Which study? bash launch/study.sh cifar10 DATA, bash launch/study.sh camvid DATA, bash launch/study.sh digits, or bash launch/study.sh short"
name=${1:-}
[ -f "$here/study_$name.py" ] || refuse "$usage"
[[ $name != cifar10 && $name != camvid ]] || [ -d "${2:-}" ] || refuse "There is no folder '${2:-}'. $usage"

# shellcheck source=launch/setup.sh
source "$here/setup.sh"
workdir=${WORKDIR:-$root/workdir/study-$name}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
data=${2:+$(CDPATH='' cd -- "$2" && pwd)}
cd "$root"
exec "$python" "launch/study_$name.py" "$workdir" ${data:+"$data"}
