"""Results of the analysis, its command, and attention shift as a metric of training."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import hf_directories
import inference_cases
import jax
import numpy as np
import pytest
import tiny_data
import tiny_model
import training_cases
from absl import flags as absl_flags
from PIL import Image

from wings_jax import analyze, checkpoint, cli, config, errors, train, tree
from wings_jax.analysis import laws, plots, probes, results, watch
from wings_jax.analysis.probes import CLASSES, GROUPS, Variant
from wings_jax.data import samples
from wings_jax.model import presets
from wings_jax.model.wings import Wings

BEFORE, IMAGE, AFTER = (CLASSES.index(name) for name in ("before", "image", "after"))
ALL = GROUPS.index("all")
LONG = "a long question"


def make_result(name: str, masses: np.ndarray, **changes) -> results.ShiftResult:
    """Returns a result with these curves f32[n,L,C] for every group."""
    count, layers = masses.shape[:2]
    reading = laws.Measurement(
        masses=np.repeat(masses[:, :, None], len(GROUPS), 2),
        heads=np.repeat(np.repeat(masses[:, :, None, None], 2, 2), 3, 3),
        gates=None,
        norms=np.zeros((count, layers, 2, 0)),
    )
    tally = samples.Tally(seen=count)
    values = {"origin": name, "step": 1, "variant": Variant(), "learners": (), **changes}
    return results.ShiftResult(
        name=name, ids=[str(i) for i in range(count)], reading=reading, tally=tally, **values
    )


def test_flat_curves_are_counted_and_left_out():
    rng = np.random.default_rng(0)
    masses = rng.dirichlet(np.ones(5), (4, 6)).astype(np.float32)
    masses[2, :, AFTER] = 0.25
    result = make_result("some", masses)
    (found,) = results.as_json([result])["models"]
    assert (found["n_used"], found["n_skipped"]) == (3, 1)
    assert found["skipped"][results.FLAT] == {"count": 1, "first": ["2: no correlation"]}
    wanted = [1 - np.corrcoef(m[:, BEFORE], m[:, AFTER])[0, 1] for m in masses[[0, 1, 3]]]
    assert found["shift"]["mean"] == pytest.approx(np.mean(wanted), abs=1e-5)
    lines = [json.loads(line) for line in results.as_lines([result]).splitlines()]
    assert [line["shift"] is None for line in lines] == [False, False, True, False]
    assert all(line["variant"]["rows"] == "all" for line in lines)


def test_router_and_norms_are_means_of_the_probes_that_are_used():
    masses = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4)).astype(np.float32)
    masses[1, :, AFTER] = 0.25  # flat, so left out
    result = make_result("some", masses, learners=("visual", "textual"))
    values = np.array([1.0, 100.0, 3.0])[:, None, None, None] * np.ones((3, 4, 2, 2))
    reading = dataclasses.replace(result.reading, gates=values, norms=values)
    (found,) = results.as_json([dataclasses.replace(result, reading=reading)])["models"]
    assert found["n_used"] == 2
    for name in ("router", "norm_ratio"):
        assert found[name]["textual"]["text"] == [2.0] * 4


def test_one_probe_has_no_interval():
    masses = np.random.default_rng(0).dirichlet(np.ones(5), (1, 4)).astype(np.float32)
    result = make_result("some", masses)
    (found,) = results.as_json([result])["models"]
    assert found["shift"]["mean"] is not None
    assert found["shift"]["interval95"] == [None, None]
    assert "nan" not in results.as_text([result])
    point = plots.ShiftPoint("some", result.shift, (50.0, 40.0, 60.0))
    for page in (plots.curves([result]), plots.scatter([point], "score", result.variant)):
        page.savefig(io.BytesIO())


def test_the_scatter_fits_any_number_of_points():
    for count in (1, 3):
        points = [
            plots.ShiftPoint(
                str(i), (0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05), (9.0 - i, 8 - i, 10 - i)
            )
            for i in range(count)
        ]
        page = plots.scatter(points, "text", Variant())
        title = page.axes[0].get_title()
        assert ("Spearman -1.00" in title) == (count == 3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A random small model of three layers with the tiny base's tokenizer."""
    arch = inference_cases.with_vocabulary(
        inference_cases.ARCHS["router"], len(inference_cases.tokenizer())
    )
    decoder = dataclasses.replace(arch.decoder, num_layers=3, max_positions=1024)
    arch = dataclasses.replace(arch, decoder=decoder, router_positions=1024)
    _, _, params = inference_cases.make(arch)
    folder = tmp_path_factory.mktemp("run") / "random"
    source = inference_cases.write_checkpoint(folder.with_name("other"))
    files = checkpoint.read_tokenizer_files(checkpoint.newest_step(source))
    checkpoint.write_checkpoint(folder, tree.flatten(params), config.Config(), arch, files)
    return folder


def run_analyze(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["analyze", "laws", *map(str, arguments)])
    cli.run_main("wings_jax.analyze", analyze.main)


