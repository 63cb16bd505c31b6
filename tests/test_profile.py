"""A trace of some steps, and the errors of a wrong `config.profile`."""

from __future__ import annotations

import json

import jax
import pytest
import training_cases

from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.training import chips, metrics, profiling


def traced_steps(trace) -> set[int]:
    """Returns the numbers of the training steps in a trace."""
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    return {
        int(dict(event.stats)["step_num"])
        for event in events
        if event.name == "train" and "step_num" in dict(event.stats)
    }


def test_a_run_traces_the_steps_of_the_config_and_logs_its_speed(tmp_path, capsys):
    training_cases.run(tmp_path, steps=4, batch_size=2, profile="2:4")
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert traced_steps(trace) == {2, 3}

    # Speed: in the metrics file and the log line; a CPU has no peak rate, which is logged once.
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["tflops_per_s_device"] < 10
    assert 0 < last["step_p50_s"] <= last["step_p95_s"]
    assert "mfu" not in last
    printed = capsys.readouterr().out
    assert printed.count("MFU is not shown: the peak rate of device kind 'cpu'") == 1
    assert "(p95 " in printed


@pytest.mark.parametrize("text", ["3", "0:2", "4:4", "5:2", "a:b", "1:2:3", " 1:2", "-1:3"])
def test_a_wrong_profile_is_named(text):
    config = training_cases.tree_of("stage2", profile=text)
    with pytest.raises(UserError, match=r"config.profile: .* is not START:STOP"):
        config_lib.from_config_dict(config)


def test_a_profile_after_the_last_step_is_named(tmp_path):
    config = training_cases.tree_of("stage2", profile="6:8", steps=5)
    with pytest.raises(UserError, match=r"config.profile: 6:8 begins after the last step, 5"):
        config_lib.from_config_dict(config)
    with pytest.raises(UserError, match=r"6:8 begins after the last step, 5"):
        profiling.Profiler("6:8", tmp_path, last=5)


def test_a_profile_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "profile").write_text("")
    profiler = profiling.Profiler("1:2", tmp_path, last=5)
    with pytest.raises(UserError, match=r"config.profile: .*profile: File exists"):
        profiler.trace_step(1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100-80"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200-141"),
        ("TPU v4", "v4"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_device_kinds_have_their_peak_rates(kind, name):
    assert chips.find_chip(kind).name == name


def test_mfu_is_in_the_log_line_where_the_peak_is_known():
    clock = metrics.Clock(steps=4, devices=8, peak_flops=1e12)
    clock.start()
    clock.tick(waited=0.0, tokens=10, flops=1e12)
    scalars = {"loss": 1.0, "accuracy": 0.5, "grad_norm": 1.0, **clock.read(1)}
    line = metrics.format_line(1, 4, scalars)
    assert f"MFU {scalars['mfu']:.1%}" in line
    assert "per device)" in line
