"""Measures `blockft train` on all GPUs of a host: speed, memory, checkpoint, killed rank, scaling, export.

usage: python data/results/code/many_gpus.py --tokenizer FOLDER (--sources FILE | --data FOLDER) --work FOLDER
           --out FILE [--num-gpus N] [--limit-s SECONDS] [--parts NAME,NAME...] [--recipe RECIPE]
           [--large SHAPE] [--small SHAPE] [key=value ...]

The script draws random weights of two shapes on the GPUs, saves them, prepares the samples of `--sources` (a
JSON list, as in `data.sources`) meanwhile, and runs these parts, the most valuable one first:

    zero3           the large shape with all weights under ZeRO-3: speed and memory of 30 steps, a checkpoint
                    after them, five more steps, and then SIGKILL to one rank
    scaling         the small shape with all weights under ZeRO-1 on 1, 2, 4, ... and all GPUs, with the same
                    rows of a step for each GPU (weak scaling); runs that fit side by side run side by side
    resume          the run of `zero3` from its checkpoint, against the five steps before the kill
    export          `blockft export` of this checkpoint, which compares the logits with those of the run
    zero2, zero1    the large shape under these stages, if the memory that `--dry-run` expects suffices
    zero3-eager     `zero3` without compiled layers, only the 30 steps

OUT is replaced after each part. A part that has no time left within `--limit-s`, or that the limit ended, is
listed under `not_run`, and the same command continues with it, as long as the folder of `--work` exists.
Settings are those of the recipe except those that are given, and of those that the parts set.

Speeds are real tokens a second of one GPU: the tokens of all GPUs, divided by their number. Medians leave out
`--warmups` steps. Without a GPU the ranks are processes of the CPU.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

CODE = Path(__file__).resolve().parent
ROOT = CODE.parents[2]

PARTS = ("zero3", "scaling", "resume", "export", "zero2", "zero1", "zero3-eager")
"""All parts in their order: the most valuable one first."""

STAGES = ("zero3", "zero2", "zero1")
"""The shipped DeepSpeed configs under which the large shape is trained."""

POLL_S = 0.05
"""Time between two looks at a run."""

SUMMARY = (
    *(
        "state",
        "refused",
        "error",
        "exit_code",
        "median_tokens_per_s_a_gpu",
        "utilization",
        "peak_memory_gib",
    ),
    *("checkpoint", "killed_rank", "share_of_one_gpu", "seconds_from_start_to_the_first_step"),
    *("largest_relative_difference", "line", "seconds"),
)
"""The figures of a part that are printed."""

REACHED, ENDED, NO_TIME = "reached", "ended", "no time left"
"""How the wait for a moment of a run ends."""

KILL_LIMIT_S = 180
"""A run that has not ended so long after one of its ranks was killed is ended, and the part says so."""

END_LIMIT_S = 30
"""Longest wait until killed processes have ended, with the memory of their GPUs."""

DRY_RUN_LIMIT_S = 120
"""Longest wait for the memory that `--dry-run` expects."""

NUM_STEPS_PLANNED = 20
"""Steps that a run plans for each measured step: it is stopped before its last step, which would be saved."""


# --- processes


def list_parents() -> dict[int, int]:
    """Return the parent of every process of this machine that is alive, by process id."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if fields[0] not in "ZX":
            parents[int(folder.name)] = int(fields[1])
    return parents


def list_descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have started."""
    parents = list_parents()
    found = [pid]
    for ancestor in found:  # it grows
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def read_rank(pid: int) -> int | None:
    """Return the rank of a process, which its launcher put into its environment; None if it has none."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return None
    return next((int(text[5:]) for text in variables if text.startswith(b"RANK=")), None)


def list_ranks(pid: int) -> dict[int, int]:
    """Return the process of each rank of a run; those that a rank has started have its variables, too."""
    parents, ranks = list_parents(), {}
    for process in list_descendants(pid):
        rank = read_rank(process)
        if rank is not None and read_rank(parents.get(process, process)) is None:
            ranks[rank] = process
    return ranks


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            continue


