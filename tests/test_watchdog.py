"""A run without progress is reported with the stacks of its threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

from wings_jax.training.watchdog import Watchdog

SCRIPT = """
import time
from wings_jax.training.watchdog import Watchdog

def read_a_file_that_hangs():
    time.sleep(0.7)

with Watchdog(0.3) as watchdog:
    watchdog.begin("step 6")
    watchdog.begin("the batch of step 7")
    read_a_file_that_hangs()
"""


def test_watchdog_prints_what_hangs_and_where():
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    first, *stacks = done.stderr.splitlines()
    assert first == (
        "no progress for 0:00: the batch of step 7 has not ended (config.watchdog_minutes). "
        "The stacks of all threads:"
    )
    assert any("in read_a_file_that_hangs" in line for line in stacks)
    assert done.stderr.count("no progress") == 2, "it is repeated while nothing moves"


def test_watchdog_is_silent_while_there_is_progress(capsys):
    reports = []
    with Watchdog(0.5, dump=reports.append) as watchdog:
        for step in range(12):
            watchdog.begin(f"step {step}")
            time.sleep(0.08)
    with Watchdog(0) as watchdog:
        watchdog.begin("step 1")
    assert reports == []
    assert capsys.readouterr().err == ""
