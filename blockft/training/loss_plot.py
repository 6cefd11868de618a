"""The plot of a run's losses."""

from pathlib import Path
from typing import Any

from blockft.outputs import plain_label, save_figure
from blockft.run_folder import LOSS_PLOT, read_metrics
from blockft.training.objectives import EVAL_LOSS_PREFIX

_STYLES: dict[str, dict[str, Any]] = {
    f"{EVAL_LOSS_PREFIX}block": {"color": "tab:blue"},
    f"{EVAL_LOSS_PREFIX}full": {"color": "tab:orange"},
    "loss": {"color": "tab:gray"},
    "loss_block": {"color": "tab:blue", "linewidth": 0.8, "alpha": 0.5},
    "loss_full": {"color": "tab:orange", "linewidth": 0.8, "alpha": 0.5},
}
"""The losses of the plot and their lines; the modes have the same colours as in reports."""


def save_loss_plot(run: Path, title: str) -> Path:
    """Draw the losses in the metrics of a run, write them to `loss.png` in its folder and return the path."""
    save_figure(draw_losses(read_metrics(run), title), run / LOSS_PLOT)
    return run / LOSS_PLOT


def draw_losses(metrics: list[dict[str, Any]], title: str) -> Any:
    """Return a matplotlib figure of the training and evaluation losses by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for line in metrics for name in line if name in _STYLES))
    if not {"loss_block", "loss_full"} <= set(names):  # the loss of the only mode is that of the run
        names = [name for name in names if name not in ("loss_block", "loss_full")]
    for name in names:
        steps, losses = zip(*((line["step"], line[name]) for line in metrics if name in line), strict=True)
        is_sparse = len(steps) < 20  # a single point would be invisible without a marker
        axes.plot(
            steps,
            losses,
            label=_describe_loss(name),
            marker="o" if is_sparse else None,
            markersize=4,
            **_STYLES[name],
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimizer step", ylabel="mean loss per label token", title=plain_label(title))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def _describe_loss(name: str) -> str:
    if name.startswith(EVAL_LOSS_PREFIX):
        return f"held-out examples, {name.removeprefix(EVAL_LOSS_PREFIX)} mode"
    return "training" if name == "loss" else f"training, {name.removeprefix('loss_')} mode"
