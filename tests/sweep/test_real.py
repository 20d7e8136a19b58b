"""Sweeps that train: on a tiny model within this process, and once in processes of their own with a kill."""

import json
import os
import signal
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import yaml

from shikomi import run
from shikomi.checkpoint.rundir import RunDir
from shikomi.cli import main
from shikomi.errors import BadInput, Stopped
from shikomi.evaluate.outcomes import label_nll, read_outcomes
from shikomi.metrics import difference
from shikomi.metrics.accuracy import Accuracy
from shikomi.plan.architecture import known
from shikomi.progress import Silent
from shikomi.recipe import dump_recipe
from shikomi.recipe.components import build
from shikomi.sweep.cells import make_sweep
from shikomi.sweep.check import check_sweep
from shikomi.sweep.engine import run_sweep
from shikomi.sweep.grid import Axis, Grid, Method, read_grid
from shikomi.sweep.runner import CellFailed, run_in_child

WORDS = ("server", "library", "font", "game")


def write_rows(path: Path, count: int, first: int) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": WORDS[(i + first) % 4]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("sweep")
    recipe = {
        "model": str(tiny_llama),
        "adapter": {"name": "lora", "r": 4},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", 40, 0)),
            "test": str(write_rows(folder / "test.jsonl", 12, 1)),
        },
        **{"dtype": "fp32", "max_steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        "evaluate": {"metrics": ["accuracy", "loss"], "baselines": ["zero-shot"]},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SHIKOMI_CACHE", str(place / "cache"))


def here(recipe, progress):
    """A runner in this process."""
    run.train(recipe, progress)


