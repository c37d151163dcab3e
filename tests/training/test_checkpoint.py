"""Checkpoints: what is written comes back bit for bit, and what is damaged is never taken."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading

import pytest
import torch

import smallruns
from harness import files
from harness.errors import UserError
from harness.files import replace_file, to_bytes
from harness.training import checkpoint
from harness.training.checkpoint import (
    CheckpointWriter,
    Damaged,
    as_file,
    checkpoints,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
)

FILES = ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors",
         "state.json"]  # fmt: skip


def contents(step):
    """Tensors of every kind that a run saves, different at every step."""
    rng = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, 3, 5, generator=rng)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 0.1 + step])
    tensors = {
        "model": {
            "conv.weight": weight.to(memory_format=torch.channels_last),
            "bn.num_batches_tracked": torch.tensor(2**62 + step),
            "half": weight.bfloat16(),
            "transposed": weight[0, 0].T,
            "empty": torch.empty(0, 3),
        },
        "ema": {"conv.weight": weight * 0.9, "odd": odd},
        "optimizer": {"conv.weight//momentum_buffer": weight.double(), "fp16": odd.half()},
    }
    state = {"step": step, "seconds": 0.1 + 0.2, "best": None, "name": "Ünï\n", "sums": [1e-300, 3]}
    return tensors, state


def save(root, step, keep=9):
    return save_checkpoint(root, step, *contents(step), keep=keep)


def assert_is(found, step):
    """That `found`, from load_checkpoint, is what was saved at this step, bit for bit."""
    tensors, state = contents(step)
    assert found[1] == state
    assert found[0].keys() == tensors.keys()
    for name, group in tensors.items():
        assert found[0][name].keys() == group.keys()
        for key, tensor in group.items():
            got = found[0][name][key]
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(bits(got), bits(tensor)), key


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def list_files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def describe(folder, **files):
    """Rewrite a checkpoint's manifest so that it lists `files` (bytes) as they are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, data in files.items():
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def two(tmp_path):
    """The folders of checkpoints 1 and 2 of one run."""
    return save(tmp_path, 1), save(tmp_path, 2)


# --- what is written comes back ---


def test_what_is_written_comes_back_bit_for_bit(tmp_path):
    folder = save(tmp_path / "not/there/yet", 12)
    assert folder.name == "step-00000012"
    assert list_files(folder) == FILES
    assert_is(load_checkpoint(folder), 12)
    assert not load_checkpoint(folder)[0]["model"]["conv.weight"].requires_grad


def test_the_manifest_describes_every_file(tmp_path):
    folder = save(tmp_path, 12)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 12)
    assert sorted(manifest["files"]) == sorted(set(FILES) - {"manifest.json"})
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_same_tensors_are_the_same_bytes():
    tensors, _ = contents(3)
    assert to_bytes(tensors["model"]) == to_bytes(dict(reversed(tensors["model"].items())))


def test_training_tensors_are_not_touched(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last))
    before = weight.detach().clone()
    save_checkpoint(tmp_path, 1, {"model": {"w": weight}}, {}, keep=2)
    assert torch.equal(weight, before) and weight.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last)


# --- what is damaged is never taken ---


def truncate(path, older):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path, older):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def extend(path, older):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path, older):
    path.write_bytes(b"")


def zero(path, older):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path, older):
    path.unlink()


def swap(path, older):
    shutil.copy(older, path)


def make_folder(path, older):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage", [truncate, halve, extend, empty, zero, delete, swap, make_folder]
)
def test_a_damaged_file_is_told_and_the_checkpoint_before_taken(two, file, damage):
    older, newer = two
    damage(newer / file, older / file)
    with pytest.raises(Damaged):
        load_checkpoint(newer)
    said = []
    path, *found = newest_valid(newer.parent, said.append)
    assert path == older
    assert_is(found, 1)
    assert len(said) == 1 and f"{newer} is damaged (" in said[0]


