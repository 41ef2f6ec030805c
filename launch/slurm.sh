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
# All see a lost host by its heartbeat; Slurm killing the others would keep them from saying so.
srun --kill-on-bad-exit=0 --wait=0 bash launch/host.sh --distributed "$@"
status=$?

if [ "$status" -eq 75 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-50}" ]; then
    echo "launch/slurm.sh: gave up after $SLURM_RESTART_COUNT restarts" >&2
    exit 1
  fi
  echo "launch/slurm.sh: back into the queue; the run goes on from its last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
