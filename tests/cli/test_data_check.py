"""`shikomi data check` from outside: exit codes, lines, JSON, the page, and the repaired file."""

import csv
import json
import subprocess
import sys

import pytest
from planted_defects import summaries

from shikomi.cli import main
from shikomi.data.findings.codes import codes

CLEAN = [{"prompt": f"What is the number {n}?", "completion": f"It is the number {n}."} for n in range(5)]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes rows to rows.jsonl in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def check(capsys, *words):
    """(exit code, the JSON object) of a check."""
    code = main(["data", "check", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def found(result):
    return {f["code"]: [p["line"] for p in f["places"]] for task in result["tasks"] for f in task["findings"]}


def test_clean_rows_and_warnings_exit_0_and_errors_exit_2(file, capsys):
    code, result = check(capsys, file(CLEAN))
    assert code == result["exit_code"] == 0 and found(result) == {}
    code, result = check(capsys, file([*CLEAN, CLEAN[2]]))
    assert code == 0 and found(result) == {"D201": [6]}
    code, result = check(capsys, file([*CLEAN, {"prompt": "p"}]))
    assert code == result["exit_code"] == 2 and found(result) == {"D103": [6]}
    assert main(["data", "check", "no.jsonl"]) == 2


def test_lines_say_place_excerpt_fix_and_sum(file, capsys):
    rows = [*CLEAN, CLEAN[2], {"prompt": "And now?", "completion": "I'm sorry, but I can't help with that."}]
    assert main(["data", "check", str(file(rows))]) == 0
    out = capsys.readouterr().out
    assert (
        "D201 warning: a row is a copy of an earlier row: 1" in out and "\n  rows.jsonl:6: What is the number 2?" in out
    )
    assert "rows.jsonl:7: I'm sorry, but I can't help with that." in out and "  fix: remove the rows" in out
    assert "rows: train 7; format: prompt_completion" in out and "tokens are estimated as characters / 4" in out
    assert "0 errors, 2 warnings, 0 notes" in out


def test_held_out_rows_are_compared(file, capsys):
    valid = file([CLEAN[1], {"prompt": "Is it new?", "completion": "Yes."}], "valid.jsonl")
    code, result = check(capsys, file(CLEAN), "--valid", valid)
    assert code == 2 and found(result) == {"D301": [1]}
    [place] = result["tasks"][0]["findings"][0]["places"]
    assert place["file"] == str(valid) and "rows.jsonl:2" in place["note"]


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "pairs"),
        ({"prompt": "p", "completion": "a", "label": True}, "thumbs"),
        ({"text": "a text"}, "conversations"),
        ({"question": "a?", "answer": "b."}, "conversations"),
    ],
)
def test_the_kind_of_rows_comes_from_their_keys(file, capsys, row, kind):
    _, result = check(capsys, file([{k: f"{v} {n}" if isinstance(v, str) else bool(n % 2) for k, v in row.items()}
                                    for n in range(6)]))  # fmt: skip
    [task] = result["tasks"]
    assert task["kind"] == kind and task["rows"] == {"train": 6} and task["errors"] == 0


def test_a_recipe_brings_its_templates_model_and_max_length(file, capsys, tmp_path):
    rows = [{"text": f"text number {n} " + "word " * (100 if n == 3 else 1), "label": "ab"[n % 2]} for n in range(10)]
    file(rows)
    (tmp_path / "r.yaml").write_text(
        "model: no/such/folder\nmax_length: 50\ndata: {train: rows.jsonl, prompt: '{text}', completion: '{label}'}\n"
    )
    code, result = check(capsys, tmp_path / "r.yaml")
    assert code == 0 and found(result) == {"D702": [4]}
    assert result["tasks"][0]["labels"] == {"a": 5, "b": 5} and "estimated" in result["reading"][0]


def test_a_model_counts_tokens(file, capsys, tiny_folder):
    folder = tiny_folder("llama")
    code, result = check(capsys, file(CLEAN), "--model", folder, "--max-length", 8)
    assert result["tasks"][0]["lengths"]["unit"] == "tokens" and found(result).keys() & {"D701", "D702"}
    assert code in (0, 2)
    assert main(["data", "check", str(file(CLEAN)), "--model", "no-such-model"]) == 2


