#!/usr/bin/env bash
# Trains a stage as a JobSet on Google Kubernetes Engine, through xpk (pip install xpk; docker builds
# the image from BASE_IMAGE, default python:3.12, and this directory):
#
#   ./launch/gke_xpk.sh [--dry-run] FLAGS OF xpk workload create -- CONFIG [flags of wings train]
#   ./launch/gke_xpk.sh --cluster=C --workload=stage2-a --tpu-type=v6e-16 -- configs/stage2.py:qwen1_5_7b \
#       --data llava=gs://BUCKET/prepared --workdir=gs://BUCKET/runs/stage2
#   ./launch/gke_xpk.sh --cluster=C --workload=stage2-b --device-type=h100-80gb-8 --num-nodes=2 -- CONFIG ...
#
# Also --project, --zone, --num-slices=N, --storage=NAME (a bucket or file store, for the data),
# --priority. MAX_RESTARTS is 100. A workload that has ended goes on under another --workload.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
case "${1:-}" in -h | --help) show_help && exit ;; --dry-run) DRY_RUN=1 && shift ;; esac

xpk_flags=() extra=tpu script=./launch/tpu_host.sh
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    # GPUs: the driver's libraries, which the node mounts into the container, must be found.
    case "$1" in --device-type*) extra=cuda13 script=./launch/gpu.sh && xpk_flags+=(--env=LD_LIBRARY_PATH=/usr/local/nvidia/lib64) ;; esac
    xpk_flags+=("$1")
    shift
done
[ $# -gt 1 ] || fail "no config: flags of xpk, then --, then for instance configs/stage2.py:qwen1_5_7b (--help)"
shift
for flag in --cluster --workload; do
    [[ " ${xpk_flags[*]}" == *" $flag"* ]] || fail "$flag is missing (--help)"
done
# xpk puts the command into YAML as it is.
for argument in "$@"; do
    [[ "$argument" != *[\'\"\\]* ]] || fail "xpk cannot pass quotes and backslashes: $argument"
done

# exec: xpk sends SIGTERM to the shell that runs the command; with exec that is the training itself.
# --max-restarts: after an eviction all pods start again, and the command resumes; xpk restarts after
#   exit status 42 and 127 to 255, thus 143 (saved after SIGTERM) and 134 (no heartbeat of a host).
# --restart-on-exit-codes=75: a host that ended because another one did.
# --termination-grace-period-seconds: for the step and the save; 30 s is too short for a 7B.
run xpk workload create "${xpk_flags[@]}" \
    --base-docker-image="${BASE_IMAGE:-python:3.12}" --script-dir=. \
    --max-restarts="${MAX_RESTARTS:-100}" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=600 \
    --command="pip install --quiet '.[$extra,gcs]' && exec $script $(quote "$@")"
