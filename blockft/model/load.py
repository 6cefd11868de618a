"""Load models, configurations and tokenizers from folders and from the Hub."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from blockft.attention.backends import BACKENDS
from blockft.digest import digest_files, digest_json, digest_names
from blockft.errors import UserError, first_line, list_allowed
from blockft.file_content import check_content, load_json
from blockft.hub_access import check_hub
from blockft.inputs import read_text
from blockft.model.base_quantization import read_base_quantization, round_linears
from blockft.model.checkpoint import MARKER
from blockft.model.decoder_layers import restore_frequencies
from blockft.model.fill_weights import draw_model, read_model
from blockft.model.lora import merge_adapter
from blockft.model.model_files import verify_base_weights, verify_model_files
from blockft.model.supported import (
    block_attention_config,
    check_settings,
    check_special_ids,
    check_supported,
    check_vocabulary,
)
from blockft.model.weights import StoredTensor, check_weights, digest_weights, error_prefix, find_file
from blockft.progress import is_enabled
from blockft.run_folder import RECIPE

BLOCK_ATTENTION = "block_attention.json"
"""The file of an adapter with the entry `block_attention`, because an adapter has no config.json."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder the folder of an adapter."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer that are read and never empty."""

OLD_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt")
"""Files that are read only if there is no tokenizer.json."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types in which weights can be loaded, by name."""

Auto = TypeVar("Auto")  # the result for "auto"
Result = TypeVar("Result")

for _name, _backend in BACKENDS.items():
    AttentionInterface.register(_name, _backend)
if not is_enabled():
    disable_progress_bar()


def parse_dtype(name: str, auto: Auto) -> torch.dtype | Auto:
    """Return the type with this name, or the value of `auto` for the name "auto".

    Raises:
        UserError: weights cannot have this type.
    """
    if name not in ("auto", *DTYPES):
        raise UserError(f"dtype is {name!r} ({list_allowed(name, ('auto', *DTYPES))})")
    return auto if name == "auto" else DTYPES[name]


def parse_device(name: str | None) -> torch.device:
    """Return the device with this name, such as cpu or cuda:1. None is the GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # RuntimeError: an unknown name or index; AssertionError: a build of PyTorch without GPUs
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r}: {first_line(error)}") from error


def load_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a folder or Hub id; for an adapter, that of its base model.

    Code in the folder or repository is never run: the model is that of transformers for its model type.

    Raises:
        UserError: there is no such model; its configuration is malformed or contradicts itself; it is not
            supported, see `blockft.model.supported`.
    """
    base = adapter_base_model(path)
    model_path, model_revision = base or (path, revision)
    _check_path(model_path, model_revision)
    verify_model_files(model_path, model_revision, weights=False)
    if file := _find_config(model_path, model_revision):
        check_settings(load_json(file), model_path)
    config = _open(AutoConfig, model_path, model_revision)
    # the file may name an attention function on the Hub, which is code
    config._attn_implementation = None
    if base and (entry := Path(path) / BLOCK_ATTENTION).is_file():
        config.block_attention = load_json(entry)
        # errors about the entry should name the adapter, not the base
        config.name_or_path = path
    check_supported(config)
    check_special_ids(config, config.vocab_size, f"{model_path}: its config.json")
    block_attention_config(config)
    # transformers finds most contradictions between settings only when it builds the model
    _call(model_path, build_meta_model, config)
    return config


