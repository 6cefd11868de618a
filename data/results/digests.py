"""Measure what digests cost: at the start of a training, at a resumed start, at a save, and per GB.

    python data/results/digests.py MODEL data/results/digests.json

MODEL is a folder of SmolLM2-135M-Instruct. The data is that of data/paper-mini/recipe.yaml, read from the
folder that BLOCKFT_REAL_DATA names. A start lasts from the command to the first step, which is not computed.
Each start is a process of its own, in which the seconds are timed that the main thread verifies, or waits for
the thread that verifies weights and checkpoints.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

RUNS = 7
RECIPE = "data/paper-mini/recipe.yaml"
TIMED = ("verify_files", "digest_files", "read_with_digest", "dump_with_digest", "list_files", "digest_names")


def time_calls() -> dict[str, float]:
    """Replace the functions of blockft.digest by timed ones, before other modules import them."""
    from blockft import digest

    spent, depth = {"digests_s": 0.0}, [0]

    def timed(function):
        def call(*arguments):
            if threading.current_thread() is not threading.main_thread():
                return function(*arguments)
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent["digests_s"] += time.perf_counter() - start

        return call

    for name in TIMED:
        setattr(digest, name, timed(getattr(digest, name)))
    from blockft.training import distributed

    distributed.run_on_each_host = timed(distributed.run_on_each_host)
    return spent


def child(stop_at_first_step: bool, out: str, *arguments: str) -> None:
    """Run one command and write its times."""
    begun = float(os.environ["BEGUN"])
    spent = time_calls()
    from blockft import cli

    def write(*_, **__) -> None:
        Path(out).write_text(json.dumps({"total_s": time.time() - begun, **spent}))

    if stop_at_first_step:
        from transformers import TrainerCallback

        TrainerCallback.on_step_begin = lambda *_, **__: (write(), os._exit(0))
    sys.argv = ["blockft", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
    write()


def run(work: Path, *arguments: str, stop: bool = True) -> dict[str, float]:
    out = work / "times.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "child", str(int(stop)), str(out), *arguments]
    subprocess.run(command, check=True, env=os.environ | {"BEGUN": str(time.time())}, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def summary(runs: list[dict[str, float]]) -> dict[str, object]:
    """Return medians over the runs."""
    return {
        "total_s": round(statistics.median(run["total_s"] for run in runs), 3),
        "digests_s": round(statistics.median(run["digests_s"] for run in runs), 4),
        "digests_percent": round(statistics.median(100 * run["digests_s"] / run["total_s"] for run in runs), 2),
        "runs": runs,
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(model: str, out: str) -> None:
    import torch

    from blockft.digest import digest_files, list_files
    from blockft.model.fingerprint import model_fingerprint
    from blockft.model.load import load_model
    from blockft.model.model_files import write_digests

    work = Path(os.environ.get("WORK", "/tmp/blockft-digests"))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    data, short, export = work / "data", work / "short", work / "export"
    common = ["train.torch_compile=false", "model.attention=sdpa", "train.deepspeed=zero0"]
    shutil.copytree(model, export)
    write_digests(export)
    prepared = run(work, "prepare", RECIPE, f"model.path={model}", f"data.output_dir={data}", stop=False)
    # a step with rows of 16,384 tokens takes minutes on a CPU
    small = ["data.row_len=1024", "data.num_documents=2", "data.too_long=trim", "train.batch_rows=1"]
    run(work, "prepare", RECIPE, f"model.path={model}", f"data.output_dir={short}", *small, stop=False)
    run_folder = work / "run"
    start = ["train", RECIPE, f"model.path={model}", f"data.output_dir={short}", *small, *common]
    start += [f"train.output_dir={run_folder}", "train.num_eval_examples=0"]
    save = run(work, *start, "train.max_steps=1", "train.warmup_steps=1", stop=False)
    checkpoint = run_folder / "checkpoint-1"
    starts = {
        "start from a model folder": ["train", RECIPE, f"model.path={model}", f"data.output_dir={data}"],
        "start from an export": ["train", RECIPE, f"model.path={export}", f"data.output_dir={data}"],
    }
    starts["resume"] = [*start, "train.max_steps=2", "train.warmup_steps=1", "--resume"]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
    for _ in range(RUNS):
        for name, arguments in starts.items():
            fresh = [f"train.output_dir={work / 'fresh'}", "train.num_eval_examples=0"]
            arguments = arguments if name == "resume" else [*arguments, *common, *fresh]
            measured[name].append(run(work, *arguments))
            shutil.rmtree(work / "fresh", ignore_errors=True)

    def seconds(function) -> float:
        times = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    names = list_files(checkpoint)
    files_s = seconds(lambda: digest_files(checkpoint, names))
    opened = load_model(model, backend="sdpa", dtype=torch.float32)
    weight_bytes = sum(p.numel() * p.element_size() for p in opened.parameters())
    fingerprint_s = seconds(lambda: model_fingerprint(opened))
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "command": f"BLOCKFT_REAL_DATA=FOLDER python data/results/digests.py MODEL {out}",
        "device": f"CPU: {platform.machine()}, {len(os.sched_getaffinity(0))} cores; files in the page cache",
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "transformers": __import__("transformers").__version__},
        "commit": git,
        "bytes": {
            "prepared data": folder_bytes(data),
            "model": folder_bytes(export),
            "checkpoint": folder_bytes(checkpoint),
        },
        "prepare": prepared,
        "train one step and save": save,
        **{name: summary(runs) for name, runs in measured.items()},
        "files_gb_per_s": round(folder_bytes(checkpoint) / files_s / 1e9, 2),
        "fingerprint_s_per_gb": round(fingerprint_s / weight_bytes * 1e9, 3),
    }
    Path(out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(sys.argv[2] == "1", *sys.argv[3:])
    else:
        main(*sys.argv[1:])
