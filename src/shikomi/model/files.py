"""From what the user calls a model to the folder that holds it: alias, folder, run, adapter, GGUF file or hub id."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from shikomi.errors import BadInput, Problem, TryAgain, nearest
from shikomi.model import catalog
from shikomi.model.check import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    PICKLES,
    check_adapter,
    check_folder,
    listing_of,
    missing,
    weight_files,
)
from shikomi.progress import Progress, Silent

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# only the root folder: subfolders hold other formats of the same weights
HUB_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
HUB_UNWANTED = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.py"]
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class ModelFiles:
    """A checked base model on this disk, and the PEFT adapter that goes on it where the user named one.

    `origin` names the base for others (alias, hub id, absolute path): what an adapter saves as base_model_name_or_path.
    `revision` is the hub's commit. `notes` are sentences to print once.
    """

    folder: Path
    origin: str
    adapter: Path | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is: beside the adapter where it has its own, else beside the base."""
        if self.adapter is not None and (self.adapter / "tokenizer.json").is_file():
            return self.adapter
        return self.folder

    def digest(self) -> str:
        """Fingerprint of config, tensor names, shapes, sizes and samples of the weights; cheap for any size."""
        digest = hashlib.sha256()
        folders = [self.folder] if self.adapter is None else [self.folder, self.adapter]
        for folder in folders:
            for name in (CONFIG, ADAPTER_CONFIG):
                if (folder / name).is_file():
                    digest.update(name.encode() + (folder / name).read_bytes())
            own = folder / ADAPTER_WEIGHTS
            for path in [own] if own.is_file() else weight_files(folder, []):
                digest.update(_weights_fingerprint(path))
        return digest.hexdigest()


def _weights_fingerprint(path: Path) -> bytes:
    """Header bytes, and samples spread over the data: two trainings of one model have equal headers and sizes."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        digest.update(file.read(length))
        start, room = 8 + length, size - 8 - length
        for index in range(SAMPLES):
            file.seek(start + room * index // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()


def resolve(
    name: str | Path, revision: str | None = None, token: str | None = None, progress: Progress | None = None
) -> ModelFiles:
    """Find, fetch or convert what `name` means, and check it; no weights are loaded.

    `name` is an alias, a transformers folder, a run directory, a PEFT adapter folder, a .gguf file or a hub id;
    `revision` and `token` are the hub's. Raises `BadInput` with every problem found, and `TryAgain` where a network or
    a disk failed.
    """
    return _resolve(str(name), revision, token, progress or Silent(), None)


def _resolve(text: str, revision: str | None, token: str | None, progress: Progress, on_it: Path | None) -> ModelFiles:
    """`on_it` is the adapter whose base is asked for: that must not be an adapter itself."""
    if text in catalog.ALIASES:
        _no_revision(text, revision)
        folder = catalog.get(text, progress)
        return ModelFiles(folder, text, notes=catalog.conversion_notes(folder))
    path = Path(text).expanduser()
    if path.exists():
        _no_revision(text, revision)
        return _local(path.absolute(), token, progress, on_it)
    if _looks_like_a_path(text, path):
        raise missing(path)
    close = nearest(text, catalog.ALIASES)
    if not HUB_ID.fullmatch(text) or ("/" not in text and close):
        fix = f"did you mean {close}?" if close else "give an alias, a folder, a .gguf file or a hub id (owner/name)"
        raise BadInput([Problem("no such model", found=text, allowed=", ".join(catalog.ALIASES), fix=fix)])
    folder = _from_hub(text, revision, token, progress)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder, token, progress, on_it)
    try:
        check_folder(folder)
    except BadInput as error:
        what = "only safetensors are fetched from the hub, never pickle checkpoints (.bin, .pt) or GGUF files"
        raise BadInput([*error.problems, Problem(what, found=text)]) from error
    return ModelFiles(folder, text, revision=folder.name)


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        fix = "remove model_revision, or give a hub id (owner/name) as model"
        raise BadInput([Problem("model_revision belongs to hub ids only", found=f"{name} at {revision}", fix=fix)])


def _looks_like_a_path(text: str, path: Path) -> bool:
    known_suffix = path.suffix in (".gguf", ".safetensors", *PICKLES)
    beside_a_folder = len(path.parts) == 2 and path.parent.is_dir()  # "runs/typo", not "owner/name"
    return known_suffix or beside_a_folder or text.startswith((".", "/", "~")) or text.count("/") > 1


def _local(path: Path, token: str | None, progress: Progress, on_it: Path | None) -> ModelFiles:
    if path.is_file():
        return _file(path, progress)
    final = path / "final"
    if final.is_dir():
        return _local(final, token, progress, on_it)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, token, progress, on_it)
    if not (path / CONFIG).is_file() and (path / "recipe.yaml").is_file():
        fix = f"shikomi resume {path}"
        raise BadInput(
            [Problem("the run is not finished: it has no final/", str(path), found=listing_of(path), fix=fix)]
        )
    check_folder(path)
    return ModelFiles(path, str(path), notes=catalog.conversion_notes(path))


def _file(path: Path, progress: Progress) -> ModelFiles:
    if path.suffix == ".gguf":
        folder = catalog.converted(path, progress)
        return ModelFiles(folder, str(path), notes=catalog.conversion_notes(folder))
    if path.suffix in PICKLES:
        check_folder(path.parent)  # says how to convert it where the folder has nothing else
    fix = f"give the folder: {path.parent}"
    raise BadInput([Problem("not a model file", str(path), allowed="a .gguf file, or a transformers folder", fix=fix)])


def _adapter(folder: Path, token: str | None, progress: Progress, on_it: Path | None) -> ModelFiles:
    """An adapter, in PEFT's format or our own, with the base that it names, resolved in turn."""
    if on_it is not None:
        fix = f"shikomi merge {folder} --output FOLDER, and name that folder as the base"
        raise BadInput([Problem("an adapter on an adapter", str(on_it), found=f"its base is {folder}", fix=fix)])
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base_name, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
        raise BadInput([Problem("not a PEFT adapter's config", str(path), found=found)]) from error
    if not isinstance(base_name, str) or not base_name:
        fix = "write the base model's folder or hub id there"
        raise BadInput([Problem("base_model_name_or_path is empty", str(path), found=repr(base_name), fix=fix)])
    beside = folder / base_name
    name = str(beside) if base_name.startswith(".") and beside.exists() else base_name
    on_the_hub = name not in catalog.ALIASES and not Path(name).expanduser().exists()
    try:
        base = _resolve(name, revision if on_the_hub else None, token, progress, folder)
    except BadInput as error:
        fix = "set base_model_name_or_path in adapter_config.json to where the base is now"
        raise BadInput([*error.problems, Problem("the base of this adapter", str(folder), fix=fix)]) from error
    check_adapter(folder, base.folder)
    return ModelFiles(base.folder, base.origin, folder, base.revision, base.notes)


