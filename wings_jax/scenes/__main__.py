"""Writes the embedded data set "scenes".

python -m wings_jax.scenes data/scenes --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses

from wings_jax import cli
from wings_jax.scenes import dataset

FLAG_HELP = {
    "pictures": "number of training images",
    "turns": "most questions of a training conversation",
    "replay": "number of text-only training conversations",
    "test_each": "number of test records of each kind",
    "seed": "seed of the random choices",
}


def main() -> None:
    """Writes the data set from the command line."""
    parser = argparse.ArgumentParser(
        prog=cli.program_name("wings_jax.scenes.__main__"),
        description='Writes the embedded data set "scenes".',
    )
    parser.add_argument("directory", help="directory to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    for field in dataclasses.fields(dataset.SceneSettings):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=field.default, help=FLAG_HELP[field.name])

    # What remains are the settings, by field.
    settings = vars(parser.parse_args())
    settings.pop("debug")

    print(dataset.write_scenes(settings.pop("directory"), dataset.SceneSettings(**settings)))


if __name__ == "__main__":
    cli.run_main("python -m wings_jax.scenes", main)
