"""The loss plot has the name of its run, whole steps and one labelled line per loss."""

from blockft.training.loss_plot import draw_losses


def test_the_plot_shows_title_whole_steps_and_labels_in_words() -> None:
    metrics = [
        {"step": 0, "eval_loss_block": 3.0, "eval_loss_full": 2.5},
        {"step": 1, "loss": 2.0, "loss_block": 2.5, "loss_full": 1.5, "loss_source_0": 2.0},
        {"step": 2, "loss": 1.0, "loss_block": 1.25, "loss_full": 0.75, "loss_source_0": 1.0},
        {"step": 2, "eval_loss_block": 1.5, "eval_loss_full": 1.25},
    ]
    (axes,) = draw_losses(metrics, "demo/run").axes
    assert axes.get_title() == "demo/run" and axes.get_xlabel() == "optimizer step"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    modes = [
        f"{kind}, {mode} mode" for kind in ("held-out examples", "training") for mode in ("block", "full")
    ]
    assert labels == [*modes[:2], "training", *modes[2:]]
    assert [list(line.get_ydata()) for line in axes.lines[2:]] == [[2.0, 1.0], [2.5, 1.25], [1.5, 0.75]]


def test_a_run_in_one_mode_has_one_line_of_training() -> None:
    (axes,) = draw_losses([{"step": 1, "loss": 2.0, "loss_full": 2.0}], "demo/run").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training"]


def test_a_run_that_logged_nothing_has_an_empty_plot() -> None:
    (axes,) = draw_losses([], "demo/run").axes
    assert not axes.lines and axes.get_legend() is None
