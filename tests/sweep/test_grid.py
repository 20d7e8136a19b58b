"""What is varied: values of the command line and of a sweep file, and the cells that they make."""

import pytest

from shikomi.errors import BadInput
from shikomi.sweep.cells import make_sweep, slug
from shikomi.sweep.grid import Axis, Grid, Method, parse_axis, read_grid


@pytest.mark.parametrize(
    "text, key, values",
    [
        ("adapter=full,lora,dora", "adapter", ["full", "lora", "dora"]),
        ("learning_rate=1e-4, 3e-4", "learning_rate", [1e-4, 3e-4]),
        (
            "adapter.target_modules=[q_proj,v_proj],all-linear",
            "adapter.target_modules",
            [["q_proj", "v_proj"], "all-linear"],
        ),
        ("adapter={name: lora, r: 2},full", "adapter", [{"name": "lora", "r": 2}, "full"]),
        ("max_grad_norm=null,1.0", "max_grad_norm", [None, 1.0]),
        ("data.prompt='a, b','c'", "data.prompt", ["a, b", "c"]),
        ("shuffle=true,false", "shuffle", [True, False]),
        ("stages.0.max_steps=3", "stages.0.max_steps", [3]),
    ],
)
def test_values_are_yaml(text, key, values):
    problems = []
    axis = parse_axis(text, problems)
    assert problems == [] and axis is not None
    assert axis.key == key and list(axis.values) == values
    assert [type(v) for v in axis.values] == [type(v) for v in values]


@pytest.mark.parametrize(
    "text, said",
    [
        ("adapter", "--grid adapter"),
        ("=1,2", "--grid =1,2"),
        ("adapter.=1", "--grid adapter.=1"),
        ("r=", "has no values"),
        ("r=[1,2", "not YAML"),
        ("r=1,2,1", "the value 1 twice"),
        ("seed=1,2", "--seeds"),
        ("output_dir=a,b", "--output-dir"),
    ],
)
def test_what_is_no_axis_is_told_with_its_fix(text, said):
    with pytest.raises(BadInput) as caught:
        read_grid([text], None, None)
    assert said in str(caught.value)


def test_all_problems_of_a_command_line_come_at_once():
    with pytest.raises(BadInput) as caught:
        read_grid(["adapter", "r=1,1", "seed=3", "x=1", "x=2"], None, None)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("seeds", ["a", "1,1", "-1", "true", "1.5", ""])
def test_seeds_are_whole_and_each_once(seeds):
    with pytest.raises(BadInput, match="seeds"):
        read_grid(["adapter=full,lora"], seeds, None)


def test_a_sweep_of_one_run_is_refused():
    with pytest.raises(BadInput, match="one run"):
        read_grid([], "3", None)
    assert read_grid([], "3,4", None).seeds == (3, 4)


def test_a_sweep_file_and_what_the_command_line_changes(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "methods:\n  full: {adapter: full, learning_rate: 2e-5}\n  as-it-is: {}\n"
        "grid: {batch_size: [4, 8], max_length: [64]}\nseeds: [0, 1]\nreference: full\n"
    )
    grid = read_grid([], None, file)
    assert [(m.name, m.overrides) for m in grid.methods] == [
        ("full", {"adapter": "full", "learning_rate": 2e-5}),
        ("as-it-is", {}),
    ]
    assert [(a.key, a.values) for a in grid.axes] == [("batch_size", (4, 8)), ("max_length", (64,))]
    assert grid.seeds == (0, 1) and grid.reference == "full"
    changed = read_grid(["batch_size=16", "warmup_steps=0,5"], "7", file, "as-it-is")
    assert [(a.key, a.values) for a in changed.axes] == [
        ("batch_size", (16,)),
        ("max_length", (64,)),
        ("warmup_steps", (0, 5)),
    ]
    assert changed.seeds == (7,) and changed.reference == "as-it-is"


def test_problems_of_a_sweep_file_have_their_lines(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "method: {}\nmethods:\n  full: full\n  a b: {}\n  c: {seed: 3}\ngrid:\n  r: 3\nseeds: [x]\nreference: 3\n"
    )
    with pytest.raises(BadInput) as caught:
        read_grid([], None, file)
    found = {(problem.line, problem.what) for problem in caught.value.problems}
    assert found == {
        (1, "unknown key `method`"),
        (3, "`methods.full`"),
        (4, "the name of a method"),
        (5, "`methods.c.seed`"),
        (7, "`grid.r`"),
        (8, "seeds"),
        (9, "`reference`"),
    }
    assert next(p.fix for p in caught.value.problems if p.line == 1) == "did you mean `methods`?"


def test_a_missing_sweep_file(tmp_path):
    with pytest.raises(BadInput, match="no such sweep file"):
        read_grid([], None, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "value, name",
    [
        ("lora", "lora"),
        (1e-4, "0.0001"),
        (8, "8"),
        (True, "true"),
        (None, "null"),
        (["q_proj", "v_proj"], "q_proj+v_proj"),
    ],
)
def test_simple_values_name_folders_as_they_are(value, name):
    assert slug(value) == name


def test_values_that_look_alike_have_different_names():
    alike = ["1", 1, "true", True, "null", None, "q_proj+v_proj", ["q_proj", "v_proj"], "a b", "a-b", "a/b", {"a": "b"}]
    alike += [[1, 2], ["1", "2"], "../up", ".", "x" * 300, "x" * 301, ""]
    names = [slug(value) for value in alike]
    assert len(set(names)) == len(alike)
    assert all("/" not in name and len(name) < 60 and name not in ("", ".", "..") for name in names)


