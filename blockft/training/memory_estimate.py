"""The memory that one process of a run needs on its GPU, by component, and the row length that fits.

The numbers of bytes per weight are those that DeepSpeed 0.19.8 allocates. P trained and F frozen weights of e
bytes each on N processes::

    stage  weights      gradients  optimizer states  added by a step
    0      e (P + F)    e P        (m + s) P         s P
    1      e (P + F)    e P        (m + 4) P / N     (e + s) P / N
    2      e (P + F)    e P / N    (m + 4) P / N     (e + s) P / N
    3      e (P + F)/N  e P / N    (m + 4) P / N     (4 + e if s) min(P / N, sub_group_size)

with m bytes for the two moments, 8 for AdamW, and s = 4 if the weights have 16 bits: float32 copies of the
weights and of the gradients. A step of stage 1 begins by freeing the gradients of other processes' weights.
Offloaded states are in the memory of the host.

The peak is the largest of three moments: the start of the last backward pass of a step, when all activations
exist; its end, when all gradients exist; the optimizer's step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from blockft.data.collate import pad_num_labels
from blockft.model.gradient_checkpointing import EVERY, list_checkpointed
from blockft.model.nf4 import BYTES_PER_WEIGHT
from blockft.training.deepspeed_config import is_offloaded, zero_stage
from blockft.training.layer_memory import LayerMemory, LinearBytes, measure_final_norm, measure_layers

KINDS = tuple(EVERY)
"""Kinds of gradient checkpointing, from the least recomputation to the most."""

ROW_LEN_STEP = 1024
"""Row lengths that are proposed are multiples of this."""

MAX_ROW_LEN = 1 << 20
"""Longest row that is proposed."""

OUTSIDE_BYTES = int(1.5 * 2**30)
"""Memory of a GPU that torch does not allocate: the CUDA context, kernels, the buffers of NCCL."""

USABLE_SHARE = 0.95
"""Share of the remaining memory that a run may be planned to fill. The rest is for fragments between tensors
and for the error of the estimate."""

ADAM_BYTES = 8.0
"""Bytes of the two moments of a weight under AdamW."""

ADAM_8BIT_BYTES = 2 * (1 + 4 / 256)
"""Bytes of the two moments of a weight under an 8-bit AdamW: codes, and their share of the scales."""

_WORKSPACE_BYTES = 64 * 2**20
"""Workspaces of matrix products."""

_DEFAULT_BUCKET = 500_000_000
"""`reduce_bucket_size` of DeepSpeed, in elements."""

_DEFAULT_LIVE = 1_000_000_000
"""`stage3_max_live_parameters` and `sub_group_size` of DeepSpeed, in elements."""


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """What the estimate must know of the model.

    num_trained         trained weights
    frozen_bytes        all frozen weights, quantised ones as they are stored
    weight_bytes        bytes of a trained weight, and of an activation
    layers              the decoder layers
    final_norm          what the norm after the last layer keeps
    vocab_size          logits of a position
    loss_bytes          of the logits and their gradients by logit, at the peak
    head_bytes          the gradient of the output weights; 0 if they are frozen
    largest_weight      elements of the largest weight matrix
    temporary_bytes     what products with quantised weights allocate
    teacher_bytes       weights of another model that teaches
    first_reached       index of the first layer with a backward pass, if none is checkpointed: the first one
                        with a trained weight, or 0 if the input embeddings are trained. The layers below it
                        keep no activations.
    """

    num_trained: int
    frozen_bytes: float
    weight_bytes: int
    layers: Sequence[LayerMemory]
    final_norm: LinearBytes
    vocab_size: int
    loss_bytes: float
    head_bytes: float
    largest_weight: int
    temporary_bytes: float = 0.0
    teacher_bytes: float = 0.0
    first_reached: int = 0


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """How a model is trained: rows of `row_len` tokens with at most `num_labels` labels.

    moment_bytes    of the two moments of a weight: `ADAM_BYTES` or `ADAM_8BIT_BYTES`
    accumulates     whether a step has more than one micro-batch for each process
    dense_masks     number of dense masks, one by kind of layer; 0 under flex
    """

    deepspeed: Mapping[str, Any]
    num_processes: int
    row_len: int
    num_labels: int
    accumulates: bool
    moment_bytes: float = ADAM_BYTES
    dense_masks: int = 0

    def with_row_len(self, row_len: int) -> "RunMemory":
        """Return the same run with longer or shorter rows, which have the same share of labels."""
        num_labels = -(-self.num_labels * row_len // self.row_len)
        return replace(self, row_len=row_len, num_labels=num_labels)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Expected bytes at the peak of a process, by component, and what it keeps in the memory of the host."""

    components: Mapping[str, float]
    host_bytes: float = 0.0

    @property
    def peak_bytes(self) -> float:
        return sum(self.components.values())


