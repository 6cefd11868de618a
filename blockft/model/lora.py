"""Low-rank adapters of peft: add one for training, load one from a checkpoint, or merge one.

Only adapters that can be exported and read back exactly are trained or read.
"""

import copy
import dataclasses
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel, set_seed

from blockft.errors import UserError, first_line, list_allowed
from blockft.file_content import load_json
from blockft.model.weights import StoredTensor, check_tensors, error_prefix, read_tensors

# peft uses a name that transformers deprecates
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

OPTIONS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "init_lora_weights",
    "modules_to_save",
)
"""Options of `peft.LoraConfig` for which tests show that a merged adapter equals the trained one."""

READ_OPTIONS = (*OPTIONS, "trainable_token_indices")
"""Options of adapters that are read exactly. Single tokens cannot be trained under ZeRO-3."""

INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
"""Values of `init_lora_weights` that need no data and give the same base model each time."""

_DESCRIPTIVE = ("task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping")
"""Entries of adapter_config.json that do not change what an adapter computes."""

_WITHOUT_EFFECT = ("inference_mode", "megatron_core", "qalora_group_size", "peft_type", "ensure_weight_tying")
"""Entries that have no effect unless an option that is refused is set, or that are checked elsewhere."""


def add_adapter(
    model: PreTrainedModel,
    arguments: Mapping[str, Any],
    *,
    seed: int,
    revision: str | None = None,
    is_quantized: bool = False,
) -> PeftModel:
    """Return the model with a new adapter, which is the same on every rank; only the adapter is trained.

    `arguments` are those of `peft.LoraConfig`; by default every linear layer is adapted. `revision` is that
    of the base model. `is_quantized` says that the weights of the decoder layers are, or will be, in 4 bits.

    Raises:
        UserError: peft does not accept the arguments, or the trained adapter could not be exported or read
            back exactly: an option is not among `OPTIONS`, names no module, or adapts tied weights.
    """
    set_seed(seed)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "revision": revision}
    with error_prefix("train.lora cannot be used: "):
        _check_options(arguments, OPTIONS)
        if is_quantized:
            _check_options_of_quantized(arguments)
        with _errors_of_peft():
            config = LoraConfig(**{**defaults, **arguments})
            adapted = _adapt(model, config)
        if is_quantized:
            _check_saved_modules_of_quantized(adapted)
        _check_named_modules(adapted, config, arguments)
        _check_tied_modules(adapted)
    return adapted


def load_adapter(base: PreTrainedModel, checkpoint: Path, weights: Mapping[str, torch.Tensor]) -> PeftModel:
    """Return the base model with the adapter of a checkpoint; `weights` have the names of the run's model.

    Raises:
        UserError: the adapter is not one that `add_adapter` makes, or its weights are missing or misshapen.
    """
    config = _read_config(checkpoint)
    config.inference_mode = False
    with error_prefix(f"{checkpoint} cannot be used: "), _errors_of_peft():
        model = _adapt(base, config)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    with error_prefix(f"{checkpoint} cannot be used: "):
        _check_tied_modules(model)
        # under ZeRO-0 DeepSpeed also saves frozen weights that are tied
        check_tensors({n: StoredTensor.of(w) for n, w in weights.items() if n in trained}, trained)
    model.load_state_dict({name: weights[name] for name in trained}, strict=False, assign=True)
    return model


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the base model with the adapter of a folder merged into its weights.

    Raises:
        UserError: the adapter cannot be read, or not exactly; it belongs to another base model.
    """
    model: PreTrainedModel = open_adapter(base, folder).merge_and_unload()
    return model


def open_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the base model with the adapter of a folder, unmerged.

    Raises:
        UserError: see `merge_adapter`.
    """
    config = _read_config(folder)
    with error_prefix(f"adapter {str(folder)!r} cannot be opened: "):
        _check_weights(base, folder, config)
        with _errors_of_peft():
            adapted = PeftModel.from_pretrained(base, folder, config=config)
        _check_tied_modules(adapted)
    return adapted


