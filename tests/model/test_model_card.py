"""A model card names its base, licence, languages, last loss and scores, and shows how to load the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockft.model.hub import BaseModel, describe_base_model
from blockft.model.model_card import build_model_card

HUB_BASE = BaseModel("owner/base", "owner/base", {"license": "apache-2.0", "language": ["en", "de"]})


def build_card(**settings: Any) -> str:
    defaults: dict[str, Any] = {
        "name": "me/mine",
        "base": HUB_BASE,
        "version": "1",
        "step": 3,
        "recipe": "train: {}\n",
        "manifest": {},
        "metrics": [],
    }
    return build_model_card(**(defaults | settings))


def read_metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_names_the_last_logged_loss_if_there_is_one() -> None:
    lines = [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    for metrics, text in (([], "after 3 steps."), (lines, "after 3 steps; the last logged loss is 0.5000.")):
        assert text in build_card(metrics=metrics)


def test_a_card_names_the_hub_id_licence_and_languages_of_its_base() -> None:
    metadata = read_metadata(build_card())
    assert metadata["base_model"] == "owner/base" and metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en", "de"]
    local = BaseModel("base", None, {})
    assert "base_model" not in read_metadata(build_card(base=local))


def test_the_code_of_a_card_loads_the_model_in_both_modes() -> None:
    card = build_card()
    for code in card.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")
    assert 'Engine.load("me/mine")' in card and '("block", "full")' in card
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card


def test_a_card_shows_odd_names_as_they_are() -> None:
    name, base = 'a"b\n```\\', BaseModel("[x](y)\n# z|`c`", None, {})
    for is_adapter in (False, True):
        card = build_card(name=name, base=base, recipe="x: |\n  ```\n  # no heading\n", is_adapter=is_adapter)
        assert "\n# [x\\](y) # z\\|\\`c\\` for Block-Attention" in card
        assert "````yaml\nx: |\n  ```\n  # no heading\n````" in card
        assert f"Engine.load({json.dumps(name)})" in card
    blocks = build_card(base=base, recipe="{x}: '{y}'\n").split("```yaml\n")
    assert blocks[1].startswith("{x}: '{y}'\n```")


def test_the_card_of_an_adapter_loads_its_base_and_then_the_adapter() -> None:
    card = build_card(is_adapter=True)
    assert read_metadata(card)["library_name"] == "peft"
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in card
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card


def test_a_card_shows_scores_only_if_they_are_given() -> None:
    assert "## Scores\n| a | b |\n" in build_card(scores="| a | b |")
    assert "Scores" not in build_card()


@pytest.mark.parametrize(
    ("readme", "metadata"),
    [
        ("---\nlicense: mit\nlanguage: en\ntags: [x]\n---\n# M\n", {"license": "mit", "language": "en"}),
        ("# no metadata\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\n'unclosed\n---\n", {}),
        (None, {}),
    ],
)
def test_a_local_base_gives_the_licence_and_languages_of_its_card(
    tmp_path: Path, readme: str | None, metadata: dict[str, Any]
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert describe_base_model(str(tmp_path)) == BaseModel(tmp_path.name, None, metadata)


def test_a_folder_of_the_hub_cache_gives_its_hub_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--base" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert describe_base_model(str(snapshot)).hub_id == "owner/base"


def test_a_base_on_the_hub_that_cannot_be_reached_keeps_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_base_model("owner/base") == BaseModel("owner/base", "owner/base", {})
