"""The shipped rows with defects planted at known lines: what `data check` has to find."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shikomi.recipe import DataSpec, Source

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"

GERMAN = (
    "Dieses Programm ist für die Arbeit mit Bildern gemacht und es kann auch mit den Dateien der alten Version umgehen"
)
FRENCH = "Ce programme est fait pour les images et il est dans la liste des outils que vous avez sur le disque avec lui"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq2fJk3lq\n9aXm+Qw2e\n-----END RSA PRIVATE KEY-----"
TOKEN = "ghp_" + "a1B2c3D4e5F6" * 3
AWS = "AKIA" + "IOSFODNN7QRSTUVW"
SLACK = "xoxb-" + "2489016-k2jh4g5f6d7s8a"
LOOP = "the server starts and the server stops and " * 12


@dataclass
class Planted:
    """One set of files: `spec` and `kind` read it, `wanted` are (code, file, line); line None for the whole set."""

    kind: str
    spec: DataSpec
    max_length: int | None = None
    wanted: list[tuple[str, str | None, int | None]] = field(default_factory=list)


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a shipped file."""
    return [json.loads(line) for line in (EXAMPLES / name).read_text("utf-8").splitlines()]


class File:
    """Lines of a file, some of them changed: `plant` puts a defect on the next line that is free."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path, self.rows = path, rows
        self.lines: dict[int, str] = {}
        self.next = 41
        self.wanted: list[tuple[str, str | None, int | None]] = []

    def plant(self, code: str, change: Callable[[dict[str, Any]], Any], step: int = 3) -> int:
        """A row changed in place or returned anew (text stands as it is); returns its index."""
        at, self.next = self.next, self.next + step
        made = change(self.rows[at])
        if isinstance(made, str):
            self.lines[at] = made
        elif made is not None:
            self.rows[at] = made
        self.wanted.append((code, str(self.path), at + 1))
        return at

    def write(self) -> Source:
        """The file."""
        lines = [self.lines.get(i, json.dumps(row)) for i, row in enumerate(self.rows)]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Source(path=str(self.path))


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets a column."""
    return lambda row: row.__setitem__(key, value)


def add(key: str, text: str) -> Callable[[dict[str, Any]], None]:
    """A change that writes text into the middle of a column."""

    def change(row: dict[str, Any]) -> None:
        half = row[key].find(" ") + 1
        row[key] = row[key][:half] + text + " " + row[key][half:]

    return change


def summaries(folder: Path) -> Planted:
    """Prompts with free answers; 300 rows and 50 of validation."""
    train = File(folder / "train.jsonl", [_pair(row) for row in rows_of("summaries/train.jsonl")])
    valid = File(folder / "valid.jsonl", [_pair(row) for row in rows_of("summaries/validation.jsonl")])
    train.wanted.append(("D902", str(train.path), 62))  # an address that the shipped rows hold
    _formats(train)
    _texts(train)
    _answers(train)
    _private(train)
    first, second = train.rows[3], train.rows[4]
    train.plant("D201", lambda row: dict(first))
    train.plant("D201", lambda row: {**second, "completion": second["completion"] + " "})
    train.plant(
        "D202", lambda row: {**train.rows[7], "prompt": train.rows[7]["prompt"].replace("This", "That", 1) + " x"}
    )
    train.plant(
        "D202", lambda row: {**train.rows[9], "completion": "nearly", "prompt": train.rows[9]["prompt"] + " More."}
    )
    train.plant("D203", lambda row: {**train.rows[11], "completion": "an entirely different answer"})
    valid.next = 5
    valid.plant("D301", lambda row: dict(train.rows[13]))
    valid.plant("D301", lambda row: {**train.rows[14], "completion": "another answer"})
    valid.plant("D302", lambda row: {**row, "prompt": train.rows[15]["prompt"] + " And one more sentence."})
    train.plant("D701", lambda row: {**row, "completion": "a long answer of its own " + words("long", 420)})
    train.plant("D702", lambda row: {**row, "prompt": words("question", 420)})
    for at in range(12):
        train.rows[270 + at]["completion"] = "a very useful package for everyone"
    spec = DataSpec(train=(train.write(),), validation=(valid.write(),))
    return Planted("conversations", spec, 600, [*train.wanted, *valid.wanted, ("D204", None, None)])


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": f"Summarise this package in a line.\n\n{row['text']}", "completion": row["summary"]}


def words(stem: str, count: int) -> str:
    """Words of which no two are the same."""
    return " ".join(f"{stem}{n}" for n in range(count))


def _formats(file: File) -> None:
    file.plant("D102", lambda row: json.dumps(row)[:-9])
    file.plant("D102", lambda row: "[1, 2]")
    file.plant("D102", lambda row: json.dumps(row).replace('"', "'"))
    file.plant("D103", lambda row: {"promt": row["prompt"], "completion": row["completion"]})
    file.plant("D104", lambda row: {"text": row["prompt"]})
    file.plant("D105", put("completion", ""))
    file.plant("D105", put("prompt", " \n"))
    file.plant("D107", put("completion", 7))
    file.plant("D108", put("completion", "half a pair \ud83d"))


def _texts(file: File) -> None:
    file.plant("D501", add("prompt", "\x1b[31mred\x1b[0m"))
    file.plant("D501", add("completion", "page\x0c"))
    file.plant("D502", add("prompt", "zero\u200bwidth"))
    file.plant("D502", add("prompt", "\u202eturned\u202c"))
    file.plant("D503", add("prompt", "caf\u00c3\u00a9"))
    file.plant("D503", add("completion", "it\u00e2\u20ac\u2122s"))
    file.plant("D503", add("prompt", "\u00d0\u0178\u00d1\u20ac\u00d0\u00b8\u00d0\u00b2\u00d0\u00b5\u00d1\u201a"))
    file.plant("D504", add("completion", "stra\ufffde"))
    file.plant("D401", lambda row: {**row, "prompt": "Эта программа показывает карту мира и все города на ней"})
    file.plant("D401", put("completion", "画像を表示するための小さなプログラムです"))
    file.plant("D402", lambda row: {**row, "prompt": GERMAN})
    file.plant("D402", put("completion", FRENCH))