def write_adapter_block_attention(folder: Path, entry: Mapping[str, Any]) -> None:
    """Write the entry `block_attention` into the folder of an adapter, where `load_config` reads it."""
    (folder / BLOCK_ATTENTION).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def build_meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration without memory for its weights."""
    # `AutoModelForCausalLM.from_config` would shard the model while ZeRO-3 is enabled
    with torch.device("meta"):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config))  # type: ignore
    return model


def adapter_base_model(path: str) -> tuple[str, str | None] | None:
    """Return the base model and revision of the adapter in a folder, or None if the folder has no adapter.

    Raises:
        UserError: the adapter is damaged, or its configuration does not name a model without adapters.
    """
    adapter = Path(path) / ADAPTER_CONFIG
    if not adapter.is_file():
        return None
    verify_model_files(path, weights=True)
    with error_prefix(f"{adapter} is not the configuration of an adapter: "):
        settings = load_json(adapter)
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        revision = settings.get("revision") if base else None
        if not (isinstance(base, str) and base) or not isinstance(revision, str | None):
            raise UserError("it should name its base model (base_model_name_or_path, and maybe a revision)")
        if (Path(base) / ADAPTER_CONFIG).is_file():
            raise UserError(f"its base model {base} is itself an adapter: merge that one first")
        return base, revision


def verify_model(path: str, revision: str | None = None) -> None:
    """Check the weights of a model with digests, and of the base model of an adapter, before they are read.

    Raises:
        UserError: a file is damaged or missing, or was added.
    """
    verify_model_files(*(adapter_base_model(path) or (path, revision)), weights=True)


def digest_base_weights(path: str, revision: str | None = None) -> str:
    """Return a digest of the files with a model's weights; for an adapter, of its base model's and its own.

    Raises:
        UserError: there are no weights.
    """
    if not (base := adapter_base_model(path)):
        return digest_weights(path, revision)
    adapter = Path(path)
    files = digest_files(adapter, [file.name for file in adapter.glob("adapter_model.*")])
    return digest_json([digest_weights(*base), digest_names(files, sorted(files))])


def load_tokenizer(
    path: str, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder or Hub id; for an adapter without one, that of its base model.

    chat_template: a file with the chat template that replaces that of the tokenizer.

    Raises:
        UserError: there is no tokenizer, or the file cannot be read; the tokenizer does not belong to the
            model beside it: it has ids that the model's embedding lacks.
    """
    base = adapter_base_model(path)
    # a folder may hold a tokenizer alone
    has_model = base is not None or _find_config(path, revision) is not None
    config = load_config(path, revision) if has_model else None
    if base is not None and not _list_tokenizer_files(path):
        path, revision = base  # peft alone saves no tokenizer with an adapter
    if Path(path).is_dir():
        files = _list_tokenizer_files(path)
        if not any(file.name in ("tokenizer.json", *OLD_VOCABULARIES) for file in files):
            raise UserError(f"{path} holds no tokenizer (tokenizer.json): copy that of the model into it")
        for file in files:
            check_content(file)
    tokenizer: PreTrainedTokenizerBase = _open(AutoTokenizer, path, revision)
    if config is not None:
        check_vocabulary(tokenizer, config, path)
    if chat_template is not None:
        tokenizer.chat_template = _read_chat_template(Path(chat_template))
    return tokenizer


def _list_tokenizer_files(folder: str) -> list[Path]:
    """Return the files of a tokenizer that are read from a folder."""
    has_vocabulary = (Path(folder) / "tokenizer.json").exists()
    names = TOKENIZER_FILES if has_vocabulary else (*TOKENIZER_FILES, *OLD_VOCABULARIES)
    return [file for name in names if (file := Path(folder) / name).is_file()]


def _read_chat_template(path: Path) -> str:
    text = read_text(path, "model.chat_template")
    if not text.strip():
        raise UserError(f"model.chat_template {path} is empty: it should hold a Jinja template")
    return text


