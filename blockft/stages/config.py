"""`blockft config`: list the settings or one section, print a resolved recipe, or print the JSON Schema."""

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from blockft.config.recipe import dump_recipe, is_recipe, list_recipes, load_recipe, nearest_recipe
from blockft.config.reference import (
    Section,
    Setting,
    is_in_section,
    json_schema_text,
    list_sections,
    settings_json,
)
from blockft.config.settings import Recipe
from blockft.errors import UserError, did_you_mean
from blockft.printable import print_text

MAX_WIDTH = 100
"""Longest line of the list of settings, in characters."""


def _unknown_name_message(name: str) -> str:
    """Return the message about a name that is neither a recipe nor a section."""
    sections, recipes = list(Recipe.model_fields), list(list_recipes())
    message = (
        f"{name!r} is neither a section ({', '.join(sections)}) nor a recipe: a file or one of "
        f"{', '.join(recipes)}"
    )
    if question := did_you_mean(name, sections):
        return f"{message}; {question}"
    close = nearest_recipe(name)
    return f"{message}; did you mean {close}?" if close else message


def print_config(
    recipe_or_section: str | None,
    overrides: Sequence[str] = (),
    *,
    as_json: bool = False,
    schema: bool = False,
    markdown: bool = False,
) -> None:
    """Print a recipe with all its settings as YAML; otherwise print what the settings mean.

    recipe_or_section: a recipe; or a section such as `train`, to print only its settings; None prints all.
    as_json: print JSON instead of YAML or text.
    schema: print the JSON Schema of a recipe.
    markdown: print the file `recipes/README.md`.

    Raises:
        UserError: more than one output is requested; see `load_recipe`.
    """
    is_section = recipe_or_section in Recipe.model_fields and not overrides
    if schema + markdown + (recipe_or_section is not None) > 1 or (as_json and (schema or markdown)):
        raise UserError("blockft config prints one thing: give a RECIPE, a section, --schema or --markdown")
    if schema:
        print_text(json_schema_text(), end="")
    elif markdown:
        from blockft.stages.recipes_readme import recipes_readme

        print_text(recipes_readme(), end="")
    elif recipe_or_section is not None and not is_section:
        if not is_recipe(recipe_or_section) and not os.path.exists(recipe_or_section):
            raise UserError(_unknown_name_message(recipe_or_section))
        resolved = load_recipe(recipe_or_section, overrides)
        print_text(resolved.model_dump_json(indent=2) if as_json else dump_recipe(resolved).rstrip("\n"))
    elif as_json:
        print_text(settings_json(recipe_or_section))
    else:
        width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
        print_text("\n".join(_lines(width, recipe_or_section)))


def _lines(width: int, name: str | None) -> Iterator[str]:
    """Yield the settings of a section, or of all, as lines of at most `width` characters."""
    for section in list_sections():
        if section.names == ("",) or not any(is_in_section(other, name) for other in section.names):
            continue
        yield from _heading(section, width)
        for setting in section.settings:
            if setting.type != "section":
                yield from _entry(setting, width)
        yield ""
    yield from textwrap.wrap(
        "Change a setting in a recipe, or on the command line: blockft train RECIPE "
        "train.learning_rate=1e-5 data.sources.0.path=my.jsonl",
        width,
    )


def _heading(section: Section, width: int) -> Iterator[str]:
    title = " and ".join(section.names)
    yield title
    yield "=" * len(title)
    yield from textwrap.wrap(section.description, width)
    yield ""


def _entry(setting: Setting, width: int) -> Iterator[str]:
    """Yield the lines of one setting: name, type, default and allowed values; then its meaning, indented."""
    default = setting.default if setting.default == "required" else f"default {setting.default}"
    first = f"{setting.key}: {setting.type}, {default}"
    if setting.allowed:
        first += f" ({setting.allowed})"
    yield from textwrap.wrap(first, width, subsequent_indent="        ", break_long_words=False)
    yield from textwrap.wrap(
        setting.description, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False
    )
