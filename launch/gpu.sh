#!/usr/bin/env bash
# Trains a stage on all GPUs of one node, or of a Slurm job (one task a node):
#
#   ./launch/gpu.sh configs/stage2.py:qwen1_5_7b --config.data.sources.llava.path=FILE ...
#   srun --nodes=2 --ntasks-per-node=1 ./launch/gpu.sh configs/stage2.py:qwen1_5_7b ...
#
# The mesh comes from the preset (8 GPUs with fsdp=8; --config.mesh.data=-1 takes more nodes).
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
