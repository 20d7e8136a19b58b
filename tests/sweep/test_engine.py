"""Running the cells and what is written of them, with a runner that trains nothing."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest

from shikomi.checkpoint.lock import RunLock
from shikomi.checkpoint.rundir import RunDir
from shikomi.errors import BadInput, Stopped, TryAgain
from shikomi.progress import Silent
from shikomi.sweep.cells import make_sweep
from shikomi.sweep.check import Checked
from shikomi.sweep.engine import run_sweep
from shikomi.sweep.grid import Axis, Grid, Method
from shikomi.sweep.pictures import score_svg
from shikomi.sweep.table import columns_of
from shikomi.sweep.write import write_results

METHODS = (
    Method("full", {"adapter": "full"}),
    Method("lora", {}),
    Method("low", {"adapter.r": 2, "learning_rate": 1e-5}),
)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures and resamples are most of the time of a write; the tests that look at them put them back."""
    monkeypatch.setattr("shikomi.sweep.paired.RESAMPLES", 50)
    monkeypatch.setattr("shikomi.sweep.write.score_svg", lambda results, key, salt: "")


class Noted(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def plan(base, tmp_path):
    """Makes a sweep of three methods with two seeds; `seeds`, `changes` to the recipe."""

    def make(*changes, seeds=(0, 1), methods=METHODS, folder="out"):
        return make_sweep(base, list(changes), Grid(methods=methods, seeds=seeds), tmp_path / folder)

    return make


def test_every_cell_runs_once_in_its_folder(plan, checked, runner, tmp_path):
    results = run_sweep(plan(), checked, Silent(), runner)
    assert runner.ran == [f"{m}_seed-{s}" for s in (0, 1) for m in ("full", "lora", "low")]
    assert all(cell["status"] == "finished" for cell in results["cells"])
    assert json.loads((tmp_path / "out" / "sweep.json").read_bytes()) == results
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} == {
        *("sweep.json", "sweep.csv", "table.md", "sweep.html", ".lock")
    }


def test_what_is_finished_is_not_run_again_and_a_failed_cell_is_tried_again(plan, checked, runner, failure, tmp_path):
    runner.fails["lora_seed-0"] = failure
    results = run_sweep(plan(), checked, Silent(), runner)
    assert len(runner.ran) == 6, "the sweep goes on after a cell that fails"
    (failed,) = [cell for cell in results["cells"] if cell["status"] != "finished"]
    assert failed["name"] == "lora_seed-0" and failed["status"] == "failed"
    assert failed["error"]["message"] == failure.message and failed["error"]["output"] == "last words"
    for name in ("table.md", "sweep.csv", "sweep.html"):
        assert failure.message in (tmp_path / "out" / name).read_text(), name
    runner.ran.clear()
    runner.fails.clear()
    results = run_sweep(plan(), checked, Silent(), runner)
    assert runner.ran == ["lora_seed-0"]
    assert all(cell["status"] == "finished" and cell["error"] is None for cell in results["cells"])
    runner.ran.clear()
    assert run_sweep(plan(), checked, Silent(), runner) == results and runner.ran == []


def test_a_stopped_sweep_keeps_what_it_has_and_goes_on(plan, checked, runner, tmp_path):
    runner.fails["low_seed-0"] = Stopped("stopped after step 4 of 9; it is saved", 130)
    with pytest.raises(Stopped, match="low_seed-0") as caught:
        run_sweep(plan(), checked, Silent(), runner)
    assert caught.value.exit_code == 130
    states = [cell["status"] for cell in json.loads((tmp_path / "out" / "sweep.json").read_bytes())["cells"]]
    assert states == ["finished", "finished", "stopped", "waiting", "waiting", "waiting"]
    runner.fails.clear()
    runner.ran.clear()
    run_sweep(plan(), checked, Silent(), runner)
    assert runner.ran == ["low_seed-0", "full_seed-1", "lora_seed-1", "low_seed-1"]


