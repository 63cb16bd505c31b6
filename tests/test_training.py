"""The trainer: what trains, resumption bit for bit, meshes, accumulation, and bad steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import training_cases as cases

from wings_jax import checkpoint, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import layout
from wings_jax.model.wings import Wings
from wings_jax.training import divergence, loop, meshes, metrics, optim
from wings_jax.training import loss as loss_lib

GOLDEN = pathlib.Path(__file__).with_name("golden_training.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of stage 2, on one device."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return cases.run(workdir, steps=6), workdir


def test_resume_is_bitwise_the_uninterrupted_run(whole, tmp_path):
    finished, workdir = whole
    ready = cases.set_up(tmp_path / "run", steps=6, checkpoint_every=2)
    batches = ready.loader.iterate

    def break_off(first: int):
        for number, batch in enumerate(batches(first)):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    ready.loader.iterate = break_off
    with jax.set_mesh(ready.mesh), pytest.raises(KeyboardInterrupt):
        loop.train(ready)
    assert checkpoint.newest_step(tmp_path / "run").name == "4"
    resumed = cases.run(tmp_path / "run", steps=6, checkpoint_every=2)
    assert cases.losses(tmp_path / "run") == cases.losses(workdir)
    expected = cases.flat(finished)
    for path, value in cases.flat(resumed).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_resume_keeps_all_metrics_and_a_finished_run_its_summary(tmp_path, monkeypatch):
    cases.run(tmp_path / "one", "stage1", steps=1)
    options = {"steps": 4, "init_from": str(tmp_path / "one")}
    ready = cases.set_up(tmp_path / "run", **options)
    stop = contextlib.nullcontext(lambda step: step == 2)
    monkeypatch.setattr(loop, "_preemption", lambda: stop)
    with jax.set_mesh(ready.mesh), pytest.raises(SystemExit) as stopped:
        loop.train(ready)
    assert stopped.value.code == 143
    assert len(cases.losses(tmp_path / "run")) == 2
    monkeypatch.undo()
    cases.run(tmp_path / "run", **options)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "one")  # the start is not needed for a resume
    summary = (tmp_path / "run/summary.json").read_text()
    cases.run(tmp_path / "run", **options)  # all steps are done
    assert (tmp_path / "run/summary.json").read_text() == summary


def test_mesh_of_eight_devices_equals_one(whole, tmp_path):
    workdir = whole[1]
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    parallel = cases.run(tmp_path / "run", devices=8, steps=6, **mesh)
    np.testing.assert_allclose(
        cases.losses(tmp_path / "run")[:5], cases.losses(workdir)[:5], atol=1e-5
    )
    kernel = parallel.state.trained["decoder/layers/attn/q/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    moments = [x for x in jax.tree.leaves(parallel.state.opt_state) if x.shape == kernel.shape]
    assert len(moments) == 2
    assert all(m.sharding.is_equivalent_to(kernel.sharding, m.ndim) for m in moments)


def test_mesh_may_change_within_a_run(whole, tmp_path, monkeypatch):
    """8 devices, then 1, then 4 along other axes; each restores bitwise what was saved."""
    parts = {
        2: (8, {"mesh__data": 2, "mesh__fsdp": 4}),
        4: (1, {}),
        6: (4, {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}),
    }
    saved: dict = {}
    for last, (devices, mesh) in parts.items():
        ready = cases.set_up(tmp_path / "run", devices=devices, steps=6, **mesh)
        restored = cases.flat(ready)
        for path, value in saved.items():
            np.testing.assert_array_equal(restored[path], value, err_msg=path)

        stop = contextlib.nullcontext(lambda step, last=last: step == last)
        monkeypatch.setattr(loop, "_preemption", lambda stop=stop: stop)
        stopped = contextlib.nullcontext() if last == 6 else pytest.raises(SystemExit)
        with jax.set_mesh(ready.mesh), stopped:
            loop.train(ready)
        saved = cases.flat(ready)

    np.testing.assert_allclose(cases.losses(tmp_path / "run"), cases.losses(whole[1]), atol=1e-5)


def test_gradient_accumulation_equals_one_batch(whole, tmp_path):
    cases.run(tmp_path / "run", steps=6, optimizer__accumulation=4)
    np.testing.assert_allclose(
        cases.losses(tmp_path / "run"), cases.losses(whole[1]), rtol=1e-5, atol=1e-5
    )


def test_stage1_trains_projector_and_visual_learner_only(tmp_path):
    ready = cases.set_up(tmp_path / "run", "stage1")
    before = cases.flat(ready)
    with jax.set_mesh(ready.mesh):
        loop.train(ready)
    moved = {path for path, value in cases.flat(ready).items() if (value != before[path]).any()}
    assert all(path.startswith(("projector/", "decoder/layers/visual/")) for path in moved)
    assert {path for path in before if path.startswith("projector/")} < moved
    assert {f"decoder/layers/visual/{name}" for name in ("o/b", "v/b", "o/a")} < moved
    state_paths = {
        "/".join(str(getattr(k, "key", k)) for k in path)
        for path, x in jax.tree_util.tree_leaves_with_path(ready.state.opt_state)
        if x.ndim
    }
    assert all("projector" in p or "visual" in p for p in state_paths)


def test_stage2_starts_from_stage1(tmp_path, capsys):
    first = cases.run(tmp_path / "one", "stage1")
    second = cases.set_up(tmp_path / "two", init_from=str(tmp_path / "one"))
    expected = cases.flat(first)
    current = cases.flat(second)
    for path, value in expected.items():
        np.testing.assert_array_equal(current[path], value, err_msg=path)
    fresh = set(current) - set(expected)
    assert {p.split("/")[2] for p in fresh} == {"textual", "router"}
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("router") and "fresh" in line for line in printed)
    assert any(line.startswith("visual") and "fresh" not in line for line in printed[-8:])


def test_checkpoint_describes_itself(whole):
    finished, workdir = whole
    restored = checkpoint.load(workdir)
    assert restored.config == finished.config
    assert restored.arch.learners == ("visual", "textual")
    assert restored.step == 6
    assert restored.tokenizer.encode("<|im_start|>") == [
        restored.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ]
    expected = cases.flat(finished)
    for path, value in tree.flatten(restored.params).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_checkpoint_is_loaded_in_the_dtype_of_the_matmuls(whole):
    """Norms, biases and the router stay float32, as decoding needs them."""
    flat = tree.flatten(checkpoint.load(whole[1], dtype="bfloat16").params)
    kinds = {path: str(value.dtype) for path, value in flat.items()}
    assert kinds["decoder/layers/attn/q/kernel"] == kinds["decoder/embed/embedding"] == "bfloat16"
    assert kinds["decoder/layers/visual/q/a"] == "bfloat16"
    assert {kinds[f"decoder/layers/{p}"] for p in ("router/kernel", "norm_mlp/scale")} == {
        "float32"
    }
    plain = tree.flatten(checkpoint.load(whole[1]).params)
    assert {str(value.dtype) for value in plain.values()} == {"float32"}


def test_golden_losses(whole):
    """Update golden_training.json only for a change that is meant to change training's numbers."""
    golden = json.loads(GOLDEN.read_text())
    lines = (whole[1] / "metrics.jsonl").read_text().splitlines()
    for name, expected in golden.items():
        values = [json.loads(line)[name] for line in lines]
        np.testing.assert_allclose(values, expected, rtol=2e-4, err_msg=name)


