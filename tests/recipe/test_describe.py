import json
from typing import Any

from shikomi.recipe import EvaluateSpec, Recipe, Source, Stage, component_reference, json_schema, reference
from shikomi.recipe.schema import OWN_KEYS, ComponentSpec, DataSpec


def test_every_key_of_every_block_is_described():
    for model in (Recipe, Stage, DataSpec, Source, EvaluateSpec, ComponentSpec):
        for key, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), f"{model.__name__}.{key}"


def test_the_reference_has_each_key_once_with_type_default_and_description():
    rows = {key: (kind, default, about) for key, kind, default, about in reference()}
    assert len(rows) == len(reference())
    for model, prefix in ((DataSpec, "data."), (Source, "data.train."), (EvaluateSpec, "evaluate.")):
        assert {prefix + key for key in model.model_fields} <= set(rows)
    assert set(Recipe.model_fields) <= set(rows)
    assert {key for key in Stage.model_fields if key not in (*OWN_KEYS, "data")} <= set(rows)
    assert {f"stages.N.{key}" for key in OWN_KEYS} <= set(rows)
    assert rows["batch_size"][:2] == ("a whole number, at least 1, at most 1,000,000", 16)
    assert rows["adapter"][1] == "lora" and rows["model"][1] == "(required)"
    assert rows["save_total_limit"][0] == "a whole number, at least 1, at most 1,000,000 or null"
    json.dumps(reference())


def test_a_component_describes_its_own_options():
    rows = {key: (kind, default) for key, kind, default, _ in component_reference("adapters", "lora")}
    assert rows["r"] == ("a whole number, at least 1, at most 4,096", 16)
    assert rows["bias"] == ("none, all, lora_only", "none")


def test_the_json_schema_knows_short_forms_stage_keys_at_the_top_and_other_tools():
    schema = json_schema()
    json.dumps(schema)
    top = schema["properties"]
    assert schema["required"] == ["model"] and schema["additionalProperties"] is False
    assert set(Recipe.model_fields) | {"learning_rate", "objective", "optim"} <= set(top)
    assert "name" not in top and top["lora_r"]["deprecated"] is True
    assert "lora" in top["adapter"]["anyOf"][0]["enum"]
    assert {"type": "string"} in top["data"]["anyOf"]
    assert top["batch_size"]["minimum"] == 1
    assert {"exclusiveMaximum": 1, "exclusiveMinimum": 0, "type": "number"} in schema["$defs"]["DataSpec"][
        "properties"
    ]["validation"]["anyOf"]


def test_every_reference_in_the_json_schema_leads_somewhere():
    schema = json_schema()

    def references(node: Any):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(schema))
    assert found and all(ref.removeprefix("#/$defs/") in schema["$defs"] for ref in found)