def _from_hub(name: str, revision: str | None, token: str | None, progress: Progress) -> Path:
    """The snapshot folder of a hub repository: safetensors, JSON, templates and tokenizer files; nothing that runs."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of the HTTP library that the hub's client uses, and the base of the client's own
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    progress.phase(f"fetching {name} from the hub")
    wanted = f"{name} at {revision}" if revision else name
    try:
        return Path(
            snapshot_download(
                name, revision=revision, token=token, allow_patterns=HUB_WANTED, ignore_patterns=HUB_UNWANTED
            )
        )
    except GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/{name}, and set HF_TOKEN to a token of that account"
        raise BadInput([Problem("a gated model", found=wanted, fix=fix)]) from error
    except RepositoryNotFoundError as error:
        close = nearest(name, catalog.ALIASES)
        fix = f"did you mean {close}?" if close else "check the spelling; for a private model set HF_TOKEN"
        raise BadInput([Problem("no such model on the hub, or a private one", found=wanted, fix=fix)]) from error
    except RevisionNotFoundError as error:
        fix = "give a branch, a tag or a commit of that model as model_revision"
        raise BadInput([Problem("no such revision on the hub", found=wanted, fix=fix)]) from error
    except HFValidationError as error:
        raise BadInput([Problem("not a hub id", found=name, allowed="owner/name", fix=str(error))]) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            fix = "unset HF_HUB_OFFLINE once to fetch it, or give a local folder"
            found = "HF_HUB_OFFLINE is set and the hub's cache does not hold all of it"
            raise BadInput([Problem(f"{wanted} is not on this machine", found=found, fix=fix)]) from error
        raise _unreachable(wanted, error) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(wanted, error) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fix = "free some, or set HF_HOME to a folder on a larger disk"
        raise TryAgain(f"the disk is full while fetching {wanted}; fix: {fix}") from error


def _unreachable(wanted: str, error: Exception) -> TryAgain:
    reason = str(error.__cause__ or error).splitlines()[0]
    return TryAgain(
        f"the hub could not be reached for {wanted}: {reason}; fix: check the network and try again, "
        "or give a local folder, a .gguf file, or the alias smollm2"
    )
