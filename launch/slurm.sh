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
# GPU nodes under Slurm, one process for each GPU; puts itself back into the queue until it is done.
#
#   sbatch [--nodes=4] launch/slurm.sh --config=FILE --workdir=DIR [FLAG ...]
#
# From the root of the checkout, with the environment made (bash launch/setup.sh, and then
# .venv/bin/pip install "jax[cuda13]"), and DIR where all nodes see it. Three minutes before the time
# limit, and when the job is preempted, the run saves. MAX_RESTARTS: default 50.
set -uo pipefail

command -v srun > /dev/null || {
  echo "launch/slurm.sh: there is no srun; this is started by sbatch on a Slurm cluster" >&2
  exit 2
}
cd "${SLURM_SUBMIT_DIR:-.}" || exit
export STATUS_DIR=$PWD/slurm-$SLURM_JOB_ID.ended # a file for each process: how it ended
rm -rf "$STATUS_DIR"
mkdir "$STATUS_DIR" || exit
# All see a lost host by its heartbeat; Slurm killing the others would keep them from saying so.
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=0 \
  bash launch/host.sh --distributed "$@"
status=$?
# srun's status is the highest of all: an error (1, 2) hides behind the 75 of those that it ended.
if error=$(grep -v -E -m1 '^(0|75)$' /dev/null "$STATUS_DIR"/*); then
  error=${error##*/}
  echo "launch/slurm.sh: process ${error%:*} failed with status ${error#*:}; see its message" >&2
  status=${error#*:}
elif [ "$status" -ne 0 ]; then
  status=75 # what left no file was lost
fi
rm -rf "$STATUS_DIR"

if [ "$status" -eq 75 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-50}" ]; then
    echo "launch/slurm.sh: gave up after $SLURM_RESTART_COUNT restarts" >&2
    exit 1
  fi
  echo "launch/slurm.sh: back into the queue; the run goes on from its last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
