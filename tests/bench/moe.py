"""Our mixture of experts beside transformers' (grouped and eager) and a dense SwiGLU of the same active parameters.

Same weights in all mixtures, in alternation, forward and forward with backward; then decoding steps of few tokens.
    python -m tests.bench.moe
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from tests.bench.side_by_side import Candidate, alternate, switched, table
from vlm.nn.backend import fast_float32, onednn_is_exact
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import MixtureOfExperts, sigmoid_router, softmax_router

DIM = 512
NAMES = {
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.bias",
    "experts.gate_up_proj": "gate_up",
    "experts.down_proj": "down",
}


def mixtral(way: str) -> nn.Module:
    """Top-2 of 8."""
    config = MixtralConfig(hidden_size=DIM, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = way
    return MixtralSparseMoeBlock(config)


def deepseek(way: str) -> nn.Module:
    """2 shared and 6 of 64 fine-grained experts."""
    sizes = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(hidden_size=DIM, moe_intermediate_size=128, **sizes)
    config._experts_implementation = way
    return DeepseekV3MoE(config)


class Ours(nn.Module):
    """Our mixture on the very parameters of transformers' block, so that cache and allocator are alike for both."""

    def __init__(self, moe: MixtureOfExperts, block: nn.Module) -> None:
        super().__init__()
        self.moe = moe
        weights = {
            NAMES.get(name, name.replace("shared_experts", "shared").replace("_proj.", ".")): value
            for name, value in block.state_dict(keep_vars=True).items()
        }
        moe.load_state_dict(weights, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)[0]
        return out


def our_mixtral(block: nn.Module) -> nn.Module:
    return Ours(MixtureOfExperts(DIM, 1024, softmax_router(DIM, 8, 2)), block)


def our_deepseek(block: nn.Module) -> nn.Module:
    router = sigmoid_router(DIM, 64, 6, scale=2.5)
    return Ours(MixtureOfExperts(DIM, 128, router, GatedMlp(DIM, 256)), block)


class FusedDense(nn.Module):
    """A SwiGLU with gate and up in one product."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(DIM, 2 * hidden, bias=False), nn.Linear(hidden, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(nn.functional.silu(gate) * up)
        return out


def peers(make: Callable[[str], nn.Module], ours: Callable[[nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """All with the same small random weights."""
    generator = torch.Generator().manual_seed(0)
    block = make("grouped_mm")
    for tensor in block.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.02 if tensor.ndim > 1 else 0))
    eager = make("eager")
    eager.load_state_dict(block.state_dict(keep_vars=True), assign=True)
    return {"transformers grouped_mm": block, "transformers eager": eager, "ours": ours(block)}


def forward(module: nn.Module, x: Tensor) -> Candidate:
    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = module(x)
        return out

    return run


def both_ways(module: nn.Module, x: Tensor) -> Candidate:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).square().sum().backward()

    return run


def candidates(bench: str, given: dict[str, Any]) -> dict[str, Candidate]:
    """Ours for a bench that takes plug-ins and hands over transformers' block and the input."""
    module = (our_mixtral if given["sec"] == "mixtral" else our_deepseek)(given["block"])
    return {"vlm": (both_ways if given["train"] else forward)(module, given["x"])}


def compare(title: str, modules: dict[str, nn.Module], tokens: int, rounds: int) -> None:
    x = torch.randn(1, tokens, DIM)
    with torch.no_grad():
        expected = modules["transformers eager"](x)
        gap = float((modules["ours"](x) - expected).norm() / expected.norm())
    assert gap < 1e-5, gap
    for words, step in (("forward", forward), ("forward and backward", both_ways)):
        start = x.clone().requires_grad_(step is both_ways)
        candidates = {name: step(module, start) for name, module in modules.items()}
        if onednn_is_exact():
            candidates |= {f"{name}, oneDNN switch": switched(run, fast_float32) for name, run in candidates.items()}
        if tokens > 1000:
            candidates = {name: run for name, run in candidates.items() if "eager" not in name or step is forward}
        table(f"{title}, {tokens} tokens, {words}", alternate(candidates, rounds), "transformers grouped_mm")


def repeated(run: Candidate, times: int = 20) -> Candidate:
    """Enough calls for the clock."""

    def many() -> None:
        for _ in range(times):
            run()

    return many


def decode(title: str, modules: dict[str, nn.Module], rounds: int) -> None:
    for tokens in (1, 4, 8):
        x = torch.randn(tokens, 1, DIM)
        candidates = {name: repeated(forward(module, x)) for name, module in modules.items()}
        table(f"{title}, 20 steps of {tokens} tokens", alternate(candidates, rounds), "transformers grouped_mm")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for title, make, ours, active in (
        ("top-2 of 8, width 1024", mixtral, our_mixtral, 2 * 1024),
        ("2 shared and 6 of 64, width 128", deepseek, our_deepseek, 8 * 128),
    ):
        modules = peers(make, ours)
        decode(title, modules, rounds=7)
        modules["dense of the same active parameters"] = FusedDense(active)
        for tokens in (256, 2048):
            compare(title, modules, tokens, rounds=7)


if __name__ == "__main__":
    main()
