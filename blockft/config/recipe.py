"""Recipes: find one by path or name, read it, apply overrides, validate it, and write it as YAML."""

import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blockft.config.recipe_yaml import MAX_RECIPE_BYTES, is_mapping, yaml_problem
from blockft.config.reference import list_keys
from blockft.config.settings import Recipe
from blockft.errors import UserError, check_type
from blockft.inputs import check_path, nearest_file, read_text, shorten, text_problem
from blockft.validation import describe_value, expected_value

RECIPES_FOLDER = next(
    p for p in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes") if p.is_dir()
)
"""The folder of the shipped recipes: inside the installed package, or beside it in a checkout."""

RECIPE_SUFFIXES = (".yaml", ".yml")

_OVERRIDE_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w][\w-]*|\[\d{1,9}\])*", re.ASCII)
"""The key of an override, as in `data.sources.0.path` or `data.sources[0].path`."""


_SECRET_KEY = re.compile(r"(key\w*|token|secret\w*|password\w*|base_url\w*)['\"]?\s*[=:]", re.IGNORECASE)
"""Overrides whose values no message repeats: a user may put a key there by mistake."""


def list_recipes() -> dict[str, Path]:
    """Return the shipped recipes: name -> file, sorted by name."""
    return {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped one.

    Raises:
        UserError: there is no such recipe; the message lists the shipped ones.
    """
    check_path(name, "recipe")
    path = Path(name)
    if path.is_file():
        return path
    shipped = list_recipes()
    if name in shipped:
        return shipped[name]
    message = f"recipe {name!r} is neither a file nor a shipped recipe ({', '.join(shipped)})"
    close = nearest_recipe(name)
    raise UserError(f"{message}; did you mean {close}?" if close else message)


def nearest_recipe(name: str) -> str | None:
    """Return the recipe that a misspelled name may mean, a file of its folder or a shipped one, or None."""
    path = Path(name)
    found = {f"{shipped}.yaml": shipped for shipped in list_recipes()}
    with suppress(OSError):  # the folder cannot be read
        files = [file for file in path.parent.iterdir() if file.suffix in RECIPE_SUFFIXES]
        found |= {file.name: str(file) for file in files}
    close = nearest_file(path.name, found)
    return found[close] if close else None


def is_recipe(name: str) -> bool:
    """Return whether a name ends in .yaml or .yml, or is the name of a shipped recipe."""
    return Path(name).suffix in RECIPE_SUFFIXES or name in list_recipes()


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    name: the path of a YAML file, or the name of a shipped recipe.

    Raises:
        UserError: the recipe is not found or not YAML, or a setting is unknown, missing or has a wrong value.
            The message names all faulty settings.
    """
    check_type(name, (str, Path), "name")
    check_type(overrides, (list, tuple), "overrides", "write a list of key=value")
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_recipe(str(name))
    text = read_text(path, "recipe", max_bytes=MAX_RECIPE_BYTES)
    try:
        problem = yaml_problem(text)
        # OmegaConf reads a text at the top level as YAML again
        settings = OmegaConf.load(io.StringIO(text)) if not problem and is_mapping(text) else None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        problem = _reason(error)
    if problem:
        raise UserError(f"{path} cannot be read as a recipe: {problem}")
    if not isinstance(settings, DictConfig):
        raise UserError(
            f"{path} does not contain a mapping: a recipe has the keys {', '.join(Recipe.model_fields)}"
        )
    return build_recipe(settings, overrides, str(path))


def build_recipe(settings: Any, overrides: Sequence[str], origin: str) -> Recipe:
    """Build a recipe from a mapping of settings and `key=value` overrides.

    origin: where the settings come from; error messages name it.

    Raises:
        UserError: see `load_recipe`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = OmegaConf.create(settings)
    for override in overrides:
        _apply_override(settings, override)
    try:
        plain = OmegaConf.to_container(settings, resolve=True)
    except RecursionError as error:
        raise UserError(f"{origin}: an interpolation is nested too deeply: write the value out") from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        where = f" (at {key})" if key else ""
        raise UserError(f"{_origin(key, overrides, origin)}: {_reason(error)}{where}") from error
    _check_texts(plain, (), overrides, origin)
    # a setting that holds `???` has to be set, required or not
    faults = {key: f"{key} is missing" for key in _missing_keys(plain, ())}
    recipe, cause = None, None
    try:
        recipe = Recipe.model_validate(_without_missing(plain))
    except ValidationError as error:
        cause = error
        for fault in error.errors(include_url=False):
            key = _key(fault["loc"])
            faults[key] = _describe_fault(key, fault)
    if recipe is not None and not faults:
        return recipe
    by_origin: dict[str, list[str]] = {}
    for key, sentence in faults.items():
        by_origin.setdefault(_origin(key, overrides, origin), []).append(sentence)
    message = "; ".join(f"{source}: {'; '.join(found)}" for source, found in by_origin.items())
    raise UserError(message) from cause


def _apply_override(settings: Any, override: str) -> None:
    """Set one setting as a `key=value` text says.

    Raises:
        UserError: the text is no override, or its value cannot be set.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_type(override, str, "an override", "write key=value")
    key, equals, value = override.partition("=")
    if not equals or not _OVERRIDE_KEY.fullmatch(key):
        raise UserError(
            f"{_show_override(override)!r} is not an override: write key=value, for example "
            "train.learning_rate=1e-4"
        )
    refused = (yaml.YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError, RecursionError)
    try:
        problem = text_problem(override) or yaml_problem(value)
        if not problem:
            loaded = yaml.safe_load(value)
            if isinstance(loaded, dict | list):
                # as in a recipe: unlike PyYAML, OmegaConf reads 1e-3 as a number
                loaded = OmegaConf.load(io.StringIO(value))
            OmegaConf.update(settings, key, loaded)
    except refused as error:
        is_split = override.rstrip().endswith(("{", "[", ":", ","))
        advice = "; put quotes around a setting that contains spaces" if is_split else ""
        problem = f"{_reason(error)}{advice}"
    if problem:
        raise UserError(f"{_show_override(override)} cannot be set: {problem}")


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every setting written out. `load_recipe` reads it back."""
    from omegaconf import OmegaConf

    # unlike yaml.safe_dump it quotes a text such as 1e5, which OmegaConf would read as a number
    return OmegaConf.to_yaml(OmegaConf.create(_escape(recipe.model_dump(mode="json"))))


def _escape(value: Any) -> Any:
    """Return settings in which OmegaConf reads `${` as text, not as an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


def _check_texts(value: Any, loc: tuple[int | str, ...], overrides: Sequence[str], origin: str) -> None:
    """Check that all keys are texts, and that all texts can be written in UTF-8.

    Raises:
        UserError: a key or a value is of another kind; the message names it.
    """
    key = _key(loc)
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError(
                    f"{_origin(key, overrides, origin)}: {key or 'the recipe'} has the key {name!r}, "
                    "it should be a text"
                )
            _check_texts(name, (*loc, name), overrides, origin)
            _check_texts(inner, (*loc, name), overrides, origin)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_texts(inner, (*loc, index), overrides, origin)
    elif isinstance(value, str) and (problem := text_problem(value)):
        raise UserError(f"{_origin(key, overrides, origin)}: {key} {problem}")


def _missing_keys(value: Any, loc: tuple[int | str, ...]) -> Iterator[str]:
    """Yield the keys that hold OmegaConf's mark `???` of a missing value."""
    if value == "???":
        yield _key(loc)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _missing_keys(inner, (*loc, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _missing_keys(inner, (*loc, index))


def _without_missing(value: Any) -> Any:
    """Return settings without those that hold OmegaConf's mark `???` of a missing value."""
    if isinstance(value, dict):
        return {key: _without_missing(inner) for key, inner in value.items() if inner != "???"}
    if isinstance(value, list):
        return [_without_missing(inner) for inner in value]
    return value


def _describe_fault(key: str, fault: Mapping[str, Any]) -> str:
    """Return what is wrong with a setting: what was found, what is allowed, and a suggestion.

    fault: pydantic's record of an error.
    """
    found, kind, context = fault["input"], fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {shorten(key)} ({_suggest(key)})"
    if kind == "missing" or (found is None and expected_value(kind)):
        required = ", ".join(_required_names(key))
        return f"{key} is missing{f', a section with {required}' if required else ''}"
    if kind == "model_type":
        return f"{key} is {shorten(repr(found))}, it should hold {', '.join(_names_in(key))}"
    if kind == "secret":  # the value may be a key or hold a password
        return f"{key} {fault['msg']}"
    if kind == "rule":
        return f"{key} {context['problem']}"
    if kind == "path":
        return f"{key} {shorten(repr(found))} {context['problem']}"
    if kind == "weight":
        return f"{key}.weight is {context['weight']}, but {fault['msg']}"
    if kind == "string_type" and isinstance(found, bool | int | float):
        return f"{key} is {shorten(str(found))}, it should be a string: put quotes around it"
    return describe_value(key, fault)


def _names_in(key: str) -> list[str]:
    """Return the names of the settings in a section; "" is the whole recipe."""
    prefix = re.sub(r"\[\d+\]", "[]", f"{key}." if key else "")
    return [
        name.removeprefix(prefix)
        for name in list_keys()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    ]


def _required_names(key: str) -> list[str]:
    """Return the names of the settings that a section of the recipe must hold."""
    section = Recipe.model_fields[key].annotation if key in Recipe.model_fields else None
    fields = getattr(section, "model_fields", {})
    return [name for name, field in fields.items() if field.is_required()]


def _suggest(key: str) -> str:
    """Return a remedy for an unknown key: a similar key of its section or of another one, or all keys."""
    section, dot, name = key.rpartition(".")
    names = _names_in(section)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {section}{dot}{close[0]}?"
    elsewhere = {other.rpartition(".")[2]: other for other in reversed(list_keys())}
    if name in elsewhere:
        return f"did you mean {elsewhere[name]}?"
    return f"allowed: {', '.join(names)}"


def _reason(error: Exception) -> str:
    """Return the message of a YAML or OmegaConf error as one line."""
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def _key(location: Sequence[str | int]) -> str:
    """Return the full name of a setting, as in `data.sources[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _origin(key: str, overrides: Sequence[str], origin: str) -> str:
    """Return the last override of a setting or of a section that holds it; otherwise `origin`."""
    for override in reversed(overrides):
        pairs = zip(_parts(key), _parts(override.partition("=")[0]), strict=False)
        if key and all(part == set_part for part, set_part in pairs):
            return _show_override(override)
    return origin


def _show_override(override: str) -> str:
    """Return an override for a message, without a value that may be a key or hold a password."""
    is_secret = _SECRET_KEY.search(override) is not None
    return f"{shorten(override.partition('=')[0])}=***" if is_secret else shorten(override)


def _parts(key: str) -> list[str]:
    """Return the names and list positions of a key that is written `a.0.b` or `a[0].b`."""
    return re.findall(r"[^.\[\]]+", key)
