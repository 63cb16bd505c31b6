"""What describes prepared data: its card (JSON and README) and tensorflow-datasets' metadata."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.data import samples, shards

CARD = "card.json"
INFO = "dataset_info.json"  # without it the directory cannot be read
_DESCRIPTION = "Conversations about images, which are encoded files."


def make_card(
    name: str,
    split: str,
    finished: Sequence[shards.FinishedShard],
    settings: Mapping[str, Any],
    tally: samples.Tally,
) -> dict[str, Any]:
    """Returns counts, hashes, source and settings in a form that JSON can hold.

    `sha256` is that of the shards' hashes, one per line. There is no date: the same data have the
    same card.
    """
    listed = []
    for shard in finished:
        fields = dataclasses.asdict(shard)
        fields.pop("bad")
        listed.append(fields)

    hashes = "".join(shard.sha256 + "\n" for shard in finished)
    return {
        "name": name,
        "split": split,
        "source": dict(settings),
        "samples": sum(shard.samples for shard in finished),
        "text_only": sum(shard.text_only for shard in finished),
        "images": sum(shard.images for shard in finished),
        "bytes": sum(shard.bytes for shard in finished),
        "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "left_out": tally.as_dict(),
        "shards": listed,
    }


def as_markdown(card: Mapping[str, Any]) -> str:
    """Returns the card as a page for readers of the directory."""
    rows = [
        ("samples", f"{card['samples']:,}"),
        ("of them text only", f"{card['text_only']:,}"),
        ("images", f"{card['images']:,}"),
        ("size", f"{card['bytes'] / 1e9:.2f} GB in {len(card['shards'])} shards"),
        ("split", card["split"]),
        ("source", f"`{card['source']['file']}`"),
        ("bad samples left out", f"{card['left_out']['bad']:,} of {card['left_out']['seen']:,}"),
        ("sha256 of the shards' hashes", f"`{card['sha256']}`"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""# {card["name"]}

{_DESCRIPTION}
Written by `wings prepare`; `wings prepare --verify DIR` compares every shard with `{CARD}`.

| | |
|---|---|
{table}

```bash
wings train --config=configs/stage2.py --data {card["name"]}=DIR
```

`tensorflow_datasets.builder_from_directory(DIR)` reads it too.
"""


def write_metadata(
    directory: pathlib.Path, job: shards.ShardJob, finished: Sequence[shards.FinishedShard]
) -> list[pathlib.Path]:
    """Writes tensorflow-datasets' files to an empty local directory; returns them, `INFO` last."""
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    # It takes name, split and number of the shards from the names of files.
    for shard in finished:
        (directory / shard.file).touch()

    split = tfds.core.SplitInfo(
        name=job.split,
        shard_lengths=[shard.samples for shard in finished],
        num_bytes=sum(shard.bytes for shard in finished),
    )
    with contextlib.redirect_stdout(None):
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=shards.features(),
            split_infos=[split],
            version="1.0.0",
            check_data=False,
            description=_DESCRIPTION,
            disable_shuffling=True,
        )

    written = sorted(directory.glob("*.json"), key=lambda path: path.name == INFO)
    return list(written)
