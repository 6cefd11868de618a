"""Constructed sets of questions whose answers follow from invented documents only.

They answer questions about independent blocks that public sets leave open:

- `related-passages`: does a model find an answer whose documents refer to each other? Each link of the chain
  stands in another document, by name or only by a description that a further document explains.
- `many-blocks`: does a model read hundreds of blocks? Every turn of a game is a block of its own, and the
  question asks for a state that several turns decide. The paper names games as a use of many blocks
  (Appendix A).
- `in-context`: does a model learn from examples that do not see each other? Every shot is a block of its own,
  and only the shots say what the labels mean.

Sample i of a set is always the same, whatever the seed: it is drawn from a random number generator with the
seed "SET:i". All names are invented for each sample, and the question contains a name that belongs to i, so
that no two samples of a set ask the same question. The documents stand in random order.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

from blockft.data.qa_formats import Question
from blockft.data.rag_prompt import Document
from blockft.data.records import PlacedRecord
from blockft.data.sample import check_field
from blockft.errors import UserError

VERSION = 1
"""Version of the texts. It changes when the same number of a sample gives another text."""

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
PERSON_SYLLABLES, NAME_SYLLABLES = 4, 3

NUM_SUBJECTS = len(SYLLABLES) ** PERSON_SYLLABLES
"""Number of samples of a set until the names of their subjects repeat: 24 million."""

SUBJECT_STEP = 1_000_003
"""Step between the numbers of the subjects' names: a prime, so that all names are used and look random."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


RELATIONS = _words("teacher doctor tailor landlord guide neighbour cousin partner lawyer barber driver")
OFFICES = _words("keeper owner painter builder guard heir founder caretaker cleaner porter")
SIDES = _words("north south east west upper lower old new red white black green")
BUILDINGS = _words("tower gate mill bridge inn library lighthouse castle barn theatre")

ATTRIBUTES = {
    "size": _words("tiny small short narrow thin flat tall wide thick long large huge"),
    "colour": _words("red blue green yellow white black grey brown pink purple orange silver"),
    "material": _words("iron oak glass clay stone brass copper paper wool leather marble wax"),
    "kind": _words("cup bowl lamp box key ring comb bell plate spoon jug chest"),
}
"""The attributes of the things of `in-context`, in the order in which they are written."""

TAKES_PER_ITEM = 3
TURNS_PER_UNIT = 6
TURNS_PER_ITEM = 30
NUM_PLACES = 64


@dataclass(frozen=True, kw_only=True)
class ConstructedSize:
    """The size of a constructed set's questions.

    num_documents: documents of a question; None takes the default of the set.
    num_hops: documents that an answer of `related-passages` needs; None draws 2 to 4 for each question.
    num_labels: labels of `in-context`.
    """

    num_documents: int | None = None
    num_hops: int | None = None
    num_labels: int = 8


@dataclass(frozen=True, kw_only=True)
class ConstructedSet:
    """A constructed set: its description and the function that builds one of its records.

    least_documents: returns the smallest number of documents of a size.
    """

    description: str
    num_documents: int
    least_documents: Callable[[ConstructedSize], int]
    build: Callable[["_Names", ConstructedSize, int], dict[str, Any]]


def read_constructed(name: str, size: ConstructedSize, first: int = 0) -> Iterator[PlacedRecord]:
    """Yield the records of a constructed set from number `first` on, without end.

    Raises:
        UserError: there is no such set, or it has too few documents for its other sizes.
    """
    if name not in CONSTRUCTED_SETS:
        raise UserError(f"there is no constructed set {name!r} (allowed: {', '.join(CONSTRUCTED_SETS)})")
    constructed = CONSTRUCTED_SETS[name]
    num_documents = constructed.num_documents if size.num_documents is None else size.num_documents
    if num_documents < (least := constructed.least_documents(size)):
        raise UserError(
            f"the constructed set {name} has num_documents {num_documents}, which is too few: allowed are "
            f"{least} or more with its other sizes"
        )
    return (
        (f"{name}, sample {number}", _build_record(name, size, num_documents, number))
        for number in count(first)
    )


