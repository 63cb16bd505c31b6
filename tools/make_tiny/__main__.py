"""Makes the tiny base that ships with the package: tokenizer, LLM and vision tower.

    python tools/make_tiny OUT [--only llm|vision] [--llm-steps N] [--tower-steps N] [--seed N]

OUT/llm and OUT/vision are directories as Hugging Face lays them out (bf16 safetensors). To ship
them: put them in place of wings_jax/assets/tiny. The same seed gives the same base, up to the
rounding of the machine. On one core the tower (and its teacher) take about half an hour, the LLM
about twenty minutes; both print their held-out accuracy as they go, and OUT/*/training.json keeps
the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import random
from typing import Any

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
    params = tower.train(run)
    rounded = _round(params)
    saving.save_vision(rounded["tower"], run.arch, out)
    held_out = tower.score(rounded, run.arch, "test")
    _note(out, run, {"held-out accuracy of linear probes": held_out})


def make_llm(out: pathlib.Path, run: llm.LlmRun) -> None:
    """Trains the tokenizer, pretrains the LLM and writes both to `out`."""
    words = out.with_name(f"{out.name}-tokenizer")
    tokenizer.save(tokenizer.train(_texts(run.seed), VOCABULARY), words)
    read = transformers.AutoTokenizer.from_pretrained(words)
    params = _round(llm.train(run, read))
    saving.save_llm(params, run.arch, out, words)
    held_out = llm.score(params, run.arch, read, each=500)
    _note(out, run, {"exact match on test questions": held_out})
    for file in words.iterdir():
        file.unlink()
    words.rmdir()


def _texts(seed: int) -> list[str]:
    """Returns what the tokenizer is trained on."""
    rng = random.Random(f"tokenizer-{seed}")
    turns = [turn["value"] for _ in range(4000) for turn in llm.dialogue(rng)]
    return [*turns, *tokenizer.frequent()]


def _round(params: Any) -> Any:
    """Returns the parameters as they will be stored, in bf16, but in f32."""
    return jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype("float32"), params)


def _note(out: pathlib.Path, run: Any, results: dict[str, Any]) -> None:
    """Writes how the model was made and what it scored."""
    note = {"made by": "tools/make_tiny", "run": dataclasses.asdict(run), **results}
    (out / "training.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    print(out, json.dumps(results), flush=True)


def main() -> None:
    """Makes what the command line asks for."""
    parser = argparse.ArgumentParser(prog="tools/make_tiny", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", choices=("llm", "vision"))
    parser.add_argument("--llm-steps", type=int, default=llm.LlmRun.steps)
    parser.add_argument("--tower-steps", type=int, default=tower.TowerRun.steps)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.only != "llm":
        run = tower.TowerRun(TOWER, steps=chosen.tower_steps, seed=chosen.seed)
        make_vision(chosen.out / "vision", run)
    if chosen.only != "vision":
        make_llm(chosen.out / "llm", llm.LlmRun(DECODER, steps=chosen.llm_steps, seed=chosen.seed))


if __name__ == "__main__":
    main()
