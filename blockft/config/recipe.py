"""Recipes: finding them by path or name, and reading them into settings."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from blockft.config.settings import Recipe
from blockft.errors import UserError

RECIPES_FOLDER = next(
    p for p in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes") if p.is_dir()
)
"""The folder of the recipes that ship: inside the installed package, or beside it in a checkout."""


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of one that ships.

    Raises:
        UserError: there is none; the names that ship are listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(RECIPES_FOLDER.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    hint = difflib.get_close_matches(path.stem, shipped, n=1)
    guess = f"; did you mean {hint[0]}?" if hint else ""
    raise UserError(f"recipe {name!r} is neither a file nor one that ships ({', '.join(shipped)}){guess}")


def is_recipe(name: str) -> bool:
    """Whether a word names a recipe, by its suffix or as one that ships."""
    return Path(name).suffix in (".yaml", ".yml") or (RECIPES_FOLDER / f"{name}.yaml").is_file()


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides to it.

    Raises:
        UserError: an unknown key (with a suggestion), a missing or ill-typed value; all faults at once.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_recipe(name)
    try:
        given = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"{path} holds no mapping: a recipe has the keys {', '.join(_fields(Recipe))}")
    return build_recipe(given, overrides, str(path))


def build_recipe(given: Any, overrides: Sequence[str], path: str) -> Recipe:
    """The recipe that a mapping of settings describes, with `key=value` overrides; `path` names it in errors.

    Raises:
        UserError: see `load_recipe`.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = OmegaConf.create(given)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is no setting: write key=value, for example train.learning_rate=1e-4")
        try:
            OmegaConf.update(given, key, yaml.safe_load(value))
        except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{word} cannot be set: {_reason(error)}") from error
    try:
        plain = cast(dict[str, Any], OmegaConf.to_container(given, resolve=True))
        if faults := _faults(Recipe, plain, ""):
            by_origin: dict[str, list[str]] = {}
            for key, fault in faults.items():
                by_origin.setdefault(_origin(key, overrides, path), []).append(fault)
            raise UserError("; ".join(f"{origin}: {'; '.join(found)}" for origin, found in by_origin.items()))
        return cast(Recipe, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), plain)))
    except OmegaConfBaseException as error:
        at = error.full_key or ""
        where = f" (at {at})" if at else ""
        raise UserError(f"{_origin(at, overrides, path)}: {_reason(error)}{where}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting written out; `load_recipe` reads it back."""
    import yaml

    def spelt(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: _spell(value) for key, value in pairs}

    plain = dataclasses.asdict(recipe, dict_factory=spelt)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _spell(value: Any) -> Any:
    """A setting as recipes write it: choices are plain texts."""
    if isinstance(value, list):
        return [_spell(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def _reason(error: Exception) -> str:
    """What YAML or OmegaConf say is wrong, in one line."""
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def _origin(key: str, overrides: Sequence[str], path: str) -> str:
    """Where a setting comes from: the last override of it or of what it is part of, or the recipe."""
    for word in reversed(overrides):
        parts = zip(_parts(key), _parts(word.partition("=")[0]), strict=False)
        if key and all(part == set_part for part, set_part in parts):
            return word
    return path


def _parts(key: str) -> list[str]:
    """The names and places of a key, spelt `a.0.b` or `a[0].b`."""
    return re.findall(r"[^.\[\]]+", key)


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _nested(kind: type) -> dict[str, tuple[type, bool]]:
    """The fields that hold settings themselves: name -> (dataclass, is it a list of them)."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found[name] = (cast(type, inner), get_origin(hint) is list)
    return found


def _faults(kind: type, given: dict[str, Any], at: str) -> dict[str, str]:
    """By key, every unknown or missing one below `at`, every unknown choice, all that is out of bounds."""
    faults = {}
    hints = get_type_hints(kind)
    for key in given:
        if key not in _fields(kind):
            hint = difflib.get_close_matches(str(key), _fields(kind), n=1)
            remedy = f"did you mean {at}{hint[0]}?" if hint else f"allowed: {', '.join(_fields(kind))}"
            faults[f"{at}{key}"] = f"unknown key {at}{key} ({remedy})"
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and given.get(f.name) in (None, "???"):
            faults[f"{at}{f.name}"] = f"{at}{f.name} is missing"
        elif f.name in given:
            faults |= _bad_value(f"{at}{f.name}", given[f.name], hints[f.name], f.metadata)
    for name, (inner, many) in _nested(kind).items():
        value = given.get(name)
        if many and isinstance(value, list):
            parts = [(f"{at}{name}[{i}].", part) for i, part in enumerate(value)]
        else:
            parts = [(f"{at}{name}.", value)] if value is not None and not many else []
        for where, part in parts:
            if isinstance(part, dict):
                faults |= _faults(inner, part, where)
            else:
                faults[where[:-1]] = f"{where[:-1]} is {part!r}, it should hold {', '.join(_fields(inner))}"
    return faults


def _bad_value(at: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with a value: no choice, or out of bounds. Its type is OmegaConf's to check."""
    values = value if isinstance(value, list) else [value]
    for choice in (h for h in (hint, *get_args(hint)) if isinstance(h, type) and issubclass(h, StrEnum)):
        if unknown := [v for v in values if v not in list(choice)]:
            return {at: f"{at} is {unknown[0]!r} (allowed: {', '.join(choice)})"}
    holds, size = ("hold", len(value)) if isinstance(value, list) else ("be", value)
    if hint is float and isinstance(value, str):
        with suppress(ValueError):  # YAML takes 1e-4 for a text
            size = float(value)
    if not isinstance(size, int | float):
        return {}
    minimum, below = limits.get("minimum"), limits.get("below")
    if isinstance(size, float) and not math.isfinite(size):
        return {at: f"{at} is {value}, it should be finite"}
    if minimum is not None and size < minimum:
        return {at: f"{at} is {value}, it should {holds} at least {minimum}"}
    if below is not None and size >= below:
        return {at: f"{at} is {value}, it should be below {below}"}
    return {}