def load_model(
    path: str,
    *,
    backend: str,
    dtype: torch.dtype,
    revision: str | None = None,
    random_seed: int | None = None,
    device: torch.device | None = None,
    quantize: bool = False,
) -> PreTrainedModel:
    """Return a causal language model, in eval mode.

    backend      attention backend: "sdpa", "flex" or "cached"
    random_seed  initialise random weights with this seed instead of reading weights
    device       where the weights are read or drawn, one matrix at a time; None is the CPU, or all ranks
                 together while ZeRO-3 is enabled
    quantize     keep the matrices of the decoder layers in 4 bits (NF4); needs a device

    For the folder of an adapter it is the base model with the adapter merged in.

    Raises:
        UserError: there is no such model, it is not supported, or its weights are not those that its
            configuration describes; see `check_weights`.
    """
    config = load_config(path, revision)
    attention = f"block_{backend}"
    if device is not None:
        target = {"device": device, "dtype": dtype, "attention": attention, "quantize": quantize}
        return _load_on_device(path, revision, config, random_seed, **target).eval()
    assert not quantize, "weights are quantised only on a device"
    if random_seed is not None:
        set_seed(random_seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        restore_frequencies(model)
        return model.eval()
    if base := adapter_base_model(path):
        return _load_merged(path, base, config, dtype, attention).eval()
    return _load_weights(path, revision, config, dtype, attention).eval()


def _load_on_device(
    path: str,
    revision: str | None,
    config: PreTrainedConfig,
    random_seed: int | None,
    **target: Any,
) -> PreTrainedModel:
    """Return a model whose weights are read or drawn on a device; `target` is for `read_model`."""
    if random_seed is not None:
        return draw_model(config, seed=random_seed, **target)
    if base := adapter_base_model(path):
        merged = _load_merged(path, base, config, target["dtype"], target["attention"])
        stored = {name: StoredTensor.of(tensor) for name, tensor in merged.state_dict().items()}
        return read_model(config, stored, generation_config=merged.generation_config, **target)
    stored = _check_files(path, revision, config)
    generation_config = None
    if _call(path, find_file, path, "generation_config.json", revision):
        generation_config = _open(GenerationConfig, path, revision)
    with error_prefix(f"model {path!r} cannot be opened: "):
        model = read_model(config, stored, generation_config=generation_config, **target)
    _check_generation_config(model, path)
    return model


def _load_merged(
    path: str,
    base: tuple[str, str | None],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str,
) -> PreTrainedModel:
    """Return the base model of an adapter with the adapter merged in.

    If the adapter was trained on quantised weights, they are rounded to the numbers that it was trained on.
    """
    verify_base_weights(Path(path), *base)
    quantized_in = read_base_quantization(Path(path))
    return merge_adapter(_load_rounded(*base, config, dtype, attention, quantized_in), Path(path))


def _load_rounded(
    path: str,
    revision: str | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str,
    quantized_in: torch.dtype | None,
) -> PreTrainedModel:
    """Return a model as `_load_weights` does; with the numbers of a run that quantised it in this type."""
    if quantized_in is None:
        return _load_weights(path, revision, config, dtype, attention)
    model = _load_weights(path, revision, config, quantized_in, attention)
    with error_prefix(f"model {path!r} cannot be opened: "):
        round_linears(model)
    for weight in model.parameters():  # Module.to would also round the buffers of the rotary embedding
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model


def load_full_attention_model(
    path: str, revision: str | None, dtype: torch.dtype, *, quantized_in: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the model as plain transformers opens it, with full attention.

    With `quantized_in` the weights have the numbers of a run that quantised them in this type.

    Raises:
        UserError: see `load_model`.
    """
    return _load_rounded(path, revision, load_config(path, revision), dtype, "sdpa", quantized_in)


def load_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Return the generation config of a folder.

    Raises:
        UserError: it cannot be read, or one of its tokens is outside the vocabulary of the model.
    """
    check_content(folder / "generation_config.json")
    generation = _call(str(folder), GenerationConfig.from_pretrained, folder)
    check_special_ids(generation, config.vocab_size, f"{folder}: its generation_config.json")
    return generation


def _load_weights(
    path: str, revision: str | None, config: PreTrainedConfig, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """Return a model with exactly the weights of its files, which transformers reads."""
    _check_files(path, revision, config)
    model: PreTrainedModel
    model, report = _open(
        AutoModelForCausalLM,
        path,
        revision,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    assert not any(report.values()), f"transformers does not use the weights that were checked: {report}"
    restore_frequencies(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{path} holds both a model and an adapter: name a folder that holds one of them")
    _check_generation_config(model, path)
    return model


def _check_files(path: str, revision: str | None, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Verify the files of a model and compare its weights with the configuration; return the weights.

    transformers does not report every difference, and passes over a generation config that it cannot read.
    """
    if (Path(path) / MARKER).is_file():
        raise UserError(
            f"{path} is a checkpoint of a run, not a model: export it with blockft export {path} FOLDER"
        )
    verify_model_files(path, revision, weights=True)
    stored = _call(path, check_weights, path, revision, build_meta_model(config))
    if file := _call(path, find_file, path, "generation_config.json", revision):
        load_json(file)
    return stored


def _check_generation_config(model: PreTrainedModel, path: str) -> None:
    if (generation := model.generation_config) is not None:
        check_special_ids(generation, model.config.vocab_size, f"{path}: its generation_config.json")


def _find_config(path: str, revision: str | None) -> Path | None:
    """Return the file config.json of a model folder or Hub id, or None if there is none."""
    _check_path(path, revision)
    return _call(path, find_file, path, "config.json", revision)


def _check_path(path: str, revision: str | None) -> None:
    """Refuse a path that is neither a folder nor a Hub id that can be asked for, and the folder of a run."""
    if not Path(path).is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"model {path!r} is neither a folder nor an id on the Hub (owner/name)")
        check_hub(f"model {path!r}", path, revision)
    if (Path(path) / RECIPE).is_file() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path} is a run, not a model: export it with blockft export {path} FOLDER")


def _open(kind: Any, path: str, revision: str | None, **settings: Any) -> Any:
    """Return `kind.from_pretrained(path)` of a verified model, with its many errors as one UserError.

    `settings` are further arguments of `from_pretrained`. Remote code is refused without a question.
    """
    _check_path(path, revision)
    verify_model_files(path, revision, weights=False)
    arguments = {"revision": revision or "main", "trust_remote_code": False, **settings}
    return _call(path, kind.from_pretrained, path, **arguments)


def _call(path: str, function: Callable[..., Result], *arguments: Any, **settings: Any) -> Result:
    """Call a reader of transformers, and raise its errors as one UserError about the model `path`."""
    try:
        return function(*arguments, **settings)
    except UserError:
        raise
    # the readers trust the files: a wrong value raises whatever error the code that meets it raises
    except Exception as error:
        is_offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(path).is_dir()
        offline = " (HF_HUB_OFFLINE is set)" if is_offline else ""
        raise UserError(f"model {path!r} cannot be opened{offline}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Return the first line of an error, with its type where the line alone says little."""
    line = first_line(error)
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), and blockft never runs code of a model folder"
    return (
        line if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {line}"
    )
