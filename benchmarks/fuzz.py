"""Tries many damaged inputs on every reader, and prints a table of inputs and faults.

    python benchmarks/fuzz.py [--scale 10] [pytest arguments]

Runs the tests that are marked `fuzz` with `--scale` times their usual number of inputs. A fault
is an input that a reader answers with anything but a result or one line.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a clone
# What hypothesis' statistics print for each test; invalid ones were not tried.
TRIED = re.compile(r"- (\d+) passing\b.*?(\d+) failing\b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=10, help="times the usual number of inputs")
    arguments, rest = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.xml"
        environment = os.environ | {
            "WINGS_FUZZ_SCALE": str(arguments.scale),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "fuzz",
            "-q",
            "--hypothesis-show-statistics",
        ]
        result = subprocess.run(
            [*command, f"--junitxml={report}", *rest],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise SystemExit(result.stdout + result.stderr)
        rows = read_rows(report, result.stdout)

    print("| test | inputs | faults | seconds |")
    print("|---|---:|---:|---:|")
    for name, inputs, faults, seconds in rows:
        print(f"| {name} | {inputs:,} | {faults} | {seconds:.0f} |")
    total = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    print(f"| **all** | {total[0]:,} | {total[1]} | {total[2]:.0f} |")
    sys.exit(result.returncode)


def read_rows(report: pathlib.Path, output: str) -> list[tuple[str, int, int, float]]:
    """Returns name, inputs, faults and seconds of each test."""
    inputs = count_inputs(output)
    rows = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        is_fault = case.find("failure") is not None or case.find("error") is not None
        rows.append((name, inputs.get(name, 0), int(is_fault), float(case.get("time", 0))))
    return rows


def count_inputs(output: str) -> dict[str, int]:
    """Returns test -> number of inputs, from hypothesis' statistics."""
    counts: dict[str, int] = {}
    name = ""
    for line in output.splitlines():
        if re.fullmatch(r"tests/\w+\.py::\w+(\[.*\])?:", line):
            name = pathlib.PurePath(line.split("::")[0]).stem + "::" + line.split("::")[1][:-1]
        match = TRIED.search(line)
        if match and name:
            counts[name] = counts.get(name, 0) + sum(map(int, match.groups()))
    return counts


if __name__ == "__main__":
    main()
