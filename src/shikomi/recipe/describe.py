"""What each key of a recipe may hold, in words: for errors, for the reference, and as a JSON Schema for editors."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Union

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shikomi import registry
from shikomi.recipe import foreign
from shikomi.recipe.schema import OWN_KEYS, ComponentSpec, DataSpec, EvaluateSpec, Recipe, Source, Stage
from shikomi.recipe.tree import Path

KINDS = {"adapter": "adapters", "quant": "quant", "objective": "objectives", "optim": "optim"}
"""Which folder the component of each key lives in."""


_SOURCES = f"{{{', '.join(Source.model_fields)}}}"


def words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type and its bounds as an error names them: "a whole number, at least 1"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [part for extra in args[1:] for part in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return words(args[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(words(arg, metadata if arg is not type(None) else ()) for arg in args)
    if origin is Literal:
        return ", ".join(str(arg) for arg in args)
    if origin in (tuple, list) and args[0] is Source:
        return f"a path or a list of {_SOURCES}"
    if origin in (tuple, list):
        return f"a list of {_plural(words(args[0]))}{_bounds(metadata)}"
    if origin is dict:
        return f"a block of {words(args[0])}: {words(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, ComponentSpec):
        return "a name, or {name: ..., its options}"
    if annotation is Source:
        return f"a path or {_SOURCES}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a block with the keys {', '.join(annotation.model_fields)}"
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "text", FilePath: "a path"}
    return named.get(annotation, "null" if annotation is type(None) else "any value") + _bounds(metadata)


def _plural(text: str) -> str:
    return f"({text})" if "," in text or " or " in text else text.removeprefix("a ")


def _bounds(metadata: Iterable[Any]) -> str:
    parts = []
    for bound in metadata:
        match bound:
            case annotated_types.Gt():
                parts.append(f"above {bound.gt}")
            case annotated_types.Ge():
                parts.append(f"at least {bound.ge}")
            case annotated_types.Lt():
                parts.append(f"below {_short(bound.lt)}")
            case annotated_types.Le():
                parts.append(f"at most {_short(bound.le)}")
            case annotated_types.MinLen(min_length=1):
                parts.append("not empty")
            case annotated_types.MinLen():
                parts.append(f"at least {bound.min_length}")
            case _ if vars(bound).get("pattern"):
                parts.append("letters, digits, `.`, `_` and `-` only")
    return "".join(f", {part}" for part in parts)


def _short(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) and number < 10**12 else str(number)


def item_of(annotation: Any) -> Any:
    """The type of an item of the list that a key holds, also where it may hold null or something else."""
    waiting = [annotation]
    while waiting:
        annotation = waiting.pop(0)
        if typing.get_origin(annotation) in (tuple, list):
            return typing.get_args(annotation)[0]
        waiting.extend(typing.get_args(annotation))
    return annotation


def field_of(model: type[BaseModel], path: Path) -> FieldInfo | None:
    """The declaration of the key at `path`, for an item of a list that of the list; None where there is none."""
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        inner = field and block_of(field)
        if field is not None and inner is None:
            return None
        field = (inner or model).model_fields.get(part)
        if field is None:
            return None
    return field


def block_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of the block that a key holds, also inside a list or beside null."""
    waiting = [field.annotation]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        waiting.extend(arg for arg in typing.get_args(annotation) if arg is not Ellipsis)
    return None


def default_of(field: FieldInfo) -> Any:
    """A key's default as a file would say it; None for null and for a key that must be given."""
    value = field.get_default(call_default_factory=True, validated_data={}) if not field.is_required() else None
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def reference() -> list[tuple[str, str, Any, str]]:
    """(key, type in words, default, description) of every key, stage keys without `stages.N`; imports no component."""
    rows: list[tuple[str, str, Any, str]] = []

    def add(model: type[BaseModel], prefix: str, skip: tuple[str, ...] = ()) -> None:
        for key, field in model.model_fields.items():
            if key in skip:
                continue
            inner = block_of(field)
            kind = words(field.annotation, field.metadata)
            if inner is DataSpec or inner is EvaluateSpec:
                kind = "a block"
            default = "(required)" if field.is_required() else default_of(field)
            rows.append((prefix + key, kind, default, field.description or ""))
            if inner is DataSpec or inner is EvaluateSpec or key == "train":
                assert inner is not None
                add(inner, f"{prefix}{key}.")

    add(Recipe, "", skip=("output_dir", "stages"))
    output, stages = Recipe.model_fields["output_dir"], Recipe.model_fields["stages"]
    rows.append(("output_dir", "a path", "runs/<recipe name>", output.description or ""))
    rows.append(("stages", "a list of blocks", "one stage", stages.description or ""))
    add(Stage, "", skip=("data", *OWN_KEYS))
    rows.append(("stages.N.name", "text", "the objective's name", Stage.model_fields["name"].description or ""))
    for key in ("adapter", "previous_adapter"):
        field = Stage.model_fields[key]
        rows.append(
            (f"stages.N.{key}", words(field.annotation, field.metadata), field.default, field.description or "")
        )
    rows.append(("stages.N.data", "a block", None, Stage.model_fields["data"].description or ""))
    return rows


def component_reference(kind: str, name: str) -> list[tuple[str, str, Any, str]]:
    """(option, type in words, default, description) of a component; imports its file."""
    rows = []
    for key, field in option_fields(registry.find(kind, name)).items():
        default = "(required)" if field.is_required() else default_of(field)
        rows.append((key, words(field.annotation, field.metadata), default, field.description or ""))
    return rows


def option_fields(cls: type) -> Mapping[str, FieldInfo]:
    """The options of a component's class, a frozen pydantic dataclass."""
    fields: Mapping[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return fields


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe as a user writes it: short forms, and stage keys at the top. Imports no component."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    stage = definitions["Stage"]["properties"]
    for name, definition in [("", schema), *definitions.items()]:
        for key, value in definition.get("properties", {}).items():
            if key in KINDS:
                definition["properties"][key] = _component(KINDS[key], value)
            elif key in ("train", "validation", "test") and name == "DataSpec":
                definition["properties"][key] = _sources(value)
    text, null = {"type": "string"}, {"type": "null"}
    top = schema["properties"]
    data = {"$ref": "#/$defs/DataSpec"}
    top["data"] = {"anyOf": [text, data], "description": top["data"]["description"]}
    report = {"enum": ["none", "tensorboard", "wandb", "trackio"]}
    top["report_to"] = {"anyOf": [report, {"type": "array", "items": report}, null], **_about(top["report_to"])}
    top.update({key: value for key, value in stage.items() if key not in ("name", "data")})
    for key, means in foreign.KEYS.items():
        top.setdefault(key, {"description": f"Read as `{means.target}`.", "deprecated": True})
    definitions.pop("ComponentSpec")
    schema["required"] = ["model"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Shikomi recipe"
    return schema


def _about(value: dict[str, Any]) -> dict[str, Any]:
    return {key: value[key] for key in ("description", "default") if key in value}


def _component(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    name = {"enum": registry.names(kind)}
    block = {"type": "object", "required": ["name"], "properties": {"name": name}}
    return {"anyOf": [name, block], **_about(value)}


def _sources(value: dict[str, Any]) -> dict[str, Any]:
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    forms: list[dict[str, Any]] = [source, {"type": "array", "items": source, "minItems": 1}]
    forms.extend(form for form in value.get("anyOf", []) if form.get("type") in ("number", "null"))
    return {"anyOf": forms, **_about(value)}
