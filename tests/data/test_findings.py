"""What `data check` finds: planted defects with their lines, nothing in clean rows, and each check at its edges."""

import csv
import json
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children
from pathlib import Path

import pytest
from planted_defects import EXAMPLES, SETS

from shikomi.data import checkup as checkup_module
from shikomi.data.checkup import checkup
from shikomi.data.conversation import Conversation
from shikomi.data.copies import SIMILAR
from shikomi.data.encode import Encoder
from shikomi.data.findings import characters, private, sampling, tokens
from shikomi.data.findings._finding import Findings, excerpt
from shikomi.data.findings._texts import Reader
from shikomi.data.findings.answers import AnswerChecks, is_placeholder
from shikomi.data.findings.codes import SEVERITIES, codes
from shikomi.data.findings.languages import language_of, script_of
from shikomi.data.scan import Scan
from shikomi.errors import TryAgain
from shikomi.recipe import DataSpec, Source

BENCH = EXAMPLES.parent / "benchmarks" / "data" / "sections"


def found_in(planted):
    """(code, file, line) of everything found; (code, None, None) of what is said of the whole set."""
    checked = checkup(planted.spec, planted.kind, max_length=planted.max_length)
    places = [(f.code, p.file, p.line) for f in checked.findings for p in f.places]
    return places + [(f.code, None, None) for f in checked.findings if not f.places]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def codes_of(tmp_path, rows, kind="conversations", **options):
    """{code: lines} of rows."""
    checked = checkup(DataSpec(train=(jsonl(tmp_path / "rows.jsonl", rows),), **options), kind)
    return {f.code: [p.line for p in f.places] for f in checked.findings}


def qa(prompt="a question", completion="an answer", **more):
    return {"prompt": prompt, "completion": completion, **more}


def test_planted_defects_are_found_on_their_lines(tmp_path):
    wanted, found = set(), []
    for make in SETS:
        planted = make(tmp_path)
        wanted |= set(planted.wanted)
        found += found_in(planted)
    assert len(wanted) >= 75
    missed = wanted - set(found)
    assert len(missed) <= 0.05 * len(wanted), sorted(map(str, missed))
    assert {code for code, _, _ in wanted - missed} == {code for code, _, _ in wanted}  # no code is blind
    # Nothing else is said, but for copies that the shipped rows hold and the labels of few rows.
    more = [place for place in found if place not in wanted and place[0] != "D202"]
    assert not more


def test_shipped_rows_are_clean(tmp_path):
    own = [
        ("sections", "conversations", {"prompt": "Section?\n\n{text}", "completion": "{label}"}),
        ("summaries", "conversations", {"prompt": "Sum it up.\n\n{text}", "completion": "{summary}"}),
    ]
    specs = [
        (
            kind,
            DataSpec(**{role: (Source(path=str(EXAMPLES / name / f"{role}.jsonl")),) for role in ROLES}, **templates),
        )
        for name, kind, templates in own
    ]
    specs += [
        ("conversations", DataSpec(train=(Source(path=str(EXAMPLES / "messages/packages.jsonl")),))),
        ("conversations", DataSpec(train=(Source(path=str(EXAMPLES / "text/train.jsonl")),))),
        ("pairs", DataSpec(train=(Source(path=str(EXAMPLES / "preferences/train.jsonl")),))),
        ("thumbs", DataSpec(train=(Source(path=str(EXAMPLES / "preferences/judgements.jsonl")),))),
        (
            "conversations",
            DataSpec(**{role: (Source(path=str(BENCH / f"{role}.jsonl")),) for role in ROLES}, **own[0][2]),
        ),
    ]
    rows, false = 0, []
    for kind, spec in specs:
        checked = checkup(spec, kind)
        rows += sum(checked.rows.values())
        for finding in checked.findings:
            for place in finding.places:
                true = place.note.startswith("e-mail") or _is_copy(finding.code, place)
                false += [] if true else [(finding.code, place)]
            false += [(finding.code, detail) for detail in finding.details if finding.code != "D602"]
    assert rows >= 3000
    assert len(false) < 5, false


ROLES = ("train", "validation", "test")


