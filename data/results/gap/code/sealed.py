"""The sealed questions: their token ids, their single opening, and the tables of the confirmation.

python sealed.py encode MODEL_FOLDER DATA_FOLDER RELATED.json OUT   token ids of the sealed questions; no answer
python sealed.py stand-in DATA OUT                  validation questions in their place, to try what follows
python sealed.py open OUT NAME,NAME,... RECORD      the opening: the models that may be asked, once and for all
python sealed.py tables OUT LINES.jsonl ...         one JSON file a model, and the tables

`encode` writes OUT/sealed.pt.xz (the dev files, the 250 kept questions of 2WikiMultihopQA, and the constructed
set `related-passages`, which is reported apart) and OUT/sealed.json (sets, types and ids, no text). The driver
asks these questions only with `--sealed OUT/sealed.pt.xz --opened RECORD`, and only models that the record
names. `open` refuses if the record exists.
"""

import hashlib
import json
import lzma
import os
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scores import interval, is_yes_no, resampled_mean

RELATED = "related-passages"
SETS = ("squad", "fid", "hotpotqa", "2wikimultihopqa", "musique")
"""Sets of the primary mean."""

ORDERS = ("ascending", "shuffled")
METRIC = "substring_match"
KINDS = {
    "SQuAD, one document": ("squad", ("",)),
    "NQ, one document": ("fid", ("",)),
    "HotpotQA, bridge": ("hotpotqa", ("bridge",)),
    "HotpotQA, comparison": ("hotpotqa", ("comparison",)),
    "2Wiki, compositional": ("2wikimultihopqa", ("compositional",)),
    "2Wiki, inference": ("2wikimultihopqa", ("inference",)),
    "2Wiki, comparison": ("2wikimultihopqa", ("comparison",)),
    "2Wiki, bridge comparison": ("2wikimultihopqa", ("bridge_comparison",)),
    "MuSiQue, 2 hops": ("musique", ("2hop",)),
    "MuSiQue, 3 hops": ("musique", ("3hop1", "3hop2")),
    "MuSiQue, 4 hops": ("musique", ("4hop1", "4hop2", "4hop3")),
    **{
        f"related passages, {hops} hops, {how}": (RELATED, (f"{hops} hops, {how}",))
        for hops in (2, 3, 4)
        for how in ("named", "described")
    },
}


def encode(model: Path, data: Path, related: Path, out: Path) -> None:
    # only here is the package's reader needed
    from blockft.data.encode import Encoder
    from blockft.model.load import load_tokenizer

    from split import NUM_TWO_WIKI, SEALED_FILES, TRAIN_FILES, Store, encode_questions, read_records
    from split import write_records as write

    encoder, store = Encoder(load_tokenizer(str(model))), Store()
    with tempfile.TemporaryDirectory() as folder:
        for source, name in SEALED_FILES.items():
            store.add("sealed", source, encode_questions(encoder, source, data / name))
        kept = list(read_records("2wikimultihopqa", data / TRAIN_FILES["2wikimultihopqa"]))[NUM_TWO_WIKI:]
        file = Path(folder) / "kept.json"
        write("2wikimultihopqa", kept, file)
        store.add("sealed", "2wikimultihopqa", encode_questions(encoder, "2wikimultihopqa", file))
        store.add("sealed", RELATED, encode_questions(encoder, "hotpotqa", related))
    for question in store.questions:
        if len(question["documents"]) < 10:
            assert question["source"] != RELATED, question["id"]
    write_file(store.documents, store.questions, out)


def stand_in(data: Path, out: Path) -> None:
    """Every 80th validation question in the place of the sealed ones."""
    from table import load_data

    prepared = load_data(data)
    questions = [q for q in prepared["questions"] if q["part"] == "validation"][::80]
    numbers = sorted({n for q in questions for n in q["documents"]})
    place = {n: i for i, n in enumerate(numbers)}
    moved = [{**q, "part": "sealed", "documents": [place[n] for n in q["documents"]]} for q in questions]
    write_file([prepared["documents"][n] for n in numbers], moved, out)


