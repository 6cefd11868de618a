"""The model card (README.md) of an export."""

import json
from typing import Any

import yaml

from blockft.markdown import code_block, escape_markdown
from blockft.model.hub import BaseModel
from blockft.units import format_count

_CARD = """---
{metadata}---
# {title}

{base}, fine-tuned for Block-Attention (Ma, Wang, Lan: Block-Attention for Efficient Prefilling, ICLR 2025).
Written by blockft {version} after {steps}{loss}.{quantization}

The keys and values of each document of a prompt can be computed once and reused in every prompt that contains
the document, at any position. The weights have the usual format: without blockft, the model attends fully.
The entry `block_attention` of `{config_file}` says how prompts are split into blocks.{sees_first}

## Usage
With blockft, in both modes. In block mode the second prompt with a document reuses its keys and values:
```python
from blockft import Engine

{request}
with Engine.load({name}) as engine:
    for mode in ("block", "full"):
        answer = engine.generate({arguments}, mode=mode)
        print(mode, answer.text)
```
With {library}, in full mode:
```python
{loading_code}
```
{scores}
## Recipe
{recipe}

## Data
{manifest}
"""

_DOCUMENTS = (
    'documents = ["Oslo is the capital of Norway.", "Bergen is a city on the west coast of Norway."]',
    'documents=documents, question="What is the capital of Norway?"',
)
_BLOCKS = (
    'blocks = ["Oslo is the capital of Norway.\\n\\n", "What is the capital of Norway?"]',
    'messages=[{"role": "user", "content": blocks}]',
)
"""The prompt of the usage example and the arguments of `generate`, with or without a wording of documents."""

_SEES_FIRST = """

Each document also attends to the first block of its prompt (the instruction). Its keys and values can be
reused in prompts that start with the same block."""
"""What the card says about a model whose local blocks see the first block."""

_LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})"""

_QUANTIZED_MODEL = """

The adapter was trained on weights that were quantised to 4 bits (NF4 with double quantisation). It is merged
into the numbers that it was trained on: the weights here are those of the quantised model, in full size."""

_QUANTIZED_ADAPTER = """

The adapter was trained on weights that were quantised to 4 bits (NF4 with double quantisation). blockft reads
`base_quantization.json` and gives the base model these numbers, in full size. Other software must quantise
the base model as the code below does; the numbers then differ in the rounding of a few scales."""
"""What the card says about a run on quantised weights."""

_LOAD_QUANTIZED = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
base = AutoModelForCausalLM.from_pretrained({base}, quantization_config=quantization)
model = PeftModel.from_pretrained(base, {name})
tokenizer = AutoTokenizer.from_pretrained({name})"""

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {name})
tokenizer = AutoTokenizer.from_pretrained({name})"""


def build_model_card(
    *,
    name: str,
    base: BaseModel,
    version: str,
    step: int,
    recipe: str,
    manifest: dict[str, Any],
    metrics: list[dict[str, Any]],
    is_adapter: bool = False,
    is_quantized: bool = False,
    has_wording: bool = True,
    local_sees_first: bool = False,
    scores: str = "",
) -> str:
    """Return the Markdown of a model card: metadata, loading code, scores, recipe and data manifest.

    Args:
        name: the name or Hub id under which the loading code opens the model.
        base: the model that was fine-tuned.
        version: of blockft.
        step: number of optimizer steps of the exported checkpoint.
        recipe: the run's recipe, as YAML.
        manifest: of the prepared data.
        metrics: lines of the run's metrics; the last loss up to `step` is named.
        is_adapter: the folder holds an adapter without its base model.
        is_quantized: the adapter was trained on quantised weights.
        has_wording: the export records the wording of prompts over documents.
        local_sees_first: the model was trained so that every block sees the first block of its prompt.
        scores: Markdown with the scores of an evaluation.
    """
    metadata: dict[str, Any] = {"base_model": base.hub_id} if base.hub_id else {}
    metadata |= {"library_name": "peft" if is_adapter else "transformers", **base.metadata}
    metadata |= {"pipeline_tag": "text-generation", "tags": ["block-attention"]}
    losses = [line["loss"] for line in metrics if "loss" in line and line["step"] <= step]
    loading_code, quantization = _LOAD_MODEL, _QUANTIZED_MODEL if is_quantized else ""
    if is_adapter:
        loading_code = _LOAD_QUANTIZED if is_quantized else _LOAD_ADAPTER
        quantization = _QUANTIZED_ADAPTER if is_quantized else ""
    request, arguments = _DOCUMENTS if has_wording else _BLOCKS
    return _CARD.format(
        request=request,
        arguments=arguments,
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=f"{escape_markdown(base.name)} for Block-Attention" + (" (adapter)" if is_adapter else ""),
        base=escape_markdown(base.name),
        name=json.dumps(name),
        version=version,
        steps=format_count(step, "step"),
        # a run may stop before it logs a loss
        loss=f"; the last logged loss is {losses[-1]:.4f}" if losses else "",
        sees_first=_SEES_FIRST if local_sees_first else "",
        quantization=quantization,
        config_file="block_attention.json" if is_adapter else "config.json",
        library="peft" if is_adapter else "transformers",
        loading_code=loading_code.format(name=json.dumps(name), base=json.dumps(base.name)),
        scores=f"\n## Scores\n{scores.strip()}\n" if scores else "",
        recipe=code_block(recipe, "yaml"),
        manifest=code_block(json.dumps(manifest, indent=2), "json"),
    )
