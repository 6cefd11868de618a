"""The model card of an export."""

import json
from typing import Any

_CARD = """---
base_model: {base}
library_name: transformers
tags: [block-attention]
---
# {base}, fine-tuned for Block-Attention

The keys and values of a document are computed once and reused in every prompt that contains the document, at
any position (Ma, Wang, Lan: Block-Attention for Efficient Prefilling, ICLR 2025). Plain `transformers` loads
the weights and uses them with full attention. The entry `block_attention` in `config.json` says how the
prompts of training were split into blocks.

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
    """Return the model card in Markdown: the base model, the recipe, the data and the last logged loss.

    manifest  of the prepared data
    metrics   the lines of the run's `metrics.jsonl`
    """
    losses = [line["loss"] for line in metrics if "loss" in line and line["step"] <= step]
    return _CARD.format(
        base=base,
        version=version,
        step=step,
        # a run may stop before its first log
        loss=f"; the last logged loss is {losses[-1]:.4f}" if losses else "",
        recipe=recipe,
        manifest=json.dumps(manifest, indent=2),
    )
