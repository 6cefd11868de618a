"""Runs a queue of experiments on one card, in one process, so that files are read and kernels compiled once.

python driver.py QUEUE --data FOLDER --model FOLDER --tokenizer FILE --out FOLDER [--seconds N] [--rehearse]

QUEUE is a module with a list `QUEUE` of experiments. Each experiment appends one line to OUT/QUEUE.jsonl when
it is done; an experiment that fails is a line with its error. No experiment starts that would end after N
seconds, as estimated from the times on an H200. `--rehearse` runs everything at toy size with random weights.
"""

import argparse
import base64
import importlib
import json
import lzma
import os
import random
import sys
import time
import traceback
from dataclasses import asdict, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import model_file
from experiments import Evaluation, Experiment
from llama import SMOLLM2, Llama, Shape, Weights
from prompts import Prompt, PromptOptions, build_prompt, collate
from sealed import add_sealed
from study import ROW_LEN, arrange_documents, evaluate, first_of_blocks, most_changed, train

TOY = Shape(
    vocab_size=49152,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)
ORDERS = ("ascending", "shuffled")
# GAP_START: when the call began (seconds since 1970), for imports take a part of its time
START = time.monotonic() - (time.time() - float(os.environ.get("GAP_START", time.time())))


def log_line(*words: object) -> None:
    print(f"[{time.monotonic() - START:6.1f}]", *words, flush=True)


