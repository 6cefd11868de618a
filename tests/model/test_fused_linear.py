"""Projections side by side: the same numbers, names and fingerprint, one product each."""

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.model.fingerprint import model_fingerprint
from blockft.model.fused_linear import FusedLinearSlice, fuse_projections
from tests.tiny import CONFIGS, build_model


@pytest.mark.parametrize("name", CONFIGS)
def test_joined_projections_give_the_same_logits_and_are_the_same_model(name: str) -> None:
    model, metadata = build_model(name), build_metadata([Layout((5, 7))])
    model.requires_grad_(False)
    given = {
        "input_ids": torch.arange(1, 13)[None],
        "position_ids": metadata.position_ids,
        "block_masks": AttentionMasks(metadata),
        "use_cache": False,
    }
    before, fingerprint, names = model(**given).logits, model_fingerprint(model), list(model.state_dict())
    fuse_projections(model)
    assert_close(model(**given).logits, before, rtol=1e-6, atol=1e-6)
    assert model_fingerprint(model) == fingerprint and list(model.state_dict()) == names
    parts = [module for module in model.modules() if isinstance(module, FusedLinearSlice)]
    # phi3 comes with them joined
    assert len(parts) == (0 if name.startswith("phi3") else 5 * model.config.num_hidden_layers)


def test_a_part_that_is_asked_for_alone_is_right() -> None:
    model = build_model("qwen2")
    weight, bias = (p.detach().clone() for p in model.model.layers[0].self_attn.k_proj.parameters())
    fuse_projections(model)
    attention = model.model.layers[0].self_attn
    for x in (torch.randn(1, 3, 32), torch.randn(1, 3, 32)):
        attention.q_proj(torch.randn(1, 3, 32))  # an input that nobody else asks for
        assert_close(attention.k_proj(x), torch.nn.functional.linear(x, weight, bias))


def test_compiled_layers_multiply_once() -> None:
    model, products = build_model("llama"), []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        products.append(sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes))
        return graph

    fuse_projections(model)
    torch.compile(model.model.layers[0].mlp, backend=count)(torch.randn(1, 3, 32))
    assert products == [2]
