"""The command line from outside: help, usage, errors, exit codes, JSON; the engine is replaced by fakes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import shikomi
from shikomi.cli import app, main
from shikomi.errors import BadInput, NonFinite, Problem, Stopped, TryAgain

RESULT = {
    "finished": True,
    "total_tokens": 12_345,
    "training_seconds": 12.0,
    "tokens_per_second": 1028.75,
    "peak_memory_bytes": 1_300_000_000,
    "final_loss": 0.4321,
    "evaluation": None,
}


def every_command():
    import typer

    def walk(command, words):
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*words, name])

    return list(walk(typer.main.get_command(app), []))


@pytest.fixture
def engine(monkeypatch):
    """A fake `shikomi.run` that records its calls; set `engine.fails` to an exception to raise."""
    calls = []
    fake = SimpleNamespace(calls=calls, fails=None)

    def act(name, value):
        def called(*arguments):
            calls.append((name, *arguments))
            if fake.fails is not None:
                raise fake.fails
            return value(arguments)

        return called

    def result(arguments):
        folder = arguments[0] if isinstance(arguments[0], Path) else arguments[0].output_dir
        return SimpleNamespace(output_dir=folder, values=RESULT)

    fake.train, fake.resume = act("train", result), act("resume", result)
    fake.dry_run = act("dry_run", lambda arguments: {"rows": 3, "tokens": 40, "example": "a"})
    monkeypatch.setitem(sys.modules, "shikomi.run", fake)
    monkeypatch.setattr(shikomi, "run", fake, raising=False)
    return fake


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "my.yaml").write_text("model: smollm2\ndata: rows.jsonl\n")
    return tmp_path / "my.yaml"


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_help_has_an_example_that_is_a_command(words, capsys):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    path = " ".join(["shikomi", *words])
    assert f"  {path}" in text.split("Usage:")[1].partition("\n")[2], "no example in the help"


def test_exit_codes_are_documented(capsys):
    for words in ([], ["train"], ["resume"]):
        main([*words, "--help"])
        text = capsys.readouterr().out
        assert all(f"\n    {code} " in text for code in (0, 2, 3, 75, 130, 143))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == shikomi.__version__


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], "'train'"),
        (["train", "--blah"], "--blah"),
        (["generate"], "MODEL"),
        (["chat", "x", "--dtype", "bf61"], "bf16"),
    ],
)
def test_usage_errors_exit_2_without_a_traceback(words, said, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_each_problem_has_its_place_found_allowed_and_fix_on_stderr(recipe, engine, capsys):
    engine.fails = BadInput(
        [
            Problem("not JSON", "rows.jsonl", 7, "`{`", "one JSON object", "close the brace " + "x" * 300),
            Problem("no such key", "my.yaml", 2),
        ]
    )
    assert main(["train", "my.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    first = lines.index("error: rows.jsonl:7: not JSON")
    assert lines[first + 1 : first + 3] == ["  found:   `{`", "  allowed: one JSON object"]
    assert lines[first + 3] == "  fix:     close the brace " + "x" * 300, "the line was wrapped"
    assert lines[first + 4 :] == ["error: my.yaml:2: no such key", "2 problems"]


@pytest.mark.parametrize(
    "error, code",
    [
        (BadInput("x"), 2),
        (NonFinite("x"), 3),
        (TryAgain("x"), 75),
        (Stopped("x", 143), 143),
        (Stopped("x", 130), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(recipe, engine, capsys, error, code):
    engine.fails = error
    assert main(["train", "my.yaml"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_exception_is_not_hidden(recipe, engine):
    engine.fails = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["train", "my.yaml"])


@pytest.mark.parametrize("error", [Stopped("stopped after step 3", 130), KeyboardInterrupt()])
def test_a_stopped_run_says_the_command_that_goes_on(recipe, engine, capsys, error):
    folder = recipe.parent / "runs" / "it's mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    engine.fails = error
    main(["train", "my.yaml", f"output_dir={folder}"])
    assert "shikomi resume 'runs/it'\"'\"'s mine'\n" in capsys.readouterr().err


def test_an_interrupt_before_the_run_exists_says_the_same_command_again(recipe, engine, capsys):
    engine.fails = KeyboardInterrupt()
    main(["train", "my.yaml", "seed=3"])
    assert "shikomi train my.yaml seed=3\n" in capsys.readouterr().err


def test_overrides_reach_the_recipe(recipe, engine):
    assert main(["train", "my.yaml", "learning_rate=0.5", "adapter.r=4", "output_dir=elsewhere"]) == 0
    ((name, given, _progress),) = engine.calls
    assert name == "train"
    assert given.stages[0].learning_rate == 0.5 and given.adapter.options["r"] == 4
    assert given.output_dir == recipe.parent / "elsewhere"


def test_the_result_is_for_people_or_one_json_object(recipe, engine, capsys):
    assert main(["train", "my.yaml"]) == 0
    text = capsys.readouterr().out
    assert "12,345 tokens" in text and "shikomi generate runs/my 'Some text'" in text
    assert main(["train", "my.yaml", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == RESULT
    assert len(captured.out.splitlines()) == 1


def test_json_reports_errors_as_one_object_too(recipe, engine, capsys):
    engine.fails = BadInput([Problem("bad", "f", 3, fix="good")])
    assert main(["train", "my.yaml", "--json"]) == 2
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["exit_code"] == 2 and found["problems"][0]["line"] == 3


def test_the_first_line_names_a_phase_and_torch_is_announced(recipe, engine, capsys):
    main(["train", "my.yaml"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["reading my.yaml ...", "importing torch ..."]


def test_dry_run_trains_nothing(recipe, engine, capsys):
    assert main(["train", "my.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    assert [call[0] for call in engine.calls] == ["dry_run"]


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--data"),
        (["my.yaml", "--data", "rows.jsonl"], "beside"),
        (["my.yaml", "seed"], "key=value"),
        (["missing.yaml"], "no such recipe"),
        (["my.yaml", "lerning_rate=1"], "learning_rate"),
    ],
)
def test_wrong_uses_of_train_are_explained(recipe, engine, capsys, words, said):
    assert main(["train", *words]) == 2
    assert said in capsys.readouterr().err
    assert engine.calls == []


def test_resume_hands_over_run_and_overrides(recipe, engine):
    assert main(["resume", "runs/my", "num_train_epochs=3"]) == 0
    ((name, folder, overrides, _),) = engine.calls
    assert (name, folder, list(overrides)) == ("resume", Path("runs/my"), ["num_train_epochs=3"])


def test_list_names_components_without_torch():
    program = "import sys; from shikomi.cli import main; main(['list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
    assert "lora" in done.stdout and "sft" in done.stdout and "macro_f1" in done.stdout


def test_torch_starts_with_threads_that_do_not_spin():
    program = (
        "import os, sys; from shikomi.cli import main; main(['--version'])\n"
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'], os.environ['OMP_DYNAMIC'])"
    )
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | {"OMP_DYNAMIC": "TRUE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=clean)
    assert done.stdout.splitlines()[-1] == "False PASSIVE FALSE"


def test_list_shows_the_options_of_one(capsys):
    assert main(["list", "adapters", "lora", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert {"r", "lora_alpha", "target_modules"} <= {option["key"] for option in options}


def test_an_unknown_kind_or_component_has_a_suggestion(capsys):
    assert main(["list", "adapter"]) == 2
    assert "adapters" in capsys.readouterr().err
    assert main(["list", "adapters", "lorra"]) == 2
    assert "did you mean `lora`" in capsys.readouterr().err


def test_models_list_says_size_hash_and_licence(capsys):
    assert main(["models", "--json"]) == 0
    (model,) = [row for row in json.loads(capsys.readouterr().out)["models"] if row["name"] == "smollm2"]
    assert model["licence"] == "Apache-2.0" and len(model["sha256"]) == 64 and model["disk_bytes"] > 1e8


def test_the_key_reference_and_the_schema(capsys):
    assert main(["recipe", "learning_rate"]) == 0
    assert capsys.readouterr().out.startswith("learning_rate: a number")
    assert main(["recipe", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "num_train_epochs" in schema["properties"]
    assert main(["recipe", "no_such_key"]) == 2


def test_a_reader_that_goes_away_is_no_error():
    program = "import sys; from shikomi.cli import main; sys.exit(main(['recipe']))"
    done = subprocess.run(
        f"{sys.executable} -c \"{program}\" | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
