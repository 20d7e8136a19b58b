"""Files and folders: rows with their lines, and everything that can be wrong with a file."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from shikomi.data import sources as sources_module
from shikomi.data.problems import LISTED, Problems
from shikomi.data.sources import files, fingerprint, hub_id, rows
from shikomi.errors import BadInput, Problem
from shikomi.recipe import Source


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    problems = Problems()
    found = [(row.line, row.data) for row in rows(Source(path=str(path), **options), problems)]
    return found, problems.listed


AB = [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "name, content",
    [
        ("r.jsonl", '{"a": 1}\n\n{"a": 2}\n'),
        ("r.ndjson", '\ufeff{"a": 1}\r\n{"a": 2}'),
        ("r.json", '[{"a": 1},\n {"a": 2}]\n'),
        ("r.json", '{"a": 1}\n{"a": 2}\n'),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n', mtime=0)),
    ],
)
def test_json_files(tmp_path, name, content):
    found, problems = read(write(tmp_path / name, content))
    assert [data for _, data in found] == AB and problems == []


def test_json_array_is_read_in_chunks_with_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("shikomi.data.text.CHUNK", 7)
    monkeypatch.setattr("shikomi.data.readers.CHUNK", 7)
    items = [{"text": "é" * n, "list": [[n], {"k": "]}"}]} for n in range(30)]
    path = write(tmp_path / "r.json", json.dumps(items, indent=1, ensure_ascii=False))
    found, problems = read(path)
    assert [data for _, data in found] == items and problems == []
    lines = path.read_text("utf-8").splitlines()
    assert all(lines[line - 1].strip() == "{" for line, _ in found)


@pytest.mark.parametrize(
    "content, line, what",
    [
        ('[{"a": 1},\n {"a": }]', 2, "broken JSON"),
        ('[{"a": 1},\n', 2, "not closed"),
        ('[{"a": 1}]\n{"a": 2}', 1, "text after the JSON array"),
        ('[{"a": 1},\n 3]', 2, "not an object"),
        ('[{"a": 1},\n {"a": "\x00"}]', 2, "NUL byte"),
        (b'[{"a": 1},\n {"a": "\xff"}]', 2, "not UTF-8"),
        ('{\n "a": 1\n}', 1, "neither a JSON array nor JSON lines"),
    ],
)
def test_broken_json_arrays(tmp_path, content, line, what):
    _, problems = read(write(tmp_path / "r.json", content))
    assert len(problems) == 1 and what in problems[0].what and problems[0].line == line


def test_every_broken_line_is_reported_and_the_good_ones_are_read(tmp_path):
    content = b"\n".join(
        [
            b'{"a": 1}',
            b"{'a': 2}",
            b'{"a": "\xff"}',
            b'{"a": "x\x00"}',
            b'\xef\xbb\xbf{"a": 3}',
            b"[1, 2]",
            b'{"a": 4',
            b'{"a": 5}',
        ]
    )
    found, problems = read(write(tmp_path / "r.jsonl", content))
    assert found == [(1, {"a": 1}), (8, {"a": 5})]
    assert [(p.line, p.what.split(":")[0]) for p in problems] == [
        (2, "broken JSON"),
        (3, "not UTF-8 text"),
        (4, "a NUL byte"),
        (5, "a byte order mark in the middle of the file"),
        (6, "the row is not an object"),
        (7, "broken JSON"),
    ]
    assert problems[0].fix == "use double quotes"
    assert problems[1].found == "byte 0xFF at byte 8 of the line"
    assert all(p.file.endswith("r.jsonl") for p in problems)


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("r.jsonl", "", "holds no rows"),
        ("r.jsonl", "\n \n", "holds no rows"),
        ("r.csv", "", "holds no rows"),
        ("r.csv", "a,b\n", "holds no rows"),
        ("r.json", "[]", "holds no rows"),
        ("r.json", "", "holds no rows"),
        ("r.txt", "\n\n", "holds no rows"),
        ("r.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("r.json", '[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        ("r.jsonl", '[\n{"a": 1}\n]', "a JSON array where JSON lines are expected"),
        ("r.parquet", "no parquet", "not a readable Parquet file"),
        ("r.xlsx", "x", "unknown kind of file"),
        ("r", "x", "unknown kind of file"),
        ("r.jsonl.gz", b"no gzip", "cannot be read"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, what):
    found, problems = read(write(tmp_path / name, content))
    assert found == [] and len(problems) == 1 and what in problems[0].what


def test_csv(tmp_path):
    content = '\ufefftext,label\r\n"two\nlines, ""quoted""",x\r\n\r\nplain,y\r\n'
    found, problems = read(write(tmp_path / "r.csv", content))
    assert problems == []
    assert found == [
        (2, {"text": 'two\nlines, "quoted"', "label": "x"}),
        (5, {"text": "plain", "label": "y"}),
    ]


