"""The arithmetic of a step by method, rates of machines, and the cached probe."""

import json
from dataclasses import replace

import pytest
import torch
from plan_jobs import job_of

from shikomi.errors import BadInput
from shikomi.plan import speed
from shikomi.plan.estimate import Machine, Range, Rows
from shikomi.plan.hardware import hardware
from shikomi.plan.lengths import rows_of
from shikomi.plan.rates import here, of_hardware
from shikomi.plan.time import seconds, timed
from shikomi.plan.work import step, tokens_of
from shikomi.recipe import DataSpec, Source

RATES = {"products": 5e10, "thin": 2e10, "attention": 4e10, "softmax": 5e8, "elementwise": 2e9, "weights": 2e9,
         "narrow": 2.5e10, "update": 5e8, "thin_8": 1e10, "thin_64": 3e10}  # fmt: skip
ROWS = Rows(count=100, tokens=256, longest=256, scored_share=0.25, measured=True)


def matrices(job):
    """Elements of the body's matrices and of the head, from the shapes."""
    arch = job.architecture
    head = arch.linears[arch.head]
    return sum(a * b for name, (a, b) in arch.linears.items() if name != arch.head), head[0] * head[1]


def test_two_flop_forward_two_back_and_two_for_trained_weights():
    lora, full = job_of("lora", rows=ROWS, batch_size=4), job_of("full", rows=ROWS, batch_size=4)
    body, head = matrices(lora)
    tokens, scored = 4 * 256, 4 * 64
    assert step(lora).products == 4 * body * tokens + 4 * head * scored
    assert step(full).products == pytest.approx(6 * body * tokens + 8 * head * scored)  # the head twice, as it computes
    assert step(lora).thin > 0 == step(full).thin


