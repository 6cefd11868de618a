"""The memory that training needs for each token of a row: counted for the layers of a model, not assumed.

A layer is run on the meta device, where tensors have sizes but no data. Whatever a family of models or an
adapter adds is therefore counted. A compiled layer keeps other tensors than an eager one: its graph is
partitioned as torch.compile does it, and the tensors that the forward part hands to the backward part are
counted. Attention is replaced by an operator that keeps what FlexAttention keeps: queries, keys, values, the
output, and a number for each query and head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from transformers import AttentionInterface, PreTrainedModel

from blockft.training.library_internals import operator_name, storage_id, traced_module
from blockft.training.tensor_memory import TensorMemory

ROW_LENS = (4093, 8191)
"""Lengths of the rows that are measured: primes, which are no size of a model. All numbers of bytes are a
constant plus a multiple of the length."""

STAND_IN = "block_stand_in"
"""Name of the attention that stands in for FlexAttention."""

_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
"""Operations of a compiled graph that read and write tensors in memory. Others are fused with each other."""


@dataclass(frozen=True, kw_only=True)
class LinearBytes:
    """A number of bytes that grows with the length of a row."""

    per_token: float
    fixed: float = 0.0

    def of_row(self, row_len: int) -> float:
        return self.fixed + self.per_token * row_len

    @staticmethod
    def fit(sizes: Sequence[float]) -> "LinearBytes":
        """Return the line through the sizes at `ROW_LENS`."""
        per_token = (sizes[1] - sizes[0]) / (ROW_LENS[1] - ROW_LENS[0])
        return LinearBytes(per_token=per_token, fixed=sizes[0] - per_token * ROW_LENS[0])


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """The activations of one decoder layer.

    input     the layer's input, all that a checkpointed layer keeps
    kept      what the backward pass needs, with the input if it does
    backward  what the backward pass of the layer allocates beyond `kept` at its peak
    """

    input: LinearBytes
    kept: LinearBytes
    backward: LinearBytes


# --- attention that keeps what FlexAttention keeps, for any device


@torch.library.custom_op("blockft::stand_in", mutates_args=())
def _stand_in(
    q_BHTD: torch.Tensor, keys_BKSD: torch.Tensor, values_BKSD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("it has sizes only")


@_stand_in.register_fake
def _(
    q_BHTD: torch.Tensor, keys_BKSD: torch.Tensor, values_BKSD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q_BHTD), q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)


@torch.library.custom_op("blockft::stand_in_backward", mutates_args=())
def _stand_in_backward(
    gradient_BHTD: torch.Tensor, kept: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("it has sizes only")


@_stand_in_backward.register_fake
def _(
    gradient_BHTD: torch.Tensor, kept: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(kept[0]), torch.empty_like(kept[1]), torch.empty_like(kept[2])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(context: Any, gradient_BHTD: torch.Tensor, _: torch.Tensor) -> Any:
    return torch.ops.blockft.stand_in_backward(gradient_BHTD, list(context.saved_tensors))


_stand_in.register_autograd(_backward, setup_context=_keep)


def _attend(
    module: torch.nn.Module,
    q_BHTD: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSD: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    out_BHTD, _ = torch.ops.blockft.stand_in(q_BHTD, keys_BKSD, values_BKSD)
    return out_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(STAND_IN, _attend)


# --- the layers of a model


def measure_layers(model: PreTrainedModel, *, compiled: bool) -> list[LayerMemory]:
    """Return the memory of each decoder layer of a model on the meta device, with its adapters.

    The weights must have the type that they have in training. Layers with the same parameters are measured
    once.
    """
    measured: dict[tuple[Any, ...], LayerMemory] = {}
    layers = []
    with _training_with_stand_in(model):
        for index, layer in enumerate(model.base_model.get_submodule("layers").children()):
            parameters = layer.named_parameters()
            kind = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in parameters)
            if kind not in measured:
                measured[kind] = _measure_layer(model, index, compiled=compiled)
            layers.append(measured[kind])
    return layers


def measure_final_norm(model: PreTrainedModel) -> LinearBytes:
    """Return what the norm after the last layer keeps, which is not compiled, with its input."""
    sizes = []
    norm = model.base_model.get_submodule("norm")
    for row_len in ROW_LENS:
        leaf = _leaf(model, row_len)
        with TensorMemory([*model.parameters(), leaf]) as memory:
            function = norm(leaf * 1).grad_fn  # keeps what the backward pass needs
            sizes.append(memory.live_bytes)
        del function
    return LinearBytes.fit(sizes)


def measure_loss(loss: Callable[[torch.Tensor], torch.Tensor], *, dtype: torch.dtype) -> float:
    """Return the bytes at the peak of a loss and its backward pass, by logit.

    `loss` computes the loss of logits (1, N, V) in the type of the weights. The logits count.
    """
    num_positions, vocab_size = 256, 512
    hidden = torch.zeros(1, num_positions, vocab_size, dtype=dtype).requires_grad_()
    with TensorMemory() as memory:
        value = loss(hidden * 1)
        value.backward()
        return memory.peak_bytes / (num_positions * vocab_size)


@contextmanager
def _training_with_stand_in(model: PreTrainedModel) -> Iterator[None]:
    attention, was_training = model.config._attn_implementation, model.training
    model.config._attn_implementation = STAND_IN
    model.train()
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        model.train(was_training)


def _leaf(model: PreTrainedModel, row_len: int) -> torch.Tensor:
    """Return hidden states that need a gradient. Their product with 1 is no leaf, as in a model."""
    size = (1, row_len, model.config.hidden_size)
    return torch.empty(size, dtype=model.dtype, device="meta").requires_grad_()


def _layer_arguments(model: PreTrainedModel, index: int, row_len: int) -> dict[str, Any]:
    position_ids = torch.empty(1, row_len, dtype=torch.long, device="meta")
    rotary: Any = model.base_model.rotary_emb
    hidden = torch.empty(1, row_len, model.config.hidden_size, dtype=model.dtype, device="meta")
    layer_types = getattr(model.config, "layer_types", None)
    is_by_type = hasattr(rotary, "layer_types")
    kind = (layer_types[index],) if is_by_type and layer_types else ()
    return {
        "position_embeddings": rotary(hidden, position_ids, *kind),
        "attention_mask": None,
        "position_ids": position_ids,
    }


def _measure_layer(model: PreTrainedModel, index: int, *, compiled: bool) -> LayerMemory:
    layer = model.base_model.get_submodule(f"layers.{index}")
    measure = _measure_compiled if compiled else _measure_eager
    sizes = [measure(model, layer, _layer_arguments(model, index, row_len), row_len) for row_len in ROW_LENS]
    kept, backward = (LinearBytes.fit(values) for values in zip(*sizes, strict=True))
    input_bytes = model.config.hidden_size * model.dtype.itemsize
    return LayerMemory(input=LinearBytes(per_token=input_bytes), kept=kept, backward=backward)


def _measure_eager(
    model: PreTrainedModel, layer: torch.nn.Module, arguments: dict[str, Any], row_len: int
) -> tuple[float, float]:
    leaf = _leaf(model, row_len)
    known = [*model.parameters(), *arguments["position_embeddings"], leaf]
    with TensorMemory(known) as memory:
        function = layer(leaf * 1, **arguments).grad_fn  # keeps what the backward pass needs
        kept = memory.live_bytes
    del function
    with TensorMemory(known) as memory:
        out = layer(leaf * 1, **arguments)
        before = memory.live_bytes
        memory.reset_peak()
        out.backward(torch.empty_like(out))
        backward = memory.peak_bytes - before
    for parameter in layer.parameters():
        parameter.grad = None
    return kept, backward


# --- compiled layers


def _measure_compiled(
    model: PreTrainedModel, layer: torch.nn.Module, arguments: dict[str, Any], row_len: int
) -> tuple[float, float]:
    """Compile a layer without generating code, and count the tensors of its two graphs."""
    with traced_module(layer) as (traced, forward_graphs, backward_graphs):
        out = traced(_leaf(model, row_len) * 1, **arguments)
        out.backward(torch.empty_like(out))
    for parameter in layer.parameters():
        parameter.grad = None
    return sum(map(_kept_bytes, forward_graphs)), max(map(_backward_bytes, backward_graphs))


def _tensor_of(node: Any) -> torch.Tensor | None:
    """Return the tensor that a node of a graph stands for; None for a number or for several tensors."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _storage_of(node: Any) -> int | None:
    tensor = _tensor_of(node)
    return None if tensor is None else storage_id(tensor.untyped_storage())