def test_chunked_loss_equals_the_loss_of_all_logits():
    model = Wings(tiny_model.VARIANTS["router"])
    params, rows = tiny_model.init(model), tiny_model.batch(["ttittt", "tttttttt"])
    hidden = model.apply({"params": params}, rows)
    logits = np.asarray(tiny_model.logits(model, params, rows), np.float64)
    chosen = rows.targets != layout.IGNORE
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, np.where(chosen, rows.targets, 0)[..., None], -1)[..., 0]
    for chunk in (3, 8, 100):
        loss, right = loss_lib.token_loss(model, params, hidden, jnp.asarray(rows.targets), chunk)
        np.testing.assert_allclose(loss, (log_z - picked)[chosen].sum(), rtol=1e-5)
        assert int(right) == ((logits.argmax(-1) == rows.targets) & chosen).sum()


def test_nonfinite_step_changes_nothing_but_the_counters(tmp_path):
    ready = cases.set_up(tmp_path / "run", "stage1")
    path = "projector/linear_0/kernel"
    poisoned = {**ready.state.trained, path: ready.state.trained[path].at[0, 0].set(jnp.nan)}
    ready.state = dataclasses.replace(ready.state, trained=poisoned)
    before = jax.device_get((ready.state.trained, ready.state.opt_state))
    with jax.set_mesh(ready.mesh):
        batch = meshes.place_batch(ready.loader[0], ready.mesh, batch_size=8, accumulation=1)
        after, measured = ready.update(ready.state, batch)
    assert (int(after.step), int(after.skipped)) == (1, 1)
    assert not np.isfinite(measured["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, (after.trained, after.opt_state))


def test_nonfinite_guard_counts_the_steps_of_its_window():
    guard = divergence.NonFiniteGuard(limit=3, window=10)
    skipped = {5: 1, 12: 2, 15: 3, 16: 4}
    total, found = 0, []
    for number in range(1, 18):
        total = skipped.get(number, total)
        found.append(guard.check(number, total))
    assert found == [()] * 15 + [(12, 15, 16), (12, 15, 16)]

    resumed = divergence.NonFiniteGuard(limit=2, window=10, start=(40, 1))
    assert [resumed.check(41, 2), resumed.check(42, 3)] == [(), (41, 42)]


def test_nonfinite_steps_stop_the_run_and_name_steps_and_samples(tmp_path):
    """The last checkpoint stays, and the file has the samples of every skipped step."""
    workdir = tmp_path / "run"
    ready = cases.set_up(workdir, "stage1", optimizer__skip_limit=2, checkpoint_every=1, steps=20)
    path = "projector/linear_0/kernel"
    poisoned = {**ready.state.trained, path: ready.state.trained[path].at[0, 0].set(jnp.nan)}
    ready.state = dataclasses.replace(ready.state, trained=poisoned)
    ids = [ready.loader.sample_ids(step) for step in range(2)]
    assert [len(row_ids) for row_ids in ids] == [8, 8]

    message = rf"not finite in 2 of the steps 1 to 2 \(1, 2\).*samples of step 2: {ids[1][0]}, "
    with jax.set_mesh(ready.mesh), pytest.raises(UserError, match=message):
        loop.train(ready)
    assert json.loads((workdir / "nonfinite.json").read_text()) == {"1": ids[0], "2": ids[1]}
    assert [step.name for step in checkpoint.list_steps(workdir)] == ["1"]


def test_checkpoints_are_kept_by_number_and_by_time(tmp_path, monkeypatch):
    cases.run(tmp_path / "number", "stage1", steps=5, checkpoint_every=1, max_checkpoints=2)
    cases.run(
        tmp_path / "time",
        "stage1",
        steps=5,
        checkpoint_every=1,
        max_checkpoints=1,
        keep_every_hours=1 / 3600,
    )
    steps = [
        [int(step.name) for step in checkpoint.list_steps(tmp_path / name)]
        for name in ("number", "time")
    ]
    assert steps[0] == [4, 5]
    assert steps[1][0] == 1
    assert steps[1][-1] == 5


def test_schedule_warms_up_and_falls_to_zero():
    rate = optim.schedule(1e-3, steps=100, warmup_ratio=0.1)
    rates = [float(rate(i)) for i in range(101)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(1e-3)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_weight_decay_leaves_out_norms_biases_and_embeddings():
    optimizer = config_lib.OptimizerConfig(
        groups={"all": ".*"},
        learning_rates={"all": 1.0},
        weight_decay=0.5,
        warmup_ratio=0,
        max_grad_norm=0,
    )
    params = {p: jnp.ones(3) for p in ("a/kernel", "a/bias", "n/scale", "e/embedding")}
    transform = optim.make_optimizer(params, dict.fromkeys(params, "all"), optimizer, steps=10)
    state = transform.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the schedule begins at 0
        updates, state = transform.update(zero, state, params)
    moved = {path for path, update in updates.items() if float(jnp.abs(update).sum()) > 0}
    assert moved == {"a/kernel"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "decoder/.*"}, "no row matches projector/kernel"),
        (
            {"a": ".*", "b": "projector/.*"},
            r"not the first match of any parameter: b \(projector/\.\*\)",
        ),
    ],
)
def test_path_tables_are_total_and_without_dead_rows(table, message):
    paths = dict.fromkeys(["decoder/kernel", "projector/kernel"])
    with pytest.raises(UserError, match=message):
        tree.match_table(paths, table, name="groups")


