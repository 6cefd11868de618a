"""`blockft doctor`: one line per check, what to do, and the exit code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.models.llama import LlamaForCausalLM

from blockft.errors import UserError
from blockft.stages import doctor as stage
from blockft.stages.memory_plan import checkpoint_bytes
from blockft.stages.prepare import prepare
from blockft.training.preflight import Check
from blockft.units import format_bytes
from tests.commands import blockft, fork_ranks
from tests.run import toy_recipe


def passes() -> str:
    return "[b] fine"


def refuses() -> str:
    raise UserError("it is broken: mend it")


@pytest.mark.parametrize(("check", "code"), [(passes, 0), (refuses, 2)])
def test_the_exit_code_tells_whether_all_checks_pass(
    check: object, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [Check(name="one", run=passes), Check(name="two", run=check)]  # type: ignore[arg-type]
    checks.append(Check(name="three", run=passes, needs=["two"]))
    monkeypatch.setattr(stage, "_build_checks", lambda *arguments: checks)
    done = blockft("doctor")
    assert done.returncode == code and done.stderr == ""
    last = ["OK       two: [b] fine", "OK       three: [b] fine"]
    if code:
        last = ["FAILED   two: it is broken: mend it", "NOT RUN  three: it needs the check 'two'"]
    assert done.stdout.splitlines() == ["OK       one: [b] fine", *last]
    as_json = blockft("doctor", "--json")
    assert as_json.returncode == code
    records = json.loads(as_json.stdout)
    assert [f"{r['status']:<8} {r['check']}: {r['message']}" for r in records] == done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hostfile", "no/such"], "no/such"),
        (["--master-port", "29500"], "--hostfile"),
        (["no-such-recipe"], "no-such-recipe"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], message: str) -> None:
    done = blockft("doctor", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_data_that_is_missing_is_found_by_the_recipe_check(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path)
    (check,) = [check for check in stage._build_checks(recipe, None, 2) if check.name == "recipe"]
    with pytest.raises(UserError, match="prepare"):
        check.run()


def test_ranks_check_that_they_form_a_group() -> None:
    ranks = fork_ranks(stage.print_group_check, num_ranks=2, GLOO_SOCKET_IFNAME="lo")
    assert ranks.wait().returncode == 0, ranks.output("stderr")
    (line,) = [line for line in ranks.output("stdout").splitlines() if line.startswith('{"group_check"')]
    text = stage.describe_group_check(0, ["node0: noise", f"node0: {line}"])
    assert text.startswith("2 ranks (gloo), the sum is right, bus bandwidth ")
    alone = '{"group_check": {"num_ranks": 1, "backend": "gloo", "bus_bytes_per_s": 0, "num_bytes": 1}}'
    assert stage.describe_group_check(0, [alone]) == "1 rank (gloo), no other rank to exchange with"
    with pytest.raises(UserError, match="^rank 1 on b was killed$"):
        stage.describe_group_check(2, ["noise", "node0: blockft: rank 1 on b was killed"])


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["train.save_steps=1", "train.num_eval_examples=4"], "4 checkpoints"),
        (["train.save_steps=1", "train.num_eval_examples=4", "train.keep_best=false"], "3 checkpoints"),
        (["train.save_steps=100"], "1 checkpoint"),
        (["train.optimizer=adamw_8bit", "train.save_steps=100"], "1 checkpoint"),
    ],
)
def test_the_disk_is_compared_with_the_checkpoints_of_the_run(
    overrides: list[str], kept: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(toy, *overrides)
    config = LlamaForCausalLM.from_pretrained(toy / "model")
    bytes_per_weight = 6.03125 if "8bit" in overrides[0] else 12
    size = round(bytes_per_weight * sum(p.numel() for p in config.parameters()))
    assert checkpoint_bytes(recipe) == size
    text = f"the run writes {kept} of {format_bytes(size)}"
    assert stage._check_space(recipe, 1).startswith(f"{text}, and ")
    needed = int(kept.split()[0]) * size
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=f"of free space, but {text}: free some space, lower train.save_tot"):
        stage._check_space(recipe, 1)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    stage._check_space(recipe, 1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    prepare(toy_recipe(folder))
    return folder
