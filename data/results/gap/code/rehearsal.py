"""Every kind of experiment once, for a try at toy size."""

from experiments import Evaluation, Experiment, block, full
from objectives import Objective
from prompts import PromptOptions, Sharing

QUEUE = [
    full("full", "", keep_weights=True),
    Experiment(
        name="asked",
        description="",
        training=None,
        weights="full",
        evaluations={
            "local": Evaluation(mode="block", prompt_options=PromptOptions(reencoded=False)),
            "prefix": Evaluation(mode="block", prompt_options=PromptOptions(private_prefix=4)),
            "hidden": Evaluation(mode="block", prompt_options=PromptOptions(hidden_first=2)),
        },
    ),
    block("both", ""),
    block("prefix", "", prompt_options=PromptOptions(private_prefix=-1)),
    block("sink-link", "", prompt_options=PromptOptions(sink_tokens=2, link_tokens=3)),
    block("twice", "", prompt_options=PromptOptions(question_twice=True, min_documents=3)),
    block("ranking", "", objective=Objective(ranking_weight=0.3)),
    block("lm", "", objective=Objective(question_weight=0.1, document_weight=0.1)),
    block("distill", "", teacher="full", objective=Objective(distill=0.5)),
    block(
        "distill-all",
        "",
        teacher="full",
        objective=Objective(distill=0.5, distill_question=0.5, hidden_weight=0.1),
    ),
    block("self", "", modes="block", objective=Objective(distill=0.5, teacher="self")),
    block("raised", "", teacher="full", objective=Objective(raised_weight=1.0)),
    block("curriculum", "", modes="full-then-both", join=0.8),
    block("go-on", "", init="full", modes="block"),
    block("shared", "", sharing=Sharing(num_questions=4, num_clozes=2, by_lot=0.5), more_data=True),
    full(
        "full-shared", "", sharing=Sharing(num_questions=4, num_clozes=2), more_data=True, keep_weights=True
    ),
    block(
        "dual",
        "",
        modes="dual",
        sharing=Sharing(num_questions=4),
        prompt_options=PromptOptions(private_prefix=-1),
        extra_len=2048,
        objective=Objective(distill=0.3, teacher="self"),
    ),
    Experiment(
        name="averaged",
        description="",
        training=None,
        weights="full + full-shared",
        evaluations={"block": Evaluation(mode="block", prompt_options=PromptOptions())},
    ),
]