class Command:
    """A process with a log. `gpus` are the numbers of the GPUs that it sees; None is all."""

    started: list["Command"] = []
    """All commands of this script, so that none outlives it."""

    def __init__(self, arguments: Sequence[str], log: Path, gpus: Sequence[int] | None = None) -> None:
        python_path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        environment = {**os.environ, "PYTHONPATH": python_path}
        if gpus is not None and count_gpus():
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        self.log, self.arguments = log, list(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            self.process = subprocess.Popen(arguments, env=environment, stdout=stream, stderr=stream)
        self.started_at = time.monotonic()
        Command.started.append(self)

    @property
    def text(self) -> str:
        """The command as it is typed."""
        return shlex.join(["blockft", *self.arguments[3:]])

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_at

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self, limit_s: float) -> bool:
        """Wait for the end of the process and return whether it came in time; otherwise stop it."""
        try:
            self.process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            self.stop()
            return False
        return True

    def stop(self) -> None:
        """End the process and all that it has started at once, and wait until none is left."""
        if not self.is_running():
            return
        pids = [*reversed(list_descendants(self.process.pid)), self.process.pid]
        kill(pids)
        self.process.wait()
        wait_for_end(pids, END_LIMIT_S)

    def read_log(self) -> str:
        """Return the log, in which HOST stands for the name of this machine."""
        text = self.log.read_text(errors="replace")
        return re.sub(rf"\b{re.escape(platform.node())}\b", "HOST", text) if platform.node() else text


def wait_for_end(pids: Sequence[int], limit_s: float) -> list[int]:
    """Wait until processes have ended, and return those that have not."""
    deadline = time.monotonic() + limit_s
    while (alive := sorted(set(pids) & set(list_parents()))) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return alive


def list_remarks(lines: Sequence[str]) -> list[str]:
    """Return the lines of a log that blockft wrote, without those of its libraries."""
    return [line.strip() for line in lines if line.strip().startswith("blockft: ")]


def count_gpus() -> int:
    return len(list_gpus())


_gpus: list[list[str]] = []


def list_gpus() -> list[list[str]]:
    """Return name, memory and driver of each GPU; none on a machine without nvidia-smi."""
    if shutil.which("nvidia-smi") and not _gpus:
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        _gpus.extend([field.strip() for field in line.split(",")] for line in lines)
    return _gpus


# --- runs


