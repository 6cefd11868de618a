"""The command line: what a user's mistakes cost, and that the README tells the truth about the verbs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from blockft.config.recipe import RECIPES_FOLDER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^(blockft .+?) *(?:#.*)?$", SHELL, flags=re.MULTILINE)


def blockft(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "blockft", *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tain",), "train"),
        (("train", "--resum", "demo"), "--resume"),
        (("train",), "RECIPE"),
        (("train", "demmo"), "did you mean demo"),
        (("prepare", "demo", "data.rowlen=9"), "did you mean data.row_len"),
        (
            (
                "prepare",
                "demo",
                "data.row_len=nine",
            ),
            "nine",
        ),
        (("prepare", "demo", "data.sources.0.format=csv"), "samples, hotpotqa"),
        (("prepare", "demo", "row_len 9"), "key=value"),
        (("train", "demo", "train.batch_rows=0"), "at least 1"),
        (("train", "demo", "data.modes=[]"), "at least 1"),
        (("train", "demo", "--num-gpus", "0"), "--num-gpus"),
        (("prepare", "demo", "data.output_dir=out/x", "data.sources.0.path=no/such.jsonl"), "no/such.jsonl"),
        (
            (
                "prepare",
                "demo",
                "data.output_dir=out/x",
                "model.path=no/such",
                "data.sources.0.path=README.md",
            ),
            "no/such",
        ),
        (("generate", "no/such", "--input", "no/such.jsonl"), "no/such.jsonl"),
        (("generate", "no/such", "--input", "README.md", "--mode", "half"), "half"),
        (("eval", "no/such", "demo", "eval.sources.0.path=no/such.jsonl"), "no/such.jsonl"),
        (("eval", "no/such", "demmo"), "did you mean demo"),
        (("eval", "no/such", "demo", "--modes", "half"), "allowed: block, full"),
        (("eval", "no/such", "README.md", "--format", "csv"), "allowed are samples"),
        (("compare", "no/such"), "blockft eval"),
        (("compare", "no/such", "--metric", "bleu"), "token_f1"),
        (("inspect", "no/such"), "blockft prepare"),
        (("export", "no/such", "out/x"), "no/such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_costs_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = blockft(*words)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockft: ")
    assert said in done.stderr
    assert not (ROOT / "out" / "x").exists()


def test_all_faults_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "# x\nmodel: {pth: x}\ndata: {output_dir: o, sources: [{format: samples}]}\ntrain: {outputdir: b}\n"
    )
    done = blockft("train", str(recipe))
    assert done.returncode == 2
    for fault in ("model.pth", "model.path is missing", "data.sources[0].path is missing", "train.outputdir"):
        assert fault in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; import blockft.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "blockft.cli" in done.stdout.split()
    assert not {"torch", "transformers", "datasets"} & set(done.stdout.split())


def test_a_launchers_stray_argument_is_passed_over() -> None:
    done = blockft("--local_rank=0", "train", "demmo")
    assert done.returncode == 2 and "did you mean demo" in done.stderr


ENDS = """
import atexit, os, sys
from blockft import cli
from blockft.errors import UserError
class Late:
    def __del__(self): print("Python shut down")
late = Late()
def app(*_, **__):
    os.environ.update(eval(sys.argv[1]))
    atexit.register(print, "outputs closed")
    exec(sys.argv[2])
cli.options.app = app
cli.main()
"""


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("raise UserError('x')", 2),
        ("raise KeyboardInterrupt", 130),
        ("raise ValueError", 1),
    ],
)
def test_a_worker_ends_before_python_shuts_down(ended: str, code: int) -> None:
    """Threads of its process group would abort it there now and then, after its work is done."""
    for environment, shuts_down in (({"RANK": "0"}, False), ({}, True)):
        words = [sys.executable, "-c", ENDS, str(environment), ended]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code
        assert done.stdout.splitlines() == ["outputs closed", *(["Python shut down"] if shuts_down else [])]
        assert ("Traceback" in done.stderr) == (code == 1)


def test_a_worker_without_outputs_ends_so_too() -> None:
    words = shlex.join([sys.executable, "-c", ENDS, str({"RANK": "0"}), "sys.exit(3)"])
    done = subprocess.run(["sh", "-c", f"{words} >&-"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3 and "Exception" not in done.stderr


def test_the_readme_names_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists(command: str) -> None:
    """Its verb, its options and the recipe it names; `make test-slow` runs those that need no GPU."""
    words = shlex.split(command)[1:]
    verb = words[:2] if words[0] in ("bench", "cache") else words[:1]
    helped = blockft(*verb, "--help")
    assert helped.returncode == 0, helped.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in helped.stdout
    named = {path.stem for path in RECIPES_FOLDER.glob("*.yaml")}
    if verb[0] in ("prepare", "train"):
        assert words[1] in named


def test_the_readmes_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
