"""Writes the constructed set `related-passages` in the layout of HotpotQA: related_passages.py OUT.json

It uses the package as it is, not commit 53ce5e5. 60 questions each of two, three and four hops, over ten
documents; the type says how many hops a question has and whether people are named or described.
"""

import json
import sys
from pathlib import Path

from blockft.data.constructed import ConstructedSize, read_constructed

PER_HOPS, FIRST = 60, 500_000
NUM_DOCUMENTS = 10


def main(out: Path) -> None:
    records = []
    for num_hops in (2, 3, 4):
        size = ConstructedSize(num_documents=NUM_DOCUMENTS, num_hops=num_hops, num_labels=8)
        placed = read_constructed("related-passages", size, FIRST + num_hops * PER_HOPS)
        for _, (_, record) in zip(range(PER_HOPS), placed, strict=False):
            assert len(record["documents"]) == NUM_DOCUMENTS
            records.append(
                {
                    "_id": record["id"],
                    "question": record["question"],
                    "answer": record["answer"],
                    "type": record["type"],
                    "level": "",
                    "context": [[d["title"], [d["text"]]] for d in record["documents"]],
                    "supporting_facts": [[d["title"], 0] for d in record["documents"] if d["is_supporting"]],
                }
            )
    out.write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
