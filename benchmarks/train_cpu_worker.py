"""One model's training steps, one per line of standard input; `train_cpu.py` runs it.

    python benchmarks/train_cpu_worker.py wings --slots=512 --stage=2 --remat=none

Each answer is a line of JSON: CPU-seconds, loss and peak memory in MiB. Which wings_jax is measured
is set by PYTHONPATH, so that two commits can take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone, after PYTHONPATH
sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import one_core
import small_model

if TYPE_CHECKING:  # the process that runs torch does not import jax
    from wings_jax.model import layout, presets


def wings_step(slots: int, stage: int, remat: str) -> Callable[[], float]:
    """Returns a function that runs one training step of Wings and returns the loss."""
    import jax

    from configs import stage1, stage2
    from wings_jax import config as config_lib
    from wings_jax import tree
    from wings_jax.model import parameters, presets
    from wings_jax.model.wings import Wings
    from wings_jax.training import optim, step

    # As `train` does; earlier commits do not have this module.
    if importlib.util.find_spec("wings_jax.process"):
        from wings_jax import process

        process.run_in_caller_thread()
        process.keep_freed_memory()

    # The stage's learners and groups, with AdamW.
    config = (stage1 if stage == 1 else stage2).get_config("tiny")
    config.optimizer.name = "adamw"
    config = config_lib.from_config_dict(config)
    learners, router = config.model.learners, config.model.router
    arch = presets.WingsArch(
        small_model.DECODER, small_model.TOWER, learners=learners, router=router
    )
    abstract = parameters.abstract_params(arch)
    labels = optim.label_groups(abstract, config.optimizer)
    params = parameters.initialize_params(arch, list(abstract), abstract, 0)
    trained, frozen = tree.split(
        params, lambda path: optim.is_trained(labels, config.optimizer, path)
    )
    optimizer = optim.make_optimizer(trained, labels, config.optimizer, 1000)

    model = Wings(arch, remat=remat)
    update = step.make_train_step(
        model, optimizer, loss_chunk=config_lib.Config().loss_chunk, accumulation=1
    )
    done, skipped = (jax.device_put(np.zeros((), np.int32)) for _ in range(2))
    state = step.TrainState(done, skipped, trained, frozen, jax.jit(optimizer.init)(trained))
    batch = random_batch(arch, slots)
    compiled = jax.jit(update, donate_argnums=0).lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return run


def random_batch(arch: presets.WingsArch, slots: int) -> layout.Batch:
    """Returns one row: text, an image, text, all of which is target."""
    from wings_jax.model import layout

    rng = np.random.default_rng(0)
    modality = np.full((1, slots), layout.TEXT)
    modality[:, 10 : 10 + arch.vision.num_patches] = layout.IMAGE
    tokens = rng.integers(0, arch.decoder.vocab_size, (1, slots))
    rows = layout.make_layout(tokens, modality)
    targets = np.where(modality == layout.TEXT, np.roll(rows.tokens, -1, axis=1), layout.IGNORE)
    size = arch.vision.image_size
    images = rng.integers(0, 256, (1, 1, size, size, 3), np.uint8)
    return layout.Batch(rows, targets.astype(np.int32), images)


def torch_step(slots: int, stage: int, remat: str) -> Callable[[], float]:
    """Returns the same for a Qwen2 of transformers in torch, without learners and images."""
    import torch
    import transformers

    torch.set_num_threads(1)
    config = small_model.qwen2_config(small_model.DECODER, use_cache=False)
    model = transformers.Qwen2ForCausalLM(config).train()
    if remat != "none":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, small_model.DECODER.vocab_size, (1, slots))

    def run() -> float:
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def main() -> None:
    """Answers each line of standard input with one step's figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=("wings", "torch"))
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--remat", default="none")
    flags = parser.parse_args()

    one_core.pin_process()
    make = {"wings": wings_step, "torch": torch_step}[flags.model]
    run = make(flags.slots, flags.stage, flags.remat)
    for _ in sys.stdin:
        start = time.process_time()
        loss = run()
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        answer = {"seconds": seconds, "loss": loss, "peak": peak}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
