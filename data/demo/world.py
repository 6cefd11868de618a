"""Write the data of the demo: documents about invented towns, and questions that the documents answer.

A scene is a few towns, and a document for each fact about them. Facts are random in every scene, so a model
cannot memorise them. The documents of a held-out scene occur together in no training scene. There are five
files of samples, from easy to hard:

    recall.jsonl    document "OremouthKell"; question "Oremouth", response OremouthKell
    pairs.jsonl     the same, and question "Oremouth?", response Kell
    facts.jsonl     "The mayor of Oremouth is Kell."; two or three towns with a mayor each, or a river
    train.jsonl     three or four towns with a mayor and a river each
    heldout.jsonl   the same with four towns, for evaluation only

    python world.py OUT_FOLDER [--scenes N] [--heldout-scenes N] [--seed S]
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUCTION = "Answer from the documents:\n"
ATTRIBUTES = ("mayor", "river")
ENDINGS = {"town": "mouth", "mayor": "k", "river": "n"}
ONSETS = (
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "th",
    "v",
    "w",
)
VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
NUM_NAMES = 32


@dataclass(frozen=True)
class Question:
    text: str
    response: str
    answer: str


def names(kind: str) -> list[str]:
    """Return the invented names of a kind; they are the same on every machine."""
    rng = random.Random(f"names of {kind}")
    found: dict[str, None] = {}
    while len(found) < NUM_NAMES:
        stem = "".join(rng.choice(part) for part in (ONSETS, VOWELS, ONSETS, VOWELS))
        found[(stem + ENDINGS[kind]).capitalize()] = None
    return list(found)


NAMES = {kind: names(kind) for kind in ENDINGS}


def pairs(rng: random.Random, short_answers: bool) -> tuple[list[str], list[Question]]:
    """Return two to four towns, each joined to its mayor or river, and questions about them.

    `short_answers` adds questions whose answer is only the mayor or river.
    """
    num_pairs = rng.choice((2, 2, 2, 3, 4))
    towns = rng.sample(NAMES["town"], num_pairs)
    values = rng.sample(NAMES[rng.choice(ATTRIBUTES)], num_pairs)
    couples = list(zip(towns, values, strict=True))
    questions = [Question(town, town + value, value) for town, value in couples]
    if short_answers:
        questions += [Question(f"{town}?", value, value) for town, value in couples]
    return [f"{town}{value}\n" for town, value in couples], questions


def scene(
    rng: random.Random, num_towns: int, attributes: tuple[str, ...], sentences: bool
) -> tuple[list[str], list[Question]]:
    """Return the documents about some towns and a question for each.

    `sentences` adds questions whose response is a sentence.
    """
    documents, questions = [], []
    for attribute in attributes:
        towns, values = rng.sample(NAMES["town"], num_towns), rng.sample(NAMES[attribute], num_towns)
        for town, value in zip(towns, values, strict=True):
            fact = f"The {attribute} of {town} is {value}."
            documents.append(fact + "\n")
            questions.append(Question(f"What is the {attribute} of {town}?", value, value))
            if sentences:
                questions.append(Question(f"Tell me the {attribute} of {town}.", fact, value))
    return documents, questions


def samples(name: str, documents: list[str], questions: list[Question]) -> Iterator[dict[str, Any]]:
    """Yield one sample per question; the samples of a scene have the same documents in the same order."""
    for number, question in enumerate(questions):
        yield {
            "id": f"{name}-{number}",
            "source": "world",
            "messages": [{"role": "user", "content": [INSTRUCTION, *documents, question.text]}],
            "response": question.response,
            "answers": [question.answer],
            "meta": {"documents": list(range(1, len(documents) + 1))},
        }


def write(path: Path, num_scenes: int, seed: int, make: Any, seen: set[frozenset[str]]) -> None:
    rng = random.Random(f"{path.stem}:{seed}")
    with path.open("w", encoding="utf-8") as lines:
        written = 0
        while written < num_scenes:
            documents, questions = make(rng)
            if frozenset(documents) in seen:
                continue
            seen.add(frozenset(documents))
            rng.shuffle(documents)
            rng.shuffle(questions)
            for sample in samples(f"{path.stem}-{written}", documents, questions):
                lines.write(json.dumps(sample) + "\n")
            written += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--scenes", type=int, default=10_000, help="scenes to train on, in each of four files"
    )
    parser.add_argument("--heldout-scenes", type=int, default=150, help="scenes of eight questions each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    makers = {
        "heldout": (options.heldout_scenes, lambda rng: scene(rng, 4, ATTRIBUTES, sentences=False)),
        "train": (options.scenes, lambda rng: scene(rng, rng.choice((3, 4)), ATTRIBUTES, sentences=False)),
        "facts": (
            options.scenes,
            lambda rng: scene(rng, rng.choice((2, 3)), (rng.choice(ATTRIBUTES),), sentences=True),
        ),
        "pairs": (options.scenes, lambda rng: pairs(rng, short_answers=True)),
        "recall": (options.scenes, lambda rng: pairs(rng, short_answers=False)),
    }
    seen: set[frozenset[str]] = set()
    for name, (num_scenes, make) in makers.items():
        write(options.folder / f"{name}.jsonl", num_scenes, options.seed, make, seen)


if __name__ == "__main__":
    main()
