"""Blocks pasted from other tools, rewritten in place in this project's keys; each change leaves a note."""

from __future__ import annotations

from typing import Any

from shikomi.errors import BadInput, Problem
from shikomi.recipe import foreign
from shikomi.recipe.edit import component_block, data_block, set_path
from shikomi.recipe.foreign import LeaveOut, Means, Refused
from shikomi.recipe.schema import OWN_KEYS, Recipe, Stage
from shikomi.recipe.tree import Block, Items, Where, shown, tree_of

STAGE_KEYS = tuple(Stage.model_fields)
TOP_KEYS = tuple(dict.fromkeys([*Recipe.model_fields, *(key for key in STAGE_KEYS if key not in OWN_KEYS)]))

_EMPTY = "it sets nothing"
_PEFT_BLOCKS = ("peft_config", "lora_config")
_QUANT_BLOCKS = ("quantization_config", "bnb_config", "bitsandbytes")
_AXOLOTL_TYPES = {
    "chat_template": "auto",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "input_output": None,
}
_AXOLOTL_UNSET = {"field_messages": "messages", "chat_template": "tokenizer_default", "ds_type": ...}


class Pasted:
    """Rewrites a tree; `problems` are values without a counterpart, `notes` say what was understood."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.empty: list[str] = []  # keys that set nothing: one note for all

    def rewrite(self, tree: Block) -> None:
        """Rewrite a recipe, its stages too."""
        self.open_blocks(tree)
        self.quantization(tree)
        self.adapter_kind(tree)
        self.datasets(tree)
        self.block(tree, TOP_KEYS, is_top=True)
        self.row_limits(tree)
        if isinstance(tree.get("adapter"), Block):
            self.adapter_block(tree["adapter"])
        stages = tree.get("stages")
        for stage in stages if isinstance(stages, Items) else ():
            if isinstance(stage, Block):
                self.block(stage, STAGE_KEYS, is_top=False)
        if self.empty:
            file = Where(tree.where.file)
            self.note(file, f"left out, because they set nothing: {', '.join(self.empty)}")
            self.empty = []

    # one key at a time

    def block(self, block: Block, own: tuple[str, ...], is_top: bool) -> None:
        """The keys of the top, or of one stage."""
        self.batch_size(block)
        if block.get("loss_type") == "dft":
            self.move(block, "loss_type", Means("objective.dft", lambda value: True))
        self.dpo_loss(block)
        self.simpo_gamma(block)
        for key in list(block):
            if key in own:
                if key in foreign.VALUES:
                    self.value(block, key)
            elif key in foreign.KEYS and block[key] is not None:
                means = foreign.KEYS[key]
                if is_top or means.target.split(".")[0] in STAGE_KEYS:
                    self.move(block, key, means)
            elif key in foreign.KEYS or key in foreign.LEFT_OUT:
                self.leave_out(block, key, foreign.LEFT_OUT.get(key, _EMPTY))
            elif self.says_nothing(key, block[key]):
                self.leave_out(block, key, _EMPTY)
        objective = block.get("objective")
        if isinstance(objective, Block) and objective.get("loss_type", "sigmoid") not in foreign.LOSSES_OF_DPO:
            self.move(objective, "loss_type", Means("name", foreign.objective_of_loss), refines=True)

    def says_nothing(self, key: str, value: Any) -> bool:
        allowed = foreign.UNSET.get(key, foreign.PEFT_UNSET.get(key))
        return allowed is not None and (value in (None, "", {}, []) or value in allowed or ... in allowed)

    def move(self, block: Block, key: str, means: Means, refines: bool = False) -> None:
        """Set the key's value where it belongs, unless something else stands there already."""
        value, where = block[key], block.place(key)
        try:
            ours = means.convert(value)
            ours = ours if isinstance(ours, LeaveOut) else tree_of(ours, where)
        except Refused as refused:
            found = "a value that is not repeated here" if refused.secret else shown(value)
            self.problems.append(where.problem(f"`{key}`", found, refused.allowed, refused.fix))
            block.take(key)
            return
        block.take(key)
        if isinstance(ours, LeaveOut):
            self.note(where, f"`{key}: {shown(value)}` is left out: {ours.reason}")
            return
        refines = refines or means.target == "objective.name"
        self.set(block, means.target, ours, where, f"`{key}: {shown(value)}`", refines)

    def set(self, block: Block, target: str, value: Any, where: Where, said: str, refines: bool = False) -> None:
        present = _get(block, target)
        if present is not _ABSENT and present != value and not (refines and present in ("dpo", "sft")):
            self.problems.append(
                where.problem(
                    f"{said} and `{target}: {shown(present)}` say different things",
                    fix=f"keep `{target}` and delete the other",
                )
            )
            return
        try:
            if present != value:
                set_path(block, tuple(target.split(".")), value, where)
        except BadInput as error:
            self.problems.extend(error.problems)
            return
        self.note(where, f"{said} is read as `{target}: {shown(value)}`")

    def value(self, block: Block, key: str) -> None:
        theirs = block[key]
        if isinstance(theirs, Block | Items):
            return
        ours = foreign.VALUES[key](theirs)
        if isinstance(ours, LeaveOut):
            self.leave_out(block, key, ours.reason)
        elif ours is not theirs:
            where = block.place(key)
            self.note(where, f"`{key}: {shown(theirs)}` is read as `{key}: {shown(ours)}`")
            block[key] = tree_of(ours, where)

    def leave_out(self, block: Block, key: str, reason: str) -> None:
        where = block.place(key)
        value = block.take(key)
        if reason == _EMPTY:
            self.empty.append(f"`{key}`")
            return
        self.note(where, f"`{key}: {shown(value)}` is left out: {reason}")

    def note(self, where: Where, text: str) -> None:
        self.notes.append(str(where.problem(text)))

    # several keys at a time

    def dpo_loss(self, block: Block) -> None:
        """`loss_type: hinge` -> objective {name: dpo, loss_type: hinge}."""
        for key in ("loss_type", "pref_loss"):
            if block.get(key) in foreign.LOSSES_OF_DPO[1:]:
                where, value = block.place(key), block.take(key)
                said = f"`{key}: {shown(value)}`"
                self.set(block, "objective.name", "dpo", where, said, refines=True)
                self.set(block, "objective.loss_type", value, where, said)

    def simpo_gamma(self, block: Block) -> None:
        """TRL's margin of SimPO, in units of the loss -> its ratio to beta."""
        if block.get("simpo_gamma") is None:
            return
        where, gamma = block.place("simpo_gamma"), block.take("simpo_gamma")
        given = (block.get(key) for key in ("beta", "pref_beta", "dpo_beta"))
        beta = next((value for value in given if value is not None), _get(block, "objective.beta"))
        said = f"`simpo_gamma: {shown(gamma)}`"
        if any(isinstance(number, bool) or not isinstance(number, int | float) for number in (gamma, beta)) or not beta:
            fix = "give `beta` too, or `objective.gamma_beta_ratio` instead"
            self.problems.append(where.problem(f"{said} without a `beta` that it can be divided by", fix=fix))
            return
        self.set(block, "objective.gamma_beta_ratio", gamma / beta, where, said)
        if block.get("cpo_alpha") == 0:
            self.leave_out(block, "cpo_alpha", "SimPO has no such term")

    def open_blocks(self, tree: Block) -> None:
        """`peft_config: {...}` becomes `adapter`; a BitsAndBytesConfig's keys go to the top."""
        for key in _PEFT_BLOCKS:
            if isinstance(tree.get(key), Block) and "adapter" not in tree:
                where = tree.place(key)
                tree.put("adapter", tree.take(key), where)
                self.note(where, f"`{key}` is read as `adapter`")
        quant = tree.get("quant")
        is_pasted = isinstance(quant, Block) and "load_in_4bit" in quant
        for key in (*_QUANT_BLOCKS, *(("quant",) if is_pasted else ())):
            if isinstance(tree.get(key), Block):
                inner = tree.take(key)
                for name in list(inner):
                    tree.put(name, inner[name], inner.place(name))

    def quantization(self, tree: Block) -> None:
        """load_in_4bit and its companions -> quant."""
        if tree.get("adapter") == "qlora":
            where = tree.place("adapter")
            tree.put("adapter", "lora", where)
            self.set(tree, "quant", "nf4", where, "`adapter: qlora`")
        four = tree.get("bnb_4bit_quant_type", "nf4")
        off = LeaveOut("`quant` says it")
        for key, table in (
            ("load_in_4bit", {True: four, False: off}),
            ("load_in_8bit", {True: "int8", False: off}),
            ("quantization_bit", {4: four, 8: "int8"}),
        ):
            if tree.get(key) is not None:
                self.move(tree, key, Means("quant", foreign.among(table)))
        for key in ("bnb_4bit_use_double_quant", "double_quantization"):
            if tree.get(key) is not None and _get(tree, "quant") not in (_ABSENT, "none"):
                self.move(tree, key, Means("quant.double_quant"))
        for key in [key for key in tree if key.startswith(("bnb_", "llm_int8_", "double_quantization"))]:
            self.leave_out(tree, key, off.reason)

    def adapter_kind(self, tree: Block) -> None:
        """Keys that choose the adapter: use_dora, use_peft, finetuning_type, stage."""
        self.dora(tree, "adapter.name")
        kinds = {"use_peft": foreign.among({True: "lora", False: "full"}), "finetuning_type": lambda value: value}
        for key, convert in kinds.items():
            if tree.get(key) is not None:
                self.move(tree, key, Means("adapter", convert))
        if isinstance(tree.get("peft_type"), str):
            self.move(tree, "peft_type", Means("adapter.name", _peft_name))
        if tree.get("stage") == "pt":
            self.move(tree, "stage", Means("data.train_on", lambda value: "everything"))
        elif isinstance(tree.get("stage"), str):
            self.move(tree, "stage", Means("objective.name", foreign.translated({"rm": "reward"})))

    def dora(self, block: Block, target: str) -> None:
        for key in ("use_dora", "peft_use_dora"):
            if block.get(key) is True:
                where = block.place(key)
                block.take(key)
                if _get(block, target) == "lora":
                    set_path(block, tuple(target.split(".")), "dora", where)
                self.set(block, target, "dora", where, f"`{key}: true`")
            elif key in block:
                self.leave_out(block, key, "`adapter` says it")

    def adapter_block(self, block: Block) -> None:
        """The keys of a LoraConfig, or of an adapter_config.json."""
        pasted = "peft_type" in block or "task_type" in block
        if isinstance(block.get("peft_type"), str):
            self.move(block, "peft_type", Means("name", _peft_name))
        component_block(block, "adapter", block.where)
        self.dora(block, "name")
        for key in list(block):
            target = foreign.KEYS[key].target if key in foreign.KEYS else ""
            if self.says_nothing(key, block[key]) or (pasted and block[key] is None):
                self.leave_out(block, key, _EMPTY)
            elif target.startswith("adapter.") and target != f"adapter.{key}":
                self.move(block, key, Means(target.removeprefix("adapter."), foreign.KEYS[key].convert))
            elif key in ("target_modules", "modules_to_save"):
                block[key] = foreign.words(block[key])

    def batch_size(self, block: Block) -> None:
        """Examples per device times accumulation steps -> batch_size."""
        sizes = [key for key in ("per_device_train_batch_size", "micro_batch_size") if key in block]
        keys = sizes + [key for key in ("gradient_accumulation_steps",) if key in block]
        if not keys:
            return
        where = block.place(keys[0])
        said = " with ".join(f"`{key}: {shown(block[key])}`" for key in keys)
        values = [block.take(key) for key in keys]
        if not sizes:
            self.problems.append(
                where.problem(f"{said} alone", fix="give `batch_size`, the examples per optimizer step")
            )
        elif any(not isinstance(value, int) or isinstance(value, bool) or value < 1 for value in values):
            self.problems.append(
                where.problem(said, allowed="whole numbers, at least 1", fix="give `batch_size` instead of them")
            )
        else:
            product = 1
            for value in values:
                product *= value
            self.set(block, "batch_size", product, where, said)

    def datasets(self, tree: Block) -> None:
        """Axolotl's lists of data sets -> sources of `data`."""
        for key, target in (("datasets", "data.train"), ("test_datasets", "data.validation")):
            if not isinstance(tree.get(key), Items):
                continue
            where, listed = tree.place(key), tree.take(key)
            for item in listed:
                if isinstance(item, Block):
                    self.axolotl_source(tree, item)
            self.set(tree, target, listed, where, f"`{key}`")

    def axolotl_source(self, tree: Block, source: Block) -> None:
        if isinstance(source.get("data_files"), str):
            where = source.place("data_files")
            source.put("path", source.take("data_files"), where)
        kind = source.get("type")
        if isinstance(kind, str):
            where = source.place("type")
            ours = _AXOLOTL_TYPES.get(kind.split(".")[0].split(":")[0])
            source.take("type")
            if ours is None:
                allowed = ", ".join(name for name, ours in _AXOLOTL_TYPES.items() if ours)
                self.problems.append(where.problem(f"`type: {kind}`", allowed=allowed, fix="see `data.format`"))
            elif ours != "auto":
                self.set(tree, "data.format", ours, where, f"`type: {kind}`")
        for key, inert in _AXOLOTL_UNSET.items():
            if key in source and (inert is ... or source[key] in (None, inert)):
                self.leave_out(source, key, "rows are recognised by their keys")

    def row_limits(self, tree: Block) -> None:
        """LLaMA-Factory's max_samples and TRL's dataset_train_split -> keys of each source."""
        for key, ours in (("max_samples", "limit"), ("dataset_train_split", "split")):
            if key not in tree:
                continue
            where, value = tree.place(key), tree.take(key)
            if value is None:
                continue
            tree.put("data", data_block(tree.get("data"), where), tree.at.get("data", where))
            train = tree["data"].get("train") if isinstance(tree["data"], Block) else None
            count = len(train) if isinstance(train, Items) else 1
            for index in range(count if train is not None else 0):
                self.set(tree, f"data.train.{index}.{ours}", value, where, f"`{key}: {shown(value)}`")


class _Absent:
    """Nothing stands at a path."""


_ABSENT = _Absent()


def _get(block: Block, target: str) -> Any:
    node: Any = block
    for part in target.split("."):
        if isinstance(node, Block) and part in node:
            node = node[part]
        elif isinstance(node, str) and part == "name":
            return node
        else:
            return _ABSENT
    return node.get("name") if isinstance(node, Block) and target in ("adapter", "quant") else node


def _peft_name(value: Any) -> Any:
    return foreign.PEFT_TYPES.get(value, value.lower().replace("_tuning", ""))