def _outputs(graph: GraphModule) -> list[Any]:
    """Return the results of a graph: nodes, or None."""
    results: Any = graph.graph.output_node().args[0]
    return list(results)


def _num_bytes(node: Node) -> int:
    tensor = _tensor_of(node)
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


def _kept_bytes(graph: GraphModule) -> float:
    """Return the bytes of what the forward graph of a layer hands to the backward graph.

    Of the layer's inputs only the hidden states count: not the weights, and not the angles of RoPE, which all
    layers share.
    """
    _, *saved = _outputs(graph)  # the first is the layer's output
    kept = {}
    for node in saved:
        tensor = _tensor_of(node)
        if tensor is not None and (node.op != "placeholder" or _is_hidden(node)):
            kept[_storage_of(node)] = _num_bytes(node)
    return sum(kept.values())


def _is_hidden(node: Node) -> bool:
    """Return whether an input of a layer is its hidden states: the first 3-D input."""
    inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
    rows = [n for n in inputs if (t := _tensor_of(n)) is not None and t.dim() == 3]
    return rows[:1] == [node]


def _backward_bytes(graph: GraphModule) -> float:
    """Return the bytes that the backward graph of a layer needs at its peak beyond what it was handed.

    Only tensors that a matrix product or attention reads or writes are stored; all others are fused. A tensor
    exists from the operation that writes it to the last one that reads it, also through fused operations.
    """
    nodes = [node for node in graph.graph.nodes if node.op in ("placeholder", "call_function")]
    results = {_storage_of(node) for node in _outputs(graph)}
    stored = {_storage_of(node) for node in nodes if _is_stored(node)} | results
    stored.discard(None)
    sizes = {_storage_of(node): _num_bytes(node) for node in reversed(nodes)}
    reads: dict[int | None, set[int | None]] = {}
    events: list[tuple[int | None, set[int | None]]] = []
    live = 0.0
    for node in nodes:
        storage = _storage_of(node)
        if node.op == "placeholder":
            live += sizes[storage] if node.name.startswith("tangents") else 0
            if node.name.startswith("primals"):
                sizes[storage] = 0  # weights, angles and the layer's input are not freed
            continue
        sources = {s for source in node.all_input_nodes for s in _sources(source, stored, reads)}
        reads[storage if storage is not None else id(node)] = sources
        if storage in stored:
            events.append((storage, sources - {storage}))
    last_use = {
        storage: index for index, (written, read) in enumerate(events) for storage in (written, *read)
    }
    peak, seen = live, set()
    for index, (written, read) in enumerate(events):
        live += 0 if written in seen else sizes[written]
        seen.add(written)
        peak = max(peak, live)
        live -= sum(sizes[s] for s in {written, *read} if last_use[s] == index and s not in results)
    return peak


def _sources(
    node: Node, stored: set[int | None], reads: dict[int | None, set[int | None]]
) -> set[int | None]:
    """Return the stored tensors from which the value of a node is computed."""
    storage = _storage_of(node)
    if storage in stored:
        return {storage}
    return reads.get(storage if storage is not None else id(node), set())


def _is_stored(node: Node) -> bool:
    """Return whether a tensor of a graph is stored in memory: an input, or not fused on one of its sides."""
    return node.op == "placeholder" or any(_reads_memory(n) for n in (node, *node.users))


def _reads_memory(node: Node) -> bool:
    """Return whether an operation reads and writes tensors in memory: a matrix product or attention."""
    operator = operator_name(node.target)
    if operator is None:
        return False
    namespace, name = operator
    return namespace not in ("aten", "prims") or name in _MATRIX_PRODUCTS
