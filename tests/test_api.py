"""The public Python API: lazy, typed and documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import blockft

ROOT = Path(__file__).parents[1]
PUBLIC = [name for name in blockft.__all__ if not name.startswith("__")]
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "numpy", "pydantic", "omegaconf", "yaml", "rich"}


def modules_for_type_checkers() -> dict[str, str | None]:
    """Return the module of each name that the package imports under TYPE_CHECKING."""
    tree = ast.parse(Path(blockft.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}


MODULES = modules_for_type_checkers()


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def test_import_loads_no_heavy_module() -> None:
    modules = run_python("import sys; import blockft; dir(blockft); print(*sys.modules)")
    assert "blockft" in modules
    assert not HEAVY & set(modules)


def test_the_names_of_the_api_are_listed() -> None:
    assert set(PUBLIC) == {
        "CacheOptions",
        "Engine",
        "RagPrompt",
        "evaluate",
        "export",
        "load_recipe",
        "prepare",
        "train",
    }
    listed = run_python("import blockft; print(*dir(blockft))")
    assert set(blockft.__all__) <= set(listed)


def test_type_checkers_see_where_every_name_comes_from() -> None:
    assert set(MODULES) == set(PUBLIC)
    assert (Path(blockft.__file__).parent / "py.typed").is_file()


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        _ = blockft.evalute  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    """Each has a docstring of its own, and the package's docstring has a line for it."""
    value = getattr(blockft, name)
    assert value.__module__ == MODULES[name]
    assert value.__doc__ and not value.__doc__.startswith(f"{name}(")
    assert blockft.__doc__ and f"\n{name} " in blockft.__doc__
    members = vars(value).items() if inspect.isclass(value) else ()
    for member, method in members:
        if not member.startswith("_") and (inspect.isfunction(method) or isinstance(method, classmethod)):
            assert inspect.getdoc(method), f"{name}.{member}"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_of_the_api_is_named_and_typed(name: str) -> None:
    value = getattr(blockft, name)
    methods = [value]
    if inspect.isclass(value):
        methods = [
            getattr(value, member)
            for member, method in vars(value).items()
            if (not member.startswith("_") or member == "__init__")
            and (inspect.isfunction(method) or isinstance(method, classmethod))
        ]
    for method in methods:
        for parameter in inspect.signature(method).parameters.values():
            if parameter.name == "self":
                continue
            assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), method
            assert parameter.annotation is not parameter.empty, method
