"""Fused projections keep logits, names and fingerprint, and are one matrix product each."""

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.model.fingerprint import model_fingerprint
from blockft.model.fused_linear import FusedLinearSlice, fuse_projections
from tests.tiny import CONFIGS, build_model


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_projections_keep_logits_names_and_fingerprint(name: str) -> None:
    model, metadata = build_model(name), build_metadata([Layout((5, 7))])
    model.requires_grad_(False)
    model_inputs = {
        "input_ids": torch.arange(1, 13)[None],
        "position_ids": metadata.position_ids,
        "block_masks": AttentionMasks(metadata),
        "use_cache": False,
    }
    before, fingerprint, names = (
        model(**model_inputs).logits,
        model_fingerprint(model),
        list(model.state_dict()),
    )
    fuse_projections(model)
    assert_close(model(**model_inputs).logits, before, rtol=1e-6, atol=1e-6)
    assert model_fingerprint(model) == fingerprint and list(model.state_dict()) == names
    slices = [module for module in model.modules() if isinstance(module, FusedLinearSlice)]
    # phi3 models have fused projections already
    assert len(slices) == (0 if name.startswith("phi3") else 5 * model.config.num_hidden_layers)


def test_a_slice_is_right_if_the_other_slices_are_not_used() -> None:
    model = build_model("qwen2")
    weight, bias = (p.detach().clone() for p in model.model.layers[0].self_attn.k_proj.parameters())
    fuse_projections(model)
    attention = model.model.layers[0].self_attn
    for x in (torch.randn(1, 3, 32), torch.randn(1, 3, 32)):
        attention.q_proj(torch.randn(1, 3, 32))  # an input that the other slices do not get
        assert_close(attention.k_proj(x), torch.nn.functional.linear(x, weight, bias))


def test_compiled_layers_multiply_once() -> None:
    model, products = build_model("llama"), []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        products.append(sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes))
        return graph

    fuse_projections(model)
    torch.compile(model.model.layers[0].mlp, backend=count)(torch.randn(1, 3, 32))
    assert products == [2]
