"""Pretrains the tiny base model that ships with the package: tokenizer, LLM and vision tower.

    python tools/make_tiny OUT [--only llm|vision] [--llm-steps N] [--tower-steps N] [--seed N]

OUT/llm and OUT/vision are Hugging Face model directories (bf16 safetensors). To ship them, replace
wings_jax/assets/tiny by OUT. The same seed gives the same base, up to the rounding of the machine.
On one core the tower (with its teacher) takes about half an hour, the LLM about twenty minutes.
Both print their held-out accuracies as they train; OUT/*/training.json has the last ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import random
import tempfile
from typing import Any

import dialogues
import jax
import llm
import ml_dtypes
import saving
import tokenizer
import tower
import transformers

from wings_jax.model import presets

VOCABULARY = 576

TOWER = presets.VisionArch(
    hidden_size=96,
    num_layers=4,
    num_heads=6,
    ffn_size=256,
    image_size=64,
    patch_size=16,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    post_norm=True,
    patch_bias=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    feature_layer=-1,
)

DECODER = presets.DecoderArch(
    vocab_size=VOCABULARY,
    hidden_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=24,
    ffn_size=256,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=1024,
    qkv_bias=True,
    tie_embeddings=True,
)


def make_vision(out: pathlib.Path, run: tower.TowerRun) -> None:
    """Pretrains the tower and writes it to `out`."""
    params = _round_to_bfloat16(tower.pretrain(run))
    saving.save_vision(params["tower"], run.arch, out)
    accuracies = tower.score_heads(params, run.arch, "test")
    _write_record(out, run, {"held-out accuracy of linear probes": accuracies})


def make_llm(out: pathlib.Path, run: llm.LlmRun) -> None:
    """Trains the tokenizer, pretrains the LLM and writes both to `out`."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer_files = pathlib.Path(directory)
        trained = tokenizer.train_tokenizer(_tokenizer_texts(run.seed), VOCABULARY)
        tokenizer.save_tokenizer(trained, tokenizer_files)
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer_files)

        params = _round_to_bfloat16(llm.pretrain(run, loaded))
        saving.save_llm(params, run.arch, out, tokenizer_files)

    accuracies = llm.score_skills(params, run.arch, loaded, num_questions=500)
    _write_record(out, run, {"exact match on test questions": accuracies})


def _tokenizer_texts(seed: int) -> list[str]:
    """Returns the texts on which the tokenizer is trained."""
    rng = random.Random(f"tokenizer-{seed}")
    turns = [turn["value"] for _ in range(4000) for turn in dialogues.make_dialogue(rng)]
    return [*turns, *tokenizer.frequent_texts()]


def _round_to_bfloat16(params: Any) -> Any:
    """Returns the parameters with the values that bf16 files store, as float32."""
    return jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype("float32"), params)


def _write_record(out: pathlib.Path, run: Any, results: dict[str, Any]) -> None:
    """Writes training.json: the settings of the run and its accuracies."""
    record = {"made by": "tools/make_tiny", "run": dataclasses.asdict(run), **results}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(out, json.dumps(results), flush=True)


def main() -> None:
    """Pretrains what the command line selects."""
    parser = argparse.ArgumentParser(
        prog="python tools/make_tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="directory to write to")
    parser.add_argument("--only", choices=("llm", "vision"), help="only one of the two models")
    parser.add_argument("--llm-steps", type=int, default=llm.LlmRun.steps, help="%(default)s")
    parser.add_argument("--tower-steps", type=int, default=tower.TowerRun.steps, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    flags = parser.parse_args()

    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.only != "llm":
        run = tower.TowerRun(TOWER, steps=flags.tower_steps, seed=flags.seed)
        make_vision(flags.out / "vision", run)
    if flags.only != "vision":
        make_llm(flags.out / "llm", llm.LlmRun(DECODER, steps=flags.llm_steps, seed=flags.seed))


if __name__ == "__main__":
    main()