def test_a_grid_can_grow(plan, checked, runner):
    run_sweep(plan(seeds=(0, 1)), checked, Silent(), runner)
    runner.ran.clear()
    progress = Noted()
    run_sweep(plan(seeds=(0, 1, 2)), checked, progress, runner)
    assert runner.ran == ["full_seed-2", "lora_seed-2", "low_seed-2"]
    assert progress.notes[0] == "6 of 9 cells are finished already and are not run again"
    progress = Noted()
    run_sweep(plan(seeds=(0, 1), methods=METHODS[:2]), checked, progress, runner)
    assert any("low_seed-0" in note and "earlier grid" in note for note in progress.notes)


def test_a_changed_recipe_is_refused_with_the_difference(plan, checked, runner):
    run_sweep(plan(), checked, Silent(), runner)
    with pytest.raises(BadInput) as caught:
        run_sweep(plan("batch_size=8"), checked, Silent(), runner)
    assert len(caught.value.problems) == 6
    assert "full_seed-0" in str(caught.value) and "batch_size: was 16, now 8" in str(caught.value)
    assert len(runner.ran) == 6
    with pytest.raises(BadInput, match="evaluate.limit: was None, now 5"):
        run_sweep(plan("evaluate.limit=5"), checked, Silent(), runner)


def test_changed_data_is_refused(plan, checked, runner):
    run_sweep(plan(), checked, Silent(), runner)
    with pytest.raises(BadInput, match="test.rows.jsonl: was 'digest', now 'other'"):
        run_sweep(plan(), Checked({}, {"test.rows.jsonl": "other"}), Silent(), runner)


