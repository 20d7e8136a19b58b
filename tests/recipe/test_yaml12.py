import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.errors import BadInput
from shikomi.recipe.dump import to_yaml
from shikomi.recipe.yaml12 import read_json, read_yaml

TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def problems(text: str, read=read_yaml) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read(text, "f")
    return [str(problem) for problem in caught.value.problems]


def test_scalars_are_those_of_version_1_2():
    read = read_yaml("[1e-4, 5e-05, 2.0e-4, 1E3, 007, 0x10, 0o17, .5, -1.]", "f")
    assert read == [1e-4, 5e-5, 2e-4, 1000.0, 7, 16, 15, 0.5, -1.0]
    assert [type(value) for value in read[3:7]] == [float, int, int, int]
    assert read_yaml("[no, yes, on, off, 12:30, 2024-01-01, 1_000, '1e-4', \"5\"]", "f") == [
        *("no", "yes", "on", "off", "12:30", "2024-01-01", "1_000", "1e-4", "5")
    ]
    assert read_yaml("[true, False, ~, null, '']", "f") == [True, False, None, None, ""]
    inf, minus, nan = read_yaml("[.inf, -.INF, .nan]", "f")
    assert (inf, minus) == (math.inf, -math.inf) and math.isnan(nan)


def test_lines_are_kept_for_keys_and_items():
    tree = read_yaml("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n", "f")
    assert tree.at["b"].line == 2
    assert tree["b"].at[1].line == 4
    assert tree["b"][1].at["d"].line == 5


def test_every_duplicate_key_and_every_tag_is_reported():
    assert problems("a: 1\nb: {x: 1, x: 2}\na: 3\nc: !!python/name:os.system\nd: !!int x") == [
        "f:2: `x` stands twice: found first on line 2; fix: delete one of the two",
        "f:3: `a` stands twice: found first on line 1; fix: delete one of the two",
        "f:4: the tag tag:yaml.org,2002:python/name:os.system: allowed: plain values without tags",
        "f:5: the tag tag:yaml.org,2002:int: allowed: plain values without tags",
    ]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: x: y", 2, "put quotes around"),
        ("a:\n\t- x", 2, "spaces, not tabs"),
        ('a: 1\nb: "open', 2, "close the quote"),
        ("a: [1, 2", 1, "not YAML"),
        ("a: 1\nb: \x00", 2, "U+0000"),
        ("a: &x [*x]", 1, "alias refers to the block that contains it"),
        ("a: *nowhere", 1, "undefined alias"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("? [a]\n: b", 1, "not a word"),
        ('a: "\\ud800"', 1, "not Unicode"),
        ("a: " + "9" * 5000, 1, "too long"),
    ],
)
def test_broken_text_is_one_clear_problem_with_its_line(text, line, says):
    (problem,) = problems(text)
    assert problem.startswith(f"f:{line}: ") and says in problem


def test_small_texts_that_grow_or_nest_without_end_are_refused():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
    )
    assert "after expanding aliases" in problems(bomb)[0]
    assert "nested too deeply" in problems("[" * 5000)[0]
    assert "nested too deeply" in problems("[" * 100_000, read_json)[0]


def test_json_has_lines_tabs_escapes_and_its_own_errors():
    tree = read_json('{\n\t"a": "\\ud83d\\ude00 \\t\\/",\n\t"b": 1E5}', "f")
    assert read_json('{"\\ud83d\\ude00": 1}', "f") == {"😀": 1}
    assert tree == {"a": "😀 \t/", "b": 100000.0} and tree.at["b"].line == 3
    assert problems("{'a': 1}", read_json)[0].startswith("f:1: not JSON")
    assert problems('{"a": 1,\n "a": 2}', read_json) == [
        "f:2: `a` stands twice: found first on line 1; fix: delete one of the two"
    ]


@settings(deadline=None)
@given(TREES)
def test_what_is_written_reads_back_with_values_and_types(tree):
    read = read_yaml(to_yaml({"tree": tree}), "f")["tree"]
    assert repr(json.dumps(read, sort_keys=True)) == repr(json.dumps(tree, sort_keys=True))


@settings(deadline=None)
@given(TREES)
def test_json_reads_as_json_does(tree):
    if not any(isinstance(leaf, float) and math.isinf(leaf) for leaf in _leaves(tree)):
        read = read_json(json.dumps({"tree": tree}, indent="\t"), "f")["tree"]
        assert json.dumps(read, sort_keys=True) == json.dumps(tree, sort_keys=True)


def _leaves(tree):
    if isinstance(tree, dict | list):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(child)
    else:
        yield tree
