"""Memory by arithmetic: against tensors that autograd really keeps, against files, and against what must be larger."""

import json
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from plan_jobs import CONFIG, job_of
from tiny_models import ARCHITECTURES, tiny_config
from transformers import AutoModelForCausalLM

from shikomi.adapters.bottleneck import Bottleneck
from shikomi.adapters.dora import Dora
from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.data.packing import Example, pack
from shikomi.model.device import Dtypes
from shikomi.model.keep import BLOCK
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.plan import kept
from shikomi.plan.architecture import architecture, known
from shikomi.plan.estimate import Machine, Range, Rows
from shikomi.plan.memory import memory, micro_batch
from shikomi.recipe import ComponentSpec, build
from shikomi.registry import names

CPU = Machine("cpu", "cpu", 16 << 30, 16 << 30, "bf16", "fp32")
GPU = Machine("rtx-4090", "cuda", 24 << 30, 64 << 30, "bf16", "bf16")
TOKENS = 256
WIDER = {"gpt2": {"n_embd": 64}, "gpt_neox": {"hidden_size": 64, "intermediate_size": 160}}


def saved_bytes(lm) -> float:
    """Bytes per token that autograd keeps of a forward, parameters and small things aside."""
    mask = np.zeros(TOKENS, bool)
    mask[-4:] = True
    ids = np.random.default_rng(0).integers(2, 300, TOKENS).astype("int32")
    found: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in [*lm.model.parameters(), *lm.trainable().values()]}

    def note(tensor):
        storage = tensor.untyped_storage()
        shared = storage.nbytes() >= BLOCK  # by what Keep keeps
        address, size = (tensor.data_ptr(), tensor.nbytes) if shared else (storage.data_ptr(), storage.nbytes())
        if storage.data_ptr() not in own and size >= 16 * TOKENS:
            found[address] = size
            alive.append(tensor)  # so that no other tensor gets its address
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lm.score(pack([Example(ids, mask)], False))
    return sum(found.values()) / TOKENS


CASES = [
    *((kind, adapter) for kind in ("llama", "qwen3") for adapter in (Lora(r=2), Full(), Dora(r=2), Bottleneck())),
    ("llama", Lora(r=2, target_modules=["q_proj", "v_proj"])),
    *((kind, Lora(r=2)) for kind in ("gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe")),
    ("gemma2", Lora(r=2, target_modules=["q_proj", "v_proj"])),
    *((kind, adapter) for kind in ("gemma2", "gpt2", "qwen3_moe") for adapter in (Full(), Dora(r=2))),
    ("gemma2", Bottleneck()),
]