def test_foreign_folders_are_refused(plan, checked, runner, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("mine")
    with pytest.raises(BadInput, match="is no sweep"):
        run_sweep(plan(), checked, Silent(), runner)
    RunDir(tmp_path / "run").create("model: x", "digest")
    with pytest.raises(BadInput, match="folder of a run"):
        run_sweep(plan(folder="run"), checked, Silent(), runner)
    assert runner.ran == [] and (tmp_path / "out" / "table.md").read_text() == "mine"


def test_two_sweeps_cannot_write_one_folder(plan, checked, runner, tmp_path):
    with RunLock(tmp_path / "out"), pytest.raises(TryAgain):
        run_sweep(plan(), checked, Silent(), runner)
    assert runner.ran == []


def test_the_untouched_model_is_measured_once(plan, checked, runner, failure):
    runner.fails["full_seed-0"] = failure
    results = run_sweep(plan(), checked, Silent(), runner)
    measured = {r.output_dir.name: bool(r.evaluate.baselines) for r in runner.recipes}
    assert [name for name, wanted in measured.items() if wanted] == ["full_seed-0", "lora_seed-0"]
    assert results["baselines"]["zero-shot"]["n"] == 40


def test_another_model_has_baselines_of_its_own(base, checked, runner, tmp_path):
    grid = Grid(axes=(Axis("model", ("smollm2", "tinyllama")), Axis("adapter.r", (2, 4))))
    run_sweep(make_sweep(base, [], grid, tmp_path / "out"), checked, Silent(), runner)
    wanted = [r.output_dir.name for r in runner.recipes if r.evaluate.baselines]
    assert wanted == ["model-smollm2_r-2", "model-tinyllama_r-2"]
    runner.recipes.clear()
    grid = Grid(axes=(Axis("evaluate.limit", (5, 6)), Axis("adapter.r", (2, 4))))
    run_sweep(make_sweep(base, [], grid, tmp_path / "rows"), checked, Silent(), runner)
    assert [r.output_dir.name for r in runner.recipes if r.evaluate.baselines] == ["limit-5_r-2", "limit-6_r-2"]


def test_progress_counts_cells_and_says_when_the_sweep_ends(plan, checked, runner, failure):
    times = iter(range(0, 1000, 30))
    progress = Noted()
    runner.fails["lora_seed-0"] = failure
    run_sweep(plan(), checked, progress, runner, clock=lambda: float(next(times)))
    assert progress.notes[0] == "cell 1 of 6, full_seed-0: accuracy 82.5%, 30 s; about 2 min 30 s left"
    assert progress.notes[1].startswith("cell 2 of 6, lora_seed-0: failed, NonFinite: the loss")
    assert progress.notes[-1].startswith("cell 6 of 6, low_seed-1: accuracy") and "left" not in progress.notes[-1]


def test_keep_clears_checkpoints_of_finished_cells(plan, checked, runner, tmp_path):
    def trains(recipe, progress):
        runner(recipe, progress)
        for step in (10, 20):
            folder = recipe.output_dir / "checkpoints" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")

    run_sweep(plan(), checked, Silent(), trains, keep=1)
    left = sorted(p.name for p in (tmp_path / "out").glob("*/checkpoints/*"))
    assert left == ["step-000020"] * 6


def test_the_numbers_are_those_of_the_cells_results(plan, checked, runner, tmp_path):
    results = run_sweep(plan(), checked, Silent(), runner)
    for cell in results["cells"]:
        result = json.loads((Path(cell["folder"]) / "result.json").read_bytes())
        for key in ("trainable_parameters", "peak_memory_bytes", "tokens_per_second", "training_seconds", "final_loss"):
            assert cell[key] == result[key]
        assert cell["score"]["value"] == result["evaluation"]["trained"]["metrics"]["accuracy"]["value"]
        assert cell["score"]["ci95"] == result["evaluation"]["trained"]["metrics"]["accuracy"]["ci95"]
        assert cell["validation_best"] == result["stages"][0]["best"]
        assert cell["adapter_bytes"] == (Path(cell["folder"]) / "final" / "adapter_model.safetensors").stat().st_size
    for row in results["settings"]:
        own = [cell for cell in results["cells"] if cell["setting"] == row["name"]]
        for key in ("peak_memory_bytes", "tokens_per_second", "final_loss", "label_nll", "adapter_bytes"):
            values = [cell[key] for cell in own]
            assert row[key]["mean"] == pytest.approx(mean(values)) and row[key]["spread"] == pytest.approx(
                stdev(values)
            )
        scores = [cell["score"]["value"] for cell in own]
        assert row["score"]["mean"] == pytest.approx(mean(scores)) and row["score"]["spread"] == pytest.approx(
            stdev(scores)
        )
        assert row["trained_percent"] == pytest.approx(100 * mean(cell["trainable_parameters"] for cell in own) / 1e6)
    full = results["settings"][0]["score"]["mean"]
    assert [row["percent_of_full"] for row in results["settings"]] == pytest.approx(
        [100 * row["score"]["mean"] / full for row in results["settings"]]
    )
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "sweep.csv").read_text())))
    assert [float(line["score"]) for line in lines] == [cell["score"]["value"] for cell in results["cells"]]
    assert [int(line["peak_memory_bytes"]) for line in lines] == [c["peak_memory_bytes"] for c in results["cells"]]


def test_a_difference_is_paired_by_seed_on_the_same_rows(plan, checked, runner):
    results = run_sweep(plan(), checked, Silent(), runner)
    full, lora, low = results["settings"]
    assert full["difference"] is None
    # Both are right in all rows but multiples of 6 and 7 for full, as for lora: names of four letters.
    assert lora["difference"]["value"] == pytest.approx(0) and lora["difference"]["ci95"] == pytest.approx([0, 0])
    assert low["difference"]["seeds"] == 2 and low["difference"]["n"] == 40
    assert full["label_nll"]["mean"] == pytest.approx(mean([(33 * 0.1 + 7 * 2) / 40, (34 * 0.1 + 6 * 2) / 40]))