def write_file(documents: list[Any], questions: list[dict[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    torch.save({"documents": documents, "questions": questions}, content)
    packed = lzma.compress(content.getvalue())
    (out / "sealed.pt.xz").write_bytes(packed)
    summary = {
        "sha256": hashlib.sha256(packed).hexdigest(),
        "sets": [q["source"] for q in questions],
        "types": [q["type"] for q in questions],
        "ids": [q["id"] for q in questions],
        "yes_no": "".join(str(int(is_yes_no(q["answers"]))) for q in questions),
    }
    (out / "sealed.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    print(summary["sha256"], dict(Counter(zip(summary["sets"], summary["types"], strict=True))))


def open_sealed(out: Path, names: str, record: Path) -> None:
    """Write the record of the opening, before any model is asked."""
    if record.exists():
        sys.exit(f"{record} exists: the sealed questions were opened already")
    opened = {
        "opened": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": names.split(","),
        "sha256": json.loads((out / "sealed.json").read_text(encoding="utf-8"))["sha256"],
        "commit": os.environ.get("GAP_COMMIT", ""),
    }
    record.write_text(json.dumps(opened, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(opened))


def add_sealed(data: dict[str, Any], file: Path, record: Path, names: list[str]) -> dict[str, Any]:
    """Add the sealed questions to the driver's data, behind all others; returns the record of the opening.

    Raises:
        SystemExit: the record does not name every model, or is that of another file.
    """
    opened: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() != opened["sha256"]:
        sys.exit(f"{record} is the record of another file than {file}")
    if missing := [name for name in names if name not in opened["models"]]:
        sys.exit(f"{record} does not name {', '.join(missing)}")
    content = torch.load(BytesIO(lzma.decompress(packed)), weights_only=False)
    first = len(data["documents"])
    data["documents"] = [*data["documents"], *content["documents"]]
    for question in content["questions"]:
        moved = {**question, "documents": [first + n for n in question["documents"]]}
        data["questions"].append({**moved, "part": "sealed"})
    return opened


class Confirmation:
    """The hits of the models on the sealed questions, by recipe and seed."""

    def __init__(self, out: Path) -> None:
        questions = json.loads((out / "sealed.json").read_text(encoding="utf-8"))
        self.sets, self.types = np.array(questions["sets"]), np.array(questions["types"])
        self.is_open = np.array([c == "0" for c in questions["yes_no"]])
        self.lines: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(out.glob("sealed-*.json")):
            line = json.loads(path.read_text(encoding="utf-8"))
            self.lines.setdefault(path.stem.rsplit("-seed", 1)[0], []).append(line)
        seeds = {
            name: [line["name"].rsplit("-seed", 1)[1] for line in some] for name, some in self.lines.items()
        }
        assert len(set(map(tuple, seeds.values()))) == 1, f"every recipe needs the same seeds: {seeds}"

    def hits(self, recipe: str, mode: str, order: str, metric: str = METRIC) -> NDArray[np.float64]:
        """Hits (seeds, questions) in percent; the mean of the orders for the order `both`."""
        if order == "both":
            return np.mean([self.hits(recipe, mode, one, metric) for one in ORDERS], axis=0)
        found = [line["results"][f"{mode} {order}"]["scores"][metric] for line in self.lines[recipe]]
        return np.array([[100.0 * (c == "1") for c in hits] for hits in found])

    def chosen(self, name: str, types: tuple[str, ...]) -> NDArray[np.bool_]:
        return (self.sets == name) & np.isin(self.types, types)

    def by_set(self, values: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """The questions of the primary mean, by set: those without yes-or-no answers."""
        every = {name: values[:, (self.sets == name) & self.is_open] for name in SETS}
        return {name: some for name, some in every.items() if some.shape[1]}


def cell(values: dict[str, NDArray[np.float64]], signed: bool = False) -> str:
    every = np.concatenate(list(values.values()), axis=1)
    low, high = interval(resampled_mean(values))
    sign = "+" if signed else ""
    return f"{every.mean():{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def tables(out: Path, lines: list[Path]) -> str:
    for path in lines:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            assert "error" not in line, line
            target = out / f"{line['name']}.json"
            assert not target.exists() or target.read_text(encoding="utf-8") == text + "\n", (
                f"{line['name']} was asked twice"
            )
            target.write_text(text + "\n", encoding="utf-8")
    found = Confirmation(out)
    baseline = next(name for name in found.lines if name.startswith("sealed-full"))
    winners = [name for name in found.lines if name != baseline]
    compared = [(name, mode) for name in winners for mode in ("block", "full")]
    rows = ["| model, mode | metric | ascending | shuffled | both orders |", "|---" * 5 + "|"]
    for metric in (METRIC, "word_match"):
        scores = {order: found.hits(baseline, "full", order, metric) for order in (*ORDERS, "both")}
        cells = [cell(found.by_set(values)) for values in scores.values()]
        rows.append(f"| {baseline}, full mode | {metric} | " + " | ".join(cells) + " |")
        for name, mode in compared:
            own = {order: found.hits(name, mode, order, metric) for order in scores}
            cells = [cell(found.by_set(values)) for values in own.values()]
            rows.append(f"| {name}, {mode} mode | {metric} | " + " | ".join(cells) + " |")
            cells = [cell(found.by_set(own[order] - scores[order]), True) for order in scores]
            rows.append(f"| minus {baseline} | {metric} | " + " | ".join(cells) + " |")
    head = " | ".join(f"{name}, {mode} mode" for name, mode in compared)
    kinds = [f"| questions | number | {baseline} | {head} |", "|---" * (3 + len(compared)) + "|"]
    full = found.hits(baseline, "full", "both")
    groups = {kind: found.chosen(*some) & found.is_open for kind, some in KINDS.items()}
    groups["yes or no"] = ~found.is_open
    for kind, of_kind in groups.items():
        if not of_kind.any():
            continue
        cells = [kind, str(of_kind.sum()), cell({"all": full[:, of_kind]})]
        for name, mode in compared:
            own = found.hits(name, mode, "both")
            difference = cell({"all": (own - full)[:, of_kind]}, True)
            cells.append(f"{own[:, of_kind].mean():.1f}; {difference}")
        kinds.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n\n" + "\n".join(kinds)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["encode", model, data, related, out]:
            encode(Path(model), Path(data), Path(related), Path(out))
        case ["stand-in", data, out]:
            stand_in(Path(data), Path(out))
        case ["open", out, names, record]:
            open_sealed(Path(out), names, Path(record))
        case ["tables", out, *lines]:
            print(tables(Path(out), [Path(line) for line in lines]))
        case _:
            sys.exit(__doc__)