def test_compressed_file_that_ends_early(tmp_path):
    found, problems = read(write(tmp_path / "r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:40]))
    assert len(found) < 1000 and "ends in the middle" in problems[-1].what


@pytest.mark.parametrize("name, delimiter", [("r.csv", ";"), ("r.csv", "\t"), ("r.tsv", "\t"), ("r.csv", "|")])
def test_csv_delimiters(tmp_path, name, delimiter):
    found, _ = read(write(tmp_path / name, f"a{delimiter}b\n1{delimiter}2,3\n"))
    assert found == [(2, {"a": "1", "b": "2,3"})]


@pytest.mark.parametrize(
    "content, line, what",
    [
        ("a,b\n1,2\n1,2,3\n", 3, "wrong number of cells"),
        ("a,b\n1\n", 2, "wrong number of cells"),
        ("a,a\n1,2\n", 1, "a column name occurs twice"),
        ('a,b\n1,2\n"open,2\n', 3, "broken CSV"),
        (b"a,b\ncaf\xe9,2\n", 2, "not UTF-8"),
        ("a,b\nx\x00,2\n", 2, "NUL"),
    ],
)
def test_broken_csv(tmp_path, content, line, what):
    _, problems = read(write(tmp_path / "r.csv", content))
    assert len(problems) == 1 and what in problems[0].what and problems[0].line == line


def test_parquet_and_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(AB), tmp_path / "r.parquet")
    assert read(tmp_path / "r.parquet") == ([(1, AB[0]), (2, AB[1])], [])
    text = write(tmp_path / "r.txt", "one\ntwo\n\n\nthree\n")
    assert read(text)[0] == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]


def test_limit_reads_only_the_first_rows(tmp_path):
    path = write(tmp_path / "r.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    found, problems = read(path, limit=2)
    assert len(found) == 2 and problems == []


def test_without_a_list_problems_are_raised(tmp_path):
    path = write(tmp_path / "r.jsonl", 'broken\n{"a": 1}\nbroken\n')
    with pytest.raises(BadInput) as error:
        list(rows(Source(path=str(path))))
    assert [p.line for p in error.value.problems] == [1, 3]


def test_long_lists_of_problems_are_counted(tmp_path):
    path = write(tmp_path / "r.jsonl", "broken\n" * (LISTED + 25))
    problems = Problems()
    list(rows(Source(path=str(path)), problems))
    assert problems.count == LISTED + 25 and len(problems.all()) == LISTED + 1
    assert "25 more problems" in problems.all()[-1].what
    one = Problems()
    one.add(Problem("x"))
    assert [p.what for p in one.all()] == ["x"]


def test_missing_files_name_a_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(BadInput, match="no such file.*did you mean .*train.jsonl"):
        files(Source(path=str(tmp_path / "trian.jsonl")))
    with pytest.raises(BadInput, match="there is no folder"):
        files(Source(path=str(tmp_path / "nowhere" / "trian.jsonl")))


def test_folders_with_splits(tmp_path):
    for name in ("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "dev.csv", "README.md", ".train.jsonl"):
        write(tmp_path / name, "x")
    write(tmp_path / "test" / "part.jsonl", "x")

    def names(role, split=None):
        return [p.name for p in files(Source(path=str(tmp_path), split=split), role)]

    assert names("train") == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names("validation") == ["dev.csv"]
    assert names("test") == ["part.jsonl"]
    assert names("train", split="dev") == ["dev.csv"]
    with pytest.raises(BadInput, match="no files for extra"):
        names("train", split="extra")


def test_folder_without_splits_is_all_training_data(tmp_path):
    write(tmp_path / "b.jsonl", "x")
    write(tmp_path / "a.jsonl", "x")
    assert [p.name for p in files(Source(path=str(tmp_path)))] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(BadInput, match="no files for test"):
        files(Source(path=str(tmp_path)), "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no data files"):
        files(Source(path=str(tmp_path / "empty")))


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here" / "rows", "x")
    assert hub_id("owner/name") == "owner/name"
    assert hub_id("hub:owner/name") == "owner/name"
    assert hub_id("folder/rows.jsonl") is None
    assert hub_id("here/rows") is None
    assert hub_id(str(tmp_path / "x")) is None


def test_hub_rows_and_refusals(monkeypatch):
    import datasets

    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        if name == "gated/set":
            raise datasets.exceptions.DatasetNotFoundError("is a gated dataset")
        return iter(AB)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(rows(Source(path="owner/name", limit=1), role="validation"))
    assert [(r.file, r.line, r.data) for r in found] == [("hub:owner/name", 1, {"a": 1})]
    assert asked == [("owner/name", "validation", True)]
    with pytest.raises(BadInput, match="gated/set cannot be read: is a gated dataset"):
        list(rows(Source(path="gated/set")))


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sources_module.__dict__, "_datasets", sources_module._datasets)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(BadInput, match=r"shikomi\[hub\]"):
        list(rows(Source(path="owner/name")))


def test_fingerprint_follows_content_and_options(tmp_path):
    path = write(tmp_path / "r.jsonl", "a")
    first = fingerprint(Source(path=str(path)))
    assert fingerprint(Source(path=str(path))) == first
    assert fingerprint(Source(path=str(path), limit=3)) != first
    write(path, "b")
    assert fingerprint(Source(path=str(path))) != first
