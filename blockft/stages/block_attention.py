"""The entry `block_attention` of a model: how the run that trained it splits prompts into blocks."""

from collections.abc import Mapping
from typing import Any

from blockft.config.settings import DataSettings
from blockft.stages.source_settings import sees_first_block


def build_block_attention(data: DataSettings, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a run with these settings on the prepared data of this manifest.

    It has the wording of prompts over documents only if the prepared data held prompts of that wording. Chats
    and data with marked blocks have a wording of their own.
    """
    entry = {
        "version": 1,
        "position_scheme": data.positions.value,
        "sink_tokens": 0,
        "local_sees_first": sees_first_block(data),
    }
    if not any(source["has_questions"] for source in manifest["sources"] if source["kept"]):
        return entry
    options = manifest["options"]
    return entry | {
        "documents_in": options["prompt"]["documents_in"],
        "order": options["order"],
        "prompt": {name: options["prompt"][name] for name in ("instruction", "document", "question")},
    }