@pytest.mark.parametrize("kind, adapter", CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_what_layers_keep_is_what_autograd_saves(kind, adapter):
    wider = {"hidden_size": 64, "intermediate_size": 160} | (
        {"head_dim": 16} if "head_dim" in ARCHITECTURES[kind] else {}
    )
    config = tiny_config(kind, **WIDER.get(kind, wider))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    lm = wrap(model, None, adapter, Dtypes(torch.bfloat16, torch.float32), torch.device("cpu"))
    choose_path(lm, 512)
    found = architecture(json.loads(config.to_json_string()))
    assert lm.path == found.path
    reads = adapter.reads(found)
    if lm.path == "fused":
        widths = kept.fused(found, reads, copies=True)
        planned = found.layers * 2 * (widths.kept + widths.gate_up)
    else:
        planned = found.layers * 4 * kept.own(found, reads, adapter.trained_shapes(found)).kept
    last = (lm.path == "fused" or adapter.name == "bottleneck") + (adapter.name == "full") * (2 - (lm.path == "fused"))
    beside = 4 * found.hidden * last + 8 * found.head_dim  # of the last norm less the first one's, and angles
    assert planned + beside == pytest.approx(saved_bytes(lm), rel=0.04)


def test_weights_as_they_are_stored():
    model = known("llama-2-7b")
    job = job_of({"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]})
    job = replace(job, architecture=model)
    plan = memory(job, GPU)
    assert plan.trainable_parameters == 4_194_304 and plan.total_parameters == 6_738_415_616
    assert plan.of("weights").likely == 2 * model.parameters
    assert plan.of("adapter").likely == 4 * 4_194_304
    assert plan.of("optimizer").likely == pytest.approx(8 * 4_194_304, rel=1e-3)
    assert plan.final_bytes == 2 * 4_194_304
    few = memory(replace(job, quant=job_of(quant="nf4").quant), GPU)
    dense = 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert few.of("weights").likely == pytest.approx(model.body_parameters * 4.127 / 8 + dense, rel=1e-3)
    full = memory(replace(job, adapter=Full()), GPU)
    assert full.of("weights").likely == 4 * model.parameters and full.final_bytes == 2 * model.parameters
    assert full.peak.likely > 16 * model.parameters


def test_fp16_and_experts():
    moe = replace(job_of(), architecture=known("mixtral-8x7b"))
    plan = memory(moe, GPU)
    assert plan.of("weights").likely == 2 * known("mixtral-8x7b").parameters
    on_cpu, experts = memory(moe, CPU).of("weights"), 45_097_156_608  # which transformers multiplies itself, in fp32
    assert on_cpu.low == pytest.approx(2 * known("mixtral-8x7b").parameters + 2 * experts, rel=0.02)
    assert on_cpu.likely == pytest.approx(on_cpu.low + 2 * experts, rel=0.02)  # and their pages of the file


@pytest.mark.parametrize(
    "more, less",
    [
        (job_of(micro_batch_tokens=8192, batch_size=64), job_of(micro_batch_tokens=1024, batch_size=64)),
        (job_of({"name": "lora", "r": 64}), job_of({"name": "lora", "r": 2})),
        (job_of("full"), job_of("lora")),
        (job_of("full"), job_of("full", optim="galore")),
        (job_of("full"), job_of("full", optim="adamw_8bit")),
        (job_of("full"), job_of("full", optim={"name": "offload", "offload_to": "disk"})),
        (job_of(recompute="none"), job_of(recompute=2)),
        (job_of(recompute=2), job_of(recompute="full")),
        (job_of("dora", recompute="none"), job_of("lora", recompute="none")),
        (job_of({"name": "lora", "init_lora_weights": "olora"}), job_of("lora")),
        (job_of("full", objective="dpo"), job_of("full", objective="orpo")),
        (job_of("full", objective="dpo"), job_of("full", objective="dpo", reference="precompute")),
        (job_of(objective="dpo", share_prefix=False, rows=Rows(100, 900, 1000, 0.5, 0.5), micro_batch_tokens=800),
         job_of(objective="dpo", share_prefix=True, rows=Rows(100, 900, 1000, 0.5, 0.5), micro_batch_tokens=800)),
    ],
)  # fmt: skip
def test_what_takes_more(more, less):
    bigger = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000}
    config = {**job_of().architecture.config, **bigger}
    a, b = (memory(replace(job, architecture=architecture(config)), CPU) for job in (more, less))
    assert a.peak.likely > b.peak.likely * 1.001


def test_the_reference_is_a_copy_only_where_it_must_be():
    trained = 4 * sum(prod(shape) for shape in Lora(r=16).trained_shapes(job_of().architecture).values())
    assert memory(job_of(objective="dpo"), CPU).of("reference").likely == 0
    assert memory(job_of(objective="dpo", fresh=False), CPU).of("reference").likely == trained
    assert memory(job_of(objective="sft", fresh=False), CPU).of("reference").likely == 0
    for starts in ({"init_lora_weights": "olora"}, {"init_lora_weights": False}, {"modules_to_save": ["norm"]}):
        assert memory(job_of({"name": "lora", **starts}, objective="dpo"), CPU).of("reference").likely >= trained
    full = memory(job_of("full", objective="kto"), CPU)
    assert full.of("reference").likely == 4 * full.total_parameters
    assert memory(job_of("full", objective="kto", reference="precompute"), CPU).of("reference").likely == 0


def test_parts_add_up_and_ranges_are_ordered():
    for job in (job_of(), job_of("full"), job_of(quant="nf4"), job_of("full", optim="galore", objective="dpo")):
        for machine in (CPU, GPU):
            plan = memory(job, machine)
            whole = sum((part.bytes for part in plan.components), Range.exact(0))
            assert whole.likely == pytest.approx(plan.peak.likely)
            for found in (plan.peak, plan.disk, plan.loading_peak, *(part.bytes for part in plan.components)):
                assert 0 <= found.low <= found.likely <= found.high


def test_micro_batches_hold_what_fits():
    job = job_of(rows=Rows(1000, 100, 500), batch_size=16, micro_batch_tokens=1024)
    tokens, scored = micro_batch(job)
    assert 800 <= tokens.likely <= 1024 and scored.likely == pytest.approx(tokens.likely / 2)
    assert micro_batch(replace(job, micro_batch_tokens=200))[0].likely == 500  # a longer row is one by itself
    assert micro_batch(replace(job, batch_size=2))[0].likely == 500
    assert micro_batch(replace(job, rows=Rows(1000, 100, 500, fullest=Range(7, 8, 9))))[0] == Range(7, 8, 9)


def test_recompute_is_chosen_for_the_memory():
    job = replace(job_of(batch_size=64, micro_batch_tokens=8192), architecture=known("smollm2-1.7b"))
    job = replace(job, rows=Rows(1000, 1000, 2000))
    assert memory(job, replace(CPU, memory_bytes=256 << 30)).recompute == "none"
    assert memory(job, replace(CPU, memory_bytes=5 << 30)).recompute == "full"
    some = memory(job, replace(CPU, memory_bytes=16 << 30)).recompute
    assert isinstance(some, int) and 0 < some < 24


def test_a_range_is_arithmetic():
    a, b = Range(1, 2, 3), Range(10, 20, 30)
    assert a + b == Range(11, 22, 33) and b - a == Range(7, 18, 29) and a * 2 == Range(2, 4, 6)
    assert b / a == Range(10 / 3, 10, 30) and a.at_least(2) == Range(2, 2, 3)


@pytest.mark.parametrize("name", names("optim"))
def test_every_optimizer_says_what_it_keeps(name):
    shapes = {"model.layers.0.mlp.up_proj.weight": (256, 512), "model.norm.weight": (512,)}
    optim = build("optim", ComponentSpec(name=name))
    places = optim.places(shapes, "cpu")
    whole = optim.state_bytes(shapes)
    assert places.device + places.disk >= (whole if isinstance(whole, int) else whole.total)
    assert 0 < optim.gradient_bytes(shapes, 1) <= optim.gradient_bytes(shapes, 2)
    assert optim.gradient_bytes(shapes, 2) >= 4 * (256 * 512 + 512)


def test_where_offloaded_state_is():
    shapes = {"a": (1000, 100), "b": (10, 100)}
    to_disk = build("optim", ComponentSpec(name="offload", options={"offload_to": "disk"})).places(shapes, "cpu")
    assert to_disk.device == 800_000 and to_disk.disk == pytest.approx(808_000, abs=16)
    host = build("optim", ComponentSpec(name="offload"))
    assert host.places(shapes, "cuda").host == pytest.approx(808_000, abs=16)
    assert host.places(shapes, "cpu").device == pytest.approx(808_000, abs=16)


def test_disk_holds_the_checkpoints_that_are_kept_and_one_more():
    def disk(**more):
        return memory(job_of("full", steps=100, **more), CPU).disk

    one = 3 * 4 * architecture(CONFIG).parameters  # weights and two moments in fp32
    rest = disk(save_steps=10, save_total_limit=1) - 2 * one
    assert rest.low == rest.high == pytest.approx(2 * architecture(CONFIG).parameters + (4 << 20), rel=1e-3)
    for more, (low, likely, high) in (
        ({"save_steps": 10, "save_total_limit": 2}, (3, 3, 3)),
        ({"save_steps": 10, "save_total_limit": None}, (11, 11, 11)),
        ({"save_steps": 60, "save_total_limit": 2}, (2, 2, 2)),
        ({"save_total_limit": 3}, (2, 3, 4)),
        ({"save_total_limit": None}, (2, 3, 101)),
    ):
        found = disk(**more) - rest
        assert (found.low / one, found.likely / one, found.high / one) == pytest.approx(
            (low, likely, high), rel=1e-3
        ), more
