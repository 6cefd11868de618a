"""All data, learning rate 1e-4: documents that overlap in position, the first block seen, clozes, seeds, averages.

The call chose from this list by name (`--only`), the later ones by the results of the earlier ones.
"""

from dataclasses import replace

from call2_card0 import FIRST
from call3_card0 import ALL
from call3_card1 import FULL_MODE
from experiments import BOTH_MODES, Experiment, block, full
from prompts import PromptOptions, Sharing

LOW = {"learning_rate": 1e-4, **ALL}
CLOZE = {"sharing": Sharing(num_questions=1, num_clozes=6, cloze_weight=1.0)}
STRIDE = 16

BLOCKS = {
    "both": ("both modes", {}),
    "first-block": ("documents see the tokens before them", FIRST),
    "stride": (
        "documents overlap in position, stride 16",
        {"prompt_options": PromptOptions(document_stride=STRIDE)},
    ),
    "stride-0": ("documents end at the same position", {"prompt_options": PromptOptions(document_stride=0)}),
    "stride-64": ("documents overlap, stride 64", {"prompt_options": PromptOptions(document_stride=64)}),
    "first-block-stride": (
        "documents see the tokens before them and overlap in position, stride 16",
        {"prompt_options": PromptOptions(private_prefix=-1, document_stride=STRIDE), "extra_len": 9216},
    ),
}

QUEUE = []
for cloze, words, changes in (("", "", {}), ("-cloze", ", 6 clozes a prompt", CLOZE)):
    for seed in (0, 1, 2):
        suffix = f"{cloze}-1e-4" + (f"-seed{seed}" if seed else "")
        for name, (description, options) in BLOCKS.items():
            QUEUE.append(
                block(
                    f"{name}{suffix}",
                    f"{description}{words}, learning rate 1e-4, seed {seed}",
                    seed=seed,
                    keep_weights=True,
                    **options,
                    **changes,
                    **LOW,
                )
            )
        baseline = full(
            f"full{suffix}",
            f"full{words}, learning rate 1e-4, seed {seed}",
            seed=seed,
            keep_weights=True,
            **changes,
            **LOW,
        )
        QUEUE.append(replace(baseline, evaluations=FULL_MODE))
    for name, (description, options) in {**BLOCKS, "full": ("full", {})}.items():
        for seeds in ((1, 2), (0, 1), (0, 1, 2)):
            names = [f"{name}{cloze}-1e-4" + (f"-seed{seed}" if seed else "") for seed in seeds]
            asked_in = options.get("prompt_options", PromptOptions())
            evaluations = FULL_MODE if name == "full" else BOTH_MODES
            QUEUE.append(
                Experiment(
                    name=f"{name}{cloze}-1e-4-average-{''.join(map(str, seeds))}",
                    description=f"mean weights of {' and '.join(names)}",
                    training=None,
                    weights=" + ".join(names),
                    evaluations={m: replace(e, prompt_options=asked_in) for m, e in evaluations.items()},
                )
            )
