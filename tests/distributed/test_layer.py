"""The layer with the residual hook, alone: x + alpha F(N(x))."""

from __future__ import annotations

import pytest
import torch

from megatron_prores.config.placement import PLACEMENTS
from tests.distributed.launch import Check, check_name, run_checks


def check_closed_layer_is_the_identity(experts: int | None) -> None:
    from tests.distributed import layers

    layers.initialize()
    layer = layers.build_layer(prores=True, experts=experts)
    layers.grow(layer)
    x = layers.hidden_states()
    layer.set_alpha(0.0)
    output = layers.run(layer, x)
    assert torch.equal(output, x)
    output.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
    branch = [p for name, p in layer.named_parameters() if "norm" not in name]
    assert branch
    # An expert that was given no token has no gradient at all.
    assert all(p.grad is None or not p.grad.any() for p in branch)

    layer.zero_grad()
    layer.set_alpha(1e-3)
    layers.run(layer, x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in branch)


def check_alpha_scales_both_branches() -> None:
    from tests.distributed import layers

    layers.initialize()
    layer = layers.build_layer(prores=True)
    stock = layers.build_layer(prores=False)
    for ours, theirs in zip(layer.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    layers.grow(layer)
    layers.grow(stock)
    x = layers.hidden_states()

    def branch(module: torch.nn.Module, stream: torch.Tensor, name: str) -> torch.Tensor:
        """F(N(x)) of the stock layer: what it adds when its other branch adds nothing."""
        other = {"self_attention": "mlp.linear_fc2", "mlp": "self_attention.linear_proj"}[name]
        weight = module.get_submodule(other).weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            output = layers.run(module, stream) - stream
            weight.copy_(kept)
        return output

    for alpha in (0.25, 0.6):
        layer.set_alpha(alpha)
        middle = x + alpha * branch(stock, x, "self_attention")
        expected = middle + alpha * branch(stock, middle, "mlp")
        torch.testing.assert_close(layers.run(layer, x), expected, rtol=1e-5, atol=1e-6)
    layer.set_alpha(1.0)
    assert torch.equal(layers.run(layer, x), layers.run(stock, x))


def check_scaled_path_at_one_is_stock(dtype: torch.dtype, fused: bool, dropout: float) -> None:
    """Under a captured graph the scaled path stays in use when the layer is open."""
    from tests.distributed import layers

    layers.initialize()
    kwargs = {"dtype": dtype, "dropout": dropout, "bias_dropout_fusion": fused}
    layer = layers.build_layer(prores=True, **kwargs)
    stock = layers.build_layer(prores=False, **kwargs)
    layer._always_scale = True
    for training in (True, False):
        layer.train(training)
        stock.train(training)
        x = layers.hidden_states(dtype)
        with torch.set_grad_enabled(training):
            assert torch.equal(layers.run(layer, x), layers.run(stock, x))


def check_no_extra_activation_is_kept(dtype: torch.dtype) -> None:
    from tests.distributed import layers

    layers.initialize()

    def kept_bytes(layer: torch.nn.Module) -> int:
        """Counts what the graph keeps alive beyond the layer's own state and its input."""
        x = layers.hidden_states(dtype)
        own = [*layer.parameters(), *layer.buffers(), x]
        if hasattr(layer, "alpha"):
            own.append(layer.alpha)
        known = {tensor.untyped_storage().data_ptr() for tensor in own}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layers.run(layer, x)
        del output
        return sum(storage.nbytes() for storage in kept.values())

    stock = kept_bytes(layers.build_layer(prores=False, dtype=dtype, dropout=0.1))
    layer = layers.build_layer(prores=True, dtype=dtype, dropout=0.1)
    assert stock > 0
    for alpha in (0.0, 0.3, 1.0):
        layer.set_alpha(alpha)
        assert kept_bytes(layer) == stock


def check_alpha_is_no_weight() -> None:
    from tests.distributed import layers

    layers.initialize()
    layer = layers.build_layer(prores=True)
    stock = layers.build_layer(prores=False)
    assert layer.state_dict().keys() == stock.state_dict().keys()
    assert layer.sharded_state_dict().keys() == stock.sharded_state_dict().keys()
    names = [name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]]
    assert not any("alpha" in name for name in names)

    tensor = layer.alpha
    layer.set_alpha(1.0 / 3.0)
    assert layer.alpha is tensor
    assert tensor.item() == pytest.approx(1 / 3, rel=1e-7)
    assert layer.bfloat16().alpha is tensor
    assert tensor.dtype == torch.float32

    layer.set_alpha(0.0)
    x = layers.hidden_states(torch.bfloat16)
    assert torch.equal(layers.run(layer, x), x)


