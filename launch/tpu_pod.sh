#!/usr/bin/env bash
# A TPU slice from your machine, with gcloud: TPU_NAME=wings TPU_ZONE=us-east5-a TPU_TYPE=v5p-16
#
#   ./launch/tpu_pod.sh [--dry-run] create          CREATE_FLAGS="--spot --network=N": of queued-resources create
#   ./launch/tpu_pod.sh setup                       copies this commit to all hosts and installs it
#   ./launch/tpu_pod.sh train CONFIG [flags of wings train, with --workdir=gs://BUCKET/runs/stage2]
#   ./launch/tpu_pod.sh logs | stop | delete        log of host 0; SIGTERM (saves); gives the slice back
#   ./launch/tpu_pod.sh resume CONFIG [same flags]  after maintenance or preemption: a slice that is gone
#                                                   is created again, then setup and train
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
case "${1:---help}" in -h | --help) show_help && exit ;; --dry-run) DRY_RUN=1 && shift ;; esac
for name in TPU_NAME TPU_ZONE TPU_TYPE; do
    [ -n "${!name:-}" ] || fail "$name is not set (--help)"
done
case "$TPU_TYPE" in # images of the TPU generations
    v6e-*) image=v2-alpha-tpuv6e ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v4-*) image=tpu-ubuntu2204-base ;;
    *) fail "TPU_TYPE=$TPU_TYPE is not v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac
queued() { run gcloud compute tpus queued-resources "$1" "$TPU_NAME" --zone="$TPU_ZONE" "${@:2}"; }
on_hosts() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$TPU_ZONE" --worker="$1" --command="$2"; }
create() {
    local flags=()
    read -ra flags <<<"${CREATE_FLAGS:-}"
    queued create --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$image" "${flags[@]}"
}
wait_until_active() {
    local state
    while state=$(queued describe --format='value(state.state)') && [ "$state" != ACTIVE ]; do
        [ -z "${DRY_RUN:-}" ] || { echo "$state" && return; }
        [[ "$state" != FAILED && "$state" != SUSPENDED ]] || fail "$TPU_NAME is $state: use resume, or delete it"
        echo "$TPU_NAME is $state" && sleep 30
    done
}
setup() { # Python of the images is older than 3.11: uv installs another one
    wait_until_active
    local archive="${TMPDIR:-/tmp}/wings_jax.tar.gz"
    run git archive --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME": --zone="$TPU_ZONE" --worker=all
    on_hosts all "mkdir -p wings_jax && tar -xzf wings_jax.tar.gz -C wings_jax && cd wings_jax && \
pip install --quiet --user uv && python3 -m uv venv --allow-existing --python 3.12 .venv && \
python3 -m uv pip install --python .venv/bin/python -e '.[tpu,gcs]'"
}
train() { # detached, so that it outlives the connection
    [ $# -gt 0 ] || fail "train: no config: for instance configs/stage2.py:qwen1_5_7b"
    on_hosts all "cd wings_jax && if kill -0 \$(cat train.pid 2>&1) 2>/dev/null; then echo it runs already; exit 1; fi; \
nohup setsid ./launch/tpu_host.sh $(quote "$@") >>train.log 2>&1 </dev/null & echo \$! >train.pid"
}
case "$1" in
    create) create ;;
    setup) setup ;;
    train) train "${@:2}" ;;
    logs) on_hosts 0 "tail -n 100 -F wings_jax/train.log" ;;
    stop) on_hosts all "kill -TERM \$(cat wings_jax/train.pid)" ;;
    delete) queued delete --force --quiet ;;
    resume)
        state=SUSPENDED # what --dry-run shows
        [ -n "${DRY_RUN:-}" ] || state=$(queued describe --format='value(state.state)' 2>/dev/null || true)
        [[ "$state" != FAILED && "$state" != SUSPENDED ]] || queued delete --force --quiet
        [[ -n "$state" && "$state" != FAILED && "$state" != SUSPENDED ]] || create
        setup && train "${@:2}"
        ;;
    *) fail "$1 is not create, setup, train, logs, stop, resume or delete" ;;
esac
