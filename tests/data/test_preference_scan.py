"""Passes over preferences: what is counted, warned of and refused; their token cache; their splits."""

import json

import numpy as np
import pytest

from shikomi.data.check import SCANS
from shikomi.data.checkup import checkup
from shikomi.data.detect import detect
from shikomi.data.encode import Encoder
from shikomi.data.pairs import Pair
from shikomi.data.preference_scan import PairPass, ThumbPass
from shikomi.data.split import split_rows
from shikomi.data.store import STORES, PairStore, ThumbStore, TokenStore
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def pair(prompt="p", chosen="good", rejected="bad one", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def judged(prompt="p", completion="c", label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


@pytest.fixture(scope="module")
def encoder(make_tokenizer):
    return Encoder(make_tokenizer("qwen2_5"), max_length=120)


def scanned(spec, encoder, kind="pairs"):
    """A pass over the training rows that has ended."""
    scan = SCANS[kind](spec.train, spec)
    for _ in scan.encoded(encoder):
        pass
    return scan


@pytest.fixture
def check(tmp_path, encoder):
    """(report, problems) of rows, and report of the words said."""

    def run(rows, kind="pairs", **options):
        spec = DataSpec(train=(jsonl(tmp_path / "rows.jsonl", rows),), **options)
        scan = scanned(spec, encoder, kind)
        return scan.report, scan.problems.all(), "\n".join(scan.report.lines(120))

    return run


def test_lengths_margins_and_columns_are_counted(check):
    rows = [pair("a", "x", "longer by far"), pair("b", "longer by far", "x", margin=2), pair("c", "x", "y", id=3)]
    report, problems, said = check([*rows, pair("d", "longer by a lot", "x")])
    assert not problems and report.formats == {"preference": 4} and report.unused == ["id"]
    assert (report.rows, report.kept, report.pairs) == (4, 4, 4)
    assert (report.chosen_longer, report.rejected_longer, report.margins) == (2, 1, 1)
    assert report.length_difference > 0 and report.plain_as_chat == 4
    assert f"chosen is longer in 50% of the pairs, by {report.length_difference / 4:+.1f} tokens" in said
    assert "length alone" not in said


@pytest.mark.parametrize("longer, word", [("chosen", "longer"), ("rejected", "shorter")])
def test_a_length_bias_is_said(check, longer, word):
    rows = [pair(str(n), **{"chosen": "x", "rejected": "x", longer: f"much longer {n}"}) for n in range(4)]
    assert f"tends to {word} answers" in check(rows)[2]


def test_same_answers_are_left_out_with_their_lines(check, tmp_path):
    report, problems, said = check([pair(), pair("q", "x", "x"), pair("r", "y", "y")])
    assert not problems and (report.rows, report.kept, report.same, report.same_after_cut) == (3, 1, 2, 0)
    assert report.places["same"] == [f"{tmp_path / 'rows.jsonl'}:2", f"{tmp_path / 'rows.jsonl'}:3"]
    assert "2 rows were left out: chosen and rejected are the same (" in said and "rows.jsonl:2," in said


@pytest.mark.parametrize("kind", ["pairs", "thumbs"])
def test_the_same_answers_everywhere_are_an_error(check, kind):
    _, problems, _ = check([pair(str(n), "x", "x") for n in range(3)], kind)
    assert len(problems) == 1 and "the same in all rows" in problems[0].what
    assert "rows.jsonl:1" in problems[0].found


def test_cuts_on_one_side_and_both(check):
    long = "long answer " * 60
    rows = [pair(), pair("one", "x", long), pair("both", "a " + long, long), pair("equal", long + "x", long + "y")]
    report, problems, said = check([*rows, pair("p " * 150)])
    assert not problems
    assert (report.kept, report.truncated, report.cut_one_side) == (3, 2, 1)
    assert (report.same_after_cut, report.too_long) == (1, 1)
    assert report.places["cut_one_side"][0].endswith(":2") and report.places["same_after_cut"][0].endswith(":4")
    assert "in 1 pairs max_length 120 cut only one of the two answers" in said
    assert "their answers are the same up to max_length 120" in said
    # the lengths that are compared are those before the cut
    assert report.length_difference < -60 and (report.chosen_longer, report.rejected_longer) == (2, 1)


def test_equal_up_to_max_length_everywhere_is_an_error(check):
    long = "long answer " * 60
    _, problems, _ = check([pair("p", long + "x", long + "y")])
    assert len(problems) == 1 and "the same up to max_length 120 in all rows" in problems[0].what
    assert problems[0].fix.startswith("max_length=")


def test_copies_and_contradictions(check):
    rows = [pair("a"), pair("b"), pair("a"), pair("b", "bad one", "good"), pair("c")]
    report, problems, said = check(rows)
    assert not problems and (report.duplicates, report.contradictions, report.kept) == (1, 2, 5)
    assert report.places["duplicates"][0].endswith("rows.jsonl:3")
    assert [place[-1] for place in report.places["contradictions"]] == ["2", "4"]
    assert "1 rows are copies of an earlier row" in said and "2 rows are contradicted by another row" in said
    report, *_ = check([judged("a"), judged("a", label=False), judged("b"), judged("b")], "thumbs")
    assert (report.duplicates, report.contradictions) == (1, 2)


def test_a_prompt_that_stands_in_the_answers_too(check):
    report, _, said = check([pair("say", "say yes", "say no"), pair("say", "say yes", "no")])
    assert report.repeats_prompt == 1 and "both answers begin with the prompt" in said


def test_implicit_strings_and_joins_are_said(check, tmp_path, make_tokenizer):
    report, problems, said = check([{"chosen": "sky is blue", "rejected": "sky is red"}])
    assert not problems and report.plain_implicit == 1 and "they stay plain text" in said
    never = Encoder(make_tokenizer("qwen2_5"), chat="never")
    spec = DataSpec(train=(jsonl(tmp_path / "p.jsonl", [pair("a", "x", "y"), pair("b ", "x", "y")]),))
    report = scanned(spec, never).report
    assert report.joined_without_space == 1 and report.plain_implicit == 0
    spec = DataSpec(train=(jsonl(tmp_path / "m.jsonl", [pair("assis", "tant", " y")]),))
    report = scanned(spec, never).report
    assert report.merges == 1 and "would have joined" in "\n".join(report.lines(None))


def test_labels_are_counted_and_weights_proposed(check):
    rows = [judged(str(n), label=n < 8) for n in range(10)]
    report, problems, said = check(rows, "thumbs")
    assert not problems and (report.desirable, report.undesirable, report.pairs) == (8, 2, 0)
    assert "8 of 10 answers are desirable (80%)" in said
    # arXiv:2402.01306: desirable_weight * 8 / (undesirable_weight * 2) between 1 and 4/3
    assert "desirable_weight from 0.25 to 0.333, or undesirable_weight from 3 to 4" in said
    assert "KTO asks" not in check([judged(str(n), label=n < 5) for n in range(10)], "thumbs")[2]


@pytest.mark.parametrize("label, fix", [(True, "objective: sft"), (False, "add good answers")])
def test_one_label_alone_is_an_error(check, label, fix):
    _, problems, _ = check([judged(str(n), label=label) for n in range(3)], "thumbs")
    assert len(problems) == 1 and "all answers are" in problems[0].what and fix in problems[0].fix


def test_one_label_is_no_error_on_the_validation_side(tmp_path, encoder):
    rows = [judged(str(n), label=n > 0) for n in range(9)]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    spec, refused = DataSpec(train=(source,)), set()
    for seed in range(8):  # the one bad answer is on either side
        for side in split_rows(ThumbPass([source], spec).conversations(), 0.4, seed):
            scan = ThumbPass([source], spec, side=side)
            labels = {item.conversation.desirable for item in scan}
            refused.add((side.side, len(labels), scan.problems.count > 0))
    assert refused == {("train", 1, True), ("train", 2, False), ("validation", 1, False), ("validation", 2, False)}


def test_pairs_become_judged_answers(check, encoder, tmp_path):
    report, problems, said = check([pair("a"), pair("b", margin=1)], "thumbs")
    assert not problems and (report.rows, report.kept, report.unpaired) == (4, 4, 4)
    assert "4 judged answers were made from pairs" in said
    source = jsonl(tmp_path / "rows.jsonl", [pair("a"), pair("b")])
    store = ThumbStore.build([source], DataSpec(train=(source,)), encoder, tmp_path / "cache")
    assert [t.desirable for t in store] == [True, False, True, False]
    assert [store.where(i)[1] for i in range(4)] == [1, 1, 2, 2]


def test_problems_of_all_rows_come_together(check):
    rows = [pair(), pair(rejected=""), {"prompt": "p", "chosen": "x"}, pair(margin="much"), {"text": "t"}]
    _, problems, _ = check([*rows, {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1}])
    assert [p.line for p in problems] == [2, 3, 4, 5]
    assert all(p.file.endswith("rows.jsonl") for p in problems)


def test_a_file_of_pairs_and_judgements_is_refused(check):
    _, problems, _ = check([pair(), judged(label=False)], "thumbs")
    assert [(p.line, p.found) for p in problems] == [(2, "unpaired_preference")]
    assert "mixes row formats" in problems[0].what and problems[0].allowed == "preference, as on line 1"


def test_conversations_refuse_preferences_and_pairs_refuse_conversations(check):
    assert "preferences" in check([pair()], "conversations")[1][0].what
    assert "learns from pairs" in check([{"messages": []}], "pairs")[1][0].what
    assert "learns from judged answers" in check([{"messages": []}], "thumbs")[1][0].what


def test_columns_of_a_csv(tmp_path, encoder):
    path = tmp_path / "rows.csv"
    path.write_text("q,a,b,gap,note\nwhat,yes,no,0.5,n\nwho,me,you,,n\n", encoding="utf-8")
    source = Source(path=str(path))
    spec = DataSpec(train=(source,), prompt="{q}?", chosen="{a}", rejected="{b}", margin="{gap}")
    store = PairStore.build([source], spec, encoder, tmp_path / "cache")
    assert [p.margin for p in store] == [0.5, 0.0] and store.report.unused == ["note"]
    assert "what?" in encoder.tokenizer.decode(store[0].prompt)
    judge = DataSpec(train=(source,), prompt="{q}?", completion="{a}", desirable="{gap}")
    with pytest.raises(BadInput, match="data.desirable is not true or false"):
        ThumbStore.build([source], judge, encoder, tmp_path / "cache")


# the token cache


@pytest.fixture
def pairs(tmp_path):
    return jsonl(
        tmp_path / "pairs.jsonl", [pair(f"question {n}", "good " * n, "bad", margin=n / 4) for n in range(1, 7)]
    )


def test_stored_pairs_are_the_encoders(tmp_path, pairs, encoder):
    spec = DataSpec(train=(pairs,))
    store = PairStore.build([pairs], spec, encoder, tmp_path / "cache")
    assert len(store) == 6 and store.weights is None
    for index, item in enumerate(PairPass([pairs], spec)):
        found, expected = store[index], encoder.encode_pair(item.conversation)
        assert isinstance(found, Pair) and found.row == index and found.margin == item.conversation.margin
        assert np.array_equal(found.prompt, expected.prompt) and found.prompt.dtype == np.int32
        for stored, answer in zip(found.completions, expected.answers, strict=True):
            assert np.array_equal(stored.ids, answer.ids) and np.array_equal(stored.mask, answer.mask)
        assert store.lengths[index] == len(found) == len(expected)
        assert store.where(index) == (pairs.path, index + 1)
    assert store.report.tokens == sum(len(p) + len(p.prompt) for p in store)
    assert store.report.trained_tokens == sum(c.n_targets for p in store for c in p.completions)
    with pytest.raises(IndexError):
        store[6]


def test_second_time_nothing_is_tokenised(tmp_path, pairs, encoder, monkeypatch):
    spec = DataSpec(train=(pairs,))
    first = PairStore.build([pairs], spec, encoder, tmp_path / "cache")
    monkeypatch.setattr(Encoder, "encode_answers", None)
    again = PairStore.build([pairs], spec, encoder, tmp_path / "cache")
    assert again.report == first.report and again[3].margin == 1.0 and again.report.margins == 6


def test_a_damaged_margin_is_made_again(tmp_path, pairs, encoder):
    spec = DataSpec(train=(pairs,))
    first = PairStore.build([pairs], spec, encoder, tmp_path / "cache")
    path = first.folder / "value.bin"
    path.write_bytes(path.read_bytes()[:-8])
    assert PairStore.build([pairs], spec, encoder, tmp_path / "cache")[5].margin == 1.5


def test_keys_follow_the_kind_and_the_columns(tmp_path, pairs, encoder):
    cache, plain = tmp_path / "cache", DataSpec(train=(pairs,))
    keys = {
        PairStore.build([pairs], plain, encoder, cache).fingerprint,
        ThumbStore.build([pairs], plain, encoder, cache).fingerprint,
        PairStore.build([pairs], plain, Encoder(encoder.tokenizer, max_length=100), cache).fingerprint,
        PairStore.build([pairs], plain.model_copy(update={"margin": "{margin}"}), encoder, cache).fingerprint,
    }
    for chosen, rejected in ["{chosen}", "{rejected}"], ["{rejected}", "{chosen}"]:
        spec = DataSpec(train=(pairs,), prompt="{prompt}", chosen=chosen, rejected=rejected)
        keys.add(PairStore.build([pairs], spec, encoder, cache).fingerprint)
    assert len(keys) == 6
    assert STORES == {"conversations": TokenStore, "pairs": PairStore, "thumbs": ThumbStore}


def test_the_key_of_conversations_is_the_one_it_was(tmp_path, encoder, monkeypatch):
    """Token caches of conversations stay valid: nothing of preferences is in their key."""
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    monkeypatch.setattr("shikomi.data.store.fingerprint", lambda source, role: "data")
    monkeypatch.setattr(Encoder, "fingerprint", lambda self: "encoder")
    key = TokenStore.cache_key([source], DataSpec(train=(source,)), encoder, None, "train", None)
    assert key == "b0499499902f4bd22729d121dcb05f8eb7f66dc97652eeb81301319fbb10eb4c"


def test_sources_have_weights_and_limits(tmp_path, pairs, encoder):
    sources = [pairs.model_copy(update={"weight": 0.5, "limit": 2}), jsonl(tmp_path / "b.jsonl", [pair("other")])]
    store = PairStore.build(sources, DataSpec(train=tuple(sources)), encoder, tmp_path / "cache")
    assert store.weights.tolist() == [0.5, 0.5, 1.0] and len(store) == 3


# splits


@pytest.mark.parametrize("scan, more", [(PairPass, {}), (ThumbPass, {})])
def test_rows_of_one_prompt_stay_on_one_side(tmp_path, scan, more):
    rows = [pair(f"prompt {n % 12}", f"good {n}", f"bad {n}") for n in range(48)]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    spec = DataSpec(train=(source,))
    sides = split_rows(scan([source], spec).conversations(), 0.25, seed=3)
    prompts = []
    for side in sides:
        items = list(scan([source], spec, side=side))
        prompts.append({json.dumps(item.conversation.identity) for item in items})
    assert len(prompts[0]) == 9 and len(prompts[1]) == 3 and not prompts[0] & prompts[1]


def test_prompts_of_other_splits_that_were_trained_are_named(tmp_path):
    sentence = "which part of the long sentence number {} about the quick brown fox is it that was changed here"
    train = jsonl(tmp_path / "train.jsonl", [pair(sentence.format(n)) for n in ("one", "two")])
    test = jsonl(tmp_path / "test.jsonl", [pair(sentence.format(n)) for n in ("one", "TWO,", "three")] + [pair("new")])
    found = checkup(DataSpec(train=(train,), test=(test,)), "pairs")
    places = {f.code: [(place.file, place.line) for place in f.places] for f in found.findings}
    assert places["D301"] == [(test.path, 1)] and places["D302"] == [(test.path, 2), (test.path, 3)]
    assert set(places) <= {"D202", "D301", "D302"}


def test_detect_knows_preferences(tmp_path):
    jsonl(tmp_path / "p.jsonl", [pair()] * 3)
    jsonl(tmp_path / "j.jsonl", [judged()] * 3)
    assert detect(tmp_path / "p.jsonl").format == "preference"
    assert detect(tmp_path / "j.jsonl").format == "unpaired_preference"
