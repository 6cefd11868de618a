"""A resumed run holds no metrics twice, and damage of a run's own files is one sentence."""

from pathlib import Path

import pytest

from blockft.errors import UserError
from blockft.run_folder import (
    DATA,
    METRICS,
    RECIPE,
    SAMPLE_ANSWERS,
    append_lines,
    digest_metrics,
    read_data,
    read_metrics,
    read_recipe,
    read_sample_answers,
    truncate_metrics,
    verify_metrics,
    write_data,
    write_recipe,
)


def test_truncated_metrics_hold_only_the_lines_of_the_checkpoint(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 0.1}\n', '{"step": 1, "eval_loss_block": 0.2}\n', '{"step": 2, "lo']
    (tmp_path / METRICS).write_text(lines[0])
    (tmp_path / SAMPLE_ANSWERS).write_text(lines[0])
    counted = digest_metrics(tmp_path)
    (tmp_path / METRICS).write_text("".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 1], "the last line is incomplete"
    assert [line["loss"] for line in read_metrics(tmp_path, counted["bytes"])] == [0.1]
    (tmp_path / SAMPLE_ANSWERS).write_text(lines[0] + lines[2])
    assert len(read_sample_answers(tmp_path)) == 1
    truncate_metrics(tmp_path, counted)
    assert (tmp_path / METRICS).read_text() == (tmp_path / SAMPLE_ANSWERS).read_text() == lines[0]
    verify_metrics(tmp_path, counted)
    (tmp_path / METRICS).unlink()
    (tmp_path / SAMPLE_ANSWERS).unlink()
    truncate_metrics(tmp_path, counted)
    assert (tmp_path / METRICS).read_text() == "" and not (tmp_path / SAMPLE_ANSWERS).exists()
    (tmp_path / SAMPLE_ANSWERS).write_text(lines[0])
    truncate_metrics(tmp_path, None)
    assert not (tmp_path / SAMPLE_ANSWERS).exists()


def test_any_text_can_be_appended_and_is_read_again(tmp_path: Path) -> None:
    records = [{"step": 1, "answer": "é\n\u2028\ud800"}, {"step": 2, "answer": "x" * 100_000}]
    append_lines(tmp_path / SAMPLE_ANSWERS, records[:1])
    append_lines(tmp_path / SAMPLE_ANSWERS, records[1:])
    assert read_sample_answers(tmp_path) == records


@pytest.mark.parametrize("text", ["a: 1\n", "a: x\u2028y\n\nb: 2\n", ""])
def test_a_recipe_is_read_as_it_was_written(text: str, tmp_path: Path) -> None:
    write_recipe(tmp_path, text)
    assert read_recipe(tmp_path) == text


def test_a_changed_recipe_is_refused_unless_it_says_that_it_was_edited(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a: 1\nb: 2\n")
    content = (tmp_path / RECIPE).read_bytes()
    for index in range(len(content)):
        for changed in (
            content[:index],
            content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :],
        ):
            (tmp_path / RECIPE).write_bytes(changed)
            with pytest.raises(UserError, match="recipe.yaml"):
                read_recipe(tmp_path)
    (tmp_path / RECIPE).write_text("a: 3\n# edited\n")
    assert read_recipe(tmp_path) == "a: 3\n"


def test_changed_data_of_a_run_is_refused(tmp_path: Path) -> None:
    write_data(tmp_path, {"num_samples": 3, "sources": {1: "é"}})
    assert read_data(tmp_path) == {"num_samples": 3, "sources": {"1": "é"}}
    (tmp_path / DATA).write_text((tmp_path / DATA).read_text().replace("3", "4"))
    with pytest.raises(UserError, match="data.json has changed"):
        read_data(tmp_path)


def test_metrics_must_begin_with_those_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "loss": 0.5}\n')
    expected = digest_metrics(tmp_path)
    path.write_text(path.read_text() + '{"step": 2, "lo')
    verify_metrics(tmp_path, expected)
    path.write_text('{"step": 1, "loss": 0.4}\n')
    with pytest.raises(UserError, match="metrics.jsonl has changed.*remove it to go on"):
        verify_metrics(tmp_path, expected)
    path.unlink()
    verify_metrics(tmp_path, expected)
    assert "metrics of earlier steps are not known" in capsys.readouterr().err
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "\x00\x00", '{"step": "one"}', "[" * 100_000])
def test_a_damaged_line_of_the_metrics_is_one_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)
