"""The cheapest changes that fit: in order, each needed, each a recipe's own words."""

from dataclasses import replace

import pytest
from plan_jobs import job_of

from shikomi.plan.estimate import Machine, Rows
from shikomi.plan.fit import Change, cheapest, fit, micro_batch_for
from shikomi.plan.memory import memory
from shikomi.recipe import build, load_recipe

GPU = Machine("gpu", "cuda", 1 << 40, 1 << 40, "bf16", "bf16")
BIG = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16,
       "num_key_value_heads": 16, "vocab_size": 32000}  # fmt: skip
ROWS = Rows(count=1000, tokens=500, longest=1000, measured=True)


def big(adapter="lora", **more):
    return job_of(adapter, config=BIG, rows=ROWS, batch_size=16, recompute="none", **more)


def words(changes: list[Change]) -> list[str]:
    return [word.partition("=")[0] for change in changes for word in change.override.split()]


def test_nothing_is_changed_where_it_fits():
    job = big()
    assert cheapest(job, GPU, memory(job, GPU).peak.high) == []


def test_the_cheapest_comes_alone_where_it_is_enough():
    job = big()
    smaller = replace(job, micro_batch_tokens=1024)
    changes = cheapest(job, GPU, memory(smaller, GPU).peak.high)
    assert [change.override for change in changes] == ["micro_batch_tokens=1024"]
    assert changes[0].saves == pytest.approx(memory(job, GPU).peak.likely - memory(smaller, GPU).peak.likely)


def test_a_row_is_never_cut_by_a_smaller_micro_batch():
    found = fit(big(), GPU, 1.0)
    assert not found.fits
    assert all(int(c.override.partition("=")[2]) >= 1000 for c in found.changes if c.override.startswith("micro_batch"))


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.35, 0.2])
def test_what_is_proposed_fits_and_each_change_saves(adapter, share):
    job = big(adapter)
    before = memory(job, GPU).peak
    limit = before.high * share
    found = fit(job, GPU, limit)
    if not found.fits:
        pytest.skip("nothing goes so far")
    assert found.peak_high <= limit and found.changes
    assert sum(change.saves for change in found.changes) == pytest.approx(before.likely - found.peak)
    assert all(change.saves > 0 and change.costs for change in found.changes)


def test_full_fine_tuning_gives_way_to_an_adapter_with_its_learning_rate():
    job = big("full")
    lora = big("lora")
    changes = cheapest(job, GPU, memory(lora, GPU).peak.high)
    (one,) = changes  # smaller micro-batches and recomputing, which cost less, are not needed any more
    assert one.override == "adapter=lora learning_rate=0.0002"
    found = fit(job, GPU, memory(lora, GPU).peak.high)
    assert found.job.adapter.name == "lora" and found.fits


def test_quality_is_given_up_after_time():
    order = ["micro_batch_tokens", "recompute", "optim", "adapter", "learning_rate", "quant", "adapter.r", "max_length"]
    found = words(list(fit(big("full"), GPU, 1.0).changes))
    positions = [order.index(word) for word in dict.fromkeys(found)]
    assert positions == sorted(positions) or found.count("micro_batch_tokens") == 2
    assert {"recompute", "adapter", "quant", "max_length"} <= set(found)


def test_four_bits_are_not_proposed_twice_nor_where_they_are_not_served():
    assert "quant" not in words(list(fit(big(quant="nf4"), GPU, 1.0).changes))
    mac = Machine("mac", "mps", 1 << 40, 1 << 40)
    assert "quant" not in words(list(fit(big(), mac, 1.0).changes))


def test_every_proposal_is_a_recipes_own_words(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = {"model": str(tmp_path), "adapter": "full", "data": {"train": str(rows)}, "learning_rate": 1e-5}
    found = fit(big("full"), GPU, 1.0)
    changed = load_recipe(recipe, [word for change in found.changes for word in change.override.split()])
    assert build("adapters", changed.adapter) == found.job.adapter
    assert build("quant", changed.quant) == found.job.quant
    (stage,) = changed.stages
    assert stage.learning_rate == 2e-4
    assert stage.recompute == found.job.recompute
    assert changed.max_length == found.job.max_length
    assert stage.micro_batch_tokens == found.job.micro_batch_tokens


def test_more_memory_has_room_for_more_tokens_at_a_time():
    job = big()
    sizes = [micro_batch_for(job, GPU, memory(job, GPU).peak.high * share) for share in (0.8, 1.0, 2.0, 100.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 8192  # a whole step: 16 rows of 500
    for size, share in zip(sizes[1:], (1.0, 2.0, 100.0), strict=True):
        peak = memory(replace(job, micro_batch_tokens=size), GPU).peak
        assert peak.high <= memory(job, GPU).peak.high * share * 1.001