def test_the_command_writes_curves_and_plots(workdir, tmp_path, monkeypatch, capsys):
    report = {
        "models": [
            {
                "name": name,
                "tasks": {"scenes_text": {"all text": {"accuracy": 0.5, "interval95": [0.4, 0.6]}}},
            }
            for name in ("one", "two")
        ]
    }
    tiny_data.write_json(tmp_path / "report.json", report)
    out = tmp_path / "new" / "out"
    models = ("--checkpoint", f"one={workdir}", f"two={workdir}")
    scores = ("--scores", tmp_path / "report.json")
    run_analyze(monkeypatch, *models, *scores, "--limit", 4, "--out", out)
    one, two = json.loads((out / "laws_summary.json").read_text())["models"]
    assert {**one, "name": "two"} == two
    assert one["variant"] == dataclasses.asdict(Variant())
    assert (one["n_used"], one["n_skipped"], one["layers"]) == (4, 0, 3)
    assert 0 <= one["shift"]["mean"] <= 2
    assert {rows: by["n_used"] for rows, by in one["shift_by_rows"].items()} == {
        "all": 4,
        "after": 4,
    }
    total = sum(np.array(curve["mean"]) for curve in one["curves"].values())
    np.testing.assert_allclose(total, 1, atol=1e-5)
    router = one["router"]
    np.testing.assert_allclose(
        np.add(router["visual"]["text"], router["textual"]["text"]), 1, atol=1e-5
    )
    lines = [json.loads(line) for line in (out / "laws.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    rho = laws.correlation(*(lines[0]["curves"][name] for name in ("before", "after")))
    assert lines[0]["shift"] == pytest.approx(1 - rho, abs=1e-3)
    heads = np.load(out / "laws_heads-one.npz")
    assert heads["masses"].shape == (4, 3, 4, len(CLASSES))
    before = heads["masses"].mean(2)[0, :, BEFORE]
    np.testing.assert_allclose(before, lines[0]["curves"]["before"], atol=1e-5)
    gates, kinds = heads["gates"], list(heads["kinds"])
    assert gates.shape == heads["norms"].shape == (4, 3, 2, 2)
    visual = gates[:, :, kinds.index("text"), list(heads["learners"]).index("visual")].mean(0)
    np.testing.assert_allclose(visual, router["visual"]["text"], atol=1e-5)
    for name in ("curves", "shares-one", "shares-two", "router", "norms", "scatter"):
        assert Image.open(out / f"laws_{name}.png").width > 300
    assert sorted(path.suffix for path in out.iterdir()) == [
        ".json",
        ".jsonl",
        *[".npz"] * 2,
        *[".png"] * 6,
    ]
    assert "Attention shift over layers (rows: all" in capsys.readouterr().out


def test_data_of_ones_own_are_read_and_skips_are_told(workdir, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    good = tiny_data.turns(LONG, "yes", f"<image>\n{LONG}", "no")
    records = [
        {"id": "good", "image": "a.png", "conversations": good},
        {"id": "open", "image": "a.png", "conversations": good[:-1]},
        {"id": "text", "conversations": good},
        {"id": "lost", "image": "b.png", "conversations": good},
    ]
    file = tiny_data.write_json(tmp_path / "data.json", records)
    out = tmp_path / "out"
    given = ("--checkpoint", workdir, "--data", file, "--out", out, "--rows", "after")
    run_analyze(monkeypatch, *given, "--prompt-only", "--exclude-prefix", 3)
    (found,) = json.loads((out / "laws_summary.json").read_text())["models"]
    assert found["variant"] == {"rows": "after", "exclude_prefix": 3, "prompt_only": True}
    assert found["n_used"] == 2
    assert {c: row["count"] for c, row in found["skipped"].items()} == {
        probes.TEXT_ONLY: 1,
        samples.MISSING_IMAGE: 1,
    }
    assert min(found["curves"]["excluded"]["mean"]) > 0
    one, other = (json.loads(line) for line in (out / "laws.jsonl").read_text().splitlines())
    assert one["curves"] == other["curves"]  # without its answer it is the same prompt
    told = capsys.readouterr().out
    assert "rows: after, excluded prefix: 3, prompt only" in told
    assert "2 of 4 samples are skipped: 1 x text only (first: text: no image)" in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--checkpoint", "no/such"], "--checkpoint: no/such holds no checkpoint"),
        (["--checkpoint", "RUN", "RUN"], "two are called 'random'"),
        (["--checkpoint", "SHORT"], "--checkpoint other: 2 layers"),
        (
            ["--checkpoint", "RUN", "--data", "TEXT"],
            "text.json: no sample can be measured: 1 x text",
        ),
        (["--checkpoint", "RUN", "--data", "no.json"], "data file no.json does not exist"),
        (["--checkpoint", "RUN", "--data", "BROKEN"], "broken.json, line 1, column 2"),
        (["--checkpoint", "RUN", "--images", "x"], "--images: goes with --data"),
        (["--checkpoint", "RUN", "--limit", "0"], "--limit: 0 is less than 1"),
        (["--checkpoint", "RUN", "--longest", "8"], "128 x too long"),
        (["--checkpoint", "RUN", "--scores", "no.json"], "--scores: no.json: No such file"),
        (["--checkpoint", "RUN", "--scores", "TEXT"], "is no report of wings_jax.evaluate"),
        (["--checkpoint", "RUN", "--scores", "OTHER"], "is no report of wings_jax.evaluate"),
        (["--checkpoint", "RUN", "--scores", "x=REPORT"], "has no model called 'x'"),
        (["--checkpoint", "RUN", "--scores", "REPORT"], "m has no score 'scenes_text/all text'"),
        (["--checkpoint", "RUN", "--out", "TEXT"], "--out: cannot write to"),
    ],
)
def test_a_mistake_is_one_line(workdir, tmp_path, monkeypatch, capsys, given, message):
    (tmp_path / "broken.json").write_text("[x")
    turns = tiny_data.turns(LONG, "yes")
    known = {
        "RUN": workdir,
        "OTHER": tiny_data.write_json(tmp_path / "other.json", {"models": [{"name": "m"}]}),
        "SHORT": workdir.with_name("other"),
        "BROKEN": tmp_path / "broken.json",
        "TEXT": tiny_data.write_json(tmp_path / "text.json", [{"conversations": turns}]),
        "REPORT": tiny_data.write_json(
            tmp_path / "report.json", {"models": [{"name": n, "tasks": {}} for n in "mn"]}
        ),
    }
    given = [str(known.get(flag, flag)) for flag in given]
    given = [flag.replace("=REPORT", f"={known['REPORT']}") for flag in given]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as caught:
        run_analyze(monkeypatch, *given, *out)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


# --- the metric of training ------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A base like that of the training tests, with a layer more."""
    smaller = training_cases.folder() / "llm"
    shape = presets.decoder_from_hf(json.loads((smaller / "config.json").read_text()))
    shape = dataclasses.replace(shape, num_layers=3)
    params = tiny_model.init(Wings(presets.WingsArch(shape, tiny_model.VISION)), scale=0.05)
    path = tmp_path_factory.mktemp("base") / "llm"
    hf_directories.save_llm(params["decoder"], shape, path, tokenizer=smaller)
    return path


def run_train(monkeypatch, workdir, llm, **changes: object) -> list[dict]:
    """Trains stage 2 by its command on all devices and returns the lines of its metrics."""
    values = {
        "model.llm": llm,
        "model.vision": training_cases.folder() / "vision",
        "data.scenes": "",
        "data.sources.scenes.path": training_cases.folder() / "scenes/train_stage2.json",
        "data.sources.scenes.images": training_cases.folder() / "scenes/images",
        "init_from": "",
        "batch_size": 8,
        "steps": 5,
        **changes,
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    stage = f"--config={training_cases.ROOT}/configs/stage2.py"
    monkeypatch.setattr(sys, "argv", ["train", stage, *arguments, f"--workdir={workdir}"])
    absl_flags.FLAGS.unparse_flags()
    for name in list(absl_flags.FLAGS):
        if name.startswith("config."):  # the overrides that an earlier command defined
            delattr(absl_flags.FLAGS, name)
    cli.run_main("wings_jax.train", train.main)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_watching_changes_nothing_and_tells_the_shift(llm, tmp_path, monkeypatch):
    plain = run_train(monkeypatch, tmp_path / "plain", llm)
    watched = run_train(monkeypatch, tmp_path / "watched", llm, laws_every=2)
    for name in ("loss", "grad_norm", "accuracy"):
        assert [line[name] for line in watched] == [line[name] for line in plain]
    wanted, found = (checkpoint.load(tmp_path / name) for name in ("plain", "watched"))
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    told = {"laws/before", "laws/image", "laws/after", "laws/shift", "laws/shift_after"}
    assert [told <= set(line) for line in watched] == [True, True, False, True, True]
    assert not any(told & set(line) for line in plain)
    ours = probes.make_recipe(found.config, found.arch, found.tokenizer, watch.LONGEST)
    read, _ = probes.read_probes(probes.embedded(watch.COUNT), ours, Variant())
    model, batches = Wings(found.arch), probes.in_batches(read, ours, 5)
    curves = laws.measure_batches(model, found.params, batches).masses[:, :, ALL]
    assert watched[-1]["laws/shift"] == pytest.approx(laws.shifts(curves).mean(), abs=1e-3)
    assert watched[-1]["laws/image"] == pytest.approx(curves[..., IMAGE].mean(), abs=1e-5)


def test_a_model_of_two_layers_cannot_be_watched(tmp_path):
    ready = training_cases.set_up(tmp_path / "run", laws_every=2)
    with pytest.raises(errors.UserError, match=r"config\.laws_every: 2 layers"):
        watch.make_metric(ready.config, ready.arch, ready.tokenizer, ready.mesh)
