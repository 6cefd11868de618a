"""What the commands of the fault tests read: data, a run, its export, documents and requests."""

import json
from collections.abc import Sequence
from pathlib import Path

from blockft.stages.export import export
from blockft.stages.prepare import prepare
from tests.commands import run_ranks
from tests.run import save_samples, toy_recipe


def build_toy(folder: Path, training: Sequence[str], texts: Sequence[str], num_requests: int) -> Path:
    """Write all that the commands read into a folder and return it. `training` are settings of the run."""
    prepare(toy_recipe(folder))
    done = run_ranks(*train_command(folder, folder / "run", *training))
    assert done.returncode == 0, done.stderr
    export(folder / "run", folder / "export")
    documents = [{"title": "", "text": text} for text in texts]
    starts = range(0, 2 * num_requests, 2)
    requests = [{"documents": documents[i : i + 3], "question": "Which?"} for i in starts]
    for name, lines in {"documents.jsonl": documents, "requests.jsonl": requests}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_samples(folder / "train.jsonl", 40)
    return folder


def train_command(toy: Path, run: Path, *settings: str) -> list[str | Path]:
    return ["train", toy / "recipe.yaml", f"train.output_dir={run}", *settings]


def cache_command(toy: Path, cache: Path) -> list[str | Path]:
    return ["cache", "build", toy / "model", toy / "documents.jsonl", "--cache", cache]


def generate_command(toy: Path, cache: Path) -> list[str | Path]:
    options = ["--max-new-tokens", "3", "--json", "--cache", cache]
    return ["generate", toy / "model", "--input", toy / "requests.jsonl", *options]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_report(folder: Path) -> dict[str, bytes]:
    """Return the files of a report except its picture, whose metadata may differ."""
    return {name: content for name, content in read_files(folder).items() if not name.endswith(".png")}
