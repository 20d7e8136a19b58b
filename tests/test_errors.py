import pytest

from shikomi.errors import BadInput, NonFinite, Problem, ShikomiError, Stopped, TryAgain, nearest


def test_a_problem_says_where_what_found_allowed_and_fix_and_leaves_out_what_is_unknown():
    full = Problem("`r`", "a.yaml", 7, found="0", allowed="at least 1", fix="write 8")
    assert str(full) == "a.yaml:7: `r`: found 0; allowed: at least 1; fix: write 8"
    assert str(Problem("broken", file="a.yaml")) == "a.yaml: broken"
    assert str(Problem("broken", line=3)) == "line 3: broken"
    assert str(Problem("broken")) == "broken"


def test_bad_input_holds_every_problem_one_a_line():
    error = BadInput([Problem("one", "f", 1), Problem("two", "f", 2)])
    assert str(error).splitlines() == ["f:1: one", "f:2: two"]
    assert [problem.line for problem in error.problems] == [1, 2]
    assert BadInput("just this").problems == [Problem("just this")]


def test_exit_codes_are_those_that_are_documented():
    assert [cls("x").exit_code for cls in (ShikomiError, NonFinite, TryAgain, Stopped)] == [2, 3, 75, 143]
    assert BadInput("x").exit_code == 2
    assert Stopped("x", 130).exit_code == 130
    with pytest.raises(ValueError):
        Stopped("x", 1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("learning_rat", "learning_rate"), ("batch-size", "batch_size"), ("LORA", "lora"), ("zzzzzz", None)],
)
def test_nearest(typed, meant):
    assert nearest(typed, ["lora", "batch_size", "learning_rate"]) == meant