def test_low_rank_products_grow_with_the_rank_and_the_targets():
    thin = [step(job_of({"name": "lora", "r": r}, rows=ROWS)).thin for r in (4, 8)]
    assert thin[1] == 2 * thin[0]
    some = step(job_of({"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}, rows=ROWS)).thin
    assert some < thin[1]


def test_recomputing_everything_is_one_more_forward():
    job = job_of("lora", rows=ROWS, batch_size=4)
    body, _ = matrices(job)
    assert step(job, "full").products - step(job, 0).products == 2 * body * 4 * 256
    layers = job.architecture.layers
    gate_up = 2 * job.architecture.hidden * job.architecture.intermediate
    assert step(job, 1).products - step(job, 0).products == 2 * gate_up * 4 * 256
    assert step(job, layers).products > step(job, 1).products


def test_only_the_last_layers_go_back_to_where_training_begins():
    whole, last = job_of("full", rows=ROWS), job_of({"name": "full", "last_layers": 1}, rows=ROWS)
    body, _ = matrices(whole)
    saved = step(whole).products - step(last).products
    tokens = tokens_of(whole).computed
    assert saved == pytest.approx(4 * body * tokens * (1 - 1 / whole.architecture.layers), rel=0.05)


def test_attention_is_quadratic_in_the_length():
    def attention(length):
        rows = replace(ROWS, tokens=length, longest=length)
        return step(job_of("lora", rows=rows, batch_size=1, max_length=4096)).attention

    assert 3.5 < attention(2048) / attention(1024) < 4.0
    assert attention(4096) / attention(2048) == pytest.approx(4, rel=0.07)


def test_only_scored_tokens_meet_the_head():
    few, all_ = (step(job_of("lora", rows=replace(ROWS, scored_share=share))) for share in (0.1, 1.0))
    job = job_of("lora", rows=ROWS)
    _, head = matrices(job)
    tokens = tokens_of(job).computed
    assert all_.products - few.products == pytest.approx(4 * head * 0.9 * tokens)
    assert all_.softmax > few.softmax


PAIRS = Rows(count=60, tokens=300, longest=300, scored_share=0.5, prompt_share=0.5, measured=True)


def test_a_shared_prompt_counts_once():
    shared = job_of("lora", objective="dpo", rows=PAIRS, batch_size=4)
    apart = replace(shared, share_prefix=False)
    assert tokens_of(shared).computed == 4 * 300
    assert tokens_of(apart).computed == 4 * (300 + 150)
    assert step(apart).products > step(shared).products


def test_an_instruction_that_all_rows_begin_with_counts_once_in_a_micro_batch():
    rows = replace(ROWS, tokens=256, shared=100)
    job = job_of("lora", rows=rows, batch_size=8, micro_batch_tokens=1024)  # two micro-batches of four rows
    assert tokens_of(job).computed == 8 * 256 - 2 * 3 * 100
    assert tokens_of(replace(job, share_prefix=False)).computed == 8 * 256
    assert tokens_of(replace(job, micro_batch_tokens=256)).computed == 8 * 256  # each alone


def test_the_common_beginning_is_found_in_the_rows(tmp_path):
    instruction = "Which section of the archive does this package belong to? " * 3
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": instruction + text, "completion": "games"} for text in ("A chess program", "An editor")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = DataSpec(train=(Source(path=str(file)),))
    found = rows_of(spec, "conversations", 512, None)
    assert found.shared == pytest.approx(len(instruction) / 4, abs=15)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": text, "completion": "x"}) + "\n" for text in ("One", "Two")))
    assert rows_of(DataSpec(train=(Source(path=str(other)),)), "conversations", 512, None).shared == 0


def test_a_live_reference_is_one_more_forward_and_a_precomputed_one_a_pass_before():
    live = job_of("lora", objective="dpo", rows=PAIRS, batch_size=4, steps=30)
    without = job_of("lora", objective="orpo", rows=replace(PAIRS, scored_share=0.5), batch_size=4, steps=30)
    before = replace(live, reference="precompute")
    body, head = matrices(live)
    tokens, scored = 4 * 300, 4 * 150
    assert step(live).products - step(before).products == 2 * body * tokens + 2 * head * scored
    assert step(without).products >= step(before).products  # orpo scores the prompt too
    machine = here(this(), RATES)
    once = timed(before, machine).flop - 30 * step(before).flop
    assert once == pytest.approx((step(live).flop - step(before).flop) * 60 / 4)


def test_kto_asks_policy_and_reference_for_other_answers_too():
    kto = job_of("lora", objective="kto", rows=replace(PAIRS, prompt_share=0.4), batch_size=4)
    body, head = matrices(kto)
    tokens, scored = tokens_of(kto).computed, tokens_of(kto).scored
    assert step(kto).products == pytest.approx((4 + 3 * 2) * body * tokens + (4 + 3 * 2) * head * scored)


def test_prefix_and_prompt_tuning_are_seen_by_every_token():
    plain = tokens_of(job_of("lora", rows=ROWS))
    prefix = tokens_of(job_of({"name": "prefix", "num_virtual_tokens": 20}, rows=ROWS))
    prompt = tokens_of(job_of({"name": "prompt", "num_virtual_tokens": 20}, rows=ROWS))
    assert prefix.keys == plain.keys + 20 and prefix.computed == plain.computed
    assert prompt.computed == plain.computed + 20 * prompt.micro_batches


def this() -> Machine:
    return Machine("this machine", "cpu", 8 << 30, 8 << 30)


def test_seconds_are_work_over_rates_and_a_range():
    job = job_of("lora", rows=ROWS, batch_size=4, steps=10)
    found = seconds(job, here(this(), RATES))
    assert 0 < found.low < found.likely < found.high
    work = step(job)
    products = 1 / (1 / 5e10 + (1 / 2.5e10 - 1 / 5e10) * (1 / 64 - 1 / 1024) / (1 / 256 - 1 / 1024))  # 64 wide
    by_hand = 10 * (work.products / products + work.thin / 2e10 + work.attention / 4e10 + work.softmax / 5e8)
    by_hand += 10 * (work.elementwise / 2e9 + work.weights / 2e9 + work.updated / 5e8)
    assert found.likely == pytest.approx(by_hand)
    assert seconds(replace(job, steps=20), here(this(), RATES)).likely == pytest.approx(2 * by_hand)


def test_thin_products_have_the_rate_of_their_rank():
    machine = here(this(), RATES)
    thin = [timed(job_of({"name": "lora", "r": r}, rows=ROWS), machine).parts["low-rank updates"] for r in (8, 16, 64)]
    assert thin[0] == pytest.approx(thin[1])  # half the work at half the rate
    assert thin[2] == pytest.approx(4 * thin[1] * 2 / 3)


def test_tokens_that_were_guessed_make_the_range_wider():
    job = job_of("lora", rows=ROWS)
    guessed = replace(job, rows=replace(ROWS, measured=False))
    rates = here(this(), RATES)
    known, wide = seconds(job, rates), seconds(guessed, rates)
    assert wide.low < known.low and wide.high > known.high and wide.likely == known.likely


def test_a_gpu_of_the_table_reaches_a_share_of_its_peak():
    job = job_of("lora", rows=ROWS)
    h100, l4 = (timed(job, of_hardware(hardware(name), "bf16")) for name in ("h100-80gb", "l4"))
    assert h100.parts["products"] == pytest.approx(l4.parts["products"] * 121 / 989)
    share = hardware("l4").share
    assert l4.seconds.low == pytest.approx(l4.seconds.likely * share.likely / share.high)
    with pytest.raises(BadInput, match="does not multiply"):
        of_hardware(hardware("t4"), "bf16")


def test_the_probe_runs_once_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(speed, "measure", lambda *what: asked.append(what) or RATES)
    assert speed.measured("cpu") == RATES
    assert speed.measured("cpu") == RATES
    assert len(asked) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # another machine, as far as speed goes
    speed.measured("cpu")
    assert len(asked) == 2


def test_the_probe_measures_every_rate():
    found = speed.measure(torch.device("cpu"), torch.bfloat16, torch.float32)
    assert found.keys() == RATES.keys()
    assert found["products"] > found["softmax"] > 0
    assert Range.exact(found["products"]).likely > 1e8