def parse_constructed(record: Any) -> Question:
    """Parse a record of a constructed set."""
    check_field(isinstance(record, dict), "the record", record, "be a JSON object")
    return Question(
        id=record["id"],
        source=record["set"],
        question=record["question"],
        answers=(record["answer"],),
        documents=tuple(
            # equal relevance: no order by relevance tells which documents hold the answer
            Document(title=d["title"], text=d["text"], supports=d["is_supporting"])
            for d in record["documents"]
        ),
        meta={"type": record["type"]} | ({"level": record["level"]} if "level" in record else {}),
        has_position="level" not in record,
    )


def _build_record(name: str, size: ConstructedSize, num_documents: int, number: int) -> dict[str, Any]:
    names = _Names(random.Random(f"{name}:{number}"), number)
    record = CONSTRUCTED_SETS[name].build(names, size, num_documents)
    names.rng.shuffle(record["documents"])
    return {"id": f"{name}-{number}", "set": name, **record}


class _Names:
    """The random number generator of a sample, and invented names that are all different.

    No name is part of another. Names of one kind have the same length, which therefore tells nothing.
    """

    def __init__(self, rng: random.Random, number: int) -> None:
        self.rng = rng
        self.subject = _spell((number + 1) * SUBJECT_STEP % NUM_SUBJECTS, PERSON_SYLLABLES).capitalize()
        self._used = _parts(self.subject.lower())

    def person(self) -> str:
        return self._draw(PERSON_SYLLABLES).capitalize()

    def town(self) -> str:
        return f"{self._draw(NAME_SYLLABLES).capitalize()}burg"

    def label(self) -> str:
        return self._draw(NAME_SYLLABLES)

    def _draw(self, num_syllables: int) -> str:
        while True:
            name = _spell(self.rng.randrange(len(SYLLABLES) ** num_syllables), num_syllables)
            if self._used.isdisjoint(parts := _parts(name)):
                self._used |= parts
                return name


def _spell(number: int, num_syllables: int) -> str:
    """Return the number as a word: its digits in the system whose digits are the syllables."""
    syllables = []
    for _ in range(num_syllables):
        number, digit = divmod(number, len(SYLLABLES))
        syllables.append(SYLLABLES[digit])
    return "".join(syllables)


def _parts(name: str) -> set[str]:
    """Return the short names that a name contains, which can start at a syllable only."""
    length = 2 * NAME_SYLLABLES
    return {name[i : i + length] for i in range(0, len(name) - length + 1, 2)}


def _document(title: str, sentences: Sequence[str], is_supporting: bool) -> dict[str, Any]:
    return {"title": title, "text": " ".join(sentences), "is_supporting": is_supporting}


