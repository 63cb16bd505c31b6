#!/usr/bin/env bash
# Trains a stage on all GPUs of one node, or of a Slurm job (one task a node):
#
#   ./launch/gpu.sh configs/stage2.py:qwen1_5_7b --data llava=FILE.json:IMAGES ...
#   srun --nodes=2 --ntasks-per-node=1 ./launch/gpu.sh configs/stage2.py:qwen1_5_7b ...
#
# By default all GPUs share the parameters (config.mesh.fsdp=-1). With several nodes, replicas of the
# parameters need less traffic between them: --config.mesh.fsdp=8 --config.mesh.data=-1.
set -euo pipefail
cd "$(dirname "$0")/.."
config=$1
shift
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}"
distributed=()
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    distributed=(--distributed)
    if [ "$SLURM_NTASKS" -eq "${SLURM_NNODES:-0}" ]; then # else JAX takes one GPU for each task
        gpus=$(nvidia-smi --list-gpus | wc -l)
        export JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-$(seq -s , 0 $((gpus - 1)))}"
    fi
fi
exec python -m wings_jax.train --config="$config" "${distributed[@]}" "$@"