def _is_copy(code, place):
    """Whether the two rows that a finding names are as alike as it says: compared here, word by word."""
    if code not in ("D201", "D202", "D203", "D301", "D302"):
        return False
    other = re.search(r"(\S+\.jsonl):(\d+)", place.note)
    one, two = (_text(Path(file), int(line)) for file, line in ((place.file, place.line), other.groups()))
    if code in ("D201", "D203", "D301"):
        return one.split() == two.split()
    a, b = ({tuple(w[k : k + 3]) for k in range(len(w) - 2)} for w in (_words(one), _words(two)))
    return len(a & b) >= (SIMILAR - 0.1) * len(a | b)  # what many rows share does not count there


def _text(path, line):
    row = json.loads(path.read_text("utf-8").splitlines()[line - 1])
    return row["text"] if "text" in row else json.dumps(row)


def _words(text):
    return re.findall(r"\w+", text.casefold())


def test_every_code_is_documented():
    assert len(codes()) > 50
    for name, code in codes().items():
        assert (
            re.fullmatch(r"[DP]\d{3}", name)
            and code.severity in SEVERITIES
            and code.repair in (None, "rewrite", "drop")
        )
        assert len(code.meaning) > 50 and code.title and code.fix and code.healthy


def test_places_are_bounded_and_counts_are_not():
    findings = Findings()
    for line in range(1005):
        findings.add("D201", "f", line)
    [finding] = findings.all()
    assert finding.count == 1005 and len(finding.places) == 1000
    assert len(findings.lines) == 1005  # --fix needs every line


def test_the_worst_comes_first():
    findings = Findings()
    for code in ("D602", "D201", "D901", "D102"):
        findings.add(code, "f", 1)
    assert [f.code for f in findings.all()] == ["D102", "D901", "D201", "D602"]


def test_excerpts_show_what_cannot_be_seen_and_stay_short():
    assert excerpt("a\x1b[0m\u200bb") == "a\\x1b[0m\\u200bb"
    long = "x" * 500 + " here " + "y" * 500
    shown = excerpt(long, 501, 505)
    assert "here" in shown and len(shown) < 100 and shown.startswith("…") and shown.endswith("…")


@pytest.mark.parametrize(
    "text, meant",
    [
        ("caf\u00c3\u00a9", "café"),
        ("it\u00e2\u20ac\u2122s", "it’s"),
        ("\u00e2\u20ac\u0153x\u00e2\u20ac\u009d", "“x”"),
        ("\u00e3\u0081\u201c\u00e3\u201a\u201c", "こん"),
        ("10\u00c2\u00a0km", "10\u00a0km"),
        ("\u00f0\u0178\u02dc\u20ac", "😀"),
    ],
)
def test_wrong_decoding_is_turned_back(text, meant, tmp_path):
    assert characters.clean(text) == meant
    assert codes_of(tmp_path, [qa(completion=f"so {text} it is")]) == {"D503": [1]}


@pytest.mark.parametrize(
    "text",
    [
        "Größe, naïve, Ünal, Ångström, ÉCOLE, «Ô»",
        "CAFÉ™ and É»",
        "£5 – 10 € · ½ ± 3°",
        "家族👨‍👩‍👧 and क्‍ष",
        "Řeka, Łódź, İstanbul",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "line\r\nbreak\ttab",
    ],
)
def test_good_text_stays_as_it_is(text, tmp_path):
    assert characters.clean(text) == text
    assert not {c for c in codes_of(tmp_path, [qa(completion=text)]) if c.startswith("D5")}


def test_marks_of_direction_are_needed_in_right_to_left_text():
    assert characters.clean("שלום \u200fabc\u200e") == "שלום \u200fabc\u200e"
    assert characters.clean("abc \u200fdef") == "abc def"


def private_codes(text):
    return [code for code, *_ in private.matches(text)]


