"""Checkpoints that are damaged or do not fit: an error, or the step before."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases

from wings_jax import checkpoint, cli, convert, errors, train
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.training import loop, meshes, start, state

RUN = {"steps": 4, "checkpoint_every": 2, "max_checkpoints": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A workdir of stage 1 with the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    cases.run(workdir, "stage1", **RUN)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def array_files(step: pathlib.Path, item: str) -> list[pathlib.Path]:
    """Returns the files of an item that hold values, largest first."""
    files = [path for path in (step / item).rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def flip(path: pathlib.Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_value(step: pathlib.Path) -> None:
    """Saves the parameters of a step again with one bit of one value changed."""
    flat = {path: np.array(x) for path, x in checkpoint.read_params(step, verify=False).items()}
    flat["projector/linear_0/kernel"].view(np.uint32)[1, 2] ^= 1 << 20
    shutil.rmtree(step / "params")
    with checkpoint.ocp.Checkpointer(checkpoint.ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(step / "params", checkpoint.tree.nest(flat))


def remove_meta(step: pathlib.Path) -> None:
    shutil.rmtree(step / "meta")


def change_json(step: pathlib.Path, item: str, before: str, after: str) -> None:
    """Replaces a text in an item that is JSON; it stays JSON."""
    change_text(step / item / "metadata", before, after)


def change_text(path: pathlib.Path, before: str, after: str) -> None:
    """Replaces a text in a file, once."""
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))


def empty(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = {
    "value": (change_a_value, "projector/linear_0/kernel differs from its checksum"),
    "meta": (remove_meta, "meta does not exist"),
    "file": (lambda step: flip(array_files(step, "params")[0]), ""),
    "config": (
        lambda step: change_json(step, "meta", '"seed": 0', '"seed": 1'),
        "meta differs from its checksum",
    ),
    "structure": (
        lambda step: (step / "params/_METADATA").write_text("{"),
        "params: the names of its arrays cannot be read",
    ),
    "shapes": (
        lambda step: change_text(
            step / "params/array_metadatas/process_0", '"array_metadata":', '"array_mdtadata":'
        ),
        "cannot be read",
    ),
    "empty": (empty, "params does not exist"),
}
# What a resumed run of this config does not read.
UNUSED = {
    "tokenizer": (
        lambda step: change_json(step, "tokenizer", "BPE", "BPF"),
        "tokenizer differs from its checksum",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE | UNUSED)
def test_damaged_checkpoint_is_an_error_for_inference(kind, workdir):
    damage, reason = (DAMAGE | UNUSED)[kind]
    damage(workdir / "checkpoints/4")
    with pytest.raises(checkpoint.DamagedCheckpointError) as error:
        checkpoint.load(workdir)
    message = str(error.value)
    assert message.startswith(f"{workdir}/checkpoints/4: the checkpoint is damaged ({reason}")
    assert message.endswith(f"; the one before is {workdir}/checkpoints/2")
    assert "\n" not in message
    assert checkpoint.load(workdir / "checkpoints/2").step == 2


@pytest.mark.parametrize(
    ("mistake", "error"), [("None.missing", AttributeError), ("len(5)", TypeError)]
)
def test_mistakes_of_code_around_orbax_are_not_damage(mistake, error, tmp_path):
    """Objects without the attributes that orbax takes are damage, as are wrong values in it."""
    code = {name: compile(mistake, f"lib/{name}/a.py", "eval") for name in ("orbax", "wings_jax")}
    with pytest.raises(error), checkpoint.ReadErrors(tmp_path / "checkpoints/1"):
        eval(code["wings_jax"])
    damaged = pytest.raises(checkpoint.DamagedCheckpointError, match="cannot be read: ")
    with damaged, checkpoint.ReadErrors(tmp_path / "checkpoints/1"):
        eval(code["orbax"])


def test_inspect_verifies_every_array(workdir, capsys, monkeypatch):
    """Parameters and optimizer state have checksums; a damaged one is named, with exit status 2."""
    verified = checkpoint.verify_step(workdir / "checkpoints/4")
    run = cases.set_up(workdir, "stage1", **RUN)
    params, opt_state = state.to_checkpoint(run.state)
    run.writer.close()
    assert verified == len(params) + len(checkpoint.flatten_state(opt_state))

    flip(array_files(workdir / "checkpoints/4", "opt_state")[0])
    arguments = ["convert", "inspect", "--verify", str(workdir)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.run_main("wings convert", convert.main)
    assert ended.value.code == 2
    assert "checkpoints/4: the checkpoint is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_flipped_bytes_of_a_checkpoint_are_found_or_change_nothing(item, workdir):
    """One byte in each of 40 places of the file that holds most values."""
    ready = cases.set_up(workdir, "stage1", **RUN)
    params, opt_state = state.to_checkpoint(ready.state)
    expected = jax.device_get((params, opt_state))
    file = array_files(workdir / "checkpoints/4", item)[0]
    original, detected = file.read_bytes(), 0

    for place in np.linspace(0, len(original) - 1, 40).astype(int):
        content = bytearray(original)
        content[place] ^= 0x41
        file.write_bytes(content)
        try:
            restored = (
                checkpoint.read_params(workdir / "checkpoints/4", params),
                ready.writer.restore_opt_state(4, opt_state),
            )
        except checkpoint.DamagedCheckpointError:
            detected += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, restored, expected)
    # Up to a third of the file may be values that were written again: orbax merges its files
    # while the run goes on.
    assert detected > 20


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_resumes_from_the_step_before(kind, workdir, finished, capsys):
    DAMAGE[kind][0](workdir / "checkpoints/4")
    cases.run(workdir, "stage1", **RUN)
    printed = capsys.readouterr().out
    assert f"{workdir}/checkpoints/4 is damaged (" in printed
    assert "resuming from step 2, " in printed
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert {"2", "4", "4.damaged"} <= names
    expected = checkpoint.read_params(finished / "checkpoints/4")
    for path, value in checkpoint.read_params(workdir / "checkpoints/4").items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_damaged_only_checkpoint_is_an_error_for_resuming(workdir):
    shutil.rmtree(workdir / "checkpoints/2")
    remove_meta(workdir / "checkpoints/4")
    with pytest.raises(UserError, match="there is none before it"):
        cases.set_up(workdir, "stage1", **RUN)
    assert (workdir / "checkpoints/4").is_dir()


def test_checksums_can_be_switched_off(workdir):
    change_a_value(workdir / "checkpoints/4")
    assert checkpoint.load(workdir, verify=False).step == 4
    assert int(cases.set_up(workdir, "stage1", verify_checkpoints=False, **RUN).state.step) == 4


def test_checksums_hold_for_the_dtype_of_inference(workdir):
    checkpoint.load(workdir, dtype=jnp.bfloat16)
    change_a_value(workdir / "checkpoints/4")
    with pytest.raises(UserError, match="differs from its checksum"):
        checkpoint.load(workdir, dtype=jnp.bfloat16)


def test_resume_with_changed_data_is_an_error(workdir, tmp_path, capsys):
    """The file keeps its name and its number of records; one answer in it has changed."""
    original = cases.folder() / "scenes/train_stage1.json"
    copy = tmp_path / "mine.json"
    shutil.copy(original, copy)
    changes = {**RUN, "data__sources__scenes__path": str(copy)}
    cases.run(tmp_path / "other", "stage1", **changes)
    shutil.copy(original, copy)  # the same content with another time
    cases.set_up(tmp_path / "other", "stage1", **changes)

    records = json.loads(copy.read_text())
    records[0]["conversations"][1]["value"] += " Indeed."
    copy.write_text(json.dumps(records))
    before, after = (
        json.loads((tmp_path / "other/data.json").read_text())["scenes"]["digest"],
        start.workdirs._digest(copy),
    )
    message = rf"config\.data\.sources\.scenes: {copy} \(digest {after}\) .* {copy} .*{before}\)"
    with pytest.raises(UserError, match=message):
        cases.set_up(tmp_path / "other", "stage1", **changes)
    cases.set_up(tmp_path / "other", "stage1", accept_changed_data=True, **changes)
    cases.set_up(tmp_path / "other", "stage1", **changes)  # it is the run's data from now on


def test_other_semantics_than_the_checkpoint_are_an_error(tmp_path):
    cases.run(tmp_path / "one", model__semantics="release", steps=1)
    message = r"config\.model\.semantics differs .* \(release, prompt_length 14 -> paper\), .*/one/"
    with pytest.raises(UserError, match=message):
        cases.set_up(tmp_path / "two", init_from=str(tmp_path / "one"))


def test_tokenizer_with_more_tokens_than_the_embedding_is_an_error(tmp_path):
    llm = shutil.copytree(cases.folder() / "llm", tmp_path / "llm")
    described = json.loads((llm / "tokenizer.json").read_text())
    rows = json.loads((llm / "config.json").read_text())["vocab_size"]
    token = {**described["added_tokens"][-1], "id": rows, "content": "<|one more|>"}
    described["added_tokens"].append(token)
    (llm / "tokenizer.json").write_text(json.dumps(described))
    message = rf"tokenizer has {rows + 1} tokens, the LLM's embedding {rows} rows"
    with pytest.raises(UserError, match=message):
        cases.set_up(tmp_path / "run", "stage1", data__tokenizer=str(llm))
    assert not (tmp_path / "run").exists()


def test_out_of_memory_advises_what_to_lower():
    advice = train.memory_advice(config_lib.Config(batch_size=8))
    message = r"out of memory .*: raise config.optimizer.accumulation \(1, so 8 rows"
    with pytest.raises(UserError, match=message), errors.full_memory(advice):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.")


def test_batch_is_padded_where_devices_do_not_divide_it(tmp_path, capsys):
    """6 rows on 8 devices, 2 micro-batches: 10 rows of padding, and the numbers of one device."""
    changes = {"batch_size": 6, "steps": 3}
    cases.run(tmp_path / "one", "stage1", **changes)
    cases.run(tmp_path / "eight", "stage1", devices=8, optimizer__accumulation=2, **changes)
    assert "10 rows of padding are added" in capsys.readouterr().out
    one, eight = (cases.losses(tmp_path / name) for name in ("one", "eight"))
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_mesh_of_the_real_presets_uses_every_device():
    for count, shape in {1: (1, 1), 2: (1, 2), 4: (1, 4), 6: (3, 2), 8: (1, 8)}.items():
        config = config_lib.from_config_dict(cases.STAGES["stage2"]("qwen1_5_7b"))
        arch = start.starting.resolve_arch(config.model)
        sizes = meshes.mesh_shape(config.mesh, arch, count)
        assert (sizes["data"], sizes["fsdp"]) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 12345678901234567890}, "config.seed: 12345678901234567890 is not at least 0 and"),
        ({"seed": -1}, "config.seed: -1 is not at least 0 and less than 2"),
        ({"workdir": "a\0b"}, r"config.workdir: 'a\\x00b' has a NUL character"),
        ({"model__llm": "\udcff"}, r"config.model.llm: '\\udcff' is not valid UTF-8"),
        ({"data__sources__scenes__path": "\0"}, "config.data.sources.scenes.path: .* NUL"),
    ],
)
def test_texts_and_seeds_that_cannot_be_used_are_named(change, message):
    with pytest.raises(UserError, match=message):
        config_lib.from_config_dict(cases.tree_of("stage1", **change))


def test_sigterm_twice_saves_and_the_handler_of_before_is_restored(tmp_path):
    """The second signal comes while the first is being handled; one after the run is not lost."""
    ready = cases.set_up(tmp_path / "run", "stage1", steps=3, checkpoint_every=100)
    update, save = ready.update, ready.writer.save

    def update_after_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    def save_after_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    ready.update, ready.writer.save = update_after_signal, save_after_signal
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with jax.set_mesh(ready.mesh), pytest.raises(SystemExit) as end:
            loop.train(ready)
        assert end.value.code == loop.PREEMPTED
        assert received == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.load(tmp_path / "run").step == 1


def test_resume_reads_every_item_once(workdir, monkeypatch):
    """And removes what a killed run had begun to save."""
    unfinished = workdir / "checkpoints/7.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    verified = []
    verify = checkpoint.verify_arrays

    def count(step, item, arrays):
        verified.append(item)
        verify(step, item, arrays)

    monkeypatch.setattr(checkpoint, "verify_arrays", count)
    ready = cases.set_up(workdir, "stage1", **RUN)
    assert int(ready.state.step) == 4
    assert sorted(verified) == ["opt_state", "params"]
    assert not unfinished.exists()


def test_arrays_above_the_bytes_in_flight_are_written(tmp_path, monkeypatch):
    """Orbax refuses an array that is not smaller than its limit: those of 7B have 3 GB."""
    monkeypatch.setattr(checkpoint, "MIN_BYTES_IN_FLIGHT", 1000)
    params = {f"decoder/{name}": np.arange(10_000, dtype=np.float32) + name for name in range(3)}
    arch = presets.WingsArch(presets.DECODERS["qwen1_5_0_5b"], presets.VISION["siglip_base_224"])
    checkpoint.write_checkpoint(tmp_path, params, config_lib.Config(), arch, {})
    read = checkpoint.read_params(checkpoint.find_step(tmp_path, flag="--checkpoint"))
    assert read.keys() == params.keys()
    assert all(np.array_equal(read[path], params[path]) for path in params)
