"""A checkpoint is whole and verified, or it is not there: kills at every system call, full disks, damage."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shikomi.checkpoint import files, manifest
from shikomi.checkpoint.manifest import (
    checkpoint_folder,
    damage,
    newest_valid,
    prune,
    read_manifest,
    read_tensors,
    write_checkpoint,
)
from shikomi.checkpoint.tensors import write_safetensors
from shikomi.errors import BadInput, TryAgain

MACHINE = {"threads": 1}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    a = torch.randn(3, 5, generator=generator)
    return {"adapter": {"a": a, "b": a.to(torch.bfloat16)}, "optimizer": {"a/step": torch.tensor(step)}}


def write(checkpoints: Path, step: int) -> Path:
    folder = checkpoint_folder(checkpoints, step)
    write_checkpoint(folder, tensors(step), {"step": step, "best": 0.1 + step}, MACHINE)
    return folder


def assert_is(folder: Path | None, step: int) -> None:
    assert folder is not None and damage(folder) is None
    for part, expected in tensors(step).items():
        found = read_tensors(folder, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_bit_comes_back(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    odd = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "turned": base.t(),
        "shared": base[1],
        "half": base.to(torch.float16),
        "yes": torch.tensor([True, False, True]),
        "name with spaces é": base.to(torch.bfloat16),
    }
    state = {"step": 5, "loss": 0.1 + 0.2, "tiny": 5e-324, "best": float("inf"), "order": [3, 1, 2], "text": "é\n"}
    folder = checkpoint_folder(tmp_path / "checkpoints", 5)
    write_checkpoint(folder, {"odd": odd, "none": {}}, state)
    found = newest_valid(tmp_path / "checkpoints")
    assert (found.folder, found.state, found.notes) == (folder, state, [])
    back = read_tensors(folder, "odd")
    for name, tensor in odd.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].contiguous().reshape(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    assert read_tensors(folder, "none") == {}
    assert read_manifest(folder)["fingerprint"]["torch"] == torch.__version__
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "none.safetensors", "odd.safetensors", "state.json"}


shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64])


@settings(max_examples=50, deadline=None)
@given(named=st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), max_size=5))
def test_the_bytes_are_those_of_the_safetensors_library(named, tmp_path_factory):
    named.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("bytes")
    made = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in named.items()}
    write_safetensors(folder / "ours", made)
    save_file(made, folder / "theirs", {"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="z: safetensors has no name for torch.complex128"):
        write_safetensors(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)})


def test_a_part_cannot_name_a_path(tmp_path):
    with pytest.raises(ValueError, match="cannot name a part"):
        write_checkpoint(tmp_path / "step-000001", {"../a": {}}, {"step": 1}, MACHINE)
    assert list(tmp_path.iterdir()) == []


# Kills


def in_child(work) -> int:
    """Runs `work` in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(call: int, work) -> bool:
    """Runs `work` in a child that dies right before its `call`-th change to the disk; False when it had fewer."""

    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    def child() -> None:
        for name in ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        work()

    return os.WIFSIGNALED(in_child(child))


def test_a_kill_before_any_system_call_leaves_the_old_state_or_the_new(tmp_path):
    call, seen = 0, set()
    while True:
        call += 1
        checkpoints = tmp_path / str(call) / "checkpoints"
        write(checkpoints, 10)
        if not killed_at(call, lambda where=checkpoints: write(where, 20)):
            break
        found = newest_valid(checkpoints)
        assert found.notes == [], f"killed at call {call}"
        seen.add(found.state["step"])
        assert_is(found.folder, found.state["step"])
        write(checkpoints, 30)  # the next writer meets what the killed one left
        assert sorted(p.name for p in checkpoints.iterdir() if p.name.startswith(".")) == []
    assert call > 20 and seen == {10, 20}


def test_a_kill_while_a_checkpoint_of_the_same_step_is_replaced_loses_nothing(tmp_path):
    call = 0
    while True:
        call += 1
        checkpoints = tmp_path / str(call) / "checkpoints"
        write(checkpoints, 10)
        if not killed_at(call, lambda where=checkpoints: write(where, 10)):
            break
        found = newest_valid(checkpoints)
        assert found.notes == [], f"killed at call {call}"
        assert_is(found.folder, 10)
        write(checkpoints, 10)
        assert [p.name for p in checkpoints.iterdir()] == ["step-000010"]
    assert call > 20