def test_the_line_names_the_file_and_what_is_wrong(two):
    _, newer = two
    delete(newer / "model.safetensors", None)
    with pytest.raises(Damaged, match=r"model\.safetensors: No such file or directory"):
        load_checkpoint(newer)
    truncate(newer / "ema.safetensors", None)
    with pytest.raises(Damaged, match=r"(ema|model)\.safetensors"):
        load_checkpoint(newer)


def test_no_bit_flips_unseen(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"model": {"w": torch.arange(3.0)}}, {"step": 1}, keep=2)
    flipped = 0
    for path in folder.iterdir():
        data = path.read_bytes()
        for at in range(len(data)):
            # Every bit of the manifest, which nothing else vouches for; one of each other byte.
            for bit in range(8) if path.name == "manifest.json" else [at % 8]:
                changed = bytearray(data)
                changed[at] ^= 1 << bit
                path.write_bytes(changed)
                with pytest.raises(Damaged):
                    load_checkpoint(folder)
                flipped += 1
        path.write_bytes(data)
    assert flipped > 2000
    load_checkpoint(folder)


def test_a_whole_folder_of_another_step_is_damaged(two):
    older, newer = two
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    with pytest.raises(Damaged, match="is of step 1"):
        load_checkpoint(newer)
    copy = shutil.copytree(older, newer.parent / "kept")  # a name that claims no step
    assert_is(load_checkpoint(copy), 1)


def test_never_from_scratch_where_all_are_damaged(two):
    for folder in two:
        truncate(folder / "model.safetensors", None)
    said = []
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .*--overwrite"):
        newest_valid(two[0].parent, said.append)
    assert len(said) == 2


def test_nothing_where_there_is_nothing(tmp_path):
    def say(line):
        raise AssertionError(line)

    assert newest_valid(tmp_path, say) is None
    assert newest_valid(tmp_path / "absent", say) is None
    (tmp_path / "notes.txt").write_text("step-00000001")
    (tmp_path / "step-1").mkdir()
    assert newest_valid(tmp_path, say) is None


