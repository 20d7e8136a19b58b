"""What the user calls a model becomes a checked folder, or an error that says what to do; the hub is never asked."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from peft import LoraConfig, get_peft_model
from tiny_gguf import write_tiny
from transformers import AutoModelForCausalLM

from shikomi.errors import BadInput, TryAgain
from shikomi.model import catalog
from shikomi.model.files import ModelFiles, resolve
from shikomi.progress import Silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/tiny, with the hub switched off."""
    root = tmp_path / "hub"
    snapshot = root / "models--owner--tiny" / "snapshots" / COMMIT
    shutil.copytree(tiny_llama, snapshot)
    refs = root / "models--owner--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def adapter(base: str | Path, weights_of: Path, target: Path, **config: object) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(weights_of), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(target)
    path = target / "adapter_config.json"
    content = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)} | config
    path.write_text(json.dumps(content))
    return target


def refused(name: str | Path, **arguments: Any) -> str:
    with pytest.raises(BadInput) as caught:
        resolve(name, **arguments)
    return str(caught.value)


def test_a_folder(tiny_llama):
    assert resolve(tiny_llama) == ModelFiles(tiny_llama, str(tiny_llama))


def test_a_folder_by_its_relative_path(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "models" / "mine")
    for name in ("models/mine", "./models/mine"):
        files = resolve(name)
        assert files.folder == tmp_path / "models" / "mine"
        assert files.origin == str(files.folder)


def test_a_damaged_folder_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "mine")
    (folder / "model.safetensors").write_bytes(b"short")
    assert "damaged weights" in refused(folder)


def test_paths_that_are_not_there(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "models" / "mine")
    for name in ("models/mime", "./models/mime", str(tmp_path / "models" / "mime")):
        assert "did you mean" in refused(name) and "models/mine?" in refused(name)
    for name in ("missing.gguf", "~/nothing-of-that-name", "a/b/c"):
        assert "no such model" in refused(name)


def test_an_alias(monkeypatch, tiny_llama):
    monkeypatch.setattr(catalog, "get", lambda name, progress: {"smollm2": tiny_llama}[name])
    assert resolve("smollm2") == ModelFiles(tiny_llama, "smollm2")


def test_names_near_an_alias_are_not_sent_to_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "did you mean smollm2?" in refused("SmolLM-2")
    assert "no such model" in refused("what is this")


