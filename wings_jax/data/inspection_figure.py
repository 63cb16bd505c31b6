"""Histograms of a data file: slots per sample, and images per sample."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax import files
from wings_jax.data.inspection import Finding


def write_figure(
    path: str | os.PathLike, findings: Sequence[Finding], report: Mapping[str, Any]
) -> None:
    """Writes a PNG with the histograms; slots are there where the report has them."""
    from matplotlib import figure  # takes seconds to import

    slots = [finding.slots for finding in findings if finding.slots is not None]
    counts = np.bincount([finding.images for finding in findings if finding.reason is None])

    # A second panel only where slots were counted.
    drawing = figure.Figure(figsize=(9, 3.6), layout="constrained")
    panels = drawing.subplots(1, 2 if slots else 1, squeeze=False)[0]
    drawing.suptitle(f"{report['file']}: {report['samples']:,} samples, {report['bad']:,} bad")

    images = panels[-1]
    images.bar(np.arange(len(counts)), counts, color="tab:blue")
    images.set(xlabel="images per sample", ylabel="samples")
    images.xaxis.get_major_locator().set_params(integer=True)

    if slots:
        limit = report["slots"]["sequence_length"]
        lengths = panels[0]
        lengths.hist(slots, bins=60, color="tab:blue")
        lengths.axvline(limit, color="tab:red", linewidth=1)
        lengths.set(xlabel="slots per sample", ylabel="samples")
        cut = report["slots"]["cut"]
        lengths.set_title(f"{cut:,} longer than {limit:,} (red), truncated", fontsize=9)

    with files.replacing(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=120)
