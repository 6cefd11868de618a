"""The examples in recipes/launch: the client of a server, and the commands of its services."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from blockft.cli.commands import app
from blockft.serving.launch import STOP_TIMEOUT_S, check_options
from blockft.serving.supported_engine import TESTED_VERSIONS
from tests.commands import ROOT, TIMEOUT_S
from tests.serving.http_server import http_server
from tests.serving.stubs import make_served
from tests.serving.test_front_end import Setup

LAUNCH = ROOT / "recipes/launch"
UNIT, COMPOSE = LAUNCH / "blockft-serve.service", LAUNCH / "serve.compose.yaml"


def run_client(url: str, question: str, documents: Path, **environment: str) -> Any:
    command = [sys.executable, str(LAUNCH / "serve_client.py"), url, question, str(documents)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)


def test_the_client_prints_the_answer_and_what_was_reused(tmp_path: Path, toy_model: Path) -> None:
    setup = Setup(make_served(tmp_path, path=str(toy_model)))
    setup.vllm.api_key = "key"
    documents = tmp_path / "documents.jsonl"
    lines = [{"title": "Dogs", "text": "They bark."}, {"text": "Cows moo."}]
    documents.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with http_server(setup.app) as url:
        first, second = (run_client(url, "Who barks?", documents, OPENAI_API_KEY="key") for _ in range(2))
        refused = run_client(url, "Who barks? " * 100, documents, OPENAI_API_KEY="key")
        unknown = run_client(url, "Who barks?", documents)
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout.startswith("below") and "tokens reused; blocks: {'computed': 4}" in first.stdout
    assert re.search(r"[1-9][0-9]* of [0-9]+ prompt tokens reused; blocks: {'host': 4}", second.stdout)
    assert refused.returncode == 1 and "use fewer documents" in refused.stderr
    assert unknown.returncode != 0


def services() -> list[tuple[str, list[str]]]:
    """Return the command of each service, from `serve` on."""
    lines = UNIT.read_text().replace("\\\n", " ").splitlines()
    (start,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    program, *unit = shlex.split(start)
    assert program.endswith("/bin/blockft")
    service = yaml.safe_load(COMPOSE.read_text())["services"]["serve"]
    program, *entrypoint = service["entrypoint"]
    assert program == "blockft"
    return [("unit", unit), ("compose", [*entrypoint, *service["command"]])]


@pytest.mark.parametrize(("name", "words"), services())
def test_the_commands_of_the_services_parse(name: str, words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    context = group.make_context("blockft", list(words))
    command, serve, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    parsed = serve.make_context(command, rest, parent=context)
    assert command == "serve" and str(parsed.params["cache"]).startswith("/")
    check_options(parsed.args)
    assert {option.split("=")[0] for option in parsed.args if option.startswith("--")} == {
        *("--host", "--port", "--max-model-len"),
    }


def test_the_container_has_the_tested_version_of_vllm() -> None:
    assert f"vllm/vllm-openai:v{TESTED_VERSIONS['vllm']}\n" in COMPOSE.read_text()


def test_the_services_wait_longer_for_the_end_than_blockft_does() -> None:
    (unit_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    service = yaml.safe_load(COMPOSE.read_text())["services"]["serve"]
    for seconds in (unit_s, service["stop_grace_period"].removesuffix("s")):
        assert int(seconds) > STOP_TIMEOUT_S


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    """Apart from the program, which is not installed here."""
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text(), flags=re.MULTILINE)
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
