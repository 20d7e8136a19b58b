"""The directory of a run: who may use it, its records, its results."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shikomi.checkpoint.lock import RunLock
from shikomi.checkpoint.manifest import checkpoint_folder, write_checkpoint
from shikomi.checkpoint.rundir import RunDir
from shikomi.checkpoint.runs import diff_recipes, gc, list_runs
from shikomi.errors import BadInput, TryAgain

RECIPE = "model: smollm2\nstages:\n- {name: sft, learning_rate: 0.0002}\noutput_dir: runs/a\n"
OTHER = RECIPE.replace("0.0002", "0.001")


def save(run: RunDir, step: int) -> Path:
    folder = checkpoint_folder(run.checkpoints, step)
    write_checkpoint(folder, {"adapter": {"a": torch.ones(2)}}, {"step": step}, {})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Who may use it


def test_a_new_run_saves_its_recipe(tmp_path):
    run = RunDir(tmp_path / "deep" / "a")
    assert not run.exists()
    assert run.create(RECIPE, "1") is False
    assert run.exists() and not run.is_finished() and not run.has_checkpoint()
    assert run.recipe_path.read_text() == RECIPE
    assert run.open() is run


def test_a_finished_run_is_refused_with_the_ways_on(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create(RECIPE, "1")
    run.write_result({"finished": True, "final_loss": 1.5})
    before = contents(tmp_path)
    ways_on = "holds a finished run.*shikomi resume .*a num_train_epochs=.*another output_dir"
    for recipe, digest in ((RECIPE, "1"), (OTHER, "2")):
        with pytest.raises(BadInput, match=ways_on) as caught:
            run.create(recipe, digest)
        assert caught.value.exit_code == 2
    assert contents(tmp_path) == before


def test_checkpoints_of_another_recipe_are_refused_with_the_difference(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create(RECIPE, "1")
    save(run, 10)
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=r"another recipe: found stages\[0\].learning_rate: was 0.0002, now 0.001"):
        run.create(OTHER, "2")
    assert contents(tmp_path) == before


def test_checkpoints_of_the_same_recipe_can_be_gone_on_from(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create(RECIPE, "1")
    run.append_metrics({"step": 1, "loss": 2.0})
    save(run, 1)
    started = run.about()["started"]
    assert run.create(RECIPE + "logging_steps: 5\n", "1") is True  # what the digest leaves out may change
    assert run.read_metrics()[0] == [{"step": 1, "loss": 2.0}]
    assert run.about()["started"] == started and "logging_steps" in run.recipe_path.read_text()


def test_a_run_without_a_checkpoint_gives_its_folder_to_another_recipe(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create(RECIPE, "1")
    run.check_data({"train.jsonl": "aa"})
    run.append_metrics({"step": 1, "loss": 2.0})
    assert run.create(OTHER, "2") is False
    assert run.read_metrics()[0] == [] and run.recipe_path.read_text() == OTHER
    run.check_data({"other.jsonl": "bb"})
    run.check_recipe(OTHER, "2")


@pytest.mark.parametrize("name", ["recipe.yaml", "final", "metrics.jsonl"])
def test_files_of_the_user_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInput, match=f"has files a run would overwrite: found {name}"):
        RunDir(tmp_path).create(RECIPE, "1")
    assert contents(tmp_path) == {name: b"mine"}


def test_other_files_in_the_folder_are_in_nobodys_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with RunLock(tmp_path):
        RunDir(tmp_path).create(RECIPE, "1")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_opening_what_is_no_run_names_the_nearest(tmp_path):
    RunDir(tmp_path / "sections").create(RECIPE, "1")
    with pytest.raises(BadInput, match="no run was started here: fix: did you mean .*sections?"):
        RunDir(tmp_path / "section").open()
    with pytest.raises(BadInput, match="`shikomi runs` lists the runs"):
        RunDir(tmp_path / "no" / "where").open()


def test_a_changed_recipe_or_data_file_is_refused_on_resume(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create(RECIPE, "1")
    run.check_recipe(RECIPE, "1")
    with pytest.raises(BadInput, match="learning_rate: was 0.0002, now 0.001"):
        run.check_recipe(OTHER, "2")
    run.check_data({"train.jsonl": "aa", "test.jsonl": "bb"})
    run.check_data({"train.jsonl": "aa", "test.jsonl": "bb"})
    with pytest.raises(BadInput, match="train.jsonl: was 'aa', now 'cc'.*put the old files back"):
        run.check_data({"train.jsonl": "cc", "test.jsonl": "bb"})


def test_extending_a_finished_run_opens_it_again_and_is_recorded(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create(RECIPE, "1")
    run.write_result({"finished": True, "steps": 20})
    run.extend(OTHER, "2", ["num_train_epochs=3"], step=20)
    assert not run.is_finished() and run.result()["steps"] == 20
    assert run.recipe_path.read_text() == OTHER
    run.check_recipe(OTHER, "2")
    [entry] = run.about()["extended"]
    assert entry["overrides"] == ["num_train_epochs=3"] and entry["step"] == 20


def test_a_stage_cannot_lead_out_of_the_run(tmp_path):
    run = RunDir(tmp_path)
    assert run.stage(1, "sft") == tmp_path / "stages" / "01-sft"
    for name in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(BadInput, match="folder name"):
            run.stage(1, name)


# Records


def test_metrics_are_one_json_object_a_line(tmp_path):
    run = RunDir(tmp_path)
    run.append_metrics({"step": 1, "loss": 0.1 + 0.2, "note": "zwei\nZeilen é"})
    run.append_metrics({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    lines = run.metrics_path.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.1 + 0.2, "note": "zwei\nZeilen é"},
        {"step": 2, "loss": None, "grad_norm": None},
    ]


def test_a_killed_process_leaves_every_record_it_wrote(tmp_path):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom shikomi.checkpoint.rundir import RunDir\n"
        "RunDir(Path(sys.argv[1])).append_metrics({'step': 1})\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert RunDir(tmp_path).read_metrics()[0] == [{"step": 1}]


def test_resuming_cuts_what_came_after_the_checkpoint_and_torn_lines(tmp_path):
    run = RunDir(tmp_path)
    assert run.truncate_metrics(0) == 0
    for step in range(1, 6):
        run.append_metrics({"step": step, "loss": 1 / step})
    run.append_metrics({"step": 3, "eval_loss": 0.5})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 3, "lo')
    assert run.truncate_metrics(after_step=3) == 3
    assert run.metrics_path.read_bytes().endswith(b"\n")
    run.append_metrics({"step": 4, "loss": 9.0})
    left = [(r["step"], r.get("loss")) for r in run.read_metrics()[0]]
    assert left == [(1, 1), (2, 0.5), (3, 1 / 3), (3, None), (4, 9.0)]
    assert run.truncate_metrics(after_step=-1) == 5 and run.metrics_path.read_bytes() == b""


def test_a_torn_line_of_an_early_step_goes_too(tmp_path):
    run = RunDir(tmp_path)
    run.append_metrics({"step": 1})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 2}')  # whole, but its end of line was never written
    assert run.truncate_metrics(after_step=9) == 1
    assert run.read_metrics()[0] == [{"step": 1}]


def test_a_live_run_can_be_followed(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_metrics() == ([], 0)
    run.append_metrics({"step": 1})
    records, at = run.read_metrics()
    assert records == [{"step": 1}]
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 2')
    assert run.read_metrics(at) == ([], at)
    with open(run.metrics_path, "a") as file:
        file.write("}\nnot json\n[1]\n")
    assert run.read_metrics(at)[0] == [{"step": 2}]


@pytest.mark.parametrize("name", ["write_result", "append_metrics", "log", "sync_metrics"])
def test_a_full_disk_is_try_again_and_keeps_what_was_there(tmp_path, monkeypatch, name):
    run = RunDir(tmp_path)
    run.write_result({"finished": False})
    run.append_metrics({"step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("builtins.open", full)
    arguments: dict[str, list] = {"log": ["text"], "append_metrics": [{"step": 2}]}
    arguments["write_result"] = [{"finished": True}]
    with pytest.raises(TryAgain, match="the disk is full"):
        getattr(run, name)(*arguments.get(name, []))
    monkeypatch.undo()
    assert run.result() == {"finished": False} and run.read_metrics()[0] == [{"step": 1}]


def test_the_log_gives_every_line_its_time(tmp_path):
    run = RunDir(tmp_path)
    run.log("one\ntwo é")
    run.log("three")
    lines = run.log_path.read_text("utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two é", "three"]
    assert all(line.startswith("20") and "+00:00 " in line for line in lines)


def test_a_broken_result_is_named(tmp_path):
    run = RunDir(tmp_path)
    assert run.result() == {} and not run.is_finished()
    run.result_path.write_text("{")
    with pytest.raises(BadInput, match="result.json: is not JSON"):
        run.is_finished()


# Many runs


def started(path: Path, recipe: str = RECIPE, losses: tuple[float, ...] = ()) -> RunDir:
    run = RunDir(path)
    run.create(recipe, recipe)
    for step, loss in enumerate(losses, 1):
        run.append_metrics({"step": step, "loss": loss})
    return run


def test_the_list_tells_running_from_stopped_by_the_lock(tmp_path):
    started(tmp_path / "a", losses=(2.0, 1.0)).write_result({"finished": True, "wall_seconds": 12.5})
    started(tmp_path / "b", losses=(3.0,)).append_metrics({"step": 1, "eval_loss": 4.0})
    started(tmp_path / "sweep" / "c")
    (tmp_path / "no-run").mkdir()
    with RunLock(tmp_path / "b"):
        rows = list_runs(tmp_path)
    assert [(r.name, r.status, r.step, r.loss) for r in rows] == [
        ("a", "finished", 2, 1.0),
        ("b", "running", 1, 3.0),
        ("sweep/c", "stopped", None, None),
    ]
    assert rows[0].seconds == 12.5 and 0 <= rows[1].seconds < 60 and rows[2].seconds == 0
    assert all(row.started.startswith("20") for row in rows)
    assert [r.status for r in list_runs(tmp_path / "b")] == ["stopped"]
    assert list_runs(tmp_path / "absent") == []


def test_listing_runs_needs_no_torch():
    program = "import sys, shikomi.checkpoint.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_the_difference_of_two_runs_leaves_out_where_they_are(tmp_path):
    started(tmp_path / "a")
    started(tmp_path / "b", OTHER.replace("runs/a", "runs/b"))
    assert diff_recipes(tmp_path / "a", tmp_path / "b") == ["stages[0].learning_rate: a 0.0002, b 0.001"]
    assert diff_recipes(tmp_path / "a", tmp_path / "a") == []
    with pytest.raises(BadInput, match="no run was started here"):
        diff_recipes(tmp_path / "a", tmp_path / "c")


def test_gc_takes_only_old_checkpoints_of_finished_runs(tmp_path):
    runs = {name: started(tmp_path / name) for name in ("done", "stopped", "extending")}
    for run in runs.values():
        for step in (9, 10, 11):
            save(run, step)
        run.final.mkdir()
        (run.final / "adapter_model.safetensors").write_bytes(b"x")
    runs["done"].write_result({"finished": True})
    runs["extending"].write_result({"finished": True})
    old = [runs["done"].checkpoints / f"step-{step:06d}" for step in (9, 10)]
    size = sum(len(data) for folder in old for data in contents(folder).values())
    before = contents(tmp_path)
    with RunLock(tmp_path / "extending"):
        dry = gc(tmp_path, dry_run=True)
        assert {k: v for k, v in contents(tmp_path).items() if not k.endswith(".lock")} == before
        wet = gc(tmp_path)
    assert dry == wet and wet.bytes == size > 0
    assert wet.paths == [checkpoint_folder(runs["done"].checkpoints, step) for step in (9, 10)]
    assert [p.name for p in runs["done"].checkpoints.iterdir()] == ["step-000011"]
    assert len(list(runs["stopped"].checkpoints.iterdir())) == len(list(runs["extending"].checkpoints.iterdir())) == 3
    assert gc(tmp_path, keep=0).paths == [
        checkpoint_folder(runs["done"].checkpoints, 11),
        *(checkpoint_folder(runs["extending"].checkpoints, step) for step in (9, 10, 11)),
    ]
    assert (runs["done"].final / "adapter_model.safetensors").exists()
    assert gc(tmp_path).bytes == 0