def test_a_difference_by_hand(base, checked, tmp_path, runner, monkeypatch):
    monkeypatch.setattr("shikomi.sweep.paired.RESAMPLES", 2000)
    # full (4 letters) with seed 0 errs in rows 0, 6, .. 36 (7 rows), with seed 1 in 0, 7, .. 35 (6 rows).
    grid = Grid(
        methods=(Method("one", {"adapter": "full"}), Method("other", {"adapter": "full", "learning_rate": 1e-5}))
    )

    def trains(recipe, progress):
        runner(recipe.model_copy(update={"seed": 1}) if recipe.output_dir.name == "other" else recipe, progress)

    results = run_sweep(make_sweep(base, [], grid, tmp_path / "out"), checked, Silent(), trains)
    gap = results["settings"][1]["difference"]
    assert gap["value"] == pytest.approx((34 - 33) / 40)
    assert (gap["gained"], gap["lost"]) == (6, 5) and gap["smallest"] >= 6 / 40
    # 11 of 40 rows differ, 6 up and 5 down: variance of the mean is (11/40 - (1/40)^2) / 40 = 0.083^2.
    assert gap["ci95"] == pytest.approx([0.025 - 1.96 * 0.0828, 0.025 + 1.96 * 0.0828], abs=0.02)
    assert gap["smallest"] == pytest.approx(2.8016 * 0.0828, rel=0.06)


def test_other_test_rows_are_said_and_not_compared(plan, checked, runner):
    def trains(recipe, progress):
        runner(recipe, progress)
        if recipe.output_dir.name.startswith("lora"):
            path = recipe.output_dir / "test_outcomes.json"
            path.write_text(path.read_text().replace('"r39"', '"r40"'))

    results = run_sweep(plan(), checked, Silent(), trains)
    assert results["settings"][1]["difference"] is None
    assert "lora is not compared with full: its test rows are others" in results["notes"]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.tags, self.texts, self.addresses = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_holds_everything_and_loads_nothing(plan, checked, runner, tmp_path, monkeypatch):
    results = run_sweep(plan(), checked, Silent(), runner)
    monkeypatch.setattr("shikomi.sweep.write.score_svg", score_svg)
    write_results(tmp_path / "out", results)
    text = (tmp_path / "out" / "sweep.html").read_text()
    page = Page()
    page.feed(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    assert text.count("<svg") == 2
    for _, write in columns_of(results):
        for row in results["settings"]:
            assert write(row) in page.texts
    # Both pictures take their colours from the page, which has a dark theme; nothing of them is white or black.
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert all("var(--accent)" in p and "var(--muted)" in p and "#ffffff" not in p for p in pictures)
    assert all(row["name"] in p for row in results["settings"] for p in pictures)


def test_text_of_a_sweep_is_escaped(base, checked, runner, failure, tmp_path):
    runner.fails["lora"] = type(failure)("<b>", "<script>x|y</script>")
    grid = Grid(methods=(Method("full", {"adapter": "full"}), Method("lora", {})))
    run_sweep(make_sweep(base, [], grid, tmp_path / "out"), checked, Silent(), runner)
    assert "<script>" not in (tmp_path / "out" / "sweep.html").read_text()
    assert "x\\|y" in (tmp_path / "out" / "table.md").read_text()


def test_the_table_has_a_row_for_each_setting(plan, checked, runner, tmp_path):
    results = run_sweep(plan(), checked, Silent(), runner)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    header, _, *rows = [line for line in lines if line.startswith("|")]
    titles = [title.strip() for title in header.strip("|").split("|")]
    assert len(rows) == 3 and all(len(row.strip("|").split("|")) == len(titles) for row in rows)
    assert titles[:2] == ["cell", "accuracy (95% interval)"] and "could be seen from" in titles
    assert "GPU memory" not in titles, "a column without numbers"
    first = dict(zip(titles, (cell.strip() for cell in rows[0].strip("|").split("|")), strict=True))
    score = results["settings"][0]["score"]
    low, high = (100 * bound for bound in score["ci95"])
    assert (
        first["accuracy (95% interval)"]
        == f"{100 * score['mean']:.1f}% ± {100 * score['spread']:.1f} ({low:.1f} to {high:.1f}%)"
    )
    text = "\n".join(lines)
    assert "The smallest that could be seen" in text and "over 2 seeds" in text