def read_steps(folder: Path) -> list[dict[str, float]]:
    """Return the logged steps of a run's folder; a line that is being written is left out."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "loss" in line]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Training(Command):
    """A `blockft train` with a folder of its own under `work`, which is removed first unless it resumes."""

    def __init__(
        self,
        work: Path,
        name: str,
        recipe: str,
        overrides: Sequence[str],
        *,
        num_gpus: int,
        gpus: Sequence[int] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.num_gpus, self.gpus = work / "runs" / name, num_gpus, gpus
        self.first_step_s: float | None = None
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        train = ["train", recipe, *overrides, f"train.output_dir={self.folder}"]
        train += ["--num-gpus", str(num_gpus), *(["--resume"] if resume else [])]
        log = work / "logs" / f"{name}{'-resumed' if resume else ''}.log"
        super().__init__([sys.executable, "-m", "blockft", *train], log, gpus)

    def wait_until(self, is_reached: Callable[[], bool], deadline: float) -> str:
        """Wait for a moment of the run; return whether it came before its end and in time."""
        while time.monotonic() < deadline:
            was_running = self.is_running()
            if is_reached():
                return REACHED
            if not was_running:
                return ENDED
            time.sleep(POLL_S)
        return NO_TIME

    def wait_for_step(self, step: int, deadline: float) -> str:
        def is_logged() -> bool:
            steps = read_steps(self.folder)
            if steps and self.first_step_s is None:
                self.first_step_s = round(self.seconds, 1)
            return any(line["step"] >= step for line in steps)

        return self.wait_until(is_logged, deadline)

    def describe(self, state: str, warmups: int, num_steps: int) -> dict[str, Any]:
        """Return the figures of the first `num_steps` steps. `state` is what `wait_for_step` returned."""
        steps = [line for line in read_steps(self.folder) if line["step"] <= num_steps]
        measured = steps[warmups:]
        figures: dict[str, Any] = {
            "command": self.text,
            "num_gpus": self.num_gpus,
            "state": state,
            "steps": len(steps),
            "seconds_from_start_to_the_first_step": self.first_step_s,
        }
        if self.gpus is not None:
            figures["gpus"] = list(self.gpus)
        if state == ENDED:
            figures |= self.describe_end()
        if measured:
            tokens_per_s = statistics.median(line["tokens_per_s"] for line in measured)
            figures["median_tokens_per_s_a_gpu"] = tokens_per_s / self.num_gpus
            for name, summary in (
                ("utilization", statistics.median),
                ("peak_memory_gib", max),
                ("peak_reserved_gib", max),
            ):
                values = [line[name] for line in measured if name in line]
                figures[name] = summary(values) if values else None
        return figures | {"metrics": steps}

    def describe_end(self) -> dict[str, Any]:
        """Return how a run ended that should not have: its exit code and what it said."""
        lines, code = self.read_log().splitlines(), self.process.returncode
        remarks, tail = list_remarks(lines), lines[-15:]
        is_refused = code == 2 and not read_steps(self.folder)
        refused = {"refused": (remarks or tail)[-1]} if is_refused else {}
        return {"exit_code": code, "remarks": remarks, "log_tail": tail, **refused}


# --- the measurement


class Measurement:
    """All parts on one host, and the JSON of their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.limit_s: float = options.limit_s
        self.started_at = time.monotonic()
        self.num_gpus = options.num_gpus or count_gpus() or 1
        self.dry_runs: dict[str, Command] = {}
        file = self.work / "result.json"
        earlier = json.loads(file.read_text()) if file.is_file() else {}
        names = ("torch", "transformers", "accelerate", "deepspeed")
        gpus = list_gpus()
        self.result: dict[str, Any] = {
            "what": "blockft train on the GPUs of one host, with random weights: speed, memory, checkpoint, "
            "resume, a killed rank, weak scaling, export",
            "command": shlex.join(["python", "data/results/code/many_gpus.py", *sys.argv[1:]]),
            "commit": options.commit,
            "devices": [name for name, _, _ in gpus[: self.num_gpus]] or ["CPU"] * self.num_gpus,
            "device_memory": gpus[0][1] if gpus else None,
            "driver": gpus[0][2] if gpus else None,
            "cpu_cores": os.cpu_count(),
            "host_memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in names},
            "num_gpus": self.num_gpus,
            "recipe": options.recipe,
            "overrides": options.overrides,
            "shapes": {"large": options.large, "small": options.small},
            "warmup_steps": options.warmups,
            "setup": earlier.get("setup", {}),
            "parts": earlier.get("parts", {}),
            "not_run": {},
            "calls": [*earlier.get("calls", []), {"limit_s": options.limit_s}],
        }
        assert earlier.get("num_gpus", self.num_gpus) == self.num_gpus, "--work is that of another host"

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.started_at)

    @property
    def deadline(self) -> float:
        """The moment at which a run that has just begun is ended."""
        return float(time.monotonic() + min(self.options.run_limit_s, self.left_s))

    def save(self) -> None:
        """Write the result to the work folder and to OUT, each in one step."""
        self.result["calls"][-1]["seconds"] = round(time.monotonic() - self.started_at, 1)
        text = json.dumps(self.result, indent=2) + "\n"
        for file in (self.work / "result.json", self.options.out):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.tmp")
            part.write_text(text)
            part.replace(file)

    def measure(self) -> bool:
        """Run the parts for which time is left; return whether none of them raised an error."""
        parts, not_run = self.result["parts"], self.result["not_run"]
        wanted = [name for name in PARTS if name in self.options.parts and not is_done(parts.get(name))]
        not_run |= dict.fromkeys(wanted, "the measurement was interrupted before its end")
        self.save()
        self.set_up(wanted)
        for name in wanted:
            reason = None
            if self.left_s < self.options.part_s:
                not_run[name] = f"{max(0.0, self.left_s):.0f} s were left"
                continue
            try:
                self.measure_part(name)
            except NotPossible as error:
                reason = str(error)
            except Exception:  # the parts after it are worth their time
                parts[name] = {"error": traceback.format_exc()}
            self.stop_runs()
            if parts.get(name, {}).get("state") == NO_TIME:
                reason = "the limit ended it; its figures are those until then"
            del not_run[name]
            if reason:
                not_run[name] = reason
            print(f"{name}: {reason or summarize(parts[name])}", flush=True)
            self.save()
        self.save()
        return not any("error" in figures for figures in parts.values())

    def measure_part(self, name: str) -> None:
        """Run a part and put its figures into the result.

        Raises:
            NotPossible: the part needs what another one has not left.
        """
        if name == "zero3":
            self.measure_zero3()
        elif name == "scaling":
            self.measure_scaling()
        elif name == "resume":
            self.measure_resume()
        elif name == "export":
            self.measure_export()
        else:
            self.measure_stage(name)

    def stop_runs(self) -> None:
        """End all commands but the dry runs, whose answers later parts read."""
        for command in Command.started:
            if command not in self.dry_runs.values():
                command.stop()

    # --- models and data

    @property
    def data(self) -> Path:
        return self.options.data or self.work / "data"

    def model(self, shape: str) -> Path:
        return self.work / "models" / shape

    def set_up(self, wanted: Sequence[str]) -> None:
        """Draw the weights and prepare the data side by side, then ask for the memory of the large shape.

        Raises:
            RuntimeError: one of these commands has failed, or had no time left.
        """
        options, setup = self.options, self.result["setup"]
        commands = {}
        if "recipe" not in setup:
            commands["recipe"] = self.start("recipe", ["config", options.recipe, *self.settings])
        for index, shape in enumerate(dict.fromkeys((options.large, options.small))):
            if f"draw {shape}" not in setup:
                shutil.rmtree(self.model(shape), ignore_errors=True)
                self.model(shape).mkdir(parents=True)
                script = [sys.executable, str(CODE / "train_speed.py"), "--save"]
                arguments = [*script, shape, str(self.model(shape)), str(options.tokenizer)]
                log = self.work / "logs" / f"draw-{shape}.log"
                commands[f"draw {shape}"] = Command(arguments, log, [index % self.num_gpus])
        if options.sources and "prepare" not in setup:
            shutil.rmtree(self.data, ignore_errors=True)
            sources = json.dumps(json.loads(options.sources.read_text()))
            arguments = ["prepare", options.recipe, *self.settings, f"model.path={options.tokenizer}"]
            commands["prepare"] = self.start("prepare", [*arguments, f"data.sources={sources}"])
        for name, command in commands.items():
            if not command.wait(self.left_s) or command.process.returncode:
                raise RuntimeError(f"{name} has failed or had no time left:\n{command.read_log()[-3000:]}")
            setup[name] = "done"
            if name == "recipe":
                text = command.read_log()
                setup[name] = {setting: read_setting(text, setting) for setting in ("row_len", "batch_rows")}
        self.row_len, self.batch_rows = setup["recipe"]["row_len"], setup["recipe"]["batch_rows"]
        manifest = json.loads((self.data / "manifest.json").read_text())
        self.num_tokens = manifest["num_tokens"]
        setup.setdefault("seconds", round(time.monotonic() - self.started_at, 1))
        names = ("num_samples", "num_examples", "num_tokens", "num_labels", "content_hash")
        setup["data"] = {name: manifest[name] for name in names}
        setup["data"]["sources"] = [
            {name: source[name] for name in ("path", "format", "kept", "tokens")}
            for source in manifest["sources"]
        ]
        for stage in STAGES:
            if stage in wanted and self.left_s >= options.part_s:
                arguments = ["train", options.recipe, *self.list_overrides(options.large, stage), "--dry-run"]
                arguments += [f"train.output_dir={self.work}/runs/dry-run", "--num-gpus", str(self.num_gpus)]
                self.dry_runs[stage] = self.start(f"dry-run-{stage}", arguments)
        self.save()

    def start(self, name: str, arguments: Sequence[str]) -> Command:
        return Command([sys.executable, "-m", "blockft", *arguments], self.work / "logs" / f"{name}.log")

    @property
    def settings(self) -> list[str]:
        """The settings of all commands; `prepare` would look for questions of `eval.sources` in its data."""
        return [*self.options.overrides, "eval.sources=[]", f"data.output_dir={self.data}"]

    def list_overrides(
        self, shape: str, stage: str, *others: str, batch_rows: int | None = None
    ) -> list[str]:
        """Return the settings of a run, which differ from those of the recipe."""
        num_steps = NUM_STEPS_PLANNED * self.options.steps
        num_tokens = num_steps * (batch_rows or self.batch_rows) * self.row_len
        return [
            *self.settings,
            f"model.path={self.model(shape)}",
            f"train.deepspeed={stage}",
            f"train.num_train_epochs={math.ceil(num_tokens / self.num_tokens)}",
            f"train.max_steps={num_steps}",
            "train.num_eval_examples=0",
            "train.sample_steps=null",
            *([f"train.batch_rows={batch_rows}"] if batch_rows else []),
            *others,
        ]

    # --- the parts

    def train_large(self, name: str, stage: str, *others: str, resume: bool = False) -> Training:
        overrides = self.list_overrides(self.options.large, stage, *others)
        return Training(
            self.work, name, self.options.recipe, overrides, num_gpus=self.num_gpus, resume=resume
        )

    def never_save(self) -> str:
        return f"train.save_steps={NUM_STEPS_PLANNED * self.options.steps}"

    def record(self, name: str, figures: dict[str, Any]) -> None:
        self.result["parts"][name] = figures
        self.save()

    def measure_zero3(self) -> None:
        """Measure the steps, the checkpoint of the last one, and how a run ends whose rank is killed."""
        num_steps, num_compared = self.options.steps, self.options.compared_steps
        deadline = self.deadline
        run = self.train_large("zero3", "zero3", f"train.save_steps={num_steps}")
        state = run.wait_for_step(num_steps, deadline)
        logged_at = time.time()
        figures = run.describe(state, self.options.warmups, num_steps)
        self.record("zero3", figures)
        if state == REACHED:
            marker = run.folder / f"checkpoint-{num_steps}" / "complete.json"
            figures["state"] = run.wait_until(marker.is_file, deadline)
        if figures["state"] == REACHED:
            seconds, size = marker.stat().st_mtime - logged_at, folder_bytes(marker.parent)
            figures["checkpoint"] = {"step": num_steps, "seconds": round(seconds, 1), "bytes": size}
            self.record("zero3", figures)
            figures["state"] = run.wait_for_step(num_steps + num_compared, deadline)
        if figures["state"] == REACHED:
            figures["killed_rank"] = self.kill_rank(run)
            figures["checkpoint"]["step"] = last = max(list_checkpoints(run.folder))
            figures["after_checkpoint"] = [line for line in read_steps(run.folder) if line["step"] > last]
        if figures["state"] == ENDED:
            figures |= run.describe_end()
        figures["dry_run"] = self.read_dry_run("zero3")
        self.record("zero3", figures)

    def kill_rank(self, run: Training) -> dict[str, Any]:
        """Kill the last rank of a run; return after which time all others had ended, and what they said."""
        ranks = list_ranks(run.process.pid)
        if len(ranks) < 2:
            return {"not_run": f"the run has {len(ranks)} ranks, and none would be left"}
        last, num_lines = max(ranks), len(run.read_log().splitlines())
        killed_at = time.monotonic()
        kill([ranks[last]])
        limit_s = min(KILL_LIMIT_S, self.left_s)
        alive = wait_for_end([run.process.pid, *ranks.values()], limit_s)
        seconds = time.monotonic() - killed_at
        result = {"rank": last, "num_ranks": len(ranks), "seconds": None if alive else round(seconds, 1)}
        if alive:
            result["still_running_after_s"] = round(seconds, 1)
            run.stop()
            kill(alive)
        run.process.wait()
        return result | {
            "exit_code": run.process.returncode,
            "sentences": list_remarks(run.read_log().splitlines()[num_lines:]),
        }

    def measure_scaling(self) -> None:
        """Train the small shape on 1, 2, 4, ... and all GPUs; runs side by side use different GPUs."""
        options = self.options
        figures = self.result["parts"].get("scaling", {"rows_a_gpu": options.small_rows, "runs": {}})
        runs = {n: run for n, run in figures["runs"].items() if run["state"] != NO_TIME}
        sizes = {self.num_gpus, *(2**k for k in range(self.num_gpus.bit_length()) if 2**k < self.num_gpus)}
        missing = sorted((size for size in sizes if str(size) not in runs), reverse=True)
        for group in group_sizes(missing, self.num_gpus):
            if self.left_s < options.part_s:
                break
            deadline, started, first = self.deadline, [], 0
            for size in group:
                overrides = self.list_overrides(
                    options.small, "zero1", self.never_save(), batch_rows=size * options.small_rows
                )
                gpus = range(first, first + size)
                started.append(
                    Training(self.work, f"zero1-{size}", options.recipe, overrides, num_gpus=size, gpus=gpus)
                )
                first += size
            states = [run.wait_for_step(options.steps, deadline) for run in started]
            for run, state in zip(started, states, strict=True):
                figure = run.describe(state, options.warmups, options.steps)
                figure["beside_runs_on"] = [other for other in group if other != run.num_gpus]
                runs[str(run.num_gpus)] = figure
            self.stop_runs()
            figures["runs"] = dict(sorted(runs.items(), key=lambda item: int(item[0])))
            self.record("scaling", figures)
        speeds = {n: run.get("median_tokens_per_s_a_gpu") for n, run in runs.items()}
        if one := speeds.get("1"):
            figures["share_of_one_gpu"] = {n: speed / one for n, speed in speeds.items() if speed}
        is_complete = len(runs) == len(sizes) and all(run["state"] != NO_TIME for run in runs.values())
        figures["state"] = REACHED if is_complete else NO_TIME
        self.record("scaling", figures)

    def measure_resume(self) -> None:
        """Resume the run of `zero3`, and compare its losses with those before the kill."""
        before = self.result["parts"].get("zero3", {})
        if not (expected := before.get("after_checkpoint")):
            raise NotPossible("zero3 has left no checkpoint with steps after it")
        run = self.train_large("zero3", "zero3", f"train.save_steps={self.options.steps}", resume=True)

        def read_new_steps() -> list[dict[str, float]]:
            # before the run resumes, the file holds the old lines
            last = before["checkpoint"]["step"]
            return [line for line in read_steps(run.folder) if line["step"] > last and line not in expected]

        deadline = self.deadline
        state = run.wait_until(lambda: bool(read_new_steps()), deadline)
        seconds = run.seconds
        if state == REACHED:
            state = run.wait_until(lambda: len(read_new_steps()) >= len(expected), deadline)
        resumed = read_new_steps()[: len(expected)]
        figures: dict[str, Any] = {"state": state, "command": run.text}
        figures |= {"from_step": before["checkpoint"]["step"], "metrics": resumed}
        if resumed:
            pairs = [(line["loss"], other["loss"]) for line, other in zip(resumed, expected, strict=False)]
            figures |= {
                "seconds_from_start_to_the_first_step": round(seconds, 1),
                "losses_resumed_and_uninterrupted": pairs,
                "largest_relative_difference": max(abs(a - b) / abs(b) for a, b in pairs),
            }
        if state == ENDED:
            figures |= run.describe_end()
        self.record("resume", figures)

    def measure_export(self) -> None:
        """Export the checkpoint of `zero3`; the command compares the logits itself."""
        checkpoint = self.result["parts"].get("zero3", {}).get("checkpoint")
        if not checkpoint:
            raise NotPossible("zero3 has left no checkpoint")
        out = self.work / "export"
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["export", f"{self.work}/runs/zero3/checkpoint-{checkpoint['step']}", str(out)]
        command = self.start("export", arguments)
        in_time = command.wait(self.left_s)
        lines = [line for line in command.read_log().splitlines() if "its logits differ" in line]
        figures: dict[str, Any] = {
            "state": ENDED if in_time else NO_TIME,
            "command": command.text,
            "exit_code": command.process.returncode,
            "seconds": round(command.seconds, 1),
            "line": lines[-1] if lines else None,
        }
        if lines:
            figures["bytes"] = folder_bytes(out)
        else:
            figures["log_tail"] = command.read_log().splitlines()[-15:]
        self.record("export", figures)

    def measure_stage(self, name: str) -> None:
        """Measure the steps of the large shape in another way: another ZeRO stage, or eager layers."""
        stage, _, eager = name.partition("-")
        dry_run = self.read_dry_run(stage) if not eager else {}
        if "refused" in dry_run:
            self.record(name, {"state": ENDED, "refused": dry_run["refused"], "by": dry_run["command"]})
            return
        others = [self.never_save(), *(["train.torch_compile=false"] if eager else [])]
        run, deadline = self.train_large(name, stage, *others), self.deadline
        state = run.wait_for_step(self.options.steps, deadline)
        figures = run.describe(state, self.options.warmups, self.options.steps)
        self.record(name, figures | ({"dry_run": dry_run} if dry_run else {}))

    def read_dry_run(self, stage: str) -> dict[str, Any]:
        """Return the memory that a dry run expects, or the sentence of its refusal."""
        command = self.dry_runs[stage]
        in_time = command.wait(min(DRY_RUN_LIMIT_S, self.left_s))
        log = command.read_log()
        result: dict[str, Any] = {"command": command.text}
        if not in_time:
            return result | {"error": "no answer in time"}
        if command.process.returncode:
            return result | {"refused": (list_remarks(log.splitlines()) or log.splitlines())[-1]}
        peak = re.search(r"expected peak\W+([\d.,]+ \w+)", log)
        kind = re.search(r"gradient\s+checkpointing\s+(none|selective|full)", log)
        return result | {"expected_peak": peak and peak[1], "gradient_checkpointing": kind and kind[1]}