def _related_passages(names: _Names, size: ConstructedSize, num_documents: int) -> dict[str, Any]:
    """Return a question over a chain of people, among other chains with the same relations.

    ::

        Ada     "The doctor of Ada is Bob. The cousin of Ada is Eve."
        Bob     "Bob works in Velo. Bob lives in Tana."
        question "In which town does the doctor of Ada live?"

    A chain is a row of people, each in another document. In a question of the type `described` a document
    names the next person only by an office ("the keeper of the old mill"), which the document of that person
    explains. Each document but those of the last people also links to a person of another chain.
    """
    rng = names.rng
    num_hops = size.num_hops or rng.randint(2, 4)
    is_described = rng.random() < 0.5
    num_chains = num_documents // num_hops
    layers = [[names.person() for _ in range(num_chains)] for _ in range(num_hops)]
    layers[0][0] = names.subject
    # documents that no chain needs fill the prompt up to its size
    layers[-1] += [names.person() for _ in range(num_documents - num_chains * num_hops)]
    people = [person for layer in layers for person in layer]
    offices = rng.sample(range(len(OFFICES) * len(SIDES) * len(BUILDINGS)), len(people))
    office_of = {person: _office(number) for person, number in zip(people, offices, strict=True)}
    shown = office_of if is_described else {person: person for person in people}
    sentences = {person: [f"{person} is {office_of[person]}."] if is_described else [] for person in people}
    relations = rng.sample(RELATIONS, 2 * (num_hops - 1))
    chain, phrase = [names.subject], names.subject
    for layer, next_layer in pairwise(layers):
        asked, other = relations.pop(), relations.pop()
        permuted, shift = rng.sample(next_layer, len(layer)), rng.randrange(1, len(layer))
        # the other relation leads to another person
        targets = {asked: permuted, other: permuted[shift:] + permuted[:shift]}
        for i, person in enumerate(layer):
            links = [f"The {relation} of {person} is {shown[targets[relation][i]]}." for relation in targets]
            sentences[person] += rng.sample(links, len(links))
        chain.append(targets[asked][layer.index(chain[-1])])
        phrase = f"the {asked} of {phrase}"
    home = {person: names.town() for person in layers[-1]}
    for person in layers[-1]:
        facts = [f"{person} lives in {home[person]}.", f"{person} works in {names.town()}."]
        sentences[person] += rng.sample(facts, len(facts))
    return {
        "question": f"In which town does {phrase} live?",
        "answer": home[chain[-1]],
        "documents": [_document(person, sentences[person], person in chain) for person in people],
        "type": f"{num_hops} hops, {'described' if is_described else 'named'}",
    }


def _office(number: int) -> str:
    number, building = divmod(number, len(BUILDINGS))
    office, side = divmod(number, len(SIDES))
    return f"the {OFFICES[office]} of the {SIDES[side]} {BUILDINGS[building]}"


