"""`shikomi explain`: every number, code, error and key has an entry; nothing is explained that is not there."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preference_records import loss, micro_batches
from running import tiny_recipe, write_rows

import shikomi
from shikomi import errors, registry
from shikomi.cli import main
from shikomi.data.findings.codes import codes
from shikomi.data.report import PreferenceReport
from shikomi.errors import BadInput, Problem
from shikomi.evaluate import explanations as book
from shikomi.evaluate import topics
from shikomi.objectives.dpo import Dpo
from shikomi.objectives.reward import Reward
from shikomi.objectives.sft import Sft
from shikomi.recipe import reference

SOURCE = Path(shikomi.__file__).parent
VARIANTS = [Dpo(rpo_alpha=0.5), Reward(center_rewards_coefficient=0.01), Sft(dft=True)]


def said(capsys, *words: str) -> str:
    assert main(["explain", *words]) == 0
    return capsys.readouterr().out


def shown_names(objective) -> set[str]:
    """What the loop writes of an objective: the terms where there are several, the metrics, the differences."""
    whole, _, counts = micro_batches(objective.data)
    outcome = objective(whole)
    assert torch.isfinite(loss(outcome, counts))
    terms = set(outcome.terms) if len(outcome.terms) > 1 else set()
    return terms | set(outcome.metrics) | set(outcome.differences)


def every_objective() -> set[str]:
    plain = [registry.find("objectives", name)() for name in registry.names("objectives")]
    return set().union(*(shown_names(objective) for objective in [*plain, *VARIANTS]))


def numbers(value: object, path: tuple[str, ...] = ()) -> set[str]:
    """Keys under which JSON holds a number or null, without those whose names are a user's: files, metrics, labels."""
    if isinstance(value, dict):
        own = {"files", "formats", "versions", "details", "examples", "places", "samples", "components"}
        if value.keys() == {"low", "likely", "high"}:
            return {path[-1], *value}
        return set().union(set(), *(numbers(v, (*path, k)) for k, v in value.items() if k not in own))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(numbers(v, path) for v in value))
    if isinstance(value, list):
        return {path[-1]} if value and isinstance(value[0], int | float) else set()
    return {path[-1]} if isinstance(value, int | float) and not isinstance(value, bool) else set()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama) -> Path:
    """A run with everything that writes numbers: validation, samples, every metric of text, a comparison."""
    from shikomi.run import train

    folder = tmp_path_factory.mktemp("explain")
    rows = write_rows(folder / "rows.jsonl", 12)
    data = {"train": str(rows), "validation": 0.25, "test": str(rows)}
    metrics = {"metrics": [m for m in registry.names("metrics") if m not in ("accuracy", "macro_f1")]}
    keys = {"evaluate": metrics | {"limit": 2, "max_new_tokens": 2, "shots": 1}, "sample_prompts": ["a"]}
    train(tiny_recipe(tiny_llama, rows, folder / "run", data=data, max_steps=2, **keys))
    return folder / "run"


def test_every_number_of_a_run_has_an_entry(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    found = numbers(records, ("",)) | numbers(result)
    assert {"grad_norm", "eval_loss", "tokens_per_second", "ci95", "truncated", "p_value"} <= found
    assert sorted(name for name in found if book.of_metric(name) is None) == []


def test_every_number_of_every_objective_and_metric_has_an_entry():
    found = every_objective() | set(registry.names("metrics"))
    assert {"rewards/chosen", "log_odds_ratio", "center", "kl", "nll"} <= found
    assert sorted(name for name in found if book.of_metric(name) is None) == []
    assert book.of_metric("eval_rewards/margins") == book.of_metric("rewards/margins")
    assert book.of_metric("no_such_number") is None and book.of_metric("exit-3") is None


def test_a_number_without_an_entry_is_found(monkeypatch):
    known = {name: entry for name, entry in book.explanations().items() if name != "log_odds_ratio"}
    monkeypatch.setattr(book, "explanations", lambda: known)
    assert [name for name in every_objective() if book.of_metric(name) is None] == ["log_odds_ratio"]


def test_every_count_of_a_data_report_has_an_entry():
    counts = {name for name, value in PreferenceReport().as_dict().items() if isinstance(value, int)}
    assert "contradictions" in counts
    assert sorted(name for name in counts if book.of_metric(name) is None) == []


def test_nothing_is_explained_that_no_run_writes(run):
    """An entry of a number that was renamed or removed would go on telling what is no longer so."""
    elsewhere = {"label_nll", "memory_bound_bytes", "entropy"}  # test_outcomes.json, --dry-run; said to be absent
    elsewhere |= {"accuracy", "macro_f1", "peak_device_memory_bytes", "recompute", "cost"}  # `plan --json`
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = every_objective() | numbers(records, ("",)) | numbers(json.loads((run / "result.json").read_text()))
    written |= set(PreferenceReport().as_dict()) | set(registry.names("metrics")) | elsewhere
    explained = {e.name for e in book.explanations().values() if e.group in book.METRIC_GROUPS}
    assert explained <= written, explained - written


def test_every_exit_code_and_kind_of_error_has_an_entry(capsys):
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.ShikomiError)]
    for kind in kinds:
        if kind is not errors.ShikomiError:
            found = topics.find(kind.__name__)
            assert f"exit-{kind('x').exit_code}" in [topic.name for topic in found]
    used = {value for name, value in vars(errors).items() if name.startswith("EXIT_")} | {0, 1}
    assert {f"exit-{code}" for code in used} == {
        e.name for e in book.explanations().values() if e.group == "exit codes"
    }
    assert "non-finite-loss" in said(capsys, "3") == said(capsys, "exit code 3") == said(capsys, "exit-3")


