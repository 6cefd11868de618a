"""The loss plot has the name of its run, whole steps and one labelled line per loss."""

from blockft.training.loss_plot import draw_losses


def test_the_plot_shows_title_whole_steps_and_labels_in_words() -> None:
    metrics = [
        {"step": 0, "eval_loss_block": 3.0, "eval_loss_full": 2.5},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss_block": 1.5, "eval_loss_full": 1.25},
    ]
    (axes,) = draw_losses(metrics, "demo/run").axes
    assert axes.get_title() == "demo/run" and axes.get_xlabel() == "optimizer step"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["held-out examples, block mode", "held-out examples, full mode", "training"]
    assert list(axes.lines[2].get_ydata()) == [2.0, 1.0]


def test_a_run_that_logged_nothing_has_an_empty_plot() -> None:
    (axes,) = draw_losses([], "demo/run").axes
    assert not axes.lines and axes.get_legend() is None