@pytest.mark.parametrize(
    "text",
    [
        "password = 'hunter2hunter2'",
        "export OPENAI_API_KEY=sk-proj-abDEx81kQ02mZpL57vbT",
        '{"secret_token": "9f8e7d6c5b4a3210"}',
        "https://bot:s3cr3tpw@git.company.de/x.git",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "AIza" + "SyA-9x8w7v6u5t4s3r2q1pabcdefghijkLM",
        "hf_" + "abcdefghijKLMNOPQRSTuvwxyzABCDEFGH",
    ],
)
def test_secrets_are_found_and_masked(text):
    assert private_codes(text) == ["D901"]
    masked = private.mask(text)
    assert "[secret]" in masked and private_codes(masked) == []


@pytest.mark.parametrize(
    "text",
    [
        "password = 'your-password-here1'",
        "api_key = os.environ['API_KEY_2024']",
        "token: the first word of a line",
        "https://user:password@example.com",
        "sk-learn-contrib is a package",
        "The key=value syntax; token=abc",
        "a secret: nobody knows",
    ],
)
def test_placeholders_and_talk_about_keys_are_no_secrets(text):
    assert private_codes(text) == []


@pytest.mark.parametrize(
    "text, code",
    [
        ("jane.roe+list@mail.company.co.uk", "D902"),
        ("+81 3-1234-5678", "D903"),
        ("+4930901820", "D903"),
        ("(212) 867-5309", "D903"),
        ("212-867-5309", "D903"),
        ("03-1234-5678", "D903"),
        ("4539148803436467", "D904"),
        ("3782-822463-10005", "D904"),
        ("5105 1051 0510 5100", "D904"),
        ("GB29 NWBK 6016 1331 9268 19", "D905"),
        ("FR1420041010050500013M02606", "D905"),
        ("DE89 3704 0044 0532 0130 00 IS MINE", "D905"),
    ],
)
def test_personal_data_is_found_and_masked(text, code):
    assert private_codes(f"so {text}, then") == [code]
    assert private_codes(private.mask(f"so {text} then")) == []


@pytest.mark.parametrize(
    "text",
    [
        "info@example.com, git@github.com, user@domain.com, icon@2x.png",
        "version 1.2.3-4567-89, 2024-01-12, 09-12-2020",
        "4539148803436468",  # Luhn
        "1234567890123456",
        "0000000000000000 1111111111111111",
        "DE89 3704 0044 0532 0130 01",  # check digits
        "DE89 3704 0044 0532 0130",  # length
        "ISBN 978-3-16-148410-0 and 3.14159265358979",
        "RFC 2782, 802.11, 192.168.100.200, 10.1000/182",
        "a-b@c and @handle",
        "commit 4111111111111111abcdef",
    ],
)
def test_other_numbers_are_no_personal_data(text):
    assert private_codes(text) == []


def test_reports_do_not_spread_what_is_private(tmp_path):
    secret = "ghp_" + "a1B2c3D4e5F6" * 3
    checked = checkup(DataSpec(train=(jsonl(tmp_path / "rows.jsonl", [qa(f"use {secret} please")]),)))
    assert [f.code for f in checked.findings] == ["D901"] and secret not in json.dumps(checked.as_dict())


@pytest.mark.parametrize(
    "answer",
    [
        "I’m sorry, but I cannot help with that.",
        "I apologize, but I am not able to do it.",
        "Sorry, I can't do that.",
        "Es tut mir leid, aber ich kann das nicht beantworten.",
        "申し訳ありませんが、その質問にはお答えできません。",
        "I cannot assist with that request.",
    ],
)
def test_refusals(answer, tmp_path):
    assert codes_of(tmp_path, [qa(completion=answer)]) == {"D803": [1]}


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that you lost your keys; here is what to do.",
        "You cannot help it: the sea is wide.",
        "Sorry for the delay! The parcel left today.",
        "The script prints 'sorry' where a file cannot be read.",
        "<b>bold</b>, <s>struck</s> and a<b",
        "Q: what is it?",
        "Use ```code``` inline",
        "```\nwhole block\n```",
        "Human rights: a history",
    ],
)
def test_answers_that_only_look_so(answer, tmp_path):
    assert codes_of(tmp_path, [qa(completion=answer)]) == {}


def test_only_chosen_answers_are_judged(tmp_path):
    refusal = "I'm sorry, but I can't help with that."
    row = {"prompt": "how?", "chosen": "like this", "rejected": refusal}
    assert codes_of(tmp_path, [row], "pairs") == {}
    assert codes_of(tmp_path, [{**row, "chosen": refusal, "rejected": "x"}], "pairs") == {"D803": [1]}