def grid_of(**axes):
    return Grid(axes=tuple(Axis(key.replace("__", "."), tuple(values)) for key, values in axes.items()))


def test_every_combination_is_a_cell_and_seeds_change_last(base, tmp_path):
    grid = Grid(
        methods=(Method("full", {"adapter": "full", "learning_rate": 2e-5}), Method("lora", {})),
        axes=(Axis("batch_size", (4, 8)),),
        seeds=(5, 6),
    )
    sweep = make_sweep(base, [], grid, tmp_path / "out")
    assert [cell.name for cell in sweep.cells] == [
        f"{method}_batch_size-{size}_seed-{seed}" for seed in (5, 6) for method in ("full", "lora") for size in (4, 8)
    ]
    assert sweep.reference == "full_batch_size-4"
    for cell in sweep.cells:
        method, size, seed = cell.name.split("_", 1)[0], int(cell.name.split("size-")[1][0]), int(cell.name[-1])
        assert cell.recipe.adapter.name == method and cell.recipe.seed == seed
        stage = cell.recipe.stages[0]
        assert stage.batch_size == size and stage.learning_rate == (2e-5 if method == "full" else 2e-4)
        assert cell.folder == tmp_path / "out" / cell.name


def test_names_do_not_change_when_a_value_is_added(base, tmp_path):
    few = make_sweep(base, [], grid_of(learning_rate=[1e-4, 3e-4]), tmp_path)
    more = make_sweep(base, [], grid_of(learning_rate=[1e-3, 1e-4, 3e-4]), tmp_path)
    assert {cell.name for cell in few.cells} < {cell.name for cell in more.cells}


def test_a_block_does_not_wipe_out_the_key_within_it(base, tmp_path):
    grid = grid_of(adapter__r=[2, 8], adapter=["lora", {"name": "lora", "lora_alpha": 7}])
    sweep = make_sweep(base, [], grid, tmp_path)
    options = [
        (cell.recipe.adapter.options.get("r"), cell.recipe.adapter.options.get("lora_alpha")) for cell in sweep.cells
    ]
    assert options == [(2, None), (2, 7), (8, None), (8, 7)]


def test_two_axes_that_end_alike_are_named_in_full(base, tmp_path):
    grid = grid_of(evaluate__limit=[3], data__train__0__limit=[4, 5])
    cells = make_sweep(base, [], grid, tmp_path).cells
    assert [cell.name for cell in cells][0] == "evaluate.limit-3_data.train.0.limit-4"
    with pytest.raises(BadInput, match="are the same run"):  # the key of the stage wins over that at the top
        make_sweep(base, [], grid_of(stages__0__max_steps=[3], max_steps=[4, 5]), tmp_path)


def test_shorthands_are_methods_of_several_keys(base, tmp_path, monkeypatch):
    from shikomi import registry

    known = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: [n for n in known(kind) if n not in ("galore", "loraplus")])
    monkeypatch.setattr("shikomi.sweep.grid.SHORTHANDS", {"gentle": {"adapter": "full", "learning_rate": 1e-6}})
    sweep = make_sweep(base, [], grid_of(adapter=["lora", "gentle"]), tmp_path)
    assert [cell.name for cell in sweep.cells] == ["lora", "gentle"]
    assert sweep.cells[1].recipe.adapter.name == "full" and sweep.cells[1].recipe.stages[0].learning_rate == 1e-6


def test_problems_of_all_cells_come_at_once_and_name_their_cells(base, tmp_path):
    (tmp_path / "my.yaml").write_text("")
    grid = grid_of(adapter=["lroa", "full", "lora"], learning_rate=[1e-4, -1])
    with pytest.raises(BadInput) as caught:
        make_sweep(base, [], grid, tmp_path / "out")
    said = [problem.what for problem in caught.value.problems]
    assert any("lroa_learning_rate-0.0001, lroa_learning_rate--1" in text and "does not exist" in text for text in said)
    assert any("full_learning_rate--1" in text and "learning_rate" in text for text in said)
    assert not any("cell full_learning_rate-0.0001" in text for text in said)
    assert not (tmp_path / "out").exists()


def test_a_problem_of_a_method_is_told_with_the_sweep_file(base, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("methods:\n  good: {}\n  bad: {adapter.rr: 3}\n")
    with pytest.raises(BadInput) as caught:
        make_sweep(base, [], read_grid([], None, file), tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.file == str(file) and problem.what.startswith("cell bad: unknown key `adapter.rr`")


def test_a_change_without_an_effect_is_refused(base, tmp_path):
    with pytest.raises(BadInput, match="cells r-4 and r-4.*are the same run|are the same run"):
        make_sweep(base, [], Grid(methods=(Method("one", {}), Method("two", {"adapter.r": 4}))), tmp_path)


def test_an_unknown_reference_is_told_with_the_nearest(base, tmp_path):
    grid = Grid(axes=(Axis("adapter", ("full", "lora")),), reference="ful")
    with pytest.raises(BadInput) as caught:
        make_sweep(base, [], grid, tmp_path)
    assert caught.value.problems[0].fix == "did you mean `full`?"


def test_unequal_budgets_are_said(base, tmp_path):
    assert make_sweep(base, [], grid_of(adapter__r=[2, 8]), tmp_path).notes == ()
    (note,) = make_sweep(base, [], grid_of(max_steps=[2, 8]), tmp_path).notes
    assert note == "the cells differ in data, order or budget: max_steps"
    del base["evaluate"]
    (note,) = make_sweep(base, [], grid_of(adapter__r=[2, 8]), tmp_path).notes
    assert "r-2, r-8" in note and "evaluate" in note