@pytest.mark.parametrize(
    "manifest",
    [
        b"\xff", b"[]", b"{}", b"null", b"7",
        b'{"format": 1, "step": 1, "files": []}',
        b'{"format": 1, "step": 1, "files": 3}',
        b'{"format": 1, "step": 1, "files": {}}',
        b'{"format": 1, "step": 1, "files": {"state.json": null}}',
        b'{"format": 2, "step": 1, "files": {"state.json": {}}}',
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(two, manifest):
    (two[0] / "manifest.json").write_bytes(manifest)
    with pytest.raises(Damaged):
        load_checkpoint(two[0])


# --- what is hostile is not read ---


@pytest.mark.parametrize(
    "name", ["../x.json", "..", "/etc/passwd", "a/b.json", "model.pt", "x.safetensors\n", "A.json"]
)
def test_a_manifest_may_not_name_files_elsewhere(two, name, monkeypatch):
    (two[0].parent / "x.json").write_bytes(b"{}")
    describe(two[0], **{name: b"{}"})
    read = []
    real = checkpoint.Path.read_bytes
    monkeypatch.setattr(checkpoint.Path, "read_bytes", lambda p: read.append(p.name) or real(p))
    with pytest.raises(Damaged, match="unexpected files"):
        load_checkpoint(two[0])
    assert read == ["manifest.json"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_under_another_name_is_not_executed(two, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    torch.save(Bomb(), tmp_path / "bomb.pt")
    for data in (pickle.dumps(Bomb()), (tmp_path / "bomb.pt").read_bytes()):
        for name in ("model.safetensors", "state.json"):
            (two[0] / name).write_bytes(data)
            describe(two[0], **{name: data})
            with pytest.raises(Damaged):
                load_checkpoint(two[0])
    assert not (tmp_path / "executed").exists()


def test_a_header_that_lies_is_damaged(two):
    for length in (2**63, 10**9, 8):
        data = struct.pack("<Q", length) + b'{"w": 1}'
        (two[0] / "model.safetensors").write_bytes(data)
        describe(two[0], **{"model.safetensors": data})
        with pytest.raises(Damaged):
            load_checkpoint(two[0])


# --- what is kept ---


def test_the_newest_are_kept_by_number(tmp_path):
    for step in (8, 9, 10, 99_999_999, 100_000_000):  # as words, the last would come first
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert_is(newest_valid(tmp_path, print)[1:], 100_000_000)


def test_ten_comes_after_nine(tmp_path):
    for step in (9, 10, 8):
        save(tmp_path, step)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["08", "09", "10"]


def test_what_was_just_written_is_never_pruned(tmp_path):
    """After a resume from 10, because 20 and 30 are damaged, 15 must not go for their sake."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    for step in (20, 30):
        truncate(tmp_path / f"step-000000{step}/model.safetensors", None)
    folder = save(tmp_path, 15, keep=2)
    assert_is(load_checkpoint(folder), 15)
    assert_is(newest_valid(tmp_path, lambda line: None)[1:], 15)


def test_the_same_step_again_replaces_it(two):
    truncate(two[1] / "model.safetensors", None)
    save(two[1].parent, 2)
    assert_is(load_checkpoint(two[1]), 2)


# --- what goes wrong while writing ---


def test_what_a_killed_save_left_is_never_chosen_and_cleaned_later(two):
    root = two[0].parent
    left = root / ".writing-step-00000003-4242"
    shutil.copytree(two[1], left)
    assert checkpoints(root) == list(two)
    assert_is(newest_valid(root, print)[1:], 2)
    save(root, 3)
    assert sorted(path.name[:6] for path in root.iterdir()) == ["step-0"] * 3


@pytest.mark.parametrize("step", [2, 3], ids=["same step", "next step"])
@pytest.mark.parametrize("call", range(len(FILES) + 1))
def test_a_full_disk_leaves_the_older_ones(two, monkeypatch, step, call):
    """The n-th file cannot be written, or at last the folder not be renamed."""
    root, before = two[0].parent, list_files(two[0].parent)
    written = []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, data, real=checkpoint.write_synced):
        if len(written) == call:
            path.write_bytes(data[:10])
            full()
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write)
    if call == len(FILES):
        monkeypatch.setattr(checkpoint.os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        save(root, step)
    assert len(written) == call
    assert list_files(root) == before and len(list(root.iterdir())) == 2
    for number, folder in enumerate(two, 1):
        assert_is(load_checkpoint(folder), number)


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "write_synced", lambda path, data: written.append(path.name))
    save(tmp_path, 1)
    assert sorted(written) == FILES and written[-1] == "manifest.json"


def test_replace_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    replace_file(path, b"old")
    replace_file(path, b"older")
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["summary.json"]

    def killed(source, target):
        assert (path.read_bytes(), source.read_bytes()) == (b"older", b"new")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")

    def full(target, data):
        target.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(OSError, match="full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["summary.json"]


# --- in the background ---


def test_the_copies_are_the_bytes_that_safetensors_writes_and_their_memory_is_used_again():
    buffer = None
    for step in (1, 2):
        for group in contents(step)[0].values():
            assert bytes(as_file(group).numpy()) == to_bytes(group)
        model = contents(step)[0]["model"]
        buffer, before = as_file(model, buffer), buffer
        assert bytes(buffer.numpy()) == to_bytes(model)
        assert before is None or before.data_ptr() == buffer.data_ptr()
    assert bytes(as_file({"w": torch.ones(3)}, buffer).numpy()) == to_bytes({"w": torch.ones(3)})


@pytest.fixture
def held(monkeypatch):
    """Writes wait until held.set()."""
    gate = threading.Event()

    def write(path, data, real=checkpoint.write_synced):
        assert gate.wait(30)
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write)
    yield gate
    gate.set()


def test_training_goes_on_while_it_is_written_and_does_not_change_it(tmp_path, held):
    tensors, state = contents(5)
    writer, after = CheckpointWriter(), []
    writer.start(tmp_path, 5, tensors, state, keep=2, on_finish=lambda: after.append(1))
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    assert not writer.done() and not checkpoints(tmp_path) and not after
    held.set()
    folder = writer.wait()
    assert_is(load_checkpoint(folder), 5)
    assert after == [1] and writer.wait() is None


def test_the_next_one_waits_for_the_one_before(tmp_path, held):
    writer = CheckpointWriter()
    writer.start(tmp_path, 1, *contents(1), keep=2)
    threading.Timer(0.2, held.set).start()
    writer.start(tmp_path, 2, *contents(2), keep=2)
    assert [path.name[-1] for path in checkpoints(tmp_path)][:1] == ["1"]
    writer.wait()
    for step, folder in enumerate(checkpoints(tmp_path), 1):
        assert_is(load_checkpoint(folder), step)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ZeroDivisionError("a mistake")])
def test_what_stops_the_writer_is_raised_once_where_it_is_waited_for(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    writer = CheckpointWriter()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_synced", fail)
        writer.start(tmp_path, 1, *contents(1), keep=2)
        with pytest.raises(type(error)):
            writer.wait()
    assert writer.wait() is None and not list(tmp_path.iterdir())
    writer.start(tmp_path, 2, *contents(2), keep=2)
    assert_is(load_checkpoint(writer.wait()), 2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_script_that_dies_leaves_the_write_to_its_end_and_its_failure_is_printed(tmp_path):
    program = """
import os, sys, time, torch
from harness.training import checkpoint
for how in ("writes", "fails"):  # in a process each, for the price of one start
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{how}.txt", os.O_WRONLY | os.O_CREAT), 2)
        break
    _, status = os.waitpid(child, 0)
    print(how, os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()
real = checkpoint.write_synced
def slow(path, data):
    time.sleep(0.3)
    if how == "fails" and path.name == "state.json":
        raise OSError(28, "No space left on device")
    real(path, data)
checkpoint.write_synced = slow
checkpoint.CheckpointWriter().start(how, 1, {"model": {"w": torch.ones(3)}}, {}, 2)
raise RuntimeError("the script's own")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(smallruns.ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["writes 1", "fails 1"], done.stderr
    for how, words in (("writes", []), ("fails", ["No space left on device"])):
        said = (tmp_path / f"{how}.txt").read_text()
        assert all(word in said for word in ["the script's own", *words]), said
        names = [path.name for path in (tmp_path / how).iterdir()]
        assert names == ["step-00000001"] * (how == "writes")
    load_checkpoint(tmp_path / "writes" / "step-00000001")


def write_and_die(root, step, point):
    """Begin a checkpoint and be killed at the `point`-th of the points, if there are as many."""
    calls = iter(range(99))

    def may_die():
        if next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*args, **kwargs):
            may_die()
            result = function(*args, **kwargs)
            may_die()
            return result

        return call

    checkpoint.write_synced = counted(checkpoint.write_synced)
    checkpoint.os.rename = counted(os.rename)
    checkpoint.shutil.rmtree = counted(shutil.rmtree)
    writer = CheckpointWriter()
    writer.start(root, step, *contents(step), keep=2)
    writer.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("step", [2, 3], ids=["same step", "next step"])
def test_a_kill_at_any_point_of_a_write_leaves_a_valid_one(tmp_path, step):
    """Before and after each write, rename and removal that the writer does."""
    killed = 0
    for point in range(99):
        root = tmp_path / str(point)
        save(root, 1)
        save(root, 2)
        child = os.fork()
        if child == 0:
            try:
                write_and_die(root, step, point)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        path, *found = newest_valid(root, print)
        newest = int(path.name[5:])
        assert_is(found, newest)
        # Between the two renames that replace a checkpoint, the one before it is the newest
        assert newest in ((1, 2) if step == 2 else (2, 3))
        save(root, 4, keep=2)  # and what was left is cleaned up
        assert not list(root.glob(".writing-*"))
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    assert newest == step and killed >= 14
