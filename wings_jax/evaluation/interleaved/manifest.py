"""The manifest of an IIT data set: which questions, in which order and wording, by hash.

It holds no text and no image of a data set, so that it may be published; whoever has the same data
sets gets the same conversations, in whichever form their files are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import files
from wings_jax.errors import UserError
from wings_jax.evaluation.interleaved.pool import IMAGE, PoolItem, find_by_uid
from wings_jax.evaluation.interleaved.selection import COMPANIONS, Selection
from wings_jax.weights import text_files

FORMAT = "iit-v1"
CONNECTIVES = 10  # wordings of each kind in a language (`conversation`)


@dataclasses.dataclass(frozen=True)
class ManifestItem:
    """A question of a manifest."""

    # Its uid when the manifest was built, for messages; files of another form may have others.
    uid: str
    # `PoolItem.sha256`.
    sha256: str
    # `PoolItem.image_sha256`, "" for a text question.
    image_sha256: str
    # By how many places the options are rotated.
    rotation: int
    # Which wording connects it with the turn before.
    template: int


@dataclasses.dataclass(frozen=True)
class ManifestEntry:
    """An anchor with the questions before it."""

    # The scored question.
    anchor: ManifestItem
    # Its modality: "T" or "V".
    modality: str
    # Its language: "en" or "zh".
    language: str
    # Text questions before it, the closest one last.
    companions: tuple[ManifestItem, ...]
    # Their cosines with the anchor.
    cosines: tuple[float, ...]
    # Random text questions in their place, for the control.
    shuffled: tuple[ManifestItem, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An IIT data set."""

    # Seed of every choice.
    seed: int
    # "wordllama" or "tfidf", and the version of its library.
    embedder: str
    # Version of the embedder's library.
    embedder_version: str
    # Benchmarks that the questions come from.
    sources: tuple[str, ...]
    # Anchors, text questions first.
    entries: tuple[ManifestEntry, ...]


def make_manifest(
    selections: Sequence[Selection],
    *,
    seed: int,
    embedder: str,
    version: str,
    sources: Sequence[str],
) -> Manifest:
    """Returns the manifest of selections. Raises UserError if an image cannot be read."""

    def describe(item: PoolItem) -> ManifestItem:
        # Rotation and wording depend on seed and uid alone, not on the other questions.
        return ManifestItem(
            item.uid,
            item.sha256,
            item.image_sha256(),
            seeded_number(seed, item.uid, "rotation") % len(item.options),
            seeded_number(seed, item.uid, "template") % CONNECTIVES,
        )

    entries = tuple(
        ManifestEntry(
            describe(selection.anchor),
            selection.anchor.modality,
            selection.anchor.language,
            tuple(map(describe, selection.companions)),
            selection.cosines,
            tuple(map(describe, selection.shuffled)),
        )
        for selection in selections
    )

    return Manifest(seed, embedder, version, tuple(sources), entries)


def seeded_number(seed: int, uid: str, purpose: str) -> int:
    """Returns a number that depends on nothing else, the same in every process.

    >>> seeded_number(0, "piqa:val:1", "rotation") % 2
    0
    """
    digest = hashlib.sha256(f"{seed} {purpose} {uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def write_manifest(path: pathlib.Path, manifest: Manifest) -> None:
    """Writes JSON lines: a head, then an entry per line. Raises UserError if it cannot be."""
    # The number of anchors shows whether a file was cut off.
    head = {
        "format": FORMAT,
        "seed": manifest.seed,
        "embedder": manifest.embedder,
        "embedder_version": manifest.embedder_version,
        "sources": list(manifest.sources),
        "anchors": len(manifest.entries),
    }

    lines = [json.dumps(head)]
    lines += [json.dumps(dataclasses.asdict(entry)) for entry in manifest.entries]
    files.write_text(path, "\n".join(lines) + "\n")


def read_manifest(path: pathlib.Path) -> Manifest:
    """Returns the manifest of a file. Raises UserError naming the file and line."""
    lines = [line for line in text_files.read_text(path).splitlines() if line.strip()]

    # Number of the line that is read, without empty lines, for messages.
    place = 1
    try:
        head = json.loads(lines[0])
        if head["format"] != FORMAT:
            raise UserError(f"--manifest: {path} has format {head['format']!r}, not {FORMAT}")

        entries = []
        for line in lines[1:]:
            place += 1
            entries.append(_parse_entry(json.loads(line)))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--manifest: {path} line {place} is not of an IIT manifest: "
            f"{type(error).__name__} {error}"
        ) from error

    if len(entries) != head.get("anchors"):
        raise UserError(
            f"--manifest: {path} has {len(entries)} of its {head.get('anchors')} anchors: it was "
            "cut off"
        )

    return Manifest(
        head["seed"],
        head["embedder"],
        head["embedder_version"],
        tuple(head["sources"]),
        tuple(entries),
    )


def _parse_entry(values: Mapping[str, Any]) -> ManifestEntry:
    # No setting has more turns before the anchor.
    companions, shuffled = (
        tuple(ManifestItem(**item) for item in values[name])[:COMPANIONS]
        for name in ("companions", "shuffled")
    )

    return ManifestEntry(
        ManifestItem(**values["anchor"]),
        values["modality"],
        values["language"],
        companions,
        tuple(values["cosines"]),
        shuffled,
    )


class ItemFinder:
    """Finds the questions of a manifest in a pool, by hash."""

    def __init__(self, pool: Sequence[PoolItem]):
        self._by_uid = find_by_uid(pool)
        # Questions about different images may have the same text, and thus the same hash.
        self._by_hash: dict[str, list[PoolItem]] = {}
        for item in pool:
            self._by_hash.setdefault(item.sha256, []).append(item)

    def find(self, wanted: ManifestItem) -> PoolItem:
        """Returns the question that has the manifest's hashes, whatever its uid is.

        Raises:
          UserError: there is none; the message names the question and what differs.
        """
        same_uid = self._by_uid.get(wanted.uid)
        candidates = self._by_hash.get(wanted.sha256, [])
        if same_uid in candidates:  # first, as other images may have the same question
            candidates = [same_uid, *(item for item in candidates if item is not same_uid)]

        # The hash of the text does not include the image, which has its own.
        for item in candidates:
            if not wanted.image_sha256 or item.image_sha256() == wanted.image_sha256:
                return item

        # Nothing fits: the message names what differs, the text or the image.
        if same_uid is None:
            raise UserError(
                f"--manifest: {wanted.uid} is not in the files below --data-root: the manifest was "
                "built from others"
            )

        is_image = same_uid in candidates and same_uid.modality == IMAGE
        found = same_uid.image_sha256() if is_image else same_uid.sha256
        expected = wanted.image_sha256 if is_image else wanted.sha256
        raise UserError(
            f"--manifest: {wanted.uid}: the {'image' if is_image else 'text'} is not the one that "
            f"the manifest was built from (sha256 {found[:12]}, expected {expected[:12]})"
        )
