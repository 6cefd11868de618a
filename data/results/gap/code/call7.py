"""Third round, all data, learning rate 1e-4: seeds, both modes in one step, a second reading, recomputation.

The calls chose from this list by name (`--only`), the later ones by the results of the earlier ones.
"""

from dataclasses import replace

from call2_card0 import FIRST
from call3_card0 import ALL
from call3_card1 import FULL_MODE
from experiments import BLOCK_MODE, BOTH_MODES, Evaluation, Experiment, block, full
from objectives import Objective
from prompts import NUM_DOCUMENTS, PromptOptions

LOW = {"learning_rate": 1e-4, **ALL}
OPTIONS = PromptOptions(private_prefix=-1)
TEACHES = Objective(distill=0.3, teacher="self")


def with_seed(name: str, seed: int) -> str:
    return f"{name}-seed{seed}" if seed else name


def twice(mode: str, options: PromptOptions) -> dict[str, Evaluation]:
    """Second readings of all documents and of the three that are read most."""
    return {
        f"{mode}, sorted": Evaluation(mode=mode, prompt_options=options, best=NUM_DOCUMENTS),
        f"{mode}, best 3": Evaluation(mode=mode, prompt_options=options, best=3),
    }


def asked(name: str, description: str, weights: str, evaluations: dict[str, Evaluation]) -> Experiment:
    return Experiment(
        name=name, description=description, training=None, weights=weights, evaluations=evaluations
    )


RECOMPUTED = {
    f"{choice} {100 * share:.0f} %": Evaluation(
        mode="block", prompt_options=OPTIONS, recomputed=share, choice=choice
    )
    for share in (0.1, 0.2)
    for choice in ("first", "changed")
}
FIRST_RECOMPUTED = {
    f"first {100 * share:.0f} %": Evaluation(mode="block", prompt_options=OPTIONS, recomputed=share)
    for share in (0.05, 0.1, 0.2)
}

QUEUE = []
for seed in (0, 1, 2, 3):
    recipes = {
        "first-block-1e-4": ("documents see the tokens before them", {}),
        "first-block-5e-5": ("documents see the tokens before them", {"learning_rate": 5e-5}),
        "first-block-dropout-1e-4": (
            "documents see the tokens before them, dropout 0.1",
            {"dropout": 0.1},
        ),
        "first-block-75-1e-4": (
            "documents see the tokens before them, three quarters of the draws in block mode",
            {"modes": "some-block", "share": 0.75, "extra_len": 12_288},
        ),
        "first-block-dual-1e-4": (
            "documents see the tokens before them, each draw in both modes, own full mode teaches, 0.3",
            {"modes": "dual", "objective": TEACHES, "extra_len": 12_288},
        ),
        "first-block-dual-no-teacher-1e-4": (
            "documents see the tokens before them, each draw in both modes",
            {"modes": "dual", "extra_len": 12_288},
        ),
        "first-block-dual-500-1e-4": (
            "documents see the tokens before them, each draw in both modes, teacher 0.3, 500 steps",
            {"modes": "dual", "objective": TEACHES, "steps": 500, "extra_len": 12_288},
        ),
        "first-block-links-1e-4": (
            "documents see the tokens before them, 4 link tokens",
            {"prompt_options": PromptOptions(private_prefix=-1, link_tokens=4)},
        ),
        "first-block-recomputed-1e-4": (
            "documents see the tokens before them, 0, 5, 10 or 20 % of the context computed once more",
            {"recomputed": (0.0, 0.05, 0.1, 0.2), "extra_len": 12_288},
        ),
        "first-block-ranking-1e-4": (
            "documents see the tokens before them, ranking loss 0.2 in layers 21 to 23",
            {"objective": Objective(ranking_weight=0.2, ranking_layers=(21, 22, 23))},
        ),
    }
    for name, (description, changes) in recipes.items():
        settings = {**FIRST, **LOW, "seed": seed, **changes}
        experiment = block(
            with_seed(name, seed), f"{description}, seed {seed}", keep_weights=True, **settings
        )
        if "recomputed" in changes:
            modes = BLOCK_MODE if seed else BOTH_MODES
            experiment = replace(experiment, evaluations={**modes, **FIRST_RECOMPUTED})
        QUEUE.append(experiment)
        if changes.get("prompt_options", OPTIONS) == OPTIONS:
            own = with_seed(name, seed)
            QUEUE.append(asked(f"{own}-twice", f"{own}, a second reading", own, twice("block", OPTIONS)))
    fulls = {
        "full-1e-4": ("full", {}),
        "full-5e-5": ("full", {"learning_rate": 5e-5}),
        "full-dropout-1e-4": ("full, dropout 0.1", {"dropout": 0.1}),
        "full-2000-1e-4": ("full, 2,000 steps", {"steps": 2000}),
    }
    for name, (description, changes) in fulls.items():
        settings = {**LOW, "seed": seed, **changes}
        own = with_seed(name, seed)
        baseline = full(own, f"{description}, seed {seed}", keep_weights=True, **settings)
        QUEUE.append(replace(baseline, evaluations=FULL_MODE))
        evaluations = twice("full", PromptOptions())
        QUEUE.append(asked(f"{own}-twice", f"{own}, a second reading", own, evaluations))
    own = with_seed("first-block-1e-4", seed)
    QUEUE.append(asked(f"{own}-recomputation", f"{own}, context tokens computed once more", own, RECOMPUTED))
for name, mode, options in (
    ("first-block-1e-4", "block", OPTIONS),
    ("first-block-dual-1e-4", "block", OPTIONS),
    ("first-block-recomputed-1e-4", "block", OPTIONS),
    ("full-1e-4", "full", PromptOptions()),
):
    for seeds in ((1, 2), (0, 1), (0, 1, 2), (1, 2, 3)):
        names = [with_seed(name, seed) for seed in seeds]
        modes = BOTH_MODES if mode == "block" else FULL_MODE
        own = f"{name}-average-{''.join(map(str, seeds))}"
        asked_in = {m: replace(e, prompt_options=options) for m, e in modes.items()}
        if "recomputed" in name:
            asked_in = {**asked_in, **FIRST_RECOMPUTED}
        QUEUE.append(
            asked(
                own,
                f"mean weights of {' and '.join(names)}",
                " + ".join(names),
                asked_in,
            )
        )
assert len({e.name for e in QUEUE}) == len(QUEUE)