def test_the_page_holds_every_finding_escaped(file, capsys, tmp_path):
    rows = [*CLEAN, CLEAN[1], {"prompt": "<script>x</script> and \x1b[0m", "completion": "an answer"}]
    assert main(["data", "check", str(file(rows)), "--html", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "D201" in page and "D501" in page and "rows.jsonl:6" in page and "rows.jsonl:7" in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "://" not in page and " src=" not in page
    assert "page: page.html" in capsys.readouterr().out


def test_fix_writes_a_new_file_and_says_what_it_changed(file, capsys, tmp_path):
    rows = [
        *CLEAN,
        CLEAN[0],  # dropped: a copy
        {"prompt": "p", "completion": " "},  # dropped: empty
        {"prompt": "Who is caf\u00c3\u00a9?", "completion": "Ask jane.roe@mailbox.org\u200b now."},
        {"prompt": "The key?", "completion": "It is ghp_" + "a1B2c3D4e5F6" * 3},
        {"prompt": "And now?", "completion": "I'm sorry, but I can't help with that."},  # stays
    ]
    path = file(rows)
    with path.open("a") as out:
        out.write("{broken\n")
    before = path.read_bytes()
    code, result = check(capsys, path, "--fix", "new.jsonl")
    assert code == 2 and path.read_bytes() == before
    made = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text("utf-8").splitlines()]
    assert made == [
        *CLEAN,
        {"prompt": "Who is café?", "completion": "Ask [e-mail] now."},
        {"prompt": "The key?", "completion": "It is [secret]"},
        rows[-1],
    ]
    fix = result["fix"]
    assert fix["rows"] == 8 and fix["dropped"] == {"D201": 1, "D105": 1, "D102": 1} and fix["left"] == {"D803": 1}
    assert {what.split()[0]: rows for what, rows in fix["rewritten"].items()} == {"characters": 1, "secrets": 2}
    code, result = check(capsys, "new.jsonl")
    assert code == 0 and found(result) == {"D803": [8]}
    assert main(["data", "check", str(path), "--fix", "other.jsonl"]) == 2
    assert "left out 1: a row is a copy of an earlier row (D201)" in capsys.readouterr().out


def test_fix_writes_over_nothing(file, capsys):
    path = file(CLEAN)
    for target in (path, "new.nonsense"):
        assert main(["data", "check", str(path), "--fix", str(target)]) == 2
    assert "already" in capsys.readouterr().err
    assert [json.loads(line) for line in path.read_text().splitlines()] == CLEAN


def test_fix_spells_labels_in_one_way(file, tmp_path, capsys):
    rows = [{"text": f"text {n}", "label": "good" if n % 2 else "bad"} for n in range(40)]
    rows[7]["label"], rows[8]["label"] = "Good", "bad "
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    code, result = check(capsys, path, "--fix", tmp_path / "new.csv")
    assert code == 0 and found(result)["D603"] == [9, 10]
    with (tmp_path / "new.csv").open(newline="") as made:
        assert [row["label"] for row in csv.DictReader(made)] == ["good" if n % 2 else "bad" for n in range(40)]


def test_a_repaired_file_has_no_finding_left_that_can_be_repaired(tmp_path, capsys):
    planted = summaries(tmp_path)
    train, valid = (source[0].path for source in (planted.spec.train, planted.spec.validation))
    code, result = check(capsys, train, "--valid", valid, "--fix", tmp_path / "new.jsonl", "--max-length", 600)
    assert code == 2 and sum(result["fix"]["dropped"].values()) >= 12
    _, result = check(capsys, tmp_path / "new.jsonl", "--valid", valid, "--max-length", 600)
    left = found(result).keys()
    assert left and not [name for name in left if codes()[name].repair]


def test_no_torch_without_a_model(file):
    path = file(CLEAN)
    program = (
        "import sys\nfrom shikomi.cli import main\n"
        f"code = main(['data', 'check', {str(path)!r}])\n"
        "print(code, sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr
