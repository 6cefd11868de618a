"""The protocol's confirmation: the baseline and the candidates for a winner, three seeds each, all data, 1e-4.

Run it with `driver.py confirmation --only NAMES --sealed FILE --opened RECORD`: the names choose the winner.
"""

from dataclasses import replace

from call3_card1 import FULL_MODE
from call7 import QUEUE as THIRD_ROUND
from call8 import QUEUE as FOURTH_ROUND
from experiments import BOTH_MODES, block
from call7 import LOW

RECIPES = ("first-block-1e-4", "first-block-ranking-1e-4", "first-block-recomputed-1e-4", "full-1e-4")

by_name = {e.name: e for e in (*THIRD_ROUND, *FOURTH_ROUND) if e.training}
QUEUE = []
for seed in (0, 1, 2):
    QUEUE.append(block(f"sealed-both-1e-4-seed{seed}", f"both modes, seed {seed}", seed=seed, **LOW))
    for recipe in RECIPES:
        experiment = by_name[f"{recipe}-seed{seed}" if seed else recipe]
        evaluations = FULL_MODE if recipe.startswith("full") else BOTH_MODES
        QUEUE.append(
            replace(
                experiment,
                name=f"sealed-{recipe}-seed{seed}",
                evaluations=evaluations,
                keep_weights=False,
            )
        )