def check_evaluation_keeps_no_graph(norm_placement: str, training: bool) -> None:
    """Also in the first pass of a recomputed layer, which is one of training without gradients."""
    from tests.distributed import layers

    layers.initialize()
    layer = layers.build_layer(prores=True, norm_placement=norm_placement).train(training)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for alpha in (0.3, 1.0):
        layer.set_alpha(alpha)
        x = layers.hidden_states().detach()
        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            output = layers.run(layer, x)
        assert not output.requires_grad
        assert not kept
        # What an evaluation leaves out, training has.
        layers.run(layer.train(), layers.hidden_states()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        layer.train(training)
        layer.zero_grad()


def check_alpha_follows_a_model_from_the_meta_device() -> None:
    """As Megatron-FSDP materializes a model: each module that owns parameters, and no other."""
    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.warmup.residual_warmup import ResidualWarmup
    from tests.distributed import layers

    layers.initialize()
    with torch.device("meta"):
        layer = layers.build_layer(prores=True, norm_placement="sandwich").to("meta")
    for module in layer.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    assert layer.alpha.is_meta
    warmup = ResidualWarmup(ProResConfig(warmup_iters=40), 4, [layer])
    warmup.set_step(5)
    assert layer.alpha.item() == pytest.approx(5 / 20)
    layers.run(layer, layers.hidden_states())


def check_graphs_of_a_part_know_its_norms() -> None:
    """Or their weights would be read before --overlap-param-gather has brought them."""
    from megatron.core.transformer.enums import CudaGraphModule

    from tests.distributed import layers

    layers.initialize()
    layer = layers.build_layer(prores=True, norm_placement="sandwich")
    attention, mlp = layer.post_self_attn_layernorm, layer.post_mlp_layernorm
    expected = {
        (CudaGraphModule.attn,): {attention},
        (CudaGraphModule.mlp,): {mlp},
        (CudaGraphModule.attn, CudaGraphModule.mlp): {attention, mlp},
    }
    for parts, norms in expected.items():
        layer.config.cuda_graph_modules = list(parts)
        covered = set(layer._get_submodules_under_cudagraphs())
        assert covered & {attention, mlp} == norms
    layer.config.cuda_graph_modules = []
    assert layer._get_submodules_under_cudagraphs() == [layer]


CHECKS: list[Check] = [
    (check_closed_layer_is_the_identity, (None,)),
    (check_closed_layer_is_the_identity, (4,)),
    (check_alpha_scales_both_branches, ()),
    (check_scaled_path_at_one_is_stock, (torch.float32, False, 0.1)),
    (check_scaled_path_at_one_is_stock, (torch.bfloat16, True, 0.1)),
    (check_no_extra_activation_is_kept, (torch.float32,)),
    (check_no_extra_activation_is_kept, (torch.bfloat16,)),
    (check_alpha_is_no_weight, ()),
    *((check_evaluation_keeps_no_graph, (name, False)) for name in PLACEMENTS),
    (check_evaluation_keeps_no_graph, ("post", True)),
    (check_alpha_follows_a_model_from_the_meta_device, ()),
    (check_graphs_of_a_part_know_its_norms, ()),
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(tmp_path_factory.mktemp("checks"), CHECKS)


@pytest.mark.parametrize("name", map(check_name, CHECKS))
def test_layer(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