def test_a_gguf_file(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", splitter="poro-chat")
    files = resolve("tiny.gguf")
    assert files.origin == str(tmp_path / "tiny.gguf")
    assert files.folder.parent == tmp_path / "cache" / "gguf"
    assert "poro-chat" in files.notes[0]


def test_other_files(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "mine")
    assert f"give the folder: {folder}" in refused(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle checkpoint is refused" in refused(folder / "pytorch_model.bin")


def test_an_adapter_brings_its_base(tiny_llama, tmp_path):
    made = adapter(tiny_llama, tiny_llama, tmp_path / "adapter")
    assert resolve(made) == ModelFiles(tiny_llama, str(tiny_llama), adapter=made)


def test_an_adapter_beside_its_base(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "all" / "base")
    made = adapter("../base", tiny_llama, tmp_path / "all" / "adapter")
    assert resolve(made).folder.resolve() == tmp_path / "all" / "base"


def test_an_adapter_on_an_alias_and_on_the_hub(tiny_llama, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(catalog, "get", lambda name, progress: tiny_llama)
    on_alias = adapter("smollm2", tiny_llama, tmp_path / "a", revision="main")
    assert resolve(on_alias) == ModelFiles(tiny_llama, "smollm2", adapter=on_alias)
    on_hub = adapter("owner/tiny", tiny_llama, tmp_path / "b", revision=COMMIT)
    files = resolve(on_hub)
    assert (files.origin, files.adapter, files.revision) == ("owner/tiny", on_hub, COMMIT)


def test_adapters_without_a_base_that_fits(tiny_llama, tiny_folder, tmp_path):
    made = adapter(tiny_folder("llama", hidden_size=64), tiny_llama, tmp_path / "a")
    assert "belongs to another base" in refused(made)
    message = refused(adapter(tmp_path / "gone", tiny_llama, tmp_path / "b"))
    assert "gone" in message and "the base of this adapter" in message
    assert "an adapter on an adapter" in refused(adapter(tmp_path / "c", tiny_llama, tmp_path / "c"))
    good = adapter(tiny_llama, tiny_llama, tmp_path / "d")
    assert "an adapter on an adapter" in refused(adapter(good, tiny_llama, tmp_path / "e"))
    assert "base_model_name_or_path is empty" in refused(adapter("", tiny_llama, tmp_path / "f"))
    (good / "adapter_config.json").write_text("{")
    assert "not a PEFT adapter's config" in refused(good)


def test_two_adapters_that_name_each_other_are_refused(tiny_llama, tmp_path):
    adapter(tmp_path / "b", tiny_llama, tmp_path / "a")
    adapter(tmp_path / "a", tiny_llama, tmp_path / "b")
    assert "an adapter on an adapter" in refused(tmp_path / "a")


def test_run_directories(tiny_llama, tmp_path):
    final = adapter(tiny_llama, tiny_llama, tmp_path / "runs" / "one" / "final")
    assert resolve("runs/one") == ModelFiles(tiny_llama, str(tiny_llama), adapter=final)
    shutil.copytree(tiny_llama, tmp_path / "runs" / "two" / "final")
    assert resolve("runs/two").folder == tmp_path / "runs" / "two" / "final"
    (tmp_path / "runs" / "three").mkdir()
    (tmp_path / "runs" / "three" / "recipe.yaml").write_text("model: smollm2\n")
    message = refused("runs/three")
    assert "not finished" in message and f"shikomi resume {tmp_path / 'runs' / 'three'}" in message


def test_revision_is_for_the_hub(tiny_llama):
    for name in ("smollm2", str(tiny_llama)):
        assert "model_revision belongs to hub ids only" in refused(name, revision="v2")


def test_hub_models_are_found_in_the_cache_offline(hub):
    files = resolve("owner/tiny")
    assert files.folder == hub / "models--owner--tiny" / "snapshots" / COMMIT
    assert (files.origin, files.revision) == ("owner/tiny", COMMIT)
    assert resolve("owner/tiny", revision=COMMIT).folder == files.folder
    message = refused("owner/other")
    assert "owner/other is not on this machine" in message and "HF_HUB_OFFLINE" in message
    assert "owner/tiny at v9 is not on this machine" in refused("owner/tiny", revision="v9")


def test_hub_models_without_safetensors_say_why(hub):
    (hub / "models--owner--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert "only safetensors are fetched from the hub" in refused("owner/tiny")


def test_what_is_asked_of_the_hub(tiny_llama, monkeypatch):
    asked: dict[str, Any] = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = []

    class Recorder(Silent):
        def phase(self, text: str) -> None:
            said.append(text)

    resolve("owner/tiny", revision="v2", token="secret", progress=Recorder())
    assert (asked["repository"], asked["revision"], asked["token"]) == ("owner/tiny", "v2", "secret")
    assert said == ["fetching owner/tiny from the hub"]
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    others = ["pytorch_model.bin", "model.pt", "onnx/model.json", "modeling_x.py", "original/consolidated.safetensors"]
    others += ["consolidated.safetensors", "README.md", "tf_model.h5", "x/tokenizer.json", "tokenizer.py"]
    kept = huggingface_hub.utils.filter_repo_objects(
        names + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == names


def failure(kind: type[hub_errors.HfHubHTTPError], message: str = "no") -> Exception:
    """As the hub's client makes it, from an answer without headers."""
    return kind(message, response=Mock(headers={}))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (failure(hub_errors.GatedRepoError), BadInput, "accept its terms at https://huggingface.co/o/x"),
        (
            failure(hub_errors.RepositoryNotFoundError),
            BadInput,
            "no such model on the hub, or a private one",
        ),
        (
            failure(hub_errors.RevisionNotFoundError),
            BadInput,
            "no such revision on the hub: found o/x at v2",
        ),
        (failure(hub_errors.HfHubHTTPError, "503 busy"), TryAgain, "503 busy; fix: check the network"),
        (hub_errors.LocalEntryNotFoundError("no connection"), TryAgain, "no connection; fix: check the network"),
        (hub_errors.HTTPError("broken off"), TryAgain, "broken off; fix: check the network"),
        (OSError(errno.ENOSPC, "full"), TryAgain, "the disk is full while fetching o/x at v2"),
        (ConnectionError("refused"), TryAgain, "refused; fix: check the network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_errors(monkeypatch, error, kind, said):
    def download(repository: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(kind) as caught:
        resolve("o/x", revision="v2")
    assert said in str(caught.value)
    assert type(caught.value) is kind


def test_digest_follows_weights_config_and_adapter(tiny_llama, tiny_folder, tmp_path):
    base = resolve(tiny_llama)
    copy = resolve(shutil.copytree(tiny_llama, tmp_path / "copy"))
    assert copy.digest() == base.digest() == base.digest()
    assert resolve(tiny_folder("llama", seed=1)).digest() != base.digest()  # same shapes, other numbers
    made = resolve(adapter(tiny_llama, tiny_llama, tmp_path / "adapter"))
    assert made.digest() != base.digest()
    config = json.loads((copy.folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (copy.folder / "config.json").write_text(json.dumps(config))
    assert copy.digest() != base.digest()


def test_digest_covers_every_shard(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    before = resolve(tmp_path / "sharded").digest()
    last = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(bytes(content))
    assert resolve(tmp_path / "sharded").digest() != before
