"""One live writer for each run directory."""

import os
import signal
import subprocess
import sys
import time

import pytest

from shikomi.checkpoint.lock import RunLock, is_locked
from shikomi.errors import BadInput, TryAgain

HOLD = """
import sys, time
from pathlib import Path
from shikomi.checkpoint.lock import RunLock
from shikomi.errors import ShikomiError
try:
    lock = RunLock(Path(sys.argv[1]))
except ShikomiError as error:
    print(error.message)
    sys.exit(error.exit_code)
print("held", flush=True)
time.sleep(60)
"""


def holder(folder) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_to_try_again(tmp_path):
    with RunLock(tmp_path / "run"):
        done = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 75
    assert f"another process is writing {tmp_path / 'run'}" in done.stdout


def test_the_lock_ends_with_a_killed_process(tmp_path):
    process = holder(tmp_path)
    try:
        assert is_locked(tmp_path)
        with pytest.raises(TryAgain):
            RunLock(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not is_locked(tmp_path)
    RunLock(tmp_path).release()


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(TryAgain):
        RunLock(tmp_path)
    first.release()
    first.release()
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    ready, started = os.pipe()
    end, ended = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ended)
        os.write(started, b".")
        os.read(end, 1)  # until the parent closes its end
        os._exit(0)
    os.read(ready, 1)
    lock.release()
    try:
        assert not is_locked(tmp_path)
    finally:
        os.close(ended)
        os.waitpid(child, 0)


def test_a_forked_worker_that_ends_does_not_release_the_lock(tmp_path):
    with RunLock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert is_locked(tmp_path)


def test_asking_does_not_disturb_a_writer_that_starts(tmp_path):
    RunLock(tmp_path).release()
    asking = os.fork()
    if asking == 0:
        while True:
            is_locked(tmp_path)
            time.sleep(0.001)
    try:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            RunLock(tmp_path).release()
    finally:
        os.kill(asking, signal.SIGKILL)
        os.waitpid(asking, 0)
    assert not is_locked(tmp_path)


def test_a_file_in_the_way_is_bad_input(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(BadInput, match="run: cannot be used as a run directory.*choose another output_dir"):
        RunLock(tmp_path / "run")
    assert not is_locked(tmp_path / "nothing")