def test_special_tokens_of_the_model_count_too(tmp_path, make_tokenizer):
    checks, findings = AnswerChecks(["<|im_end|>", "<tool_7>"]), Findings()
    texts = _texts(tmp_path, qa(completion="so <tool_7> it is"))
    checks.check(texts, findings)
    AnswerChecks().check(texts, findings)
    assert findings.count("D801") == 1


def _texts(tmp_path, row):
    spec = DataSpec(train=(jsonl(tmp_path / "one.jsonl", [row]),))
    return Reader(spec, "train", "conversations").read(next(iter(Scan(spec.train, spec))))


def test_placeholders():
    assert all(
        map(is_placeholder, ("N/A", "n.a.", "null", "TODO", "---", "…", "[your answer here]", "Lorem ipsum dolor"))
    )
    assert not any(map(is_placeholder, ("none of them is", "42", "no", "A", "natural", "the answer", "answer")))


def test_scripts_and_languages():
    assert [script_of(t) for t in ("hello there", "привет мир", "日本語の文", "中文文本", "12 + 3", "ok")] == [
        "Latin",
        "Cyrillic",
        "Japanese",
        "Han",
        None,
        None,
    ]
    texts = {
        "English": "this is the first of the texts that was written for it and it is not the last one of them all",
        "Spanish": "este es el primero de los textos que se escribió para la prueba y no es el último de los que hay",
        "Dutch": "dit is de eerste van de teksten die voor het boek zijn en het is niet de laatste van alle",
    }
    for language, text in texts.items():
        assert language_of(text.split()) == language
    assert language_of("grep sed awk perl".split() * 10) is None and language_of("the and of".split()) is None


def test_two_languages_in_numbers_are_only_noted(tmp_path):
    rows = [qa(f"number {n}?", f"это ответ номер {n}") for n in range(30)]
    rows += [qa(f"number {n}!", f"this is the answer {n}") for n in range(70)]
    found = codes_of(tmp_path, rows)
    assert found.keys() == {"D403"}


def test_labels_out_of_balance(tmp_path):
    rows = [qa(f"p{n}", "yes") for n in range(95)] + [qa(f"q{n}", "no") for n in range(5)]
    assert codes_of(tmp_path, rows).keys() == {"D601"}
    assert codes_of(tmp_path, rows[50:]).keys() == set()
    named = codes_of(tmp_path, [*rows[50:], qa("r", "maybe")], labels=("yes", "no"))
    assert named == {"D109": [51]}


def test_placeholders_may_be_labels(tmp_path):
    rows = [qa(f"p{n}", "none" if n % 2 else "some") for n in range(40)]
    assert codes_of(tmp_path, rows) == {}


def test_one_prompt_with_two_answers_and_copies_by_white_space(tmp_path):
    rows = [qa("one", "a"), qa("two", "b"), qa("one ", "a"), qa("two", "c"), qa("one", "a")]
    assert codes_of(tmp_path, rows) == {"D201": [3, 5], "D203": [4]}


def test_several_answers_to_one_prompt_are_no_copies_where_they_are_judged(tmp_path):
    prompt = "which part of this long sentence about the quick brown fox and the lazy dog was changed"
    judged = [{"prompt": prompt, "completion": f"part {n}", "label": bool(n % 2)} for n in range(6)]
    assert codes_of(tmp_path, judged, "thumbs") == {}
    near = {**judged[0], "prompt": prompt.replace("quick", "slow") + " and where is it now and why is it there at all"}
    other = {**near, "prompt": near["prompt"].replace("all", "last")}
    assert codes_of(tmp_path, [*judged, near, other], "thumbs").get("D202") == [8]


def test_csv_lines_and_columns_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("question", "answer"), ("a\nb", "x"), ("c", "I'm sorry, but I can't say."), ("d", "z")])
    spec = DataSpec(train=(Source(path=str(path)),), prompt="{question}", completion="{answer}")
    [finding] = checkup(spec).findings
    assert finding.code == "D803" and [p.line for p in finding.places] == [4]