class Runner:
    """What the experiments of a queue share: device, data, compiled layers, weights of those before."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rehearses = arguments.rehearse
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        packed = lzma.decompress((arguments.data / "prepared.pt.xz").read_bytes())
        self.data: dict[str, Any] = torch.load(BytesIO(packed), weights_only=False)
        add_more_data(self.data, arguments.data / "more.pt.xz")
        self.tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
        is_toy = self.rehearses and self.device.type == "cpu"
        self.shape, self.row_len = (TOY, 4096) if is_toy else (SMOLLM2, ROW_LEN)
        self.llama = Llama(self.shape, "flex" if self.device.type == "cuda" else "sdpa")
        if self.rehearses:
            start = model_file.random_flat(self.shape).to(self.device, self.dtype)
        else:
            start = model_file.load_flat(arguments.model, self.device)
        self.weights = {"pretrained": start}
        self.weights_folder: Path | None = arguments.weights
        self.opened: dict[str, Any] | None = None
        part = "validation"
        if arguments.sealed:
            names = arguments.only.split(",")
            self.opened = add_sealed(self.data, arguments.sealed, arguments.opened, names)
            part = "sealed"
        self.questions = [i for i, q in enumerate(self.data["questions"]) if q["part"] == part]
        if self.rehearses and not arguments.sealed:
            self.questions = self.questions[::160]

    def detokenize(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.decode_batch(ids)

    def weights_of(self, name: str) -> torch.Tensor:
        """The weights of an earlier experiment, or the mean of several (`a + b`); waits for another card's."""
        if " + " in name:
            several = [self.weights_of(part).to(self.device, torch.float32) for part in name.split(" + ")]
            return torch.stack(several).mean(dim=0)
        if name not in self.weights and self.weights_folder is not None:
            file = self.weights_folder / f"{name}.pt"
            end = time.monotonic() + self.wait_s
            while not file.exists() and time.monotonic() < end:
                time.sleep(0.5)
            self.weights[name] = torch.load(file, map_location=self.device)
        return self.weights[name]

    def keep(self, name: str, flat: torch.Tensor) -> None:
        self.weights[name] = flat
        if self.weights_folder is not None:
            self.weights_folder.mkdir(parents=True, exist_ok=True)
            torch.save(flat.to(torch.bfloat16), self.weights_folder / f".{name}.pt")
            (self.weights_folder / f".{name}.pt").rename(self.weights_folder / f"{name}.pt")

    wait_s = 60.0

    def check_kernels(self) -> float:
        """The largest relative distance between a packed row by the backend and its prompts alone by sdpa."""
        prompt_options = PromptOptions(private_prefix=-1, link_tokens=2)
        prompts = [
            build_prompt(
                self.data,
                n,
                mode="block",
                order="shuffled",
                rng=random.Random(n),
                prompt_options=prompt_options,
            )
            for n in self.questions[:: max(1, len(self.questions) // 7)]
        ]
        if self.device.type == "cpu":
            prompts = prompts[:1]
        weights = Weights(self.shape, self.weights["pretrained"])
        alone, distances, start = Llama(self.shape, "sdpa"), [], 0
        end = self.data["end_of_turn"]
        with torch.no_grad():
            row = collate(prompts, self.row_len, end).to(self.device)
            packed, _ = self.llama.hidden(weights, row.model_inputs, on_kv=lambda *_: None)
            for prompt in prompts:
                own = collate([prompt], len(prompt), end).to(self.device)
                expected, _ = alone.hidden(weights, own.model_inputs)
                found = packed[start : start + len(prompt)]
                distance = (found.float() - expected.float()).norm() / expected.float().norm()
                distances.append(float(distance))
                start += len(prompt)
        return max(distances)

    def choose(
        self, flat: torch.Tensor, evaluation: Evaluation, prompts: list[Prompt]
    ) -> list[np.ndarray[Any, Any]]:
        """The context tokens of prompts that are computed once more."""
        if evaluation.choice == "first":
            return first_of_blocks(prompts, evaluation.recomputed)
        assert evaluation.choice == "changed", evaluation.choice
        weights, end = Weights(self.shape, flat), self.data["end_of_turn"]
        return most_changed(
            self.llama, weights, prompts, evaluation.recomputed, end, self.device, self.row_len
        )

    def arrange(
        self, flat: torch.Tensor, evaluation: Evaluation, order: str, prompt_options: PromptOptions
    ) -> tuple[dict[int, list[int]], dict[str, Any]]:
        """The documents of a second reading, see `arrange_documents`; first readings are kept for one model."""
        if evaluation.first_stride is not None:
            prompt_options = replace(prompt_options, document_stride=evaluation.first_stride)
        key = (evaluation.mode, order, evaluation.first_stride)
        if key not in self.readings:
            self.readings[key] = arrange_documents(
                self.llama,
                self.data,
                flat,
                self.questions,
                mode=evaluation.mode,
                order=order,
                prompt_options=prompt_options,
                device=self.device,
                row_len=self.row_len,
                **({"num_chosen": 8} if self.rehearses else {}),
            )
        arranged, reading = self.readings[key]
        return {n: some[-evaluation.best :] for n, some in arranged.items()}, reading

    def run(self, experiment: Experiment) -> dict[str, Any]:
        training, log = experiment.training, None
        times = {}
        start = time.monotonic()
        if training is None:
            flat = self.weights_of(experiment.weights)
        else:
            if self.rehearses:
                objective = replace(training.objective, ranking_layers=(1, 2), hidden_layers=(1, 2))
                training = replace(training, steps=2, objective=objective, data_share=0.01, warmup_steps=1)
            flat, log = train(
                self.llama,
                self.data,
                training,
                self.weights_of(training.init),
                device=self.device,
                dtype=self.dtype,
                row_len=self.row_len,
                teacher=self.weights_of(experiment.teacher) if experiment.teacher else None,
                on_step=lambda step: log_line("  step", step) if step % 100 == 0 or self.rehearses else None,
            )
        times["train"] = round(time.monotonic() - start, 1)
        if experiment.keep_weights:
            self.keep(experiment.name, flat)
        flat = flat.to(self.device, self.dtype)
        self.readings: dict[tuple[str, str, int | None], tuple[dict[int, list[int]], dict[str, Any]]] = {}
        prompt_options = training.prompt_options if training else None
        results = {}
        for name, evaluation in experiment.evaluations.items():
            asked_in = evaluation.prompt_options or prompt_options
            assert asked_in is not None
            for order in ORDERS:
                start = time.monotonic()
                choose, arranged, reading = None, None, None
                if evaluation.best:
                    arranged, reading = self.arrange(flat, evaluation, order, asked_in)
                if evaluation.recomputed:
                    choose = partial(self.choose, flat, evaluation)
                found = evaluate(
                    self.llama,
                    self.data,
                    flat,
                    self.questions,
                    self.detokenize,
                    mode=evaluation.mode,
                    order=order,
                    prompt_options=asked_in,
                    device=self.device,
                    row_len=self.row_len,
                    choose=choose,
                    arranged=arranged,
                )
                found.pop("texts")
                times[f"{name} {order}"] = round(time.monotonic() - start, 1)
                results[f"{name} {order}"] = {
                    "scores": {m: "".join(str(int(s)) for s in v) for m, v in found["scores"].items()},
                    "gold_loss": [round(x, 4) for x in found["gold_loss"]],
                    "decoding_agrees": round(found["decoding_agrees"], 4),
                    **({"reading": reading} if reading else {}),
                }
                hits = found["scores"]["substring_match"]
                mean = float(np.mean(hits))
                log_line(
                    f"  {name} {order}: {100 * mean:.1f} loss {np.mean(found['gold_loss']):.3f}"
                    f" decoding agrees {found['decoding_agrees']:.3f} hits {packed_bits(hits)}"
                )
        return {"results": results, "training": log, "seconds": times, "settings": asdict(experiment)}


def packed_bits(hits: list[float]) -> str:
    """Hits per question as base64, eight questions a byte: they stand in the log if files are lost."""
    return base64.b64encode(np.packbits(np.array(hits) > 0).tobytes()).decode()


def add_more_data(data: dict[str, Any], file: Path) -> None:
    """Add the questions, documents and sentences with gaps of `more_data.py`; no number of a question changes."""
    data["clozes"] = {}
    if not file.exists():
        return
    more = torch.load(BytesIO(lzma.decompress(file.read_bytes())), weights_only=False)
    first = len(data["documents"])
    data["documents"] = [*data["documents"], *more["documents"]]
    for question in more["questions"]:
        data["questions"].append({**question, "documents": [first + n for n in question["documents"]]})
    data["clozes"] = {(n if n >= 0 else first - n - 1): some for n, some in more["clozes"].items()}


def expected_seconds(experiment: Experiment, num_questions: int) -> float:
    """What an experiment takes on an H200."""
    # a second reading of three documents is quick, its first reading of ten is not
    seconds = sum(22.0 if e.best else 15.0 for e in experiment.evaluations.values())
    seconds = 1 + seconds * num_questions / 1120
    if training := experiment.training:
        step = 0.151 if training.extra_len else 0.117 if training.modes == "full" else 0.103
        if training.modes == "dual":
            step += 0.117
        step += 0.005 * bool(training.objective.ranking_weight)
        teaches = training.objective.needs_teacher and training.modes != "dual"
        seconds += training.steps * (step + 0.035 * teaches)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("queue")
    for name in ("data", "model", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", help="names of the queue's experiments to run, in this order, with commas")
    parser.add_argument("--weights", type=Path, help="folder of kept weights, shared by the cards")
    parser.add_argument("--sealed", type=Path, help="ask the sealed questions of this file, see sealed.py")
    parser.add_argument("--opened", type=Path, help="the record of their opening")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if (arguments.sealed is None) != (arguments.opened is None) or (arguments.sealed and not arguments.only):
        parser.error("--sealed needs --opened and --only")
    torch._dynamo.config.recompile_limit = 64
    torch.backends.cuda.matmul.allow_tf32 = True
    queue: list[Experiment] = importlib.import_module(arguments.queue).QUEUE
    if arguments.only:
        by_name = {experiment.name: experiment for experiment in queue}
        queue = [by_name[name] for name in arguments.only.split(",")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments)
    provenance = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "commit": os.environ.get("GAP_COMMIT", ""),
        "command": f"python driver.py {arguments.queue}",
        "rehearsal": runner.rehearses,
        **({"sealed": runner.opened} if runner.opened else {}),
    }
    log_line("ready", provenance)
    log_line(f"kernels: relative distance {runner.check_kernels():.2e}")
    for experiment in queue:
        start = time.monotonic()
        if start - START + expected_seconds(experiment, len(runner.questions)) > arguments.seconds:
            log_line("no time for", experiment.name)
            continue
        log_line(experiment.name)
        try:
            line = runner.run(experiment)
        except Exception as error:  # noqa: BLE001 - the queue goes on with what does not depend on it
            traceback.print_exc()
            line = {"error": repr(error)}
        with (arguments.out / f"{arguments.queue}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": experiment.name, **provenance, **line}) + "\n")
        log_line(
            "  seconds", line.get("seconds"), (line.get("training") or {}).get("mean_losses_of_last_tenth")
        )
        if torch.cuda.is_available():
            log_line(f"  {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
