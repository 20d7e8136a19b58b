"""`shikomi plan`: from a folder with only a config.json to one object of ranges; clear errors for nonsense."""

import json
from pathlib import Path

import pytest

from shikomi.cli import main
from shikomi.plan import speed

CONFIG = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True},
}
RATES = {"products": 5e10, "thin": 2e10, "attention": 4e10, "softmax": 5e8, "elementwise": 2e9, "weights": 2e9,
         "narrow": 4e10, "update": 5e8}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "measure", lambda *what: RATES)


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe for a model that is only a config.json, and 50 rows."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    rows = [{"prompt": f"What is {i}? " + "word " * (i % 9), "completion": f"number {i}"} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "my.yaml"
    file.write_text("model: model\ndata: rows.jsonl\nbatch_size: 10\nnum_train_epochs: 2\nchat: never\n")
    return file


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_a_config_is_enough_for_every_number(recipe, capsys):
    found = planned(capsys, str(recipe))
    for key in ("peak_memory_bytes", "seconds", "cost"):
        assert 0 < found[key]["low"] <= found[key]["likely"] <= found[key]["high"], key
    assert found["total_parameters"] == sum((500 * 64, 64, 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64)))
    assert found["trainable_parameters"] == 4 * 16 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 160))
    likely = sum(part["likely"] for part in found["components"].values())
    assert likely == pytest.approx(found["peak_memory_bytes"]["likely"], rel=0.01)
    (stage,) = found["stages"]
    assert stage["steps"] == 10 and not stage["tokens_measured"]
    assert found["speed_measured"] is True and found["machine"] == "this machine"
    assert any("estimated" in note for note in found["notes"])


def test_keys_change_the_plan_as_they_change_a_run(recipe, capsys):
    base = planned(capsys, str(recipe))
    full = planned(capsys, str(recipe), "adapter=full")
    assert full["trainable_parameters"] == base["total_parameters"]
    assert planned(capsys, str(recipe), "num_train_epochs=4")["seconds"]["likely"] == pytest.approx(
        2 * base["seconds"]["likely"]
    )
    assert planned(capsys, str(recipe), "adapter.r=32")["trainable_parameters"] == 2 * base["trainable_parameters"]


def test_another_machine_a_price_and_a_currency(recipe, capsys):
    dollars = planned(capsys, str(recipe), "--machine", "rtx-4090", "--price", "3.6")
    assert dollars["speed_measured"] is False and dollars["machine"] == "rtx-4090"
    assert dollars["cost"]["likely"] == pytest.approx(dollars["seconds"]["likely"] * 3.6 / 3600)
    yen = planned(capsys, str(recipe), "--machine", "rtx-4090", "--price", "3.6", "--currency", "jpy")
    assert yen["currency"] == "JPY" and yen["cost"]["likely"] > 50 * dollars["cost"]["likely"]
    assert any("computed and not measured" in note for note in dollars["notes"])


def test_what_does_not_fit_comes_with_changes(recipe, capsys):
    tight = planned(capsys, str(recipe), "--fit", "2MB")
    assert tight["fits"] == "no" and tight["limit_bytes"] == 2e6 and tight["changes"]
    assert planned(capsys, str(recipe), "--fit", "1TB")["changes"] == []
    assert main(["plan", str(recipe), "--fit", "2MB"]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "cheapest changes" in text
    assert f"shikomi plan {recipe.name}" in text


def test_the_text_says_what_the_object_says(recipe, capsys):
    assert main(["plan", str(recipe), "--machine", "cpu-8gb"]) == 0
    text = capsys.readouterr().out
    for part in ("peak memory", "while loading", "time ", "cost ", "electricity", "fits in", "tokens/s"):
        assert part in text, part


def test_where_a_recipe_fits(recipe, capsys):
    assert main(["plan", str(recipe), "--table", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tables"]
    assert all(row["fits"] == "yes" for row in table["rows"])
    assert any("RTX 4090" in row["machine"] for row in table["rows"])


@pytest.mark.parametrize(
    "words, told",
    [
        (["--machine", "rtx-4080"], "rtx-4090"),
        (["--price", "-3"], "no price"),
        (["--price", "cheap"], "no price"),
        (["--currency", "YEN"], "JPY"),
        (["--fit", "lots"], "24GB"),
        (["--fit", "0GB"], "24GB"),
        (["learning_rate"], "key=value"),
        (["dtype=fp16", "--machine", "cpu-8gb"], "fp16"),
        (["dtype=bf16", "--machine", "t4"], "does not multiply"),
    ],
)
def test_nonsense_on_the_command_line_is_told(recipe, capsys, words, told):
    assert told in refused(capsys, str(recipe), *words)


def test_no_recipe_says_how_to_get_one(capsys):
    assert "shikomi init" in refused(capsys)
    assert "shikomi init" in refused(capsys, "adapter=full")


def test_an_unknown_model_type_and_missing_fields_are_named(recipe, capsys):
    config = Path("model/config.json")
    config.write_text(json.dumps({**CONFIG, "model_type": "lama"}))
    assert "llama" in refused(capsys, str(recipe))
    config.write_text(json.dumps({k: v for k, v in CONFIG.items() if k not in ("hidden_size", "vocab_size")}))
    told = refused(capsys, str(recipe))
    assert "hidden_size" in told and "vocab_size" in told
    config.unlink()
    assert "config.json" in refused(capsys, str(recipe))


def test_data_without_rows_is_refused(recipe, capsys):
    Path("rows.jsonl").write_text("")
    assert "rows" in refused(capsys, str(recipe))


def test_from_python():
    import shikomi

    recipe = shikomi.load_recipe({"model": "model", "data": "rows.jsonl", "chat": "never"})
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    plan = shikomi.estimate(recipe, "h100-80gb", memory_limit="16GiB")
    assert plan.limit == 16 << 30 and plan.fits == "yes"
    assert plan.seconds.low < plan.seconds.likely < plan.seconds.high
    assert plan.as_dict()["peak_memory_bytes"]["likely"] == plan.peak.likely
