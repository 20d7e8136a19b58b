"""Adapter arithmetic: what must hold whatever the numbers are, TIES by hand, and what is refused; the command too."""

import itertools
import json
import math

import pytest
import torch
from tiny_models import save_tiny

import shikomi
from shikomi.adapters.lora import Lora
from shikomi.adapters.prompt import Prompt
from shikomi.checkpoint.combine import METHODS, combine, combine_adapters
from shikomi.checkpoint.peft_config import DEFAULTS
from shikomi.checkpoint.peft_format import Adapter, load_adapter, save_adapter
from shikomi.cli import main
from shikomi.errors import BadInput
from shikomi.inference import open_model
from shikomi.model.load import load_model

P = "base_model.model."
SIZES = {"m.0.q_proj": (6, 5), "m.0.up_proj": (7, 6), "m.1.q_proj": (6, 5)}


def adapter(seed=0, r=3, modules=tuple(SIZES), sizes=SIZES, **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in modules:
        out, inside = sizes[path]
        tensors[f"{P}{path}.lora_A.weight"] = torch.randn(r, inside, generator=generator)
        tensors[f"{P}{path}.lora_B.weight"] = torch.randn(out, r, generator=generator)
    targets = sorted({path.rpartition(".")[2] for path in modules})
    settings = {"base_model_name_or_path": "base", "r": r, "target_modules": targets, **config}
    return Adapter({**DEFAULTS, **settings}, tensors, [])


def deltas(given: Adapter) -> dict[str, torch.Tensor]:
    """scaling * B A of every module, in fp64."""
    found = {}
    for path in SIZES:
        a, b = (given.tensors.get(f"{P}{path}.lora_{side}.weight") for side in "AB")
        if a is not None:
            r = a.shape[0]
            leaf = path.rpartition(".")[2]
            alpha, rank = given.config["lora_alpha"], given.config["r"]
            for key, value in given.config["alpha_pattern"].items():
                alpha = value if key in (leaf, path) else alpha
            for key, value in given.config["rank_pattern"].items():
                rank = value if key in (leaf, path) else rank
            assert rank == r, "the config says another rank than the tensors have"
            found[path] = b.double() @ a.double() * (alpha / (math.sqrt(r) if given.config["use_rslora"] else r))
    return found


def close(found: Adapter, expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(deltas(found), expected, rtol=1e-5, atol=1e-5)


OTHERS = (
    adapter(1, r=2, lora_alpha=7, modules=("m.0.q_proj", "m.0.up_proj")),
    adapter(2, r=4, lora_alpha=1, use_rslora=True, modules=("m.1.q_proj", "m.0.q_proj")),
)
EQUAL = (adapter(3, lora_alpha=2), adapter(4, lora_alpha=9, use_rslora=True))


def test_cat_is_the_weighted_sum_over_all_modules():
    one, two = (deltas(a) for a in OTHERS)
    expected = {p: 0.7 * one.get(p, 0) - 1.5 * two.get(p, 0) for p in SIZES}
    found = combine(OTHERS, (0.7, -1.5), "cat")
    close(found, expected)
    assert {p: found.tensors[f"{P}{p}.lora_A.weight"].shape[0] for p in SIZES} == dict(
        zip(SIZES, (6, 2, 4), strict=True)
    )
    close(combine(OTHERS, (0.7, -1.5), "svd", r=6), expected)


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_weight_one_and_zero_is_the_first_adapter(method):
    close(combine(EQUAL, (1, 0), method), deltas(EQUAL[0]))
    close(combine(EQUAL[:1], (1,), method), deltas(EQUAL[0]))


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_halves_of_one_adapter_are_that_adapter(method):
    close(combine([EQUAL[1], EQUAL[1]], (0.5, 0.5), method), deltas(EQUAL[1]))


def test_ties_of_one_adapter_twice_is_that_adapter():
    close(combine([EQUAL[1], EQUAL[1]], (1, 1), "ties", density=1.0), deltas(EQUAL[1]))


@pytest.mark.parametrize("method", [m for m in METHODS if "dare" not in m])
def test_order_does_not_matter(method):
    three = [*EQUAL, adapter(5, lora_alpha=4)]
    weights = (0.5, -0.8, 1.1)
    expected = deltas(combine(three, weights, method))
    for order in itertools.permutations(range(3)):
        close(combine([three[i] for i in order], [weights[i] for i in order], method), expected)


def test_linear_is_not_the_sum_but_sums_a_and_b():
    first, second = adapter(1, lora_alpha=3), adapter(2, lora_alpha=3)  # scaling 1
    found = combine([first, second], (4, 1), "linear")
    for name in first.tensors:
        torch.testing.assert_close(found.tensors[name], 2 * first.tensors[name] + second.tensors[name])
    a, b = "m.0.q_proj.lora_A.weight", "m.0.q_proj.lora_B.weight"
    negative = combine([first, second], (-4, 1), "linear").tensors
    torch.testing.assert_close(negative[P + a], -2 * first.tensors[P + a] + second.tensors[P + a])
    torch.testing.assert_close(negative[P + b], 2 * first.tensors[P + b] + second.tensors[P + b])


def row(*values, b=(1.0, 2.0, -3.0)) -> Adapter:
    tensors = {"lora_A.weight": torch.tensor([values]), "lora_B.weight": torch.tensor([b]).t()}
    config = {**DEFAULTS, "r": 1, "lora_alpha": 1, "target_modules": ["q"], "base_model_name_or_path": "base"}
    return Adapter(config, {f"{P}m.q.{name}": t for name, t in tensors.items()}, [])


def test_ties_by_hand():
    one, two = row(1.0, -2.0, 3.0, 0.5), row(-2.0, -1.0, 4.0, 0.1, b=(1.0, 5.0, 4.0))
    found = combine([one, two], (1, 1), "ties", density=0.5).tensors
    # A trimmed to two of four: [0, -2, 3, 0] and [-2, 0, 4, 0]; signs - - + and none
    assert found[P + "m.q.lora_A.weight"].tolist() == [[-2.0, -2.0, 3.5, 0.0]]
    # B trimmed to one of three: [0, 0, -3] and [0, 5, 0]
    assert found[P + "m.q.lora_B.weight"].t().tolist() == [[0.0, 5.0, -3.0]]
    weighted = combine([one, two], (4, 1), "ties", density=0.5).tensors  # roots 2 and 1, after signs are elected
    assert weighted[P + "m.q.lora_A.weight"].tolist() == [[-2.0, -4.0, 5.0, 0.0]]


def test_ties_elects_by_sum_or_by_count():
    three = [row(5.0, 1.0), row(-1.0, -2.0), row(-1.0, -3.0)]
    for how, expected in (("total", [5.0, -2.5]), ("frequency", [-1.0, -2.5])):
        found = combine(three, (1, 1, 1), "ties", density=1.0, majority_sign_method=how).tensors
        assert found[P + "m.q.lora_A.weight"].tolist() == [expected]
    drawn = combine([row(2.0), row(-2.0)], (1, 1), "ties", density=1.0).tensors
    assert drawn[P + "m.q.lora_A.weight"].tolist() == [[2.0]]


def test_methods_on_the_updates_see_the_products():
    one, two = row(1.0, 2.0), row(3.0, -1.0)
    found = combine([one, two], (1, 1), "magnitude_prune_svd", density=1 / 6)
    # the products' largest entries: -3 * 2 and -3 * 3
    expected = torch.zeros(3, 2).double()
    expected[2] = torch.tensor([-9.0, -6.0])
    a, b = (found.tensors[f"{P}m.q.lora_{side}.weight"].double() for side in "AB")
    torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-5)


def test_svd_is_the_best_of_its_rank_and_says_what_it_keeps():
    found = combine(EQUAL, (1, 1), "svd", r=2)
    total = {p: deltas(EQUAL[0])[p] + deltas(EQUAL[1])[p] for p in SIZES}
    lost = whole = 0.0
    for path, delta in total.items():
        s = torch.linalg.svdvals(delta).square()
        lost, whole = lost + float(s[2:].sum()), whole + float(s.sum())
        torch.testing.assert_close((deltas(found)[path] - delta).square().sum(), s[2:].sum(), rtol=1e-4, atol=1e-6)
    assert found.notes == [f"rank 2 keeps {1 - lost / whole:.2%} of the squared norm of what the adapters add together"]


def test_dare_keeps_the_mean_and_follows_its_seed():
    one = row(*[1.0] * 4000)
    draws = [
        combine([one], (1,), "dare_linear", density=0.3, seed=s).tensors[P + "m.q.lora_A.weight"] for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert abs(float(draws[0].mean()) - 1) < 0.1 and sorted(set(draws[0][0].tolist())) == [0.0, pytest.approx(1 / 0.3)]


NAN = float("nan")
PROMPT = Adapter({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": torch.ones(2, 3)}, [])
LARGER = {**SIZES, "m.0.q_proj": (6, 9)}


@pytest.mark.parametrize(
    "adapters, arguments, said",
    [
        (OTHERS, ((0.5,), "cat"), "1 for 2 adapters"),
        (OTHERS, ((0.5, NAN), "cat"), "a weight is not a finite number: found nan"),
        (OTHERS, ((0.5, math.inf), "cat"), "found inf"),
        ((), ((), "cat"), "no adapter to combine"),
        (OTHERS, ((1, 1), "tie"), "no such method: 'tie'.*did you mean 'ties'"),
        (OTHERS, ((1, 1), "ties"), "ties needs adapters of equal rank: found m.0.q_proj has r=4 there, and r=2"),
        (OTHERS, ((1, 1), "cat", 0.5), "cat drops nothing and takes no density"),
        (EQUAL, ((1, 1), "ties", 0.0), "density is no share"),
        (EQUAL, ((1, 1), "ties", 1.5), "density is no share"),
        (EQUAL, ((1, 1), "ties", NAN), "density is no share"),
        (EQUAL, ((1, 1), "ties", 0.5, "most"), "unknown majority_sign_method: found 'most'"),
        (EQUAL, ((1, 1), "cat", None, "total", 4), "cat cannot choose its rank"),
        (EQUAL, ((1, 1), "svd", None, "total", 0), "a rank below 1"),
        ((EQUAL[0], adapter(0, use_dora=True)), ((1, 1),), "adapter 2: DoRA scales every row"),
        ((EQUAL[0], adapter(base_model_name_or_path="other")), ((1, 1),), "different bases.*'other'.*'base'"),
        ((adapter(revision="a"), adapter(revision="b")), ((1, 1),), "different bases: found revision 'b'"),
        ((EQUAL[0], adapter(sizes=LARGER)), ((1, 1),), r"another base: found m.0.q_proj is \(6, 9\) there"),
        ((EQUAL[0], adapter(peft_type="PREFIX_TUNING")), ((1, 1),), "virtual tokens are no change of weights"),
        ((EQUAL[0], PROMPT), ((1, 1),), "virtual tokens.*switch between adapters"),
        ((EQUAL[0], adapter(peft_type="IA3")), ((1, 1),), "computes another function"),
    ],
)  # fmt: skip
def test_refused(adapters, arguments, said):
    with pytest.raises(BadInput, match=said):
        combine(adapters, *arguments)


def test_whole_weights_and_unlike_base_weights_are_refused():
    plain, name = EQUAL[0], P + "m.head.weight"
    whole = plain._replace(tensors={**plain.tensors, name: torch.ones(2)})
    with pytest.raises(BadInput, match="adapter 2: the adapter holds weights that were trained whole.*m.head.weight"):
        combine([plain, whole], (1, 1))
    bias = plain._replace(tensors={**plain.tensors, P + "m.0.q_proj.base_layer.bias": torch.ones(2)})
    with pytest.raises(BadInput, match="trained whole"):
        combine([bias, plain], (1, 1))
    embedding = P + "m.embed.base_layer.weight"
    ones, twos = (plain._replace(tensors={**plain.tensors, embedding: torch.full((2,), v)}) for v in (1.0, 2.0))
    with pytest.raises(BadInput, match="a base weight of its own"):
        combine([ones, twos], (1, 1))
    assert torch.equal(combine([ones, plain, ones], (1, 1, 1)).tensors[embedding], torch.ones(2))


def test_all_problems_come_at_once():
    with pytest.raises(BadInput) as error:
        combine([adapter(use_dora=True), adapter(peft_type="LOHA")], (NAN,), "best")
    assert len(error.value.problems) == 5


def test_expressions_and_chosen_layers_become_paths():
    layers = adapter(1, layers_to_transform=[0], modules=("m.0.q_proj",))
    found = combine([layers, adapter(2, r=2, target_modules=".*up_proj", modules=("m.0.up_proj",))], (1, 1)).config
    assert found["target_modules"] == ["m.0.q_proj", "m.0.up_proj"] and found["layers_to_transform"] is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and two adapters of it, one of them in a run."""
    place = tmp_path_factory.mktemp("saved")
    base = save_tiny(place / "base")
    for folder, r in ((place / "a" / "final", 2), (place / "b", 3)):
        lm = load_model(str(base), Lora(r=r, target_modules=["q_proj", "v_proj"]), "fp32")
        torch.manual_seed(r)
        with torch.no_grad():
            for parameter in lm.trainable().values():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        save_adapter(folder, *lm.attached.export(), str(base), dtype="fp32")
    lm = load_model(str(base), Prompt(2), "fp32")
    save_adapter(place / "prompt", *lm.attached.export(), str(base))
    return place


def run(words, capsys):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_an_adapter_that_says_what_it_is(saved, tmp_path, capsys):
    words = ["combine", saved / "a", saved / "b", "--weights", "0.7,-0.3", "-o", tmp_path / "both"]
    code, out, _ = run([*words, "--json"], capsys)
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and said["r"] == 5 and said["modules"] == 4 and said["method"] == "cat"
    assert [part["weight"] for part in said["adapters"]] == [0.7, -0.3]
    card = (tmp_path / "both" / "README.md").read_text()
    assert "2 adapters combined (cat): 0.7 x a, -0.3 x b" in card and f'base_model: "{saved / "base"}"' in card
    parts = [load_adapter(saved / "a" / "final"), load_adapter(saved / "b")]
    expected = combine(parts, (0.7, -0.3))
    found = load_adapter(tmp_path / "both")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], t) for name, t in expected.tensors.items())
    code, out, err = run(words, capsys)
    assert code == 2 and "the output folder is not empty" in err and out == ""


def test_equal_shares_where_no_weights_are_given(saved, tmp_path):
    said = shikomi.combine_adapters([saved / "a", saved / "b"], tmp_path / "both", method="svd", r=2)
    assert [part["weight"] for part in said["adapters"]] == [0.5, 0.5] and said["r"] == 2
    assert "rank 2 keeps" in said["notes"][0]


def test_several_adapters_answer_one_text(saved, tmp_path, capsys):
    combine_adapters([saved / "a", saved / "b"], tmp_path / "both")
    named = [f"--adapter={name}={folder}" for name, folder in (("b", saved / "b"), ("both", tmp_path / "both"))]
    text = ["What is a font?", "--max-new-tokens", "6", "--dtype", "fp32"]
    code, out, _ = run(["generate", saved / "base", *text, *named, "--json"], capsys)
    answers = json.loads(out.splitlines()[-1])["answers"]
    assert code == 0 and list(answers) == ["b", "both"]
    for name, folder in (("b", saved / "b"), ("both", tmp_path / "both")):
        assert answers[name] == open_model(folder, dtype="fp32").generate(text[0], max_new_tokens=6)
    assert answers["b"] != answers["both"]
    code, out, _ = run(["generate", saved / "base", *text, *named], capsys)
    assert code == 0 and out == "".join(f"{name}: {answer}\n" for name, answer in answers.items())
    code, _, err = run(["generate", saved / "base", *text, "--adapter", "b"], capsys)
    assert code == 2 and "NAME=FOLDER" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["a", "c"], "no such run or adapter folder\n  found:   nothing there\n  fix:     give runs"),
        (["a", "base"], "a whole model, which has no A and B"),
        (["a", "empty"], "no adapter here: adapter_config.json is missing"),
        (["a", "stopped"], "the run is not finished"),
        (["a", "prompt"], "virtual tokens are no change of weights"),
        (["a", "bn"], "only low-rank updates can be added up"),
        (["a", "nameless"], "base_model_name_or_path is empty"),
        (["a", "b", "--method", "dare_tie"], "did you mean 'dare_ties'?"),
        (["a", "b", "--weights", "1,x"], "--weights: not numbers"),
        (["a", "b", "--weights", "1,nan"], "not a finite number"),
        (["a", "b", "--method", "linear"], "/b: linear needs adapters of equal rank"),
    ],
)
def test_the_command_refuses_with_exit_code_2(words, said, saved, tmp_path, capsys):
    for name in ("empty", "stopped", "bn", "nameless"):
        (tmp_path / name).mkdir()
    (tmp_path / "stopped" / "run.json").write_text("{}")
    (tmp_path / "bn" / "adapter_config.json").write_text('{"shikomi_type": "bottleneck"}')
    for path in (saved / "b").iterdir():
        (tmp_path / "nameless" / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "nameless" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    places = [saved / w if (saved / w).exists() else tmp_path / w for w in words[:2]]
    code, out, err = run(["combine", *places, *words[2:], "-o", tmp_path / "both"], capsys)
    assert code == 2 and said in err and out == "" and "Traceback" not in err
    assert not (tmp_path / "both").exists()