class NotPossible(Exception):
    """Raised if a part needs what an earlier one has not left."""


def is_done(figures: dict[str, Any] | None) -> bool:
    return figures is not None and "error" not in figures and figures.get("state") != NO_TIME


def read_setting(text: str, name: str) -> int:
    """Return a whole number of the recipe that `blockft config` has printed."""
    match = re.search(rf"^  {name}: (\d+)$", text, re.MULTILINE)
    assert match, name
    return int(match[1])


def list_checkpoints(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run."""
    return [int(marker.parent.name.partition("-")[2]) for marker in run.glob("checkpoint-*/complete.json")]


def group_sizes(sizes: Sequence[int], num_gpus: int) -> list[list[int]]:
    """Return runs of these numbers of GPUs, the largest first, in groups that fit side by side."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= num_gpus:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def summarize(figures: dict[str, Any]) -> str:
    """Return the most telling figures of a part in a line."""
    return json.dumps({name: figures[name] for name in SUMMARY if name in figures})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of all runs, key=value")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--sources", type=Path, help="a JSON list of sources, which are prepared")
    data.add_argument("--data", type=Path, help="a folder of prepared data")
    parser.add_argument("--work", type=Path, required=True, help="models, runs, logs; 150 GB for 8B")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of the result")
    parser.add_argument("--recipe", default="llama-3.1-8b")
    parser.add_argument("--large", default="llama-3-8b")
    parser.add_argument("--small", default="llama-3.2-1b")
    parser.add_argument("--num-gpus", type=int, help="default: all GPUs, or 1 on a CPU")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmups", type=int, default=5, help="steps that medians leave out")
    parser.add_argument("--compared-steps", type=int, default=5, help="steps after the checkpoint")
    parser.add_argument("--small-rows", type=int, default=8, help="rows of a step for each GPU in `scaling`")
    parser.add_argument("--limit-s", type=float, default=3600, help="time of everything")
    parser.add_argument("--run-limit-s", type=float, default=400, help="longest time of one run")
    parser.add_argument("--part-s", type=float, default=60, help="least time left with which a part begins")
    parser.add_argument("--commit", default="", help="the commit that is measured")
    options = parser.parse_intermixed_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, allowed are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measurement = Measurement(options)
    try:
        succeeded = measurement.measure()
    finally:
        for command in Command.started:
            command.stop()
        measurement.save()
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
