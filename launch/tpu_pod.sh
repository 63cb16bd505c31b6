#!/usr/bin/env bash
# Trains a stage on a TPU pod slice: run it on every host of the slice, for instance with
#
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command "cd wings_jax && \
#       ./launch/tpu_pod.sh configs/stage2.py:qwen1_5_7b --workdir=gs://BUCKET/stage2 ..."
#
# All hosts share the workdir: a bucket (pip install '.[gcs]') or a file store.
# By default all chips share the parameters (config.mesh.fsdp=-1); --config.mesh.fsdp=8
# --config.mesh.data=-1 makes replicas of 8 chips each.
set -euo pipefail
cd "$(dirname "$0")/.."
config=$1
shift
exec python -m wings_jax.train --config="$config" --distributed "$@"
