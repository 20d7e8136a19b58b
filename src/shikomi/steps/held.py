"""A loaded base and the adapters that it holds, one of them in force: each answers as it does when opened alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from shikomi.checkpoint.rundir import RunDir
from shikomi.data.encode import Encoder
from shikomi.errors import BadInput, Problem, nearest
from shikomi.model.files import ModelFiles, resolve
from shikomi.model.language_model import LanguageModel
from shikomi.model.load import load_model, stop_ids_of
from shikomi.model.mount import Mount, Recorded, choose_base, mount, mounted
from shikomi.model.task import check_policy
from shikomi.recipe import Recipe, load_recipe
from shikomi.steps.prepare import scheme
from shikomi.steps.saved import saved_adapter

LENGTH = 1024  # tokens of the longest row that is expected where no recipe says it
FIRST = "default"  # the name of the adapter that a model was opened with


@dataclass(frozen=True)
class Part:
    """An adapter, or the base, as it answers when it is opened by itself."""

    mount: Mount
    tokenizer: Any
    encoder: Encoder
    stop_ids: list[int]
    recipe: Recipe | None
    labels: tuple[str, ...] | None


@dataclass(eq=False)
class Held:
    """The parts of `lm` by name; that of the base, None, is there once it was in use."""

    lm: LanguageModel
    files: ModelFiles
    active: str | None
    parts: dict[str | None, Part]

    @property
    def part(self) -> Part:
        """The one in force."""
        return self.parts[self.active]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(name for name in self.parts if name is not None)

    def add(self, name: str, folder: str | Path) -> None:
        """Loads another adapter of the same base (a run, a PEFT folder, a hub id) beside those that are there.

        What is in force stays so: see `use`. Raises BadInput for a name that is taken, for an adapter of another base
        or one that does not fit.
        """
        if not name or name in self.parts:
            allowed = "any that is not in use: " + (", ".join(self.names) or "none is")
            raise BadInput([Problem("an adapter needs a name of its own", found=repr(name), allowed=allowed)])
        files = resolve(folder)
        if files.adapter is None:
            fix = "open it by itself, or give a run or folder with adapter_config.json"
            raise BadInput([Problem("a whole model, not an adapter", str(folder), fix=fix)])
        if files.folder.resolve() != self.files.folder.resolve():
            found = f"its base is {files.origin}, and {self.files.origin} is loaded"
            fix = "open it by itself, or set base_model_name_or_path in adapter_config.json if that is the same model"
            raise BadInput([Problem("an adapter for another base", str(folder), found=found, fix=fix)])
        check_policy(files, str(folder))
        options, tensors, _ = saved_adapter(files.adapter)
        recipe, labels = run_of(Path(folder))
        tokenizer = _tokenizer(self.lm, files, str(folder))
        before = self.active
        self._take_off()
        try:
            length = recipe.max_length if recipe else LENGTH
            made = mount(self.lm, options, tensors, str(files.adapter), tokenizer, length)
            made.take_off(self.lm)
            self.parts[name] = _part_of(self.lm, made, tokenizer, recipe, labels)
        finally:
            self._put_on(before)

    def use(self, name: str | None) -> None:
        """Takes an adapter into force, or with None the base with its own chat template. Raises BadInput."""
        if name is None and None not in self.parts:
            tokenizer = _tokenizer(self.lm, replace(self.files, adapter=None), self.files.origin)
            after = self.active
            self._take_off()
            try:
                self.parts[None] = _part_of(self.lm, choose_base(self.lm, LENGTH), tokenizer, None, None)
                after = None
            finally:
                self._put_on(after)
        elif name is None or self._known(name) != self.active:
            self._take_off()
            self._put_on(name)

    def remove(self, name: str) -> None:
        """Forgets an adapter; where it is in force, the base is afterwards. Raises BadInput for an unknown name."""
        if name == self.active:
            self.use(None)
        del self.parts[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self.names:
            close = nearest(name, self.names)
            fix = f"did you mean {close!r}?" if close else "add_adapter(name, folder)"
            raise BadInput([Problem(f"no adapter named {name!r}", allowed=", ".join(self.names) or None, fix=fix)])
        return name

    def _take_off(self) -> None:
        self.parts[self.active].mount.take_off(self.lm)

    def _put_on(self, name: str | None) -> None:
        part = self.parts[name]
        part.mount.put_on(self.lm)
        self.lm.tokenizer, self.lm.stop_ids = part.tokenizer, part.stop_ids
        self.active = name


def open_held(name: str | Path, files: ModelFiles, dtype: str, device: str) -> Held:
    """Loads a base with the adapter that `name` means, where it means one. Raises BadInput."""
    recipe, labels = run_of(Path(name))
    recorded: Recorded | None = None
    tensors: dict[str, Tensor] = {}
    if files.adapter is not None:
        options, tensors, _ = saved_adapter(files.adapter)
        recorded = Recorded(options)
    lm = load_model(
        str(files.folder),
        recorded,
        dtype,
        device,
        max_length=recipe.max_length if recipe else LENGTH,
        tokenizer_folder=str(files.tokenizer_folder),
        quant=scheme(recipe) if recipe and recorded else None,  # an adapter answers over the base it was trained on
    )
    if recorded is not None:
        recorded.load(tensors, str(files.adapter))
    lm.origin = files.origin
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    part = _part_of(lm, mounted(lm, recorded), lm.tokenizer, recipe, labels)
    lm.stop_ids = part.stop_ids
    active = FIRST if recorded is not None else None
    return Held(lm, files, active, {active: part})


def _tokenizer(lm: LanguageModel, files: ModelFiles, name: str) -> Any:
    """The tokenizer of an adapter or of the base; raises BadInput where its model would have other rows than `lm`."""
    tokenizer = AutoTokenizer.from_pretrained(str(files.tokenizer_folder), local_files_only=True)
    config = AutoConfig.from_pretrained(str(files.folder), local_files_only=True)
    rows, loaded = max(config.vocab_size, len(tokenizer)), lm.model.get_input_embeddings().weight.shape[0]
    if rows != loaded:
        what = "another vocabulary than that of the model as it was opened: one of them has new tokens"
        found = f"{rows:,} tokens, and {loaded:,} are loaded"
        raise BadInput([Problem(what, name, found=found, fix="open each of them by itself")])
    return tokenizer


def _part_of(
    lm: LanguageModel, mounted: Mount, tokenizer: Any, recipe: Recipe | None, labels: tuple[str, ...] | None
) -> Part:
    """What is in force in `lm`, with the way its rows become prompts."""
    chat, template = (recipe.chat, recipe.chat_template) if recipe else ("auto", None)
    train_on, max_length = (recipe.data.train_on, recipe.max_length) if recipe else ("all", None)
    encoder = Encoder(tokenizer, chat, template, train_on, max_length)
    stop_ids = sorted({*stop_ids_of(lm.model, tokenizer), *encoder.stop_ids})
    return Part(mounted, tokenizer, encoder, stop_ids, recipe, labels)


def run_of(path: Path) -> tuple[Recipe | None, tuple[str, ...] | None]:
    """Recipe and label set of a run directory; of a folder that is none, nothing."""
    if not (path / "run.json").is_file():
        return None, None
    run = RunDir(path)
    labels = (run.result().get("data") or {}).get("labels")
    return load_recipe(run.recipe_path), tuple(labels) if labels else None