def test_the_same_rows_give_the_same_findings(tmp_path):
    planted = SETS[0](tmp_path)
    one, two = (checkup(planted.spec, planted.kind, max_length=600).as_dict() for _ in range(2))
    assert one == two


def test_lengths_are_exact_with_a_tokenizer_and_said_to_be_estimates_without(tmp_path, make_tokenizer):
    encoder = Encoder(make_tokenizer("qwen2_5"), max_length=60)
    rows = [qa("short", "x"), qa("long", words := " ".join(["word"] * 40)), qa(words, "x")]
    spec = DataSpec(train=(jsonl(tmp_path / "rows.jsonl", rows),))
    checked = checkup(spec, encoder=encoder)
    whole = Encoder(encoder.tokenizer).encode_many([item.conversation for item in Scan(spec.train, spec)])
    tokens = [len(e.ids) for e in whole]
    lengths = checked.lengths
    assert lengths["unit"] == "tokens" and lengths["total"] == sum(tokens)
    assert lengths["trained"] == sum(int(e.mask.sum()) for e in whole)
    assert lengths["percentiles"]["100"] == max(tokens) and lengths["cut_at"]["60"]["rows"] == 2
    assert {f.code: [p.line for p in f.places] for f in checked.findings} == {"D701": [2], "D702": [3]}
    guessed = checkup(spec, max_length=60).lengths
    assert "estimated" in guessed["unit"] and guessed["total"] == sum(
        -(-len(r["prompt"]) // 4) - (-len(r["completion"]) // 4) for r in rows
    )


def test_of_very_many_rows_some_stand_for_others(tmp_path, make_tokenizer, monkeypatch):
    monkeypatch.setattr(sampling, "FIRST_ROWS", 20)
    monkeypatch.setattr(sampling, "_TEMPLATE_BYTES", 60)
    monkeypatch.setattr(checkup_module, "BATCH", 8)
    monkeypatch.setattr(checkup_module, "_AHEAD", 2)
    encoder = Encoder(make_tokenizer("gemma"), max_length=200)
    rows = [qa(f"question {n:03d}", f"the answer {n:03d}") for n in range(120)]
    for n in (50, 51, 77):
        rows[n]["completion"] = "word " * 250
    for n in (60, 61, 90):
        rows[n]["system"] = "which this template refuses"
    spec = DataSpec(train=(jsonl(tmp_path / "rows.jsonl", rows),))
    every = checkup(spec, encoder=encoder)
    places = {f.code: [p.line for p in f.places] for f in every.findings}
    assert places == {"D112": [61, 62, 91], "D701": [51, 52, 78], "D807": [51, 52, 78]}
    assert any("tokens were counted in" in note for note in every.notes)
    monkeypatch.setattr(sampling, "FIRST_ROWS", 120)
    whole = checkup(spec, encoder=encoder)
    assert not any("tokens were counted in" in note for note in whole.notes)
    assert every.lengths["cut_at"]["200"]["rows"] == whole.lengths["cut_at"]["200"]["rows"] == 3
    for key in ("total", "trained", "mean"):
        assert every.lengths[key] == pytest.approx(whole.lengths[key], rel=0.05)


def test_a_row_that_may_be_too_long_is_settled_by_the_tokens_of_its_text(monkeypatch):
    monkeypatch.setattr(sampling, "FIRST_ROWS", 1)
    sample = sampling.Sample(1000)

    def weight(size):
        return sample.weight(Conversation(({"role": "user", "content": "x" * size},)))

    assert weight(9) == 1
    sample.accept(Conversation(({"role": "user", "content": "x"},)))
    assert {weight(1743) for _ in range(sampling.EVERY)} == {0, sampling.EVERY}
    assert weight(1744) == sampling.MAYBE
    tools = Conversation(({"role": "user", "content": "x" * 1744},), tools=[{"name": "f"}])
    sample.accept(tools)
    assert sample.weight(tools) == 1, "what a template makes of tools is not in the text"
    settled = sampling.Settled(1000)
    assert settled.weight(745) == 1
    assert sorted(settled.weight(744) for _ in range(sampling.EVERY)) == [*[0] * (sampling.EVERY - 1), sampling.EVERY]


@pytest.mark.parametrize("kind", ["conversations", "pairs"])
def test_tokens_counted_in_another_process_are_the_same(tmp_path, make_tokenizer, monkeypatch, kind):
    started = []
    monkeypatch.setattr(tokens, "ProcessPoolExecutor", lambda *args: started.append(args) or ProcessPoolExecutor(*args))
    monkeypatch.setattr(tokens, "MANY_ROWS", 30)
    monkeypatch.setattr(sampling, "FIRST_ROWS", 20)
    monkeypatch.setattr(checkup_module, "BATCH", 8)
    monkeypatch.setattr(checkup_module, "_AHEAD", 2)
    answer = {"conversations": "completion", "pairs": "chosen"}[kind]
    rows = [{"prompt": f"question {n:03d}", answer: f"the answer {n:03d}"} for n in range(120)]
    if kind == "pairs":
        rows = [row | {"rejected": "no"} for row in rows]
    rows[100] |= {answer: "word " * 250}
    for n in range(60, 80):
        rows[n] |= {answer: "word " * 180}  # longer in bytes than what is surely short, and settled by tokens
    rows[90]["system"] = "which this template refuses"
    spec = DataSpec(train=(jsonl(tmp_path / "rows.jsonl", rows),))
    encoder = Encoder(make_tokenizer("gemma"), max_length=400)
    here, there = (checkup(spec, kind, encoder, processes=allowed) for allowed in (False, True))
    assert len(started) == 1
    assert any("tokens were counted in" in note for note in there.notes)
    assert [(f.code, [p.line for p in f.places]) for f in there.findings if f.code == "D112"] == [("D112", [91])]
    assert here.as_dict() == there.as_dict()


def test_the_process_goes_on_where_the_thread_ends(make_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "MANY_ROWS", 6)
    encoder = Encoder(make_tokenizer("gemma"))
    row = (Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})), sampling.MAYBE)
    together = tokens.Tokens(encoder, Scan.encode).count([row] * 12)
    counter = tokens.Tokens(encoder, Scan.encode)
    with tokens.Beside(counter, processes=True) as beside, monkeypatch.context() as slow:
        slow.setattr(Encoder, "count", lambda *args, count=Encoder.count: time.sleep(0.3) or count(*args))
        parts = [beside.count([row] * 6) for _ in range(2)]
        assert [weight for part in parts for weight, _ in part.result()] == [weight for weight, _ in together]