def messages(*raised: str) -> list[tuple[str, str]]:
    """(place, text) of every raise of these errors in the source, what is computed left out."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in raised:
                texts = [n.value for a in node.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
                found.append((f"{path.name}:{node.lineno}", "".join(t for t in texts if isinstance(t, str))))
    return found


def test_every_message_to_try_again_and_of_a_loss_that_is_not_finite_is_explained():
    found = [(place, text) for place, text in messages("TryAgain", "NonFinite") if text]
    assert len(found) >= 8
    unexplained = [(place, text) for place, text in found if not book.of_message(text)]
    assert unexplained == []


def test_what_an_error_says_is_in_the_source():
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")).casefold()
    for entry in book.explanations().values():
        lost = [part for part in entry.says if part.casefold() not in source and part != "loss nan"]
        assert not lost, f"{entry.name}: no message says {lost}"


def test_every_finding_and_every_recipe_key_is_found_under_its_name():
    for code in codes().values():
        (topic,) = topics.find(code.code.lower())
        assert topic.kind == "finding" and ("what to do", code.fix) in topic.paragraphs
    for key, kind, _, about in reference():
        found = [topic for topic in topics.find(key) if topic.kind == "recipe key"]
        assert any(topic.title == about and topic.paragraphs[0][1].startswith(kind) for topic in found)


def test_every_entry_says_what_it_is_and_what_to_do():
    for entry in book.explanations().values():
        healthy = entry.healthy or entry.group in ("exit codes", "errors")
        assert entry.title and entry.meaning and entry.do and healthy, entry.name
        assert not entry.says or entry.group == "errors"


@pytest.mark.parametrize(
    "words, parts",
    [
        ("grad_norm", ["grad_norm (number): length of the gradient", "healthy: 0.1 to 5", "what to do: Growing"]),
        ("eval_rewards/margins", ["eval_rewards/margins (number)", "Measured on the validation rows."]),
        ("learning_rate", ["learning_rate (number)", "learning_rate (recipe key): Peak", "default 0.0002"]),
        ("prompt", ["data.prompt (recipe key)", "prompt (adapter): Prompt tuning"]),
        ("adapter.r", ["r (option): lora: rank of the update", "r (option): dora:"]),
        ("DPO", ["dpo (objective): DPO: direct preference optimization", "shikomi list objectives dpo"]),
        ("D102", ["D102 (finding): error: a line cannot be read"]),
        ("out of memory with micro_batch_tokens=2048: lower it", ["out-of-memory (error)"]),
        ("the hub could not be reached for a/b: timed out", ["hub-unreachable (error)"]),
    ],
)
def test_what_is_printed(words, parts, capsys):
    text = " ".join(said(capsys, words).split())
    assert [part for part in parts if part not in text] == []


def test_lines_fit_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    bodies = [line for line in said(capsys, "loss").splitlines() if line.startswith("  ")]
    assert len(bodies) > 5 and max(map(len, bodies)) <= 60


@pytest.mark.parametrize(
    "typed, meant", [("grad_nrom", "grad_norm"), ("learning_rat", "learning_rate"), ("exit-4", "exit-"), ("dp0", "dpo")]
)
def test_a_misspelt_name_gives_the_nearest(typed, meant, capsys):
    assert main(["explain", typed]) == 2
    assert f"did you mean `{meant}" in capsys.readouterr().err


def test_an_unknown_name_says_where_the_list_is(capsys):
    with pytest.raises(BadInput) as raised:
        topics.find("zzzzzz")
    problem = Problem("nothing is known under this name", found="zzzzzz", fix="`shikomi explain` lists what it knows")
    assert raised.value.problems == [problem]


def test_without_a_name_everything_is_listed(capsys):
    text = said(capsys)
    for name in ("grad_norm", "exit-75", "out-of-memory", "D101", "data.prompt", "dora", "macro_f1"):
        assert name in text
    listed = json.loads(said(capsys, "--json"))["topics"]
    assert "rewards/margins" in listed["number"] and "lora_alpha" in listed["option"]


def test_json(capsys):
    said_once = json.loads(said(capsys, "p_value", "--json"))
    (entry,) = said_once["explanations"]
    assert (said_once["topic"], entry["kind"], entry["name"]) == ("p_value", "number", "p_value")
    assert [label for label, _ in entry["paragraphs"]] == ["", "healthy", "what to do"]


def test_torch_is_not_imported():
    program = "import sys; from shikomi.cli import main; main(['explain', 'beta']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "beta (option)" in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_the_page_of_the_guide_is_current(repository, monkeypatch):
    monkeypatch.chdir(repository)
    pages = runpy.run_path(str(repository / "docs" / "generate.py"))["PAGES"]
    page = (repository / "docs" / "guide" / "metrics.md").read_text(encoding="utf-8")
    assert page == pages["metrics.md"](), "run: python docs/generate.py"
    assert all(f"`{name}`" in page for name in [*book.explanations(), *codes()])


def test_the_report_explains_its_columns(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col" title="exp of the loss. Among how many' in page and "shikomi explain NAME" in page