def test_clock_measures_speed_and_waiting():
    clock = metrics.Clock(steps=10)
    assert clock.read(1)["eta_s"] == 0
    clock.start()
    clock.tick(waited=0.0, tokens=100)
    speed = clock.read(2)
    assert speed["tokens_per_s"] > 0
    assert speed["data_wait"] == 0
    assert "mfu" not in speed


def test_clock_counts_per_device_and_percentiles(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 3.0, 7.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    clock = metrics.Clock(steps=10, devices=2, peak_flops=100e12)
    clock.start()
    for _ in range(4):
        clock.tick(waited=0.7, tokens=70, flops=140e12)
    speed = clock.read(4)
    assert speed["tokens_per_s"] == pytest.approx(40)
    assert speed["tokens_per_s_device"] == pytest.approx(20)
    assert speed["tflops_per_s_device"] == pytest.approx(40)
    assert speed["mfu"] == pytest.approx(0.4)
    assert speed["data_wait"] == pytest.approx(0.4)
    assert (speed["step_s"], speed["step_p50_s"]) == (1.75, 1.0)
    assert 1.0 < speed["step_p95_s"] <= 4.0
    assert speed["eta_s"] == pytest.approx(6 * 1.75)


def test_metrics_after_the_checkpoint_are_removed_on_resume(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, start=0)
    for number in range(1, 5):
        writer.write(number, {"loss": float(number)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 5, "lo')
    metrics.MetricsWriter(tmp_path, start=2).close()
    assert cases.losses(tmp_path) == [1.0, 2.0]
