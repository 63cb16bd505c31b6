"""Decoding with the exported torch code beside a plain Qwen2 of the same size, on the CPU.

    python benchmarks/transformers_decode.py [--size small] [--prompt 512] [--tokens 64]

Both models have random weights; Wings has both learners and the router. Runs alternate on one
thread, after one that does not count. The table has medians, of seconds on the clock and of CPU
seconds, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a clone
sys.path.insert(0, str(ROOT / "wings_jax" / "weights"))

from transformers_code import configuration_wings, modeling_wings  # noqa: E402

COMMON = {
    "model_type": "qwen2",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SIZES = {
    "small": {  # 10 M parameters
        **COMMON,
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 688,
    },
    "0.5b": {  # Qwen2.5-0.5B, with a smaller vocabulary: 0.37 B parameters
        **COMMON,
        "vocab_size": 8192,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 8,
}
IMAGE_TOKEN = 8191


def make_models(text: dict) -> dict[str, torch.nn.Module]:
    """Returns the two models with random weights."""
    torch.manual_seed(0)
    entries = {key: value for key, value in text.items() if key != "model_type"}
    qwen2 = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**entries))
    config = configuration_wings.WingsConfig(
        text_config=text,
        vision_config=VISION,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=64,
        learners=("visual", "textual"),
        router=True,
    )
    wings = modeling_wings.WingsForConditionalGeneration(config)
    for parameter in wings.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return {"Qwen2": qwen2.eval(), "Wings": wings.eval()}


def make_inputs(length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Returns a prompt of this many slots for each model; that of Wings has an image in it."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, IMAGE_TOKEN, (1, length)))
    with_image = ids.clone()
    with_image[0, 16:80] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, VISION["image_size"], VISION["image_size"])
    return {
        "Qwen2": {"input_ids": ids},
        "Wings": {"input_ids": with_image, "pixel_values": pixels},
    }


@torch.no_grad()
def measure(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> list[float]:
    """Returns seconds of the prefill, seconds per token after it, and CPU seconds per token."""
    seconds, cpu_seconds = [], []
    for count in (1, 1 + tokens):
        started, cpu_started = time.perf_counter(), time.process_time()
        model.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones_like(inputs["input_ids"]),
        )
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    per_token = [(whole - prefill) / tokens for prefill, whole in (seconds, cpu_seconds)]
    return [seconds[0], *per_token]


def main() -> None:
    """Prints a table with both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="default %(default)s")
    parser.add_argument("--prompt", type=int, default=512, help="slots; default %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    flags = parser.parse_args()

    torch.set_num_threads(1)
    models, inputs = make_models(SIZES[flags.size]), make_inputs(flags.prompt)
    results: dict[str, list[list[float]]] = {name: [] for name in models}
    for _ in range(flags.repeats + 1):
        for name, model in models.items():
            results[name].append(measure(model, inputs[name], flags.tokens))

    print(f"{flags.size}, prompt {flags.prompt}, {flags.tokens} tokens, {flags.repeats} runs each")
    print("| model | prefill, ms | per token, ms | CPU per token, ms |")
    print("|---|---|---|---|")
    medians = {}
    for name, runs in results.items():
        medians[name] = [statistics.median(column) for column in zip(*runs[1:], strict=True)]
        print(f"| {name} | " + " | ".join(f"{1e3 * x:.2f}" for x in medians[name]) + " |")
    ratios = [
        wings / qwen2 for wings, qwen2 in zip(medians["Wings"], medians["Qwen2"], strict=True)
    ]
    print("| Wings / Qwen2 | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
