"""Toy data for tests of whole runs: a tiny model, source files and a recipe that uses them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from blockft.config.recipe import load_recipe
from blockft.config.settings import Recipe
from tests.tiny import SIZE

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer whose tokens are the 256 bytes and the chat markup."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|system|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, **size: float) -> Path:
    """Save a random Llama and its tokenizer; `size` overrides settings of its config."""
    tokenizer = save_tokenizer(folder)
    config = LlamaConfig(
        **(SIZE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | size),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_block_attention(model: Path, **fields: Any) -> Path:
    """Write into the config of a saved model how it was trained, as an export does. Returns its folder."""
    file = model / "config.json"
    config = json.loads(file.read_text()) | {"block_attention": {"version": 1, **fields}}
    file.write_text(json.dumps(config))
    return model


def save_samples(path: Path, num_samples: int, seed: int = 0) -> Path:
    """Write questions whose answer is a digit in one of two to four documents."""
    rng = random.Random(seed)
    lines = []
    for i in range(num_samples):
        names = rng.sample("abcdefgh", rng.randint(2, 4))
        values = [str(rng.randrange(10)) for _ in names]
        answer = rng.randrange(len(names))
        documents = [f"{name}={value}\n" for name, value in zip(names, values, strict=True)]
        content = ["Answer.\n", *documents, f"{names[answer]}?"]
        record: dict[str, Any] = {"id": f"q{i}", "source": "toy", "response": values[answer]}
        record["messages"] = [{"role": "user", "content": content}]
        record["answers"] = [values[answer]]
        record["meta"] = {"documents": list(range(1, len(content) - 1))}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def toy_recipe(folder: Path, *overrides: str, **size: float) -> Recipe:
    """Load the toy recipe of `folder`; make its model (see `save_model`) and sources if they are missing."""
    if not (folder / "model").exists():
        save_model(folder / "model", **size)
        save_samples(folder / "train.jsonl", 40)
        save_samples(folder / "heldout.jsonl", 10, seed=1)
        (folder / "recipe.yaml").write_text(
            f"# a toy run\n"
            f"model: {{path: {folder}/model}}\n"
            f"data:\n"
            f"  output_dir: {folder}/data\n"
            f"  row_len: 128\n"
            f"  num_workers: 1\n"
            f"  sources: [{{format: samples, path: {folder}/train.jsonl}}]\n"
            f"train: {{output_dir: {folder}/run, batch_rows: 4, learning_rate: 1e-2, save_steps: 4}}\n"
            f"eval:\n"
            f"  output_dir: {folder}/eval\n"
            f"  max_new_tokens: 4\n"
            f"  sources: [{{format: samples, path: {folder}/heldout.jsonl}}]\n",
            encoding="utf-8",
        )
    return load_recipe(str(folder / "recipe.yaml"), overrides)
