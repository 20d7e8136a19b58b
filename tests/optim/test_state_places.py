"""Optimizers whose state is small or elsewhere: the same updates, less memory, and refusals that name another way."""

import bitsandbytes
import pytest
import torch
from torch import nn

from shikomi.errors import BadInput, TryAgain
from shikomi.optim import _by_tensor, _moments
from shikomi.optim.adamw import AdamW
from shikomi.optim.adamw_8bit import AdamW8bit
from shikomi.optim.offload import Offload, OnDiskAdamW
from shikomi.optim.paged import Paged

SHAPES = {
    "model.embed_tokens.weight": (80, 64),
    "model.layers.0.mlp.gate_proj.weight": (97, 64),
    "model.layers.0.self_attn.k_proj.weight": (16, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (80, 64),
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(trained: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in trained.values():
        p.grad = torch.randn(p.shape, generator=generator)


def steps(optimizer, trained, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        gradients(trained, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def kept(optimizer, trained) -> dict[str, torch.Tensor]:
    return {f"{key}/{name}": t for name, p in trained.items() for key, t in optimizer.state[p].items()}


def put_back(optimizer, trained, saved) -> None:
    for name, tensor in saved.items():
        key, _, parameter = name.partition("/")
        optimizer.put(trained[parameter], key, tensor)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_offloaded_is_adamw_bit_for_bit(place, tmp_path):
    options = {"adam_beta2": 0.95, "adam_epsilon": 1e-6}
    plain, moved = parameters(), parameters()
    reference = AdamW(**options).build(plain, 1e-2, 0.1)
    optimizer = Offload(offload_to=place, **options).build(moved, 1e-2, 0.1, tmp_path)
    steps(reference, plain, 5)
    steps(optimizer, moved, 5)
    for name in SHAPES:
        assert torch.equal(plain[name], moved[name])
    for name, tensor in kept(reference, plain).items():
        assert torch.equal(tensor, kept(optimizer, moved)[name])


def test_the_file_on_disk_holds_the_state_and_memory_does_not(tmp_path):
    """After each tensor its pages leave the process; what they held is read back from the file."""

    def resident() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssFile:"))

    trained = {f"layers.{i}.weight": nn.Parameter(torch.ones(1024, 1024)) for i in range(8)}  # 64 MB of state
    optimizer = Offload(offload_to="disk").build(trained, 1e-2, 0.0, tmp_path)
    assert isinstance(optimizer, OnDiskAdamW)
    seen = []
    leave = optimizer.leave

    def watched() -> None:
        seen.append(resident())
        leave()

    optimizer.leave = watched
    before = resident()
    steps(optimizer, trained, 2)
    assert len(seen) == 16 and max(seen) - before < 12 << 20  # one tensor's state is 8 MB
    tensors = _by_tensor.InTurn(kept(optimizer, trained), optimizer)
    for name in tensors:
        tensors[name].sum()
        assert resident() - before < 12 << 20
    assert optimizer.file.size() == 64 << 20
    assert not list(tmp_path.iterdir())  # it has no name: a killed run leaves nothing behind
    assert str(tmp_path) in open("/proc/self/maps").read()


def test_a_full_disk_is_told_before_the_first_update(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("shikomi.optim.offload.tempfile.TemporaryFile", lambda dir: Full())
    trained = parameters()
    optimizer = Offload(offload_to="disk").build(trained, 1e-2, 0.0, tmp_path)
    with pytest.raises(TryAgain, match="No space left.*offload_to: host"):
        steps(optimizer, trained, 1)
    assert torch.equal(trained["model.norm.weight"], parameters()["model.norm.weight"])


def test_eight_bits_are_bitsandbytes_with_embeddings_in_32(monkeypatch):
    monkeypatch.setattr(_moments, "SLICE", 1024)  # several slices, the last one short
    ours, theirs = parameters(), parameters()
    optimizer = AdamW8bit().build(ours, 1e-2, 0.1)
    decayed = [p for p in theirs.values() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [theirs["model.norm.weight"]], "weight_decay": 0.0},
    ]
    reference = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2)
    steps(optimizer, ours, 6)
    steps(reference, theirs, 6)
    for name in ("model.layers.0.mlp.gate_proj.weight", "lm_head.weight"):
        state, expected = optimizer.state[ours[name]], reference.state[theirs[name]]
        assert torch.equal(ours[name], theirs[name])
        assert torch.equal(state["exp_avg"], expected["state1"]) and state["exp_avg"].dtype == torch.uint8
        assert torch.equal(state["exp_avg_sq_absmax"], expected["absmax2"])
    plain = parameters()
    steps(AdamW().build(plain, 1e-2, 0.1), plain, 6)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(ours[name], plain[name])
    assert not torch.equal(ours["lm_head.weight"], plain["lm_head.weight"])


@pytest.mark.parametrize(
    "options", [AdamW(), AdamW8bit(), AdamW8bit(embedding_bits=8), Offload(), Offload(offload_to="disk")], ids=str
)
def test_state_is_counted_and_goes_round(options, tmp_path):
    """Saved after three steps and put into a fresh optimizer, it goes on bit for bit."""
    whole, cut = parameters(), parameters()
    optimizer = options.build(whole, 1e-2, 0.1, tmp_path)
    steps(optimizer, whole, 6)
    first = options.build(cut, 1e-2, 0.1, tmp_path)
    steps(first, cut, 3)
    saved = {name: tensor.clone() for name, tensor in kept(first, cut).items()}
    assert options.state_bytes(SHAPES) == sum(t.numel() * t.element_size() for t in saved.values())
    if isinstance(first, _by_tensor.TensorAdamW):
        second = options.build(cut, 1e-2, 0.1, tmp_path)
        put_back(second, cut, saved)
        steps(second, cut, 3, first=3)
        assert all(torch.equal(whole[name], cut[name]) for name in SHAPES)
        assert all(torch.equal(t, kept(second, cut)[name]) for name, t in kept(optimizer, whole).items())


def test_eight_bits_of_smollm2_are_two_fifths_of_the_state():
    shapes = {"model.embed_tokens.weight": (49152, 576)}
    for i in range(30):
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (576, 576) for n in "qo"}
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (192, 576) for n in "kv"}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (1536, 576) for n in ("gate", "up", "down")}
    full = AdamW().state_bytes(shapes)
    assert full == pytest.approx(8 * 134.5e6, rel=1e-3)
    assert AdamW8bit().state_bytes(shapes) / full == pytest.approx(0.411, abs=0.001)
    assert AdamW8bit(embedding_bits=8).state_bytes(shapes) / full == pytest.approx(0.254, abs=0.001)


@pytest.mark.parametrize("bits, nearest", [(32, "offload_to: disk"), (8, "optim: adamw_8bit")])
def test_paged_is_refused_on_a_cpu_with_the_nearest_choice(bits, nearest):
    with pytest.raises(BadInput, match="needs the managed memory of CUDA") as refused:
        Paged(state_bits=bits).build(parameters(), 1e-2, 0.0)
    assert nearest in str(refused.value) and "device: cuda" in str(refused.value)


@pytest.fixture
def managed(monkeypatch):
    """Ordinary memory in the place of managed memory, and the CPU allowed: what was asked for, in order."""
    from bitsandbytes import functional

    asked = []

    def get_paged(*shape, dtype, device):
        asked.append(("get", shape, dtype))
        tensor = torch.empty(shape, dtype=dtype)
        tensor.is_paged = True
        return tensor

    def prefetch(tensor):
        assert tensor.is_paged
        asked.append(("prefetch", tuple(tensor.shape), tensor.dtype))

    monkeypatch.setattr(functional, "get_paged", get_paged)
    monkeypatch.setattr(functional, "fill", lambda tensor, value: tensor.fill_(value))
    monkeypatch.setattr(functional, "prefetch_tensor", prefetch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append(("synchronize",)))
    monkeypatch.setattr("shikomi.optim.paged.SMALLEST_PAGED", 5000)
    monkeypatch.setattr("shikomi.optim.paged.DEVICES", ("cpu",))
    return asked


@pytest.mark.parametrize("bits", [32, 8])
def test_paged_is_bitsandbytes_and_its_state_goes_back_into_managed_memory(bits, managed):
    ours, theirs = parameters(), parameters()
    options = Paged(state_bits=bits, embedding_bits=8)
    optimizer = options.build(ours, 1e-2, 0.0)
    reference = bitsandbytes.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0, optim_bits=bits)
    steps(optimizer, ours, 3)
    steps(reference, theirs, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
    large = [name for name, p in ours.items() if p.numel() >= 5000]
    assert len(large) == 3
    dtype = torch.float32 if bits == 32 else torch.uint8
    assert [a for a in managed if a[0] == "get"] == [("get", SHAPES[n], dtype) for n in large for _ in range(2)]
    assert sum(a[0] == "prefetch" for a in managed) == 3 * 2 * 3 and managed.count(("synchronize",)) == 3
    saved = {name: tensor.clone() for name, tensor in kept(optimizer, ours).items()}
    again = options.build(ours, 1e-2, 0.0)
    put_back(again, ours, saved)
    assert all(again.state[ours[n]]["exp_avg"].is_paged for n in large)
    steps(again, ours, 3, first=3)
    steps(reference, theirs, 3, first=3)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_eight_bits_without_bitsandbytes_name_the_way_out(no_bitsandbytes):
    with pytest.raises(BadInput, match=r"bitsandbytes, which is not installed.*shikomi\[quant\].*optim: adamw"):
        AdamW8bit().build(parameters(), 1e-2, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [Offload(), Paged(), Paged(state_bits=8), AdamW8bit()], ids=str)
def test_on_a_gpu_state_is_elsewhere_and_the_steps_are_adamws(options):
    """Not run where this was written: there was no GPU."""
    device = torch.device("cuda")
    plain, moved = ({n: nn.Parameter(p.detach().to(device)) for n, p in parameters().items()} for _ in range(2))
    reference, optimizer = AdamW().build(plain, 1e-2, 0.1), options.build(moved, 1e-2, 0.1)
    for step in range(4):
        for trained, one in ((plain, reference), (moved, optimizer)):
            gradients(trained, step)
            for p in trained.values():
                p.grad = p.grad.to(device)
            one.step()
    exact = isinstance(options, Offload)
    for name in SHAPES:
        torch.testing.assert_close(plain[name], moved[name], rtol=0 if exact else 1e-2, atol=0 if exact else 5e-3)
    if exact:
        assert {t.device.type for name, t in kept(optimizer, moved).items() if not name.startswith("step/")} == {"cpu"}