def test_a_process_that_is_killed_is_said_and_not_a_traceback(make_tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "MANY_ROWS", 0)
    row = (Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})), 1)
    counter = tokens.Tokens(Encoder(make_tokenizer("gemma")), Scan.encode)
    with pytest.raises(TryAgain, match="killed"), tokens.Beside(counter, processes=True) as beside:
        assert beside.count([row]).result()[0][1].tokens > 0
        for process in active_children():
            process.kill()
        for _ in range(10_000):  # the pool sees it a moment later
            beside.count([row]).result()


def test_pairs_that_are_the_same_up_to_max_length(tmp_path, make_tokenizer):
    encoder = Encoder(make_tokenizer("qwen2_5"), max_length=60)
    start = "word " * 40
    row = {"prompt": "p", "chosen": start + "one", "rejected": start + "two"}
    spec = DataSpec(train=(jsonl(tmp_path / "rows.jsonl", [row, {**row, "prompt": "q", "rejected": "x"}]),))
    found = {f.code: [p.line for p in f.places] for f in checkup(spec, "pairs", encoder).findings}
    assert found == {"P106": [2], "P107": [1]}


def test_rows_of_one_label_and_pairs_without_difference_are_errors(tmp_path):
    judged = [{"prompt": f"p{n}", "completion": "x", "label": True} for n in range(3)]
    assert codes_of(tmp_path, judged, "thumbs").keys() == {"D111"}
    same = [{"prompt": f"p{n}", "chosen": "x", "rejected": "x"} for n in range(7)]
    assert codes_of(tmp_path, same, "pairs") == {"D111": [None], "P101": [1, 2, 3, 4, 5, 6, 7]}