def measure_model(
    model: PreTrainedModel,
    *,
    compiled: bool,
    loss_bytes: float,
    teacher_bytes: float = 0.0,
    quantized: bool = False,
) -> ModelMemory:
    """Return what the estimate must know of a model on the meta device, with its adapters.

    The weights must have the type that they have in training. `compiled` says whether layers are compiled,
    `quantized` whether the frozen matrices of the layers will have 4 bits. The model itself is not quantised:
    its layers keep the same activations.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    in_4_bits = _frozen_matrices(model) if quantized else []
    saved_bytes = sum(p.nbytes - BYTES_PER_WEIGHT * p.numel() for p in in_4_bits)
    head: torch.Tensor = model.get_output_embeddings().weight
    return ModelMemory(
        num_trained=sum(p.numel() for p in trained),
        frozen_bytes=sum(p.nbytes for p in parameters if not p.requires_grad) - saved_bytes,
        weight_bytes=model.dtype.itemsize,
        layers=measure_layers(model, compiled=compiled),
        final_norm=measure_final_norm(model),
        vocab_size=model.config.vocab_size,
        loss_bytes=loss_bytes,
        head_bytes=float(head.nbytes) if head.requires_grad else 0.0,
        largest_weight=max(p.numel() for p in parameters),
        # one matrix at a time is computed from its codes, through float32
        temporary_bytes=max((p.nbytes + 4.0 * p.numel() for p in in_4_bits), default=0.0),
        teacher_bytes=teacher_bytes,
        first_reached=_first_reached(model),
    )


def _first_reached(model: PreTrainedModel) -> int:
    """Return the index of the first layer with a backward pass; the number of layers if there is none."""
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    layers = list(model.base_model.get_submodule("layers").children())
    trained = (
        index for index, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())
    )
    return next(trained, len(layers))


def _frozen_matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the frozen matrices of the linear layers inside the decoder layers."""
    modules = model.base_model.get_submodule("layers").modules()
    weights = [module.weight for module in modules if isinstance(module, torch.nn.Linear)]
    return [weight for weight in weights if not weight.requires_grad]


def estimate_memory(model: ModelMemory, run: RunMemory, kind: str) -> MemoryEstimate:
    """Return the expected peak of a run with a kind of gradient checkpointing (none, selective or full)."""
    states = _States.of(model, run)
    kept, first_backward, last_backward = _activations(model, run, kind)
    logits = pad_num_labels(run.num_labels) * model.vocab_size * model.loss_bytes
    always = {
        "weights": states.weights,
        "optimizer states": states.optimizer,
        "weights of the teacher": model.teacher_bytes,
        "masks": _mask_bytes(run),
        "workspaces": _WORKSPACE_BYTES + model.temporary_bytes,
    }
    backward = {"buffers of DeepSpeed": states.buckets + states.gathered}
    moments = [
        {
            "gradients": states.gradients_before,
            "activations": kept,
            # the gradient of the logits is freed before that of the first layer exists
            "logits, or the first layer's backward pass": max(logits, model.head_bytes + first_backward),
            **backward,
        },
        {"gradients": states.gradients_after, "activations": last_backward, **backward},
        {"gradients": states.gradients_at_step, "gradients in float32": states.step},
    ]
    largest = max(moments, key=lambda components: sum(components.values()))
    components = {name: size for name, size in (always | largest).items() if size}
    return MemoryEstimate(components=components, host_bytes=states.host)


def usable_bytes(gpu_bytes: float) -> float:
    """Return how much of a GPU's memory the estimated peak of a run may fill."""
    return (gpu_bytes - OUTSIDE_BYTES) * USABLE_SHARE


def choose_kind(model: ModelMemory, run: RunMemory, gpu_bytes: float) -> str | None:
    """Return the kind of gradient checkpointing with the least recomputation that fits, or None."""
    usable = usable_bytes(gpu_bytes)
    fitting = (kind for kind in KINDS if estimate_memory(model, run, kind).peak_bytes <= usable)
    return next(fitting, None)


def longest_row(model: ModelMemory, run: RunMemory, kind: str, gpu_bytes: float) -> int:
    """Return the longest row that fits, a multiple of `ROW_LEN_STEP`; 0 if none fits."""
    low, high = 0, MAX_ROW_LEN // ROW_LEN_STEP
    while low < high:
        middle = (low + high + 1) // 2
        longer = run.with_row_len(middle * ROW_LEN_STEP)
        fits = estimate_memory(model, longer, kind).peak_bytes <= usable_bytes(gpu_bytes)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * ROW_LEN_STEP


