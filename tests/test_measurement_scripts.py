"""Scripts of `data/` that repeat a measurement use names that the package has.

Those of the gap study belong to the commit that its README names.
"""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "data").rglob("*.py") if "gap" not in path.parts)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_imports_names_that_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "blockft":
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), f"{node.module}: {name}"


def test_all_scripts_were_found() -> None:
    assert {path.name for path in SCRIPTS} >= {"serve_answers.py", "many_gpus.py", "digests.py", "world.py"}
