"""`.ci/offline/collect.py`: the lists of a host's packages that it reads, and the files that it removes."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "offline" / "collect.py"


@pytest.fixture(scope="module")
def collect() -> ModuleType:
    spec = importlib.util.spec_from_file_location("collect", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_line_of_pip_freeze_names_a_package(collect: ModuleType, tmp_path: Path):
    have = tmp_path / "have.txt"
    have.write_text("# image\nTorch==2.11.0+cu130\nhf_xet\n\nninja @ file:///build/ninja.whl\n")
    assert collect.read_have(have) == {"torch": "2.11.0", "hf-xet": None, "ninja": None}


def test_the_requirements_of_the_tests_are_those_of_pyproject(collect: ModuleType):
    names = {text.split(">")[0].split("[")[0] for text in collect.read_test_requirements()}
    assert {"torch", "deepspeed", "bitsandbytes", "openai", "pytest-xdist"} <= names
    assert not names & collect.NOT_FOR_TESTS


def test_removed_files_leave_the_list_of_a_wheel(collect: ModuleType, tmp_path: Path):
    wheel = tmp_path / "tool-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("tool/lib_cpu.so", "tool/lib_cuda11.so"):
            file.writestr(name, "library")
        file.writestr("tool-1.0.dist-info/RECORD", "tool/lib_cpu.so,,7\ntool/lib_cuda11.so,,7\n")
    collect.drop_files(tmp_path, "tool/*cuda1[12]*.so")
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["tool/lib_cpu.so", "tool-1.0.dist-info/RECORD"]
        assert file.read("tool-1.0.dist-info/RECORD") == b"tool/lib_cpu.so,,7\n"
    with pytest.raises(SystemExit, match="no collected wheel has such a file"):
        collect.drop_files(tmp_path, "tool/*cuda1[12]*.so")


@pytest.mark.parametrize(
    ("line", "options", "fault"),
    [
        ("-e /src/tool", [], "line 1: '-e /src/tool' is not NAME, NAME==VERSION or NAME @ URL"),
        ("", [], "lists no package"),
        ("numpy==2.5.2", ["--keep", "numba"], "--keep numba: have.txt does not list it"),
        ("numpy==2.5.2", [], "wheels exists: name a new folder"),
    ],
)
def test_a_mistake_ends_before_anything_is_downloaded(
    tmp_path: Path, line: str, options: list[str], fault: str
):
    (tmp_path / "have.txt").write_text(f"{line}\n")
    (tmp_path / "wheels").mkdir()
    command = [sys.executable, SCRIPT, "have.txt", "wheels", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("collect: ") and fault in done.stderr
    assert not list((tmp_path / "wheels").iterdir())
