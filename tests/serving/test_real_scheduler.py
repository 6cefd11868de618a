"""vLLM's real scheduler and the connector's half give out no token that is computed over wrong pages."""

import json
import os
import subprocess
from pathlib import Path

from tests.commands import ROOT
from tests.serving.real_server import needs_vllm
from tests.serving.vllm_environment import vllm_python

pytestmark = needs_vllm

TIMEOUT_S = 300


def test_random_work_gives_no_token_over_pages_whose_load_has_failed(tmp_path: Path) -> None:
    """Loads fail in the steps of their requests and beside them; clients leave, requests are preempted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    command = [vllm_python(), "-m", "tests.serving.random_schedule", str(tmp_path)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert run.returncode == 0, run.stderr[-2000:]
    counts = json.loads(run.stdout.splitlines()[-1])
    assert not counts.pop("wrong", 0)
    events = {"right", "aborted", "preempted", "loaded waiting", "failed waiting"}
    assert counts.keys() == events | {"loaded in a step", "failed in a step"} and min(counts.values()) > 50
