#!/usr/bin/env bash
# Trains a stage on a host of a TPU slice, together with its other hosts: run it on each of them.
# launch/tpu_pod.sh and launch/gke_xpk.sh do.
#
#   ./launch/tpu_host.sh [--dry-run] CONFIG [flags of wings train]
#
# All hosts share the workdir: a bucket, or a file store. By default all chips share the parameters
# (config.mesh.fsdp=-1); --config.mesh.fsdp=8 --config.mesh.data=-1 makes replicas of 8 chips each.
# LIBTPU_INIT_ARGS of the environment are kept, and have precedence over those below.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
case "${1:-}" in -h | --help) show_help && exit ;; --dry-run) DRY_RUN=1 && shift ;; esac
[ $# -gt 0 ] || fail "no config: for instance configs/stage2.py:qwen1_5_7b (--help)"
config=$1
shift

libtpu_flags=(
    # The parameters of a layer are gathered over all chips before it: asynchronously, fused with the
    # matrix products that run meanwhile, and over several of them. Newer chips have it by default
    # ("auto" decides by the chip); given here so that it does not depend on the version of libtpu.
    --xla_enable_async_all_gather=true
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
    --xla_tpu_overlap_compute_collective_tc=true
)
if [ "${MEGASCALE_NUM_SLICES:-1}" -gt 1 ]; then
    libtpu_flags+=(
        # Between slices the gradients of replicas (config.mesh.data) are added over the data center's
        # network: behind computation, and across passes of the loop over layers.
        --xla_tpu_enable_data_parallel_all_reduce_opt=true
        --xla_tpu_data_parallel_opt_different_sized_ops=true
    )
fi
export LIBTPU_INIT_ARGS="${libtpu_flags[*]} ${LIBTPU_INIT_ARGS:-}"
[ ! -d .venv/bin ] || PATH="$PWD/.venv/bin:$PATH"
[ -z "${DRY_RUN:-}" ] || echo "export LIBTPU_INIT_ARGS=$(quote "$LIBTPU_INIT_ARGS")"
run exec python -m wings_jax.train --config="$config" --distributed "$@"
