#!/usr/bin/env bash
# From a clone to a model that answers about images: environment, both stages on the embedded data,
# evaluation before and after, an image with answers. About 8 minutes on 2 cores; writes to runs/.
#
#   ./launch/quickstart.sh [config flags for both stages, for instance --config.seed=1]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment requirements.txt
export TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 # torch is not needed
use_all_cores

started=$SECONDS
echo "== stage 1: projector and visual learners =="
python -m wings_jax.train --config=configs/stage1.py "$@"
echo "== stage 2: LLM, projector, both learners, router =="
python -m wings_jax.train --config=configs/stage2.py "$@"
echo "== evaluation on held-out digits, drawings and text questions =="
python -m wings_jax.evaluate --base --checkpoint stage1=runs/stage1 stage2=runs/stage2 \
    --out runs/evaluation --figure runs/answers.png
echo
echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "  checkpoints         runs/stage1, runs/stage2"
echo "  table before/after  runs/evaluation"
echo "  scenes and answers  runs/answers.png"
echo "  data set            runs/scenes"
echo "  curves              runs/*/metrics.jsonl, or tensorboard --logdir runs"
echo "ask on:  . ${VENV:-.venv}/bin/activate && wings chat --checkpoint runs/stage2"
