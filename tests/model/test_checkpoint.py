"""Which checkpoints of a run are complete, which one is the best, and which are removed."""

from pathlib import Path

from blockft.model.checkpoint import best_checkpoint, complete_checkpoints, mark_complete, remove_incomplete


def save_checkpoint(run: Path, step: int, **eval_losses: float) -> Path:
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir()
    mark_complete(
        checkpoint, step=step, run_signature={}, eval_losses=eval_losses, eval_due=False, unlogged={}
    )
    return checkpoint


def test_the_best_checkpoint_has_the_lowest_loss_of_block_mode(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1, full=0.1, block=0.9)
    best = save_checkpoint(tmp_path, 2, full=0.5, block=0.6)
    save_checkpoint(tmp_path, 3)
    assert best_checkpoint(tmp_path) == best


def test_the_best_checkpoint_has_the_lowest_loss_of_the_only_mode(tmp_path: Path) -> None:
    best = save_checkpoint(tmp_path, 1, full=0.1)
    save_checkpoint(tmp_path, 2, full=0.2)
    assert best_checkpoint(tmp_path) == best


def test_only_incomplete_checkpoints_are_removed(tmp_path: Path) -> None:
    complete = save_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-4" / "global_step4").mkdir(parents=True)
    (tmp_path / "checkpoint-4" / "global_step4" / "shard.pt").touch()
    (tmp_path / "checkpoint-mine").mkdir()
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-mine"]
    assert complete_checkpoints(tmp_path) == [complete]
