"""Models whose weights are read or drawn on a device, one module at a time."""

from pathlib import Path

import pytest
import torch

from blockft.attention.layout import Layout
from blockft.errors import UserError
from blockft.model.base_quantization import round_linears
from blockft.model.load import load_model
from blockft.model.lora import add_adapter
from blockft.model.masked_forward import masked_logits
from blockft.model.nf4_linear import NF4Linear
from tests.tiny import CONFIGS, build_model

CPU = torch.device("cpu")


def save(name: str, folder: Path) -> str:
    build_model(name).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_the_one_that_transformers_opens(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(name, tmp_path)
    expected = load_model(path, backend="sdpa", dtype=dtype)
    model = load_model(path, backend="sdpa", dtype=dtype, device=CPU)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert model.training == expected.training
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(model.all_tied_weights_keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_model_has_the_logits_of_its_rounded_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = save(name, tmp_path)
    quantized = load_model(path, backend="sdpa", dtype=torch.float32, device=CPU, quantize=True)
    rounded = load_model(path, backend="sdpa", dtype=torch.float32)
    round_linears(rounded)
    ids, layout = torch.arange(1, 40), [Layout((10, 9, 20))]
    with torch.no_grad():
        expected = masked_logits(rounded, ids, layout)
        torch.testing.assert_close(masked_logits(quantized, ids, layout), expected, rtol=1e-5, atol=1e-5)
    assert not any(type(module) is torch.nn.Linear for module in quantized.model.modules())


def test_a_merged_adapter_can_be_the_base_of_a_quantised_run(tmp_path: Path) -> None:
    base = build_model("llama")
    base.name_or_path = save("llama", tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapted = add_adapter(base, {"init_lora_weights": False}, seed=0)
    adapted.save_pretrained(adapter)
    merged = load_model(str(adapter), backend="sdpa", dtype=torch.float32)
    round_linears(merged)
    model = load_model(str(adapter), backend="sdpa", dtype=torch.float32, device=CPU, quantize=True)
    ids, layout = torch.arange(1, 20), [Layout((19,))]
    with torch.no_grad():
        expected = masked_logits(merged, ids, layout)
        torch.testing.assert_close(masked_logits(model, ids, layout), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_drawn_weights_depend_on_the_seed_alone(name: str, quantize: bool, tmp_path: Path) -> None:
    CONFIGS[name]().save_pretrained(tmp_path)

    def draw(seed: int) -> dict[str, torch.Tensor]:
        model = load_model(
            str(tmp_path),
            backend="sdpa",
            dtype=torch.float32,
            random_seed=seed,
            device=CPU,
            quantize=quantize,
        )
        assert any(isinstance(module, NF4Linear) for module in model.modules()) == quantize
        return {key: weight.detach() for key, weight in model.named_parameters()}

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    plain = load_model(str(tmp_path), backend="sdpa", dtype=torch.float32, random_seed=1)
    for key, weight in plain.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(first[key], weight), key  # norms and biases
        elif not quantize:
            assert first[key].std().item() == pytest.approx(weight.std().item(), rel=0.2)


def test_weights_without_a_device_are_drawn_as_transformers_draws_them(tmp_path: Path) -> None:
    model = build_model("llama")
    model.config.save_pretrained(tmp_path)
    drawn = load_model(str(tmp_path), backend="sdpa", dtype=torch.float32, random_seed=7)
    for key, weight in model.named_parameters():
        assert torch.equal(weight, drawn.get_parameter(key)), key


def test_weights_that_are_not_finite_are_not_quantised(tmp_path: Path) -> None:
    model = build_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model '{tmp_path}' cannot be opened: .*layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path), backend="sdpa", dtype=torch.float32, device=CPU, quantize=True)


def test_a_damaged_model_is_refused_on_a_device_as_elsewhere(tmp_path: Path) -> None:
    model = build_model("llama")
    weights = {key: w for key, w in model.state_dict().items() if "k_proj" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"2 of 21 weights are missing"):
        load_model(str(tmp_path), backend="sdpa", dtype=torch.float32, device=CPU)


@pytest.mark.gpu
def test_weights_are_drawn_on_a_gpu(tmp_path: Path) -> None:
    CONFIGS["llama"]().save_pretrained(tmp_path)
    cuda = torch.device("cuda")
    models = [
        load_model(str(tmp_path), backend="sdpa", dtype=torch.bfloat16, random_seed=1, device=cuda)
        for _ in range(2)
    ]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert first.is_cuda and torch.equal(first, second)
    assert all(buffer.is_cuda for buffer in models[0].buffers())