def test_kills_at_random_times_leave_a_whole_checkpoint(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    write(checkpoints, 1)
    rng = random.Random(0)

    def train(start: int) -> None:
        for step in range(start + 1, start + 1000):
            write(checkpoints, step)
            prune(checkpoints, 2)

    last = 1
    for _ in range(20):
        child = os.fork()
        if child == 0:
            train(last)
            os._exit(0)
        while newest_valid(checkpoints).state["step"] == last:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = newest_valid(checkpoints)
        assert found.notes == [] and found.state["step"] > last
        last = found.state["step"]
        assert_is(found.folder, last)


# A full disk


@pytest.mark.parametrize("name", ["write", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_at_any_call_keeps_the_old_checkpoint(tmp_path, monkeypatch, name, code):
    original = getattr(os, name)
    failures = 0
    for call in range(1, 100):
        checkpoints = tmp_path / str(call)
        write(checkpoints, 10)
        calls = 0

        def failing(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:  # noqa: B023 (used in this turn of the loop only)
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, failing)
        try:
            write(checkpoints, 20)
            if calls < call:
                break
        except TryAgain as error:
            failures += 1
            assert error.exit_code == 75
            assert "the checkpoint of step 20" in error.message and os.strerror(code) in error.message
        finally:
            monkeypatch.setattr(os, name, original)
        found = newest_valid(checkpoints)
        assert_is(found.folder, found.state["step"])
        # After the rename the new one is there whole; nothing half-written ever stays.
        assert {p.name for p in checkpoints.iterdir()} <= {"step-000010", "step-000020"}
    assert failures >= 1


def test_a_real_file_size_limit_is_a_full_disk(tmp_path):
    program = f"""
import resource, sys
from pathlib import Path
import torch
from shikomi.checkpoint.manifest import write_checkpoint
from shikomi.errors import TryAgain
checkpoints = Path({str(tmp_path)!r})
write_checkpoint(checkpoints / "step-000001", {{"adapter": {{"a": torch.ones(10)}}}}, {{"step": 1}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_checkpoint(checkpoints / "step-000002", {{"adapter": {{"a": torch.ones(1_000_000)}}}}, {{"step": 2}}, {{}})
except TryAgain as error:
    print(error.message)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert "the disk is full (File too large" in done.stdout and "MB free" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert newest_valid(tmp_path).state == {"step": 1}


def test_a_folder_that_may_not_be_written_is_bad_input(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "write_bytes", refused)
    monkeypatch.setattr(manifest, "write_bytes", refused)
    with pytest.raises(BadInput, match="Read-only file system.*choose another output_dir"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_no_temporary_folder(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, harm):
    write(tmp_path, 10)
    write(tmp_path, 20)
    harm(tmp_path / "step-000020" / name)
    found = newest_valid(tmp_path)
    assert found.state["step"] == 10
    assert_is(found.folder, 10)
    assert len(found.notes) == 2 and "step-000020 is damaged" in found.notes[0] and name in found.notes[0]
    assert found.notes[1] == "going on from step-000010 instead"


def test_no_valid_checkpoint_means_step_0_and_says_so(tmp_path):
    assert newest_valid(tmp_path / "checkpoints") == (None, {}, [])
    cut(write(tmp_path, 10) / "state.json")
    found = newest_valid(tmp_path)
    assert found.folder is None and found.state == {}
    assert "step-000010 is damaged" in found.notes[0] and "starting at step 0" in found.notes[-1]


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / "step-000010").rename(tmp_path / "step-000030")
    assert newest_valid(tmp_path).state["step"] == 20


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", "", "..\\secret", "link"])
def test_names_that_leave_the_folder_are_refused_unread(tmp_path, name, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = write(tmp_path / "checkpoints", 10)
    (folder / "link").symlink_to(secret)
    found = json.loads((folder / "manifest.json").read_text())
    found["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    found["sha256"] = manifest._digest(found)
    (folder / "manifest.json").write_text(json.dumps(found))
    opened = []
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: opened.append(path))
    with pytest.raises(BadInput, match="not a plain file in its folder"):
        read_manifest(folder)
    assert newest_valid(tmp_path / "checkpoints").folder is None
    with pytest.raises(BadInput):
        read_tensors(folder, "adapter")
    assert opened == []


def test_a_newer_format_stops_instead_of_falling_back(tmp_path):
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    found = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**found, "format": 2}))
    with pytest.raises(BadInput, match="newer format.*found 2; allowed: 1 to 1"):
        newest_valid(tmp_path)


def test_damaged_tensors_are_not_read(tmp_path):
    folder = write(tmp_path, 10)
    with pytest.raises(BadInput, match="no such part.*allowed: adapter, optimizer"):
        read_tensors(folder, "adaptor")
    flip(folder / "adapter.safetensors")
    assert read_tensors(folder, "optimizer")["a/step"] == 10
    with pytest.raises(BadInput, match="SHA-256 differs"):
        read_tensors(folder, "adapter")


# Keeping


@pytest.mark.parametrize(
    "keep, best, left",
    [
        (None, None, [1, 2, 3, 4, 5]),
        (2, None, [4, 5]),
        (2, 3, [3, 4, 5]),
        (2, 5, [4, 5]),
        (1, 1, [1, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (0, 2, [2]),
        (0, None, []),
    ],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        write(tmp_path, step)
    gone = prune(tmp_path, keep, best and checkpoint_folder(tmp_path, best))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:06d}" for step in left]
    assert sorted(p.name for p in gone) == [f"step-{step:06d}" for step in range(1, 6) if step not in left]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    assert newest_valid(tmp_path).state["step"] == 1_000_000
    assert [p.name for p in prune(tmp_path, 1)] == ["step-999999"]


def test_a_damaged_later_checkpoint_never_displaces_a_good_earlier_one(tmp_path):
    write(tmp_path, 100)
    cut(write(tmp_path, 120) / "state.json")
    write(tmp_path, 110)  # resumed from 100, stopped by a signal
    prune(tmp_path, 1)
    assert newest_valid(tmp_path) == (tmp_path / "step-000110", {"step": 110, "best": 110.1}, [])


def test_what_prune_was_killed_in_is_no_checkpoint(tmp_path):
    call = 0
    while True:
        call += 1
        older = write(tmp_path, 10)
        write(tmp_path, 20)
        if not killed_at(call, lambda: prune(tmp_path, 1)):
            break
        assert not older.exists() or damage(older) is None, f"killed at call {call}"
        assert_is(newest_valid(tmp_path).folder, 20)
    assert call > 3 and [p.name for p in tmp_path.iterdir()] == ["step-000020"]