def _many_blocks(names: _Names, size: ConstructedSize, num_documents: int) -> dict[str, Any]:
    """Return a question about the log of a game, one turn a document.

    ::

        Turn 1      "Ada moves to Velo."
        Turn 2      "Bob takes the lamp of Kim."
        Turn 3      "Ada moves to Tana."
        question "Where is Ada after the last turn?"

    Kinds of questions: where a unit is after the last turn, where it was after an earlier turn, and where the
    unit is that holds an item. All units move about equally often, and all items change hands equally often.
    """
    rng = names.rng
    kind = rng.choice(("last move", "earlier move", "holder of an item"))
    units = [names.person() for _ in range(_num_units(num_documents))]
    owners = [names.person() for _ in range(max(1, num_documents // TURNS_PER_ITEM))]
    (owners if kind == "holder of an item" else units)[0] = names.subject
    places = [names.town() for _ in range(NUM_PLACES)]
    takers = [owner for owner in owners for _ in range(TAKES_PER_ITEM)]
    movers = [units[i % len(units)] for i in range(num_documents - len(takers))]
    turns = rng.sample(range(1, num_documents + 1), num_documents)
    # by unit or owner: the turns, each with the place or the unit that it leads to, in the order of time
    moves: dict[str, list[tuple[int, str]]] = {unit: [] for unit in units}
    takes: dict[str, list[tuple[int, str]]] = {owner: [] for owner in owners}
    for turn, mover in sorted(zip(turns, movers, strict=False)):
        last = [place for _, place in moves[mover][-1:]]
        moves[mover].append((turn, rng.choice([place for place in places if place not in last])))
    for turn, owner in sorted(zip(turns[len(movers) :], takers, strict=True)):
        last = [unit for _, unit in takes[owner][-1:]]
        takes[owner].append((turn, rng.choice([unit for unit in units if unit not in last])))
    texts = {turn: f"{unit} moves to {place}." for unit, steps in moves.items() for turn, place in steps}
    texts |= {
        turn: f"{unit} takes the lamp of {owner}." for owner, steps in takes.items() for turn, unit in steps
    }
    question, (answer, supporting) = _ask_game(rng, kind, names.subject, moves, takes)
    return {
        "question": question,
        "answer": answer,
        "documents": [_document(f"Turn {turn}", [text], turn in supporting) for turn, text in texts.items()],
        "type": f"{num_documents} turns, {kind}",
    }


def _num_units(num_documents: int) -> int:
    return max(3, num_documents // TURNS_PER_UNIT)


def _ask_game(
    rng: random.Random,
    kind: str,
    subject: str,
    moves: dict[str, list[tuple[int, str]]],
    takes: dict[str, list[tuple[int, str]]],
) -> tuple[str, tuple[str, set[int]]]:
    """Return a question, its answer, and the turns on which the answer rests."""
    if kind == "holder of an item":
        take_turn, holder = takes[subject][-1]
        turn, place = moves[holder][-1]
        question = f"Where is the unit that holds the lamp of {subject} after the last turn?"
        return question, (place, {take_turn, turn})
    if kind == "last move":
        turn, place = moves[subject][-1]
        return f"Where is {subject} after the last turn?", (place, {turn})
    index = rng.randrange(len(moves[subject]) - 1)
    (turn, place), (next_turn, _) = moves[subject][index : index + 2]
    return f"Where is {subject} after turn {rng.randrange(turn, next_turn)}?", (place, {turn})


def _in_context(names: _Names, size: ConstructedSize, num_documents: int) -> dict[str, Any]:
    """Return a thing to name, and shots that show what the names mean.

    ::

        "The small red iron cup of Ada is a zuvota."     "The huge blue iron bowl of Bob is a kemipa."
        question "What is the tall red glass box of Kim?"    answer: zuvota, as the colour decides

    One attribute decides the label; every label has about as many shots as the others. No other attribute
    would explain all shots and give another answer.
    """
    rng = names.rng
    deciding = rng.choice(list(ATTRIBUTES))
    values = rng.sample(ATTRIBUTES[deciding], size.num_labels)
    label_of = {value: names.label() for value in values}
    asked = rng.choice(values)
    while True:
        shots = [_thing(rng, deciding, values[i % len(values)]) for i in range(num_documents)]
        query = _thing(rng, deciding, asked)
        labels = [label_of[shot[deciding]] for shot in shots]
        if all(_explains(name, shots, labels, query, label_of[asked]) for name in ATTRIBUTES):
            break
    return {
        "question": f"What is the {_describe(query, names.subject)}?",
        "answer": label_of[asked],
        "documents": [
            _document("", [f"The {_describe(shot, names.person())} is a {label}."], shot[deciding] == asked)
            for shot, label in zip(shots, labels, strict=True)
        ],
        "type": f"{num_documents} shots, {size.num_labels} labels",
        "level": f"{deciding} decides",
    }


def _thing(rng: random.Random, deciding: str, value: str) -> dict[str, str]:
    return {name: value if name == deciding else rng.choice(values) for name, values in ATTRIBUTES.items()}


def _describe(thing: dict[str, str], owner: str) -> str:
    return f"{' '.join(thing.values())} of {owner}"


def _explains(
    attribute: str, shots: list[dict[str, str]], labels: list[str], query: dict[str, str], answer: str
) -> bool:
    """Return whether an attribute answers a query rightly or not at all, or contradicts itself."""
    labels_of: dict[str, set[str]] = {}
    for shot, label in zip(shots, labels, strict=True):
        labels_of.setdefault(shot[attribute], set()).add(label)
    is_rule = all(len(found) == 1 for found in labels_of.values())
    return not is_rule or labels_of.get(query[attribute], {answer}) == {answer}


CONSTRUCTED_SETS = {
    "related-passages": ConstructedSet(
        description="chains of people; every link stands in another document, by name or by a description",
        num_documents=24,
        least_documents=lambda size: 2 * (size.num_hops or 4),
        build=_related_passages,
    ),
    "many-blocks": ConstructedSet(
        description="the log of a game, a turn a document; the question asks where a unit is",
        num_documents=300,
        least_documents=lambda size: 24,
        build=_many_blocks,
    ),
    "in-context": ConstructedSet(
        description="shots, one a document, that show what invented labels mean; the question asks for one",
        num_documents=32,
        least_documents=lambda size: size.num_labels,
        build=_in_context,
    ),
}
"""The constructed sets by name."""
