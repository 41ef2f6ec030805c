#!/usr/bin/env bash
#SBATCH --job-name=mae-jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@180
# Run on GPU nodes under Slurm, one process for each GPU; the job requeues itself until it is finished.
#
#   sbatch [--nodes=4] launch/slurm.sh --config=FILE --workdir=DIR [FLAG ...]
#
# Start it from the root of the checkout. Make the environment first (bash launch/setup.sh, then
# .venv/bin/pip install "jax[cuda13]"), and choose a DIR that all nodes see. The run saves three minutes
# before the time limit, and when the job is preempted. MAX_RESTARTS: default 50.
set -uo pipefail

command -v srun > /dev/null || {
  echo "launch/slurm.sh: there is no srun; this is started by sbatch on a Slurm cluster" >&2
  exit 2
}
cd "${SLURM_SUBMIT_DIR:-.}" || exit
[ -f launch/host.sh ] || {
  echo "launch/slurm.sh: there is no launch/host.sh in $PWD: submit from the root of the checkout" >&2
  exit 2
}
[[ ${MAX_RESTARTS:=50} =~ ^[0-9]+$ ]] || {
  echo "launch/slurm.sh: MAX_RESTARTS=$MAX_RESTARTS: write a number" >&2
  exit 2
}
export STATUS_DIR=$PWD/slurm-$SLURM_JOB_ID.ended # a file for each process, with its exit status
rm -rf "$STATUS_DIR"
mkdir "$STATUS_DIR" || exit
# A lost host is noticed by its missing heartbeat. Slurm must not kill the others before they report it.
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=0 \
  bash launch/host.sh --distributed "$@"
status=$?
# srun returns the highest status: an error (1, 2) would hide behind the 75 of the hosts it ended.
if error=$(grep -v -E -m1 '^(0|75)$' /dev/null "$STATUS_DIR"/*); then
  error=${error##*/}
  echo "launch/slurm.sh: process ${error%:*} failed with status ${error#*:}; see its message" >&2
  status=${error#*:}
elif [ "$status" -ne 0 ]; then
  status=75 # a process without a file was lost
fi
rm -rf "$STATUS_DIR"

if [ "$status" -eq 75 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
    echo "launch/slurm.sh: gave up after $SLURM_RESTART_COUNT restarts" >&2
    exit 1
  fi
  echo "launch/slurm.sh: back into the queue; the run goes on from its last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