def _activations(model: ModelMemory, run: RunMemory, kind: str) -> tuple[float, float, float]:
    """Return what all layers keep; what the first layer of the backward pass needs beyond that; and what the
    last one needs, with what it keeps."""
    # with checkpointing, transformers and peft let the embeddings require gradients: all layers are reached
    first = model.first_reached if kind == KINDS[0] else 0
    norm = model.final_norm.of_row(run.row_len)
    if first == len(model.layers):
        return norm, 0.0, norm
    layers = model.layers[first:]
    checkpointed = list_checkpointed(kind, len(model.layers))[first:]
    dense = _dense_bias_bytes(model, run)
    whole = [layer.kept.of_row(run.row_len) + dense for layer in layers]
    kept = sum(
        layer.input.of_row(run.row_len) if is_checkpointed else size
        for layer, size, is_checkpointed in zip(layers, whole, checkpointed, strict=True)
    )
    backward = [layer.backward.of_row(run.row_len) for layer in layers]
    recomputed = whole[-1] if checkpointed[-1] else 0.0
    return (
        kept + norm,
        recomputed + backward[-1],
        layers[0].input.of_row(run.row_len) + whole[0] + backward[0],
    )


def _mask_bytes(run: RunMemory) -> float:
    if run.dense_masks:
        return run.dense_masks * float(run.row_len) ** 2
    tiles = -(-run.row_len // 128)
    return 4 * 4.0 * tiles**2  # numbers of tiles: partial and full, by query and by key


def _dense_bias_bytes(model: ModelMemory, run: RunMemory) -> float:
    """Return what a layer keeps of a dense mask: each call converts it to numbers."""
    return model.weight_bytes * float(run.row_len) ** 2 if run.dense_masks else 0.0


@dataclass(frozen=True, kw_only=True)
class _States:
    """Bytes of the states of a model on one process."""

    weights: float
    optimizer: float
    gradients_before: float
    gradients_after: float
    gradients_at_step: float
    step: float
    buckets: float
    gathered: float
    host: float

    @staticmethod
    def of(model: ModelMemory, run: RunMemory) -> "_States":
        zero = run.deepspeed.get("zero_optimization", {})
        stage, e, n = zero_stage(run.deepspeed), model.weight_bytes, run.num_processes
        trained = float(model.num_trained)
        in_float32 = 4.0 if e < 4 else 0.0
        weights = e * trained + model.frozen_bytes
        optimizer = (run.moment_bytes + (4 if stage else in_float32)) * trained
        gradients = e * trained
        step = in_float32 * trained
        if stage:
            optimizer, step = optimizer / n, (e + in_float32) * trained / n
        if stage == 3:
            weights = weights / n
            step = (4 + (e if e < 4 else 0)) * min(trained / n, zero.get("sub_group_size", _DEFAULT_LIVE))
        gradients_after = gradients if stage < 2 else gradients / n
        before = gradients_after if run.accumulates or stage == 3 else 0.0
        num_parameters = trained + model.frozen_bytes / e
        live = zero.get("stage3_max_live_parameters", _DEFAULT_LIVE)
        gathered = e * min(num_parameters, live) if stage == 3 and n > 1 else 0.0
        states = {
            "weights": weights,
            "optimizer": optimizer,
            "gradients_before": before,
            "gradients_after": gradients_after,
            "gradients_at_step": gradients / n if stage else gradients,
            "step": step,
            "buckets": _bucket_bytes(model, zero, stage),
            "gathered": gathered,
        }
        return _States(**_offloaded(states, model, run.deepspeed))


def _offloaded(
    states: dict[str, float], model: ModelMemory, deepspeed: Mapping[str, Any]
) -> dict[str, float]:
    """Move offloaded states to the host: with the optimizer states also the gradients."""
    stage, on_host = zero_stage(deepspeed), 0.0
    if stage and is_offloaded(deepspeed, "offload_optimizer"):
        on_host += states["optimizer"] + states["gradients_after"]
        # one gradient at a time passes through a buffer
        states["buckets"] += 2 * model.weight_bytes * model.largest_weight
        gradients = ("gradients_before", "gradients_after", "gradients_at_step")
        states |= dict.fromkeys(("optimizer", *gradients, "step"), 0.0)
    if stage == 3 and is_offloaded(deepspeed, "offload_param"):
        on_host += states["weights"]
        live = deepspeed["zero_optimization"].get("stage3_max_live_parameters", _DEFAULT_LIVE)
        states["gathered"] = min(states["weights"], model.weight_bytes * float(live))
        states["weights"] = 0.0
    return {**states, "host": on_host}


def _bucket_bytes(model: ModelMemory, zero: Mapping[str, Any], stage: int) -> float:
    """Return the bytes of the buffers in which gradients are reduced. Their size is a setting."""
    if stage == 0 or (stage < 3 and not zero.get("contiguous_gradients", True)):
        return 0.0
    elements = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    if elements == "auto":  # transformers sets the square of the hidden size
        elements = (model.layers[0].input.per_token / model.weight_bytes) ** 2
    overlaps = zero.get("overlap_comm")
    num_buffers = 2 if (overlaps if overlaps is not None else stage == 3) and stage < 3 else 1
    return num_buffers * model.weight_bytes * float(elements)
