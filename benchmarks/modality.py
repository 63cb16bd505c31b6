"""What a text-only row costs in a batch with images, and in a batch of its own.

    python benchmarks/modality.py [--stage=stage2] [--slots=2048,512] [PRESET ...]

Operations of a training step per row (10^12, forward and backward), with every pair of slots
computed. In a batch with images the tower also runs for a row without one, on a blank image, and
the visual learner has keys for it (`config.data.batch_by_modality` is what avoids that).
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax import config as config_lib
from wings_jax.model import flops, parameters
from wings_jax.training import optim
from wings_jax.weights import starting

PRESETS = ("qwen1_5_0_5b", "qwen1_5_1_8b", "qwen1_5_7b")


def main() -> None:
    """Prints a line for each preset and number of slots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--stage", default="stage2", choices=["stage1", "stage2"])
    parser.add_argument("--slots", default="2048,512")
    arguments = parser.parse_args()

    stage = importlib.import_module(f"configs.{arguments.stage}")
    print(f"{'preset':<18}{'slots':>6}{'with images':>14}{'text only':>12}{'saved':>9}")
    for preset in arguments.presets:
        config = config_lib.from_config_dict(stage.get_config(preset))
        arch = starting.resolve_arch(config.model)
        abstract = parameters.abstract_params(arch)
        labels = optim.label_groups(abstract, config.optimizer)
        trained = [p for p in abstract if optim.is_trained(labels, config.optimizer, p)]

        for slots in map(int, arguments.slots.split(",")):
            mixed, text = (
                flops.model_flops(arch, flops.padded_workload(arch, 1, slots, images), trained)
                for images in (1, 0)
            )
            print(
                f"{preset:<18}{slots:>6}{mixed / 1e12:>14.1f}{text / 1e12:>12.1f}"
                f"{1 - text / mixed:>9.1%}"
            )


if __name__ == "__main__":
    main()