@pytest.fixture(scope="module")
def results(place):
    """Three methods with two seeds, trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("shikomi.sweep.write.score_svg", lambda results, key, salt: "")  # most of the time of a write
        methods = (
            Method("full", {"adapter": "full", "learning_rate": 1e-3}),
            Method("lora-qv-r2", {"adapter": {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}}),
            Method("lora-r8", {"adapter.r": 8}),
        )
        sweep = make_sweep(place / "my.yaml", [], Grid(methods=methods, seeds=(0, 1)), place / "out")
        return run_sweep(sweep, check_sweep(sweep, Silent()), Silent(), here)


def test_cells_of_a_seed_see_the_same_rows_in_the_same_order(results):
    tokens, starts = {}, {}
    for cell in results["cells"]:
        records, _ = RunDir(Path(cell["folder"])).read_metrics()
        tokens.setdefault(cell["seed"], set()).add(tuple(record["tokens"] for record in records))
        starts.setdefault(cell["seed"], []).append(records[0]["loss"])
    assert {seed: len(orders) for seed, orders in tokens.items()} == {0: 1, 1: 1}
    # Before the first update no method changes the model, so the first loss tells whether the rows are the same.
    for losses in starts.values():
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert starts[0][0] != pytest.approx(starts[1][0], rel=1e-5)


def test_the_table_says_what_the_results_say(results):
    for cell in results["cells"]:
        result = RunDir(Path(cell["folder"])).result()
        assert cell["status"] == "finished" and cell["trainable_parameters"] == result["trainable_parameters"]
        assert cell["score"]["value"] == result["evaluation"]["trained"]["metrics"]["accuracy"]["value"]
    full, small, large = results["settings"]
    assert full["trained_percent"] == pytest.approx(100) and small["trained_percent"] < large["trained_percent"] < 100
    assert small["adapter_bytes"]["mean"] < large["adapter_bytes"]["mean"] < full["adapter_bytes"]["mean"]


def test_differences_are_of_the_stored_outcomes(results, place):
    for row in results["settings"][1:]:
        gaps = []
        for seed in (0, 1):
            one, other = (read_outcomes(place / "out" / f"{name}_seed-{seed}") for name in ("full", row["name"]))
            assert one["ids"] == other["ids"] and len(set(one["ids"])) == 12
            gap = difference(Accuracy(), one["predictions"], other["predictions"], one["references"])
            gaps.append(gap["value"])
        assert row["difference"]["value"] == pytest.approx(sum(gaps) / 2) and row["difference"]["n"] == 12


def test_outcomes_are_what_the_result_counts(results):
    for cell in results["cells"]:
        outcome = read_outcomes(Path(cell["folder"]))
        right = sum(p == r for p, r in zip(outcome["predictions"], outcome["references"], strict=True))
        assert right / 12 == pytest.approx(cell["score"]["value"])
        measured = RunDir(Path(cell["folder"])).result()["evaluation"]["trained"]["metrics"]["loss"]["value"]
        assert -sum(outcome["logp"]) / sum(outcome["tokens"]) == pytest.approx(measured)
        # The label is one of four whose probabilities sum to 1: less is at stake than for the label among all texts.
        assert all(0 <= nll <= -logp + 1e-6 for nll, logp in zip(outcome["label_nll"], outcome["logp"], strict=True))
        wrong = [
            n
            for n, p, r in zip(*(outcome[k] for k in ("label_nll", "predictions", "references")), strict=True)
            if p != r
        ]
        assert all(nll > 0.69 for nll in wrong), "a label that is not the likeliest has less than half"


def test_label_nll_by_hand():
    import numpy as np

    scores = np.log(np.array([[0.2, 0.6], [0.01, 0.03], [0.5, 0.5]]))
    found = label_nll(scores, ("a", "b"), ("a", "b", "c"))
    assert found == (pytest.approx(np.log(4)), pytest.approx(np.log(4 / 3)), None)


def test_all_settings_are_checked_before_the_first_starts(place, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", 3, 0)
    bad.write_text("not json\n")
    grid = Grid(
        axes=(Axis("data.train", (str(bad), "nowhere.jsonl", str(place / "train.jsonl"))), Axis("adapter.r", (2, 4)))
    )
    sweep = make_sweep(place / "my.yaml", [], grid, tmp_path / "out")
    with pytest.raises(BadInput) as caught:
        check_sweep(sweep, Silent())
    said = [problem.what for problem in caught.value.problems]
    names = [setting.name for setting in sweep.settings]
    assert any(text.startswith(f"cell {names[0]}, {names[1]}: ") for text in said)
    assert any(text.startswith(f"cell {names[2]}, {names[3]}: ") for text in said)
    assert not any(names[4] in text or names[5] in text for text in said)
    assert not (tmp_path / "out").exists()


def test_changed_test_rows_are_refused(place, tmp_path):
    rows = write_rows(tmp_path / "test.jsonl", 6, 0)

    plan = make_sweep(place / "my.yaml", [f"data.test={rows}", "max_steps=1"], Grid(seeds=(0, 1)), tmp_path / "out")
    run_sweep(plan, check_sweep(plan, Silent()), Silent(), here)
    write_rows(rows, 6, 1)
    with pytest.raises(BadInput, match="the data is not what this sweep was started with"):
        check_sweep(plan, Silent())


def test_dry_run_lists_cells_with_what_they_train_and_writes_nothing(place, capsys):
    words = ["sweep", "my.yaml", "--grid", "adapter=full,lora", "--grid", "learning_rate=1e-3,1e-2", "--seeds", "0,1"]
    assert main([*words, "--dry-run", "-o", "dry", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["cells"] == 8 and not (place / "dry").exists()
    rows = {row["name"]: row for row in found["settings"]}
    full, lora = rows["full_learning_rate-0.001"], rows["lora_learning_rate-0.01"]
    assert full["trainable_parameters"] == full["total_parameters"] > lora["trainable_parameters"] > 0
    assert lora["overrides"] == ['adapter="lora"', "learning_rate=0.01"] and lora["steps"] == 4
    assert main([*words, "--dry-run", "-o", "dry"]) == 0
    text = capsys.readouterr().out
    assert f"{lora['trainable_parameters']:,}" in text and "4 settings, 2 seeds each: 8 runs" in text


def test_the_command_says_which_cells_failed_and_exits_1(place, capsys, monkeypatch):
    def fails(recipe, progress):
        if recipe.adapter.name == "full":
            raise CellFailed("killed", "by the system, most likely for memory")
        run.train(recipe, progress)

    monkeypatch.setattr("shikomi.sweep.engine.run_sweep.__kwdefaults__", None, raising=False)
    monkeypatch.setattr("shikomi.sweep.engine.run_sweep.__defaults__", (fails, *run_sweep.__defaults__[1:]))
    words = ["sweep", "my.yaml", "max_steps=1", "--grid", "adapter=lora,full", "-o", "partly"]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "full failed, killed: by the system" in text and "sweep.html" in text
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [cell["status"] for cell in found["cells"]] == ["finished", "failed"]


def test_a_wrong_command_line_is_told_with_its_cells(capsys):
    assert main(["sweep", "my.yaml", "--grid", "adapter=full,lroa", "--reference", "x"]) == 2
    said = capsys.readouterr().err
    assert "cell lroa: `adapter: lroa` does not exist" in said and "--reference x is no cell" in said
    assert main(["sweep", "my.yaml", "oops", "--grid", "adapter=full,lora"]) == 2
    assert "not a key=value" in capsys.readouterr().err


class Stopping(Silent):
    """Sends SIGTERM to this process at the second step."""

    def advance(self, record):
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_processes_of_their_own_are_stopped_saved_and_resumed(place, tmp_path):
    grid = Grid(methods=(Method("lora", {}), Method("small", {"adapter.r": 2})))
    changes = ["max_steps=60", "evaluate=null"]
    sweep = make_sweep(place / "my.yaml", changes, grid, tmp_path / "out")
    checked = check_sweep(sweep, Silent())

    def first_here(recipe, progress):
        (here if recipe.output_dir.name == "lora" else run_in_child)(recipe, progress)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="small.*it is saved") as caught:
        # Steps of the first cell are not passed on: only a child's may stop it.
        run_sweep(
            sweep, checked, Stopping(), lambda r, p: first_here(r, p if r.output_dir.name == "small" else Silent())
        )
    assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before
    records, _ = RunDir(tmp_path / "out" / "small").read_metrics()
    saved = records[-1]["step"]
    assert 2 <= saved < 60

    finished = (tmp_path / "out" / "lora" / "result.json").stat().st_mtime_ns
    ballast = bytearray(800_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])  # held by this process, and by no cell
    results = run_sweep(sweep, checked, Silent(), run_in_child)
    assert [cell["status"] for cell in results["cells"]] == ["finished", "finished"]
    assert (tmp_path / "out" / "lora" / "result.json").stat().st_mtime_ns == finished
    resumed, _ = RunDir(tmp_path / "out" / "small").read_metrics()
    assert resumed[:saved] == records and [r["step"] for r in resumed] == list(range(1, 61))
    assert 1e8 < results["cells"][1]["peak_memory_bytes"] < len(ballast)


def test_a_child_whose_sweep_is_gone_stops(place):
    recipe = make_sweep(place / "my.yaml", [], Grid(seeds=(3, 4)), place / "gone").cells[0].recipe
    child = subprocess.run(
        [sys.executable, "-m", "shikomi.sweep.child"],
        input=json.dumps(dump_recipe(recipe)) + "\n",  # and then the end of input
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == -signal.SIGTERM and not (place / "gone").exists()


@pytest.mark.parametrize(
    "program, kind, message",
    [
        ("import os; os.kill(os.getpid(), 9)", "killed", "memory"),
        ("import sys; print('what it said', file=sys.stderr); sys.exit(5)", "ended", "exit code 5"),
        ('import sys; print(\'["error", ["NonFinite", "at step 3"]]\'); sys.exit(3)', "NonFinite", "at step 3"),
    ],
)
def test_how_a_process_ended_is_told(place, monkeypatch, program, kind, message):
    recipe = make_sweep(place / "my.yaml", [], Grid(seeds=(3, 4)), place / "gone").cells[0].recipe
    start = subprocess.Popen

    def dead(words, **how):
        child = start([words[0], "-c", program], **how)
        child.wait()  # before it is told anything
        return child

    monkeypatch.setattr("subprocess.Popen", dead)
    with pytest.raises(CellFailed) as caught:
        run_in_child(recipe, Silent())
    assert caught.value.kind == kind and message in caught.value.message
    assert caught.value.output == ("what it said" if kind == "ended" else "")


def test_places_are_compared_at_equal_parameters(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository)
    grid = read_grid([], None, repository / "recipes" / "sweeps" / "lora.yaml")
    sweep = make_sweep(repository / "recipes" / "sweeps" / "sections-short.yaml", [], grid, tmp_path / "out")
    assert sweep.reference == "r8" and len(sweep.cells) == 12
    adapters = {cell.name: build("adapters", cell.recipe.adapter) for cell in sweep.cells}
    shapes = [
        adapters[name].trained_shapes(known("smollm2-135m")) for name in ("all-linear-r3", "attention-r8", "q-v-r16")
    ]
    trained = [sum(prod(shape) for shape in of_one.values()) for of_one in shapes]
    assert max(trained) < 1.01 * min(trained)


def test_the_methods_of_the_repository_are_cells(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository)
    grid = read_grid([], None, repository / "recipes" / "sweeps" / "methods.yaml")
    names = [method.name for method in grid.methods]
    assert names == [
        *("full", "lora-qv-r2", "lora-qv-r8", "lora-r8", "lora-r8-1e-3", "dora", "loraplus"),
        *("galore", "bottleneck", "prefix", "prompt"),
    ]
    sweep = make_sweep(repository / "recipes" / "sections-lora.yaml", [], grid, tmp_path / "out")
    assert [cell.name for cell in sweep.cells] == names and sweep.reference == "full" and sweep.notes == ()
