"""The command line: messages for mistakes, help texts and exit codes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from blockft import __version__
from blockft.cli import bench, cache, commands
from blockft.cli.next_command import eval_command, print_next, unused_path
from blockft.config.choices import Metric
from blockft.evaluation.metrics import METRICS
from tests.commands import blockft

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tain",), "train"),
        (("train", "--resum", "demo"), "--resume"),
        (("train",), "RECIPE"),
        (("train", "demmo"), "did you mean demo"),
        (("prepare", "demo", "data.rowlen=9"), "did you mean data.row_len"),
        (("prepare", "demo", "data.row_len=nine"), "nine"),
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
        (
            ("generate", "no/such", "--input", "README.md", "--mode", "half"),
            "--mode is 'half' (allowed: block, full) (see blockft generate --help)",
        ),
        (("eval", "no/such", "demo", "eval.sources.0.path=no/such.jsonl"), "no/such.jsonl"),
        (("eval", "no/such", "demmo"), "did you mean demo"),
        (("eval", "no/such", "demo", "--modes", "half"), "allowed: block, full"),
        (("eval", "no/such", "README.md", "--format", "csv"), "--format is 'csv' (allowed: samples, "),
        (("compare", "no/such"), "blockft eval"),
        (("compare", "no/such", "--metric", "bleu"), "token_f1"),
        (("inspect", "no/such"), "blockft prepare"),
        (("inspect", "recipes"), "recipes is no prepared folder, or an incomplete one"),
        (("export", "no/such", "out/x"), "no/such"),
        (
            ("export", "no/such", "out/x", "--dtype", "int8"),
            "--dtype is 'int8' (allowed: auto, float32, bfloat16)",
        ),
        (("config", "demmo"), "did you mean demo"),
        (("config", "trian"), "neither a section (model, data, train, eval) nor a recipe"),
        (("config", "trian"), "did you mean train?"),
        (("config", "demo", "--schema"), "prints one thing"),
        (("train", "demo", "--num-gpu", "2"), "(see blockft train --help)"),
        (("trian", "demo"), "(see blockft --help)"),
        (("cache", "biuld"), "build"),
        (("cache", "stats"), "(see blockft cache stats --help)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_gives_one_line_and_exit_code_2(arguments: tuple[str, ...], expected: str) -> None:
    done = blockft(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("blockft: ")
    assert expected in done.stderr
    assert not (ROOT / "out" / "x").exists()


def test_all_faults_of_a_recipe_are_reported_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "# x\nmodel: {pth: x}\ndata: {output_dir: o, sources: [{format: samples}]}\ntrain: {outputdir: b}\n"
    )
    done = blockft("train", str(recipe))
    assert done.returncode == 2
    for fault in ("model.pth", "model.path is missing", "data.sources[0].path is missing", "train.outputdir"):
        assert fault in done.stderr


@pytest.mark.parametrize("code", ["import blockft.cli", "import blockft", "import blockft.config.choices"])
def test_the_command_line_and_the_package_import_nothing_slow(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    imported = set(done.stdout.split())
    assert code.split()[1] in imported
    assert not {"torch", "transformers", "datasets", "pydantic", "omegaconf", "numpy"} & imported


def test_help_of_the_program_imports_nothing_slow() -> None:
    code = (
        "import atexit, sys; sys.argv = ['blockft', '--help']; from blockft.cli import main; "
        "atexit.register(lambda: print(*sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Commands:" in done.stdout
    assert not {"torch", "transformers", "pydantic", "omegaconf"} & set(done.stdout.split())


def list_commands() -> list[tuple[str, ...]]:
    """All commands: the top-level ones and those of the groups."""
    names = []
    for app, group in ((commands.app, ()), (cache.app, ("cache",)), (bench.app, ("bench",))):
        for info in app.registered_commands:
            assert info.callback
            names.append((*group, info.name or info.callback.__name__))
    return names


def test_help_of_the_program_lists_every_command_with_a_whole_summary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ((), ("cache",), ("bench",)):
        done = blockft(*group, "--help")
        listed = done.stdout.partition("Commands:\n")[2]
        for name in (name[-1] for name in list_commands() if name[:-1] == group):
            (line,) = [line for line in listed.splitlines() if line.split()[:1] == [name]]
            assert line.endswith(".") and not line.endswith("...") and len(line) <= 80


@pytest.mark.parametrize("command", list_commands(), ids=" ".join)
def test_help_of_a_command_shows_examples_that_parse(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = blockft(*command, "--help")
    assert done.returncode == 0, done.stderr
    usage = done.stdout.partition("\n\n")[0].partition("Usage: blockft ")[2].removeprefix(" ".join(command))
    assert usage == usage.upper() and "[[" not in usage and "...}" not in usage
    examples = re.findall(r"^ +blockft (.+)$", done.stdout.partition("Arguments:")[0], flags=re.MULTILINE)
    assert examples or command == ("recipes",)
    for example in examples:
        arguments = shlex.split(example.partition(" > ")[0])
        assert tuple(arguments[: len(command)]) == command
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert option in done.stdout


def test_choices_are_shown_in_the_help() -> None:
    assert "<block|full>" in blockft("generate", "--help").stdout
    assert "<auto|float32|bfloat16>" in blockft("export", "--help").stdout
    assert "<substring_match|word_match|exact_match|token_f1>" in "".join(
        blockft("compare", "--help").stdout.split()
    )
    assert set(Metric) == set(METRICS)


def test_the_version_is_printed() -> None:
    assert blockft("--version").stdout == f"blockft {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "completed"), [("blockft tra", "train"), ("blockft train hotp", "hotpotqa")]
)
def test_a_shell_completes_commands_and_recipes(typed: str, completed: str) -> None:
    shell = {"_BLOCKFT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "blockft"], capture_output=True, text=True, cwd=ROOT, env=os.environ | shell
    )
    assert done.stdout.split() == [completed]


def test_the_next_command_goes_to_stderr_of_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_next("run: out/a b", ["export", Path("out/a b"), "out/[model]"])
    captured = capsys.readouterr()
    assert (
        captured.out == "" and captured.err == "run: out/a b\nnext: blockft export 'out/a b' 'out/[model]'\n"
    )
    print_next("run: out\nnext: rm")
    assert capsys.readouterr().err == "run: out\\nnext: rm\n"
    monkeypatch.setenv("RANK", "1")
    print_next("run: out")
    assert capsys.readouterr().err == ""


def test_the_command_after_an_export_evaluates_into_an_unused_folder(tmp_path: Path) -> None:
    model, recipe, report = tmp_path / "model", tmp_path / "recipe.yaml", tmp_path / "eval"
    sources = "sources: [{format: samples, path: p}]"
    training = f"model: {{path: m}}\ndata: {{output_dir: o, {sources}}}\ntrain: {{output_dir: r}}\n"
    recipe.write_text(training)
    assert eval_command(model, recipe) is None
    recipe.write_text(f"{training}eval: {{output_dir: {report}, {sources}}}\n")
    assert eval_command(model, recipe) == ["eval", str(model), str(recipe)]
    report.mkdir()
    for name in ("model-eval", "model-eval-2", "model-eval-3"):
        expected = ["eval", str(model), str(recipe), f"eval.output_dir={tmp_path / name}"]
        assert eval_command(model, recipe) == expected
        (tmp_path / name).mkdir()
    assert unused_path(model) == model and unused_path(report) == tmp_path / "eval-2"


@pytest.mark.parametrize("checkpoints", [(), ("checkpoint-4", "checkpoint-8")])
def test_an_interrupted_training_prints_its_checkpoint_and_how_to_resume(
    checkpoints: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr("blockft.stages.train.complete_checkpoints", lambda _: [run / c for c in checkpoints])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockft.stages.train.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.train("demo", [f"train.output_dir={run}"])
    result, command = capsys.readouterr().err.splitlines()
    assert (str(run / "checkpoint-8") if checkpoints else "no complete checkpoint") in result
    assert command == f"next: blockft train demo train.output_dir={run} --resume"


def test_an_argument_that_a_launcher_adds_is_ignored() -> None:
    done = blockft("--local_rank=0", "train", "demmo")
    assert done.returncode == 2 and "did you mean demo" in done.stderr


PROCESS = """
import atexit, os, sys
from blockft import cli
from blockft.cli import commands
from blockft.errors import UserError
class Global:
    def __del__(self, write=os.write): write(1, b"Python shut down\\n")
sys.last = Global()  # Python empties `sys` when it shuts down; globals of the script may outlive it
def app(*_, **__):
    os.environ.update(eval(sys.argv[1]))
    atexit.register(print, "outputs closed")
    exec(sys.argv[2])
commands.app = app
cli.main()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("raise UserError('x')", 2),
        ("raise KeyboardInterrupt", 130),
        ("raise ValueError", 1),
    ],
)
def test_a_rank_ends_before_python_shuts_down(end: str, code: int) -> None:
    """During shutdown, threads of the process group sometimes abort a rank whose work is done."""
    # a measurement of coverage in the process would keep the object whose end shows the shutdown
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    for environment, shuts_down in (({"RANK": "0"}, False), ({}, True)):
        command = [sys.executable, "-c", PROCESS, str(environment), end]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=unmeasured)
        assert done.returncode == code
        assert done.stdout.splitlines() == ["outputs closed", *(["Python shut down"] if shuts_down else [])]
        assert ("Traceback" in done.stderr) == (code == 1)


def test_a_rank_without_stdout_ends_with_its_exit_code() -> None:
    command = shlex.join([sys.executable, "-c", PROCESS, str({"RANK": "0"}), "sys.exit(3)"])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3 and "Exception" not in done.stderr
