"""The model card of an export."""

import json
from typing import Any

_CARD = """---
base_model: {base}
library_name: transformers
tags: [block-attention]
---
# {base}, fine-tuned for Block-Attention

Every document of a prompt can be encoded once and its keys and values reused in any other prompt, wherever
the document stands there (Ma, Wang, Lan: Block-Attention for Efficient Prefilling, ICLR 2025). The weights
are ordinary: plain `transformers` loads them and attends fully. The entry `block_attention` in `config.json`
says how prompts were cut into blocks.

Written by blockft {version} after {step} steps{loss}.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("...")      # full attention
```
```sh
blockft generate ... --input prompts.jsonl               # block attention
```

## Recipe
```yaml
{recipe}```

## Data
```json
{manifest}
```
"""


def build_model_card(
    *,
    base: str,
    version: str,
    step: int,
    recipe: str,
    manifest: dict[str, Any],
    metrics: list[dict[str, Any]],
) -> str:
    """Markdown that says what the weights are, and how and from what they were made."""
    losses = [line["loss"] for line in metrics if "loss" in line and line["step"] <= step]
    return _CARD.format(
        base=base,
        version=version,
        step=step,
        loss=f"; the last logged loss is {losses[-1]:.4f}" if losses else "",  # a run may stop before one is
        recipe=recipe,
        manifest=json.dumps(manifest, indent=2),
    )