def _read_config(folder: Path) -> LoraConfig:
    """Return the configuration of the adapter in a folder.

    Raises:
        UserError: it is malformed, or describes an adapter that cannot be merged exactly.
    """
    path = folder / "adapter_config.json"
    settings = load_json(path)
    with error_prefix(f"{path} cannot be used: "):
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            found = settings.get("peft_type") if isinstance(settings, dict) else settings
            raise UserError(f"peft_type is {found!r}, only LORA is supported")
        # options of other versions of peft, which older and newer files hold, have no effect if they are off
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        ignored = (*_DESCRIPTIVE, *_WITHOUT_EFFECT, *(n for n in settings.keys() - known if not settings[n]))
        _check_options({n: value for n, value in settings.items() if n not in ignored}, READ_OPTIONS)
        options = {n: settings[n] for n in (*READ_OPTIONS, *_DESCRIPTIVE[1:3]) if n in settings}
        with _errors_of_peft():
            return LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **options)


def _adapt(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return the model with a new adapter. On the meta device it gets no initial values."""
    initialization = config.init_lora_weights
    if next(model.parameters()).is_meta:
        config = copy.copy(config)
        config.init_lora_weights = True  # some initializations decompose the base model's weights
    adapted = get_peft_model(model, config)
    # a reader of the adapter initializes its base model in the same way
    adapted_config: Any = adapted.peft_config["default"]
    adapted_config.init_lora_weights = initialization
    return adapted


@contextmanager
def _errors_of_peft() -> Iterator[None]:
    """Raise the errors of peft as one `UserError` with the first line of their message.

    peft checks few of its arguments and files: a wrong one raises whatever the code that meets it raises.
    """
    with warnings.catch_warnings():
        # what this warns of is refused afterwards, see `_check_tied_modules`
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        try:
            yield
        except Exception as error:
            raise UserError(first_line(error)) from error


def _check_options(arguments: Mapping[str, Any], supported: Collection[str]) -> None:
    """Refuse options whose adapters cannot be merged exactly, and values that peft does not check."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    defaults["task_type"] = "CAUSAL_LM"
    for name, value in arguments.items():
        if value is None and ":" in name:
            raise UserError(f"{name!r} has no value: YAML needs a space after the colon, as in {{r: 8}}")
        is_unset = not value or value == defaults.get(name)
        if name not in supported and not (is_unset and name in defaults):
            raise UserError(
                f"{name} is not supported, because such an adapter cannot be exported and read back exactly; "
                f"supported: {', '.join(supported)}"
            )
        if name == "init_lora_weights" and not any(value is v or value == v for v in INITIALIZATIONS):
            raise UserError(f"{name} is {value!r} ({list_allowed(value, map(str, INITIALIZATIONS))})")
        # peft takes every text for true
        if name in ("use_rslora", "use_dora") and not isinstance(value, bool | None):
            raise UserError(f"{name} is {value!r}, it should be true or false")
        if name == "bias" and value not in (kinds := ("none", "all", "lora_only")):
            raise UserError(f"{name} is {value!r} ({list_allowed(value, kinds)})")
        if name == "lora_dropout" and not (_is_number(value) and 0 <= value < 1):
            raise UserError(f"{name} is {value!r}, it should be a number of at least 0 and below 1")
        if name == "layers_to_transform" and not all(
            map(_is_index, value if isinstance(value, list) else [value or 0])
        ):
            raise UserError(f"{name} is {value!r}, it should be the number of a layer, or a list of numbers")
    ranks = {"r": arguments.get("r", 1), **_entries(arguments, "rank_pattern")}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 2**31:
            raise UserError(f"{name} is {rank!r}, it should be a whole number of at least 1")
    scales = {"lora_alpha": arguments.get("lora_alpha", 1), **_entries(arguments, "alpha_pattern")}
    for name, alpha in scales.items():
        if not _is_number(alpha) or not 0 < alpha < math.inf:
            raise UserError(f"{name} is {alpha!r}, it should be a number greater than 0")


def _check_options_of_quantized(arguments: Mapping[str, Any]) -> None:
    """Refuse options that need the weights of the base model as floats, or that change them."""
    if arguments.get("use_dora"):
        raise UserError("use_dora needs weights that are not quantised: leave model.quantization out")
    if (init := arguments.get("init_lora_weights")) in ("pissa", "olora"):
        raise UserError(
            f"init_lora_weights {init!r} changes the weights of the model, which are quantised: leave it "
            "out, or leave model.quantization out"
        )


def _check_saved_modules_of_quantized(model: PeftModel) -> None:
    """Refuse to train a copy of quantised weights."""
    layers = next(name for name, _ in model.named_modules() if name.endswith(".layers"))
    for name, module in model.named_modules():
        if ".modules_to_save." in name and name.startswith(layers) and isinstance(module, torch.nn.Linear):
            raise UserError(
                f"modules_to_save names the quantised weights of {name.removeprefix(layers)[1:]}, which "
                "cannot be trained: name other modules, or leave model.quantization out"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entries(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the entries of a mapping among the options; an error names them `option.entry`."""
    value = arguments.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}, it should map names of modules to numbers")
    return {f"{name}.{key}": entry for key, entry in value.items()}


def _check_named_modules(model: PeftModel, config: LoraConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse lists of modules with a name that peft passed over because no module has it."""
    adapted: list[str] = model.targeted_module_names
    all_names = [name for name, _ in model.get_base_model().named_modules()]
    targets = arguments.get("target_modules")
    searched: list[tuple[str, Any, Collection[str]]] = [
        ("target_modules", [] if isinstance(targets, str) else targets or [], adapted),
        ("modules_to_save", config.modules_to_save or [], all_names),
    ]
    for option, names, modules in searched:
        for name in [names] if isinstance(names, str) else names:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise UserError(f"{option} names {name!r}, but the model has no such module")
    layers = config.layers_to_transform
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if not any(f".{layer}." in name for name in adapted):
            raise UserError(f"layers_to_transform names layer {layer!r}, but no module of it is adapted")


def _check_tied_modules(model: PeftModel) -> None:
    """Refuse an adapter of tied weights: both matrices would change, but only one of them was trained.

    Exception: tokens that are trained in the embedding and, tied, in the head.
    """
    base: Any = model.get_base_model()
    for pair in base.all_tied_weights_keys.items():
        names = [name.removesuffix(".weight") for name in pair]
        modules = [base.get_submodule(name) for name in names]
        is_adapted = [not isinstance(module, torch.nn.Linear | torch.nn.Embedding) for module in modules]
        token_adapters: list[Any] = [getattr(module, "token_adapter", None) for module in modules]
        shares_tokens = all(a is not None for a in token_adapters) and any(
            a.tied_adapter is not None for a in token_adapters
        )
        if any(is_adapted) and not shares_tokens:
            name = names[is_adapted.index(True)]
            raise UserError(
                f"it adapts {name}, but the model ties {names[0]} to {names[1]} (tie_word_embeddings): leave "
                "both out of target_modules, modules_to_save and trainable_token_indices"
            )


def _check_weights(base: PreTrainedModel, folder: Path, config: LoraConfig) -> None:
    """Compare the tensors of an adapter's folder with those that its configuration needs on this base model.

    peft itself only warns of missing tensors, and passes over unexpected ones.
    """
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    if not (found := [file for file in files if file.is_file() or file.is_symlink()]):
        raise UserError(f"it holds no weights ({' or '.join(file.name for file in files)})")
    stored = read_tensors(found[:1])
    with torch.device("meta"), _errors_of_peft():
        adapted = _adapt(type(base)(copy.deepcopy(base.config)), config)
    needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    # peft also saves embeddings that were resized or adapted
    for name, tensor in adapted.state_dict().items():
        if name in stored and name.endswith((".weight", ".base_layer.weight")) and name not in shapes:
            shapes[name] = tuple(tensor.shape)
    check_tensors(stored, shapes)
