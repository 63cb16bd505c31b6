#!/usr/bin/env bash
# Runs the benchmarks that suit this machine and writes one page:
#
#   ./benchmarks/all.sh [PAGE]           default: benchmarks.md
#   MINUTES=10 ./benchmarks/all.sh       less time in all (default 25)
#   PRESET=qwen1_5_7b ./benchmarks/all.sh    another size of the training step (default 1.8B; CPU: tiny)
#
# A GPU or TPU gets the training step of PRESET beside LLaVA's, decoding, the attention kernels and
# what the device reaches at most; a CPU gets small sizes. A benchmark that fails or is out of time
# is a row of the page and does not end the others; time that one leaves is for those after it.
set -uo pipefail
cd "$(dirname "$0")/.."
page=${1:-benchmarks.md}
seconds=$((${MINUTES:-25} * 60))
python=${PYTHON:-python}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}"
platform=$($python -c 'import jax; print(jax.devices()[0].platform)' | tail -1) || exit 2

# name | share of the time in percent | command
if [ "$platform" = cpu ]; then
    preset=${PRESET:-tiny}
    list="device|5|benchmarks/ceilings.py --size=1024 --gib=0.25
attention|10|benchmarks/attention.py --slots=512,1024,2048
training step|20|benchmarks/train.py --preset=$preset --batch=4 --steps=3 --compare=llava
training step on one thread|25|benchmarks/train_cpu.py --slots=512,1024 --repeat=3
decoding|20|benchmarks/decode.py --prompts=512 --batches=1,4 --repeat=2
prefill and decoding on one thread|20|benchmarks/prefill.py --prompts=512,1024 --repeat=3"
else
    preset=${PRESET:-qwen1_5_1_8b}
    variants=${VARIANTS:-save_dots:8:auto:unrolled,save_dots:8,save_attn:8,full:16}
    list="device|4|benchmarks/ceilings.py
training step, stage 2|36|benchmarks/train.py --preset=$preset --seq=2048 --variants=$variants --compare=llava --minutes=@MINUTES
training step, stage 1|16|benchmarks/train.py --preset=$preset --stage=stage1 --seq=2048 --variants=full:16 --minutes=@MINUTES
attention kernels|20|benchmarks/kernels.py
decoding|20|benchmarks/decode.py --size=1.8b --dtype=bfloat16 --prompts= --batches=1,8,32"
fi

log=$(mktemp)
{
    echo "# Benchmarks"
    echo
    $python -c 'import jax, os; d = jax.devices(); print(f"{len(d)} x {d[0].device_kind}, jax {jax.__version__}, {os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f} before")' | tail -1
    echo
    echo "$(git rev-parse --short HEAD 2>/dev/null || echo 'no git'), $(date -u +%Y-%m-%d)"
} >"$page"

failed=0 left=100 # percent of the time that the benchmarks from here on have
deadline=$((SECONDS + seconds))
while IFS='|' read -r name share command; do
    limit=$(((deadline - SECONDS) * share / left))
    limit=$((limit > 1 ? limit : 1)) # 0 is without a limit for `timeout`
    left=$((left - share))
    command=${command//@MINUTES/$((limit / 120 + 1))} # no variant starts after half of its time
    echo "$name: $command (at most $limit s)"
    start=$SECONDS
    # shellcheck disable=SC2086 # the command is words
    timeout -k 30 "$limit" $python $command >"$log" 2>"$log.err" </dev/null
    status=$? took=$((SECONDS - start))
    {
        printf '\n## %s\n\n`python %s`, %s s\n\n' "$name" "$command" $took
        grep -v '^\[ *[0-9.]* s\]' "$log" # without lines of progress
        # `timeout` ended it, or killed it while it compiled.
        if [ $status = 124 ] || { [ $status = 137 ] && [ $took -ge $limit ]; }; then
            printf '\n**Not finished in %s s.**\n' "$limit"
        elif [ $status != 0 ]; then
            printf '\n**Failed with status %s:** %s\n' $status "$(tail -1 "$log.err" | cut -c1-300)"
        fi
    } >>"$page"
    if [ $status != 0 ]; then
        failed=$((failed + 1))
        tail -3 "$log.err"
    fi
done <<<"$list"
rm -f "$log" "$log.err"
echo "$page ($failed failed)"
