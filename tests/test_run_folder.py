"""The metrics of a run that was interrupted hold no line twice after it is resumed."""

from pathlib import Path

from blockft.run_folder import METRICS, read_metrics, truncate_metrics


def test_truncated_metrics_hold_no_line_that_a_resumed_run_logs_again(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 0.1}', '{"step": 1, "eval_loss_block": 0.2}', '{"step": 2, "loss": 0.3}']
    for eval_due, num_kept in ((False, 2), (True, 1)):
        (tmp_path / METRICS).write_text("\n".join([*lines, '{"step": 3, "lo']))
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 1, 2], "the last line is incomplete"
        truncate_metrics(tmp_path, last_step=1, eval_due=eval_due)
        assert (tmp_path / METRICS).read_text().splitlines() == lines[:num_kept]
