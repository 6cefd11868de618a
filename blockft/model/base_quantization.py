"""The base model of an adapter that was trained on quantised weights: its record, and its numbers.

::

    base_quantization.json    {"scheme": "nf4", "dtype": "bfloat16"}

The file stands in the folder of the adapter: in an export, and in each checkpoint. `dtype` is the type of the
run, from which the weights were quantised and in which their numbers were used. Readers give the base model
these numbers, in full size.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from blockft.errors import UserError, list_allowed
from blockft.file_content import load_json
from blockft.model.nf4 import round_to_nf4
from blockft.model.nf4_linear import quantized_linears

BASE_QUANTIZATION = "base_quantization.json"

SCHEME = "nf4"
"""The only scheme."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of runs by name."""


def write_base_quantization(adapter: Path, dtype: torch.dtype) -> None:
    """Record in the folder of an adapter that it was trained on quantised weights of this type."""
    record = {"scheme": SCHEME, "dtype": str(dtype).removeprefix("torch.")}
    (adapter / BASE_QUANTIZATION).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_base_quantization(adapter: Path) -> torch.dtype | None:
    """Return the type of the weights that were quantised to train an adapter; None if they were not.

    Raises:
        UserError: the record is malformed.
    """
    path = adapter / BASE_QUANTIZATION
    if not (path.exists() or path.is_symlink()):
        return None
    record = load_json(path)
    if not isinstance(record, dict) or record.keys() != {"scheme", "dtype"} or record["scheme"] != SCHEME:
        raise UserError(f'{path} should hold {{"scheme": "{SCHEME}", "dtype": ...}}: restore the file')
    if record["dtype"] not in [*_DTYPES]:
        raise UserError(f"{path} has dtype {record['dtype']!r} ({list_allowed(record['dtype'], _DTYPES)})")
    return _DTYPES[record["dtype"]]


@torch.no_grad()
def round_linears(model: PreTrainedModel) -> None:
    """Give a model the numbers that a run of its type has after it quantised the weights.

    Raises:
        UserError: a weight cannot be quantised, see `quantize`.
    """
    for name, linear in quantized_linears(model):
        linear.weight.data = round_to_nf4(linear.weight, name)
