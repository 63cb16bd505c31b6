#!/usr/bin/env bash
# Trains a stage as a Slurm job over several nodes with GPUs, one task a node:
#
#   sbatch [--nodes=4 --partition=P ...] launch/slurm.sh CONFIG [flags of wings train]
#   sbatch launch/slurm.sh configs/stage2.py:qwen1_5_7b --data llava=/shared/mix665k.json:/shared/images \
#       --workdir=/shared/runs/stage2
#   ./launch/slurm.sh --dry-run CONFIG ...     prints the command of the job
#
# Submit it from the clone, which is on a file system of all nodes, as data and workdir are. Options of
# sbatch have precedence over the lines below. VENV is the environment to use (default .venv).
#SBATCH --job-name=wings
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --exclusive
#SBATCH --output=%x-%j.log --open-mode=append
# After the failure of a node, or preemption, Slurm queues the job again; the command resumes.
#SBATCH --requeue
# SIGTERM to all tasks 10 minutes before the time limit: each finishes its step, they save together and
# exit with 143. Saving 95 GB at 1 GB/s takes 95 s; the signal may come a minute early.
#SBATCH --signal=TERM@600
set -euo pipefail
# Slurm runs a copy of this file: the clone is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -f launch/environment.sh ] || { echo "slurm.sh: submit it from the clone" >&2 && exit 2; }
. launch/environment.sh
case "${1:-}" in -h | --help) show_help && exit ;; --dry-run) DRY_RUN=1 && shift ;; esac
[ $# -gt 0 ] || fail "no config: for instance configs/stage2.py:qwen1_5_7b (--help)"
[ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] || fail "submit it: sbatch launch/slurm.sh $(quote "$@")"
[ ! -d "${VENV:-.venv}/bin" ] || PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"

# --cpus-per-task: srun does not take it from the job since Slurm 22.05.
# --kill-on-bad-exit=0, --wait=0: tasks that still save are not killed because another one has ended; if a
# host dies, the others end by themselves after config.host_timeout seconds.
status=0
run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" --kill-on-bad-exit=0 --wait=0 \
    ./launch/gpu.sh "$@" || status=$?

# 143: saved before the time limit. 75, 134: another host was lost. These go on in a new job; `scancel`
# ends it.
if [ "$status" -eq 143 ] || [ "$status" -eq 75 ] || [ "$status" -eq 134 ]; then
    [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ] || fail "stopped ${MAX_RESTARTS:-100} times"
    echo "slurm.sh: exit status $status, queueing job $SLURM_JOB_ID again"
    run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