def _answers(file: File) -> None:
    file.plant("D801", add("completion", "<|im_end|>"))
    file.plant("D801", add("prompt", "[INST] do it [/INST]"))
    file.plant("D801", lambda row: {**row, "completion": row["completion"] + "</s>"})
    file.plant(
        "D802", lambda row: {**row, "completion": row["completion"] + "\n\nHuman: And what else?\n\nAssistant: No."}
    )
    file.plant("D802", lambda row: {**row, "completion": row["completion"] + "\n### Instruction:\nDo more."})
    file.plant("D803", put("completion", "I'm sorry, but I can't help with that request."))
    file.plant("D803", put("completion", "As an AI language model, I do not have opinions on packages."))
    file.plant("D803", put("completion", "I cannot provide information about this software, since it is not safe."))
    file.plant("D803", put("completion", "Sorry, I am unable to summarise this."))
    file.plant("D804", lambda row: {**row, "completion": row["prompt"]})
    file.plant("D805", put("completion", "N/A"))
    file.plant("D805", put("completion", "..."))
    file.plant("D806", lambda row: {**row, "completion": "Use it so:\n```python\nimport it\nit.run("})
    file.plant("D807", put("completion", LOOP))


def _private(file: File) -> None:
    file.plant("D901", add("prompt", KEY))
    file.plant("D901", add("prompt", f"token {TOKEN}"))
    file.plant("D901", add("completion", AWS))
    file.plant("D901", add("prompt", SLACK))
    file.plant("D901", add("prompt", "postgres://admin:hunter2zz@db.company.org/main"))
    file.plant("D901", add("prompt", 'api_key = "f3a9c17be2d84406b1aa"'))
    file.plant("D902", add("prompt", "write to jane.roe@mailbox.org,"))
    file.plant("D903", add("completion", "+49 30 901820 17"))
    file.plant("D903", add("prompt", "call (212) 867-5309 now"))
    file.plant("D904", add("prompt", "card 4539 1488 0343 6467"))
    file.plant("D905", add("prompt", "DE89 3704 0044 0532 0130 00"))


def sections(folder: Path) -> Planted:
    """Labels; 900 rows and 100 of validation."""
    train = File(folder / "labels.jsonl", rows_of("sections/train.jsonl"))
    valid = File(folder / "held.jsonl", rows_of("sections/validation.jsonl"))
    train.next = valid.next = 20
    train.plant("D603", put("label", "Games"))
    train.plant("D603", put("label", "net "))
    train.plant("D604", put("label", "scence"))
    valid.plant("D303", put("label", "astronomy"))
    spec = DataSpec(
        train=(train.write(),), validation=(valid.write(),), prompt="Which section?\n\n{text}", completion="{label}"
    )
    return Planted("conversations", spec, None, [*train.wanted, *valid.wanted, ("D602", None, None)])


def conversations(folder: Path) -> Planted:
    """Messages; 112 rows."""
    train = File(folder / "chat.jsonl", rows_of("messages/packages.jsonl"))
    train.plant("D106", lambda row: row["messages"][1].__setitem__("role", "narrator"))
    train.plant("D106", lambda row: row["messages"].pop(1) and row["messages"].pop(0) and None)
    train.plant("D106", lambda row: {"messages": row["messages"][:2]})
    train.plant("D105", lambda row: row["messages"][2].__setitem__("content", ""))
    return Planted("conversations", DataSpec(train=(train.write(),)), None, train.wanted)


def pairs(folder: Path) -> Planted:
    """Pairs; 60 rows, of which most have a longer rejected answer after planting."""
    train = File(folder / "pairs.jsonl", rows_of("preferences/train.jsonl"))
    for row in train.rows:
        row["rejected"] += ", which is nothing that anybody asked for in the first place"
    train.next = 20
    train.plant("P101", lambda row: {**row, "rejected": row["chosen"]})
    train.plant("P102", lambda row: {**row, "rejected": row["chosen"].upper() + "!"})
    other = train.rows[5]
    train.plant("P103", lambda row: {**other, "chosen": other["rejected"], "rejected": other["chosen"]})
    train.wanted.append(("P103", str(train.path), 6))
    train.plant("P105", lambda row: {**row, **{k: row["prompt"] + " " + row[k] for k in ("chosen", "rejected")}})
    train.plant("P106", lambda row: {**row, "rejected": words("more", 400)})
    train.plant("D110", lambda row: {"chosen": _turns("one"), "rejected": _turns("two")})
    wanted = [*train.wanted, ("P104", None, None)]
    return Planted("pairs", DataSpec(train=(train.write(),)), 600, wanted)


def _turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer to {question}"}]


def judgements(folder: Path) -> Planted:
    """Judged answers; 80 rows, nearly all of one label after planting."""
    train = File(folder / "judged.jsonl", rows_of("preferences/judgements.jsonl"))
    train.wanted.append(("D902", str(train.path), 2))  # an address that the shipped rows hold
    for row in train.rows[:60]:
        row["label"] = True
    train.plant("D107", put("label", "maybe"))
    return Planted("thumbs", DataSpec(train=(train.write(),)), None, [*train.wanted, ("P108", None, None)])


SETS = (summaries, sections, conversations, pairs, judgements)
