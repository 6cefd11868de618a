"""Linear layers in 4 bits: outputs and gradients of the numbers that their weights stand for."""

from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

from blockft.errors import UserError
from blockft.model.base_quantization import round_linears
from blockft.model.nf4 import dequantize, quantize, round_to_nf4
from blockft.model.nf4_linear import NF4Linear, check_bitsandbytes, decode_matrix, quantized_linears
from tests.tiny import CONFIGS, build_model

pytest.importorskip("bitsandbytes")


def random_linear(bias: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(48, 32, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 32), (48, 32), (64, 100), (512, 384)])
def test_the_kernels_give_the_numbers_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights = quantize(torch.randn(shape).to(dtype))
    decoded = decode_matrix(weights.codes, weights.scales, weights.groups, shape, dtype, torch.float32)
    assert torch.equal(decoded, dequantize(weights, shape, dtype).float())


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(bias: bool) -> None:
    linear = random_linear(bias)
    quantized, x = NF4Linear(linear, "q"), torch.randn(2, 5, 48)
    linear.weight.data = round_to_nf4(linear.weight)
    results = []
    for layer in (linear, quantized):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad))
    assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_inputs_in_float32_meet_the_numbers_of_the_run() -> None:
    """The logits of a run in bfloat16 are compared in float32."""
    linear = random_linear(dtype=torch.bfloat16)
    x, expected = torch.randn(3, 48), round_to_nf4(linear.weight).float()
    assert_close(NF4Linear(linear, "q")(x), x @ expected.T)


def test_nothing_of_the_size_of_the_matrix_waits_for_the_backward_pass() -> None:
    linear = NF4Linear(random_linear(), "q")
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for forward in (linear, torch.compile(linear, backend="aot_eager")):
            forward(torch.randn(2, 48, requires_grad=True))
    assert saved and not any(tensor.is_floating_point() and tensor.numel() >= 32 * 48 for tensor in saved)


def test_the_codes_are_frozen_whole_numbers_that_a_conversion_leaves_alone() -> None:
    linear = NF4Linear(random_linear(), "q")
    before = {name: weight.clone() for name, weight in linear.named_parameters()}
    linear.to(torch.bfloat16)
    for name, weight in linear.named_parameters():
        assert (
            torch.equal(weight, before[name]) and not weight.requires_grad and not weight.is_floating_point()
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_layers_but_the_head_are_quantised(name: str) -> None:
    model = build_model(name)
    linears = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {n for n, _ in quantized_linears(model)} == linears - {"lm_head"}
    head, embedding = model.lm_head.weight.clone(), model.get_input_embeddings().weight.clone()
    round_linears(model)
    assert torch.equal(head, model.lm_head.weight)
    assert torch.equal(embedding, model.get_input_embeddings().weight)


def test_a_missing_package_is_named_with_its_extra() -> None:
    with (
        patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match=r"^x=1 needs the package bitsandbytes.*blockft\[quantization\]'$"),
    ):
        check_bitsandbytes("x=1")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_a_gpu_give_the_numbers_of_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = quantize(torch.randn(256, 384).to(dtype).cuda())
    decoded = decode_matrix(weights.codes, weights.scales, weights.groups, (256, 384), dtype, dtype)
    assert torch.equal(decoded, dequantize(weights, (256, 384), dtype))
