#!/usr/bin/env bash
# Trains a stage on all GPUs of this machine. As a task of Slurm or Open MPI, or a pod of a JobSet, it
# trains together with the others.
#
#   ./launch/gpu.sh [--dry-run] CONFIG [flags of wings train]
#   ./launch/gpu.sh configs/stage2.py:qwen1_5_7b --data llava=FILE.json:IMAGES
#
# By default all GPUs share the parameters (config.mesh.fsdp=-1). With several nodes, replicas of the
# parameters need less traffic between them: --config.mesh.fsdp=8 --config.mesh.data=-1.
# XLA_FLAGS of the environment are kept, and have precedence over those below.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
case "${1:-}" in -h | --help) show_help && exit ;; --dry-run) DRY_RUN=1 && shift ;; esac
[ $# -gt 0 ] || fail "no config: for instance configs/stage2.py:qwen1_5_7b (--help)"
config=$1
shift

# JAX takes 75 % of a GPU's memory by default; NCCL and the CUDA libraries need less than 5 %.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}"
xla_flags=(
    # Starts a collective (the parameters of a layer, its gradients) as early as its input is there
    # and waits for it as late as possible, so that it runs beside the matrix products. Off by
    # default.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # Layers are a loop, and that scheduler does not look beyond one pass of it: this gathers the
    # parameters of the next layer during the present one, for the memory of one layer more. Off by
    # default, while its counterpart for the gradients (pipelined_reduce_scatter) is on.
    --xla_gpu_enable_pipelined_all_gather=true
)
export XLA_FLAGS="${xla_flags[*]} ${XLA_FLAGS:-}"

distributed=()
for processes in "${SLURM_STEP_NUM_TASKS:-}" "${OMPI_COMM_WORLD_SIZE:-}" "${NNODES:-}" \
    "${JAX_NUM_PROCESSES:-}"; do
    [ "${processes:-1}" -le 1 ] || distributed=(--distributed)
done
[ -z "${DRY_RUN:-}" ] || echo "export XLA_FLAGS=$(quote "$XLA_FLAGS")"
run exec python -m wings_jax.train --config="$config" "${distributed[@]}" "$@"
