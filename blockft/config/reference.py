"""Describe all settings, derived from the pydantic models, as JSON Schema and as sections of tables."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from blockft.config.settings import Recipe
from blockft.validation import format_bound

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as it is documented.

    key: its full name; `[]` stands for the items of a list, as in `data.sources[].path`.
    default: YAML, or `required`.
    allowed: choices or bounds; empty if every value of the type is allowed.
    """

    key: str
    type: str
    default: str
    allowed: str
    description: str

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings. `names` has several entries if the same settings appear in several places."""

    names: tuple[str, ...]
    description: str
    settings: tuple[Setting, ...]


class _WithoutTitles(GenerateJsonSchema):
    """Leaves out titles that only repeat the name of a field."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe (draft 2020-12), with the description of every setting."""
    return {"$schema": DIALECT, **Recipe.model_json_schema(schema_generator=_WithoutTitles)}


def json_schema_text() -> str:
    """Return the JSON Schema as the file `recipes/recipe.schema.json` holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


@cache
def list_sections() -> tuple[Section, ...]:
    """Return all settings by section. Sections that have the same settings are returned once."""
    sections: dict[str, Section] = {}
    for name, definition, schema in _walk("", "Recipe", json_schema()):
        if definition in sections:
            first = sections[definition]
            sections[definition] = Section(
                names=(*first.names, name), description=first.description, settings=first.settings
            )
        else:
            settings = tuple(
                _describe(f"{name}.{field}".lstrip("."), prop, field in schema.get("required", ()))
                for field, prop in schema["properties"].items()
            )
            description = " ".join(schema.get("description", "").split())
            sections[definition] = Section(names=(name,), description=description, settings=settings)
    return tuple(sections.values())


def list_keys() -> list[str]:
    """Return the full names of all settings and sections, as in `data.sources[].path`."""
    return [
        f"{name}.{setting.name}".lstrip(".")
        for section in list_sections()
        for name in section.names
        for setting in section.settings
    ]


def is_in_section(name: str, section: str | None) -> bool:
    """Return whether a name such as `data.sources[]` is a section or lies in it; everything lies in None."""
    return section is None or name == section or name.startswith(f"{section}.")


def settings_json(section_name: str | None = None) -> str:
    """Return all settings, or those of one section, as a JSON list of objects, one for each key."""
    found = [
        asdict(setting) | {"key": f"{name}.{setting.name}"}
        for section in list_sections()
        for name in section.names
        for setting in section.settings
        if name and is_in_section(name, section_name) and setting.type != "section"
    ]
    return json.dumps(found, indent=2, ensure_ascii=False)


def _walk(name: str, definition: str, schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the name, the name of the definition, and the schema of a section and all sections in it."""
    yield name, definition, schema
    for field, prop in schema["properties"].items():
        inner = _without_null(prop)
        is_list = inner.get("type") == "array"
        inner_name = (inner["items"] if is_list else inner).get("$ref", "").rpartition("/")[2]
        inner_schema = json_schema()["$defs"].get(inner_name, {})
        if "properties" in inner_schema:
            full_name = f"{name}.{field}{'[]' if is_list else ''}".lstrip(".")
            yield from _walk(full_name, inner_name, inner_schema)


def _without_null(prop: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a setting's values other than null."""
    schemas: list[dict[str, Any]] = prop.get("anyOf", [prop])
    return next(schema for schema in schemas if schema.get("type") != "null")


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the definition that a schema refers to, or the schema itself."""
    name = schema.get("$ref", "").rpartition("/")[2]
    definitions: dict[str, dict[str, Any]] = json_schema()["$defs"]
    return definitions[name] if name else schema


def _describe(key: str, prop: dict[str, Any], is_required: bool) -> Setting:
    """Return the documentation of a setting from its schema."""
    values = _without_null(prop)
    default = "required" if is_required else json.dumps(prop.get("default"), ensure_ascii=False)
    if "enum" in _resolve(values):
        default = default.strip('"')
    type_name = _type_name(values)
    return Setting(
        key=key,
        type=type_name + (" or null" if values is not prop else ""),
        default="" if type_name == "section" and not is_required else default,
        allowed=_allowed(values),
        # pydantic leaves out a description that repeats the docstring of the section
        description=prop.get("description") or _resolve(values)["description"],
    )


def _type_name(schema: dict[str, Any]) -> str:
    """Return the type of a setting in a word, for example `integer` or `list of choices`."""
    resolved = _resolve(schema)
    if "enum" in resolved:
        return "choice"
    if "properties" in resolved:
        return "section"
    if resolved["type"] == ["string", "array"]:
        return "string or list of strings"
    if resolved["type"] == "array":
        return f"list of {_type_name(resolved['items'])}s"
    return "mapping" if resolved["type"] == "object" else str(resolved["type"])


def _allowed(schema: dict[str, Any]) -> str:
    """Return the choices or the bounds of a setting, for example `at least 0, below 1`."""
    resolved = _resolve(schema)
    if resolved.get("type") == "array":
        items = _allowed(resolved["items"])
        return ", ".join(filter(None, (items, "at least one" if resolved.get("minItems") else "")))
    if "enum" in resolved:
        return ", ".join(resolved["enum"])
    return ", ".join(
        f"{word} {format_bound(resolved[name])}" for name, word in _BOUNDS.items() if name in resolved
    )
