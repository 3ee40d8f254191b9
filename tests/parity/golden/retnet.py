"""Writes retnet.safetensors: what torchscale's RetNetDecoder and fla's naive retention give for random weights.

    python -m venv oracle && . oracle/bin/activate
    pip install torch==2.14.1 torchvision==0.29.1 timm open_clip_torch
    pip install --no-deps torchscale==0.3.0 fairscale==0.4.0 flash-linear-attention==0.6.0 fla-core==0.6.0 einops
    pip install transformers==5.23.0
    python tests/parity/golden/retnet.py

torchscale pins versions of timm and open_clip that nothing else can live with, hence an environment of its own; the
tests need only this file's output. torchscale's three forms differ where its norm's eps shows, so both ends are kept:
the logits of all forms for matrices of deviation 0.3, which hide it, and of 0.02, which do not.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = {
    "vocab_size": 61,
    "decoder_embed_dim": 32,
    "decoder_value_embed_dim": 64,
    "decoder_retention_heads": 4,
    "decoder_ffn_embed_dim": 48,
    "decoder_layers": 2,
    "recurrent_chunk_size": 4,
}


def decoder(std: float, chunkwise: bool = False) -> nn.Module:
    """torchscale's decoder with noise in every parameter: matrices of deviation `std`, gains around 1."""
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(**SIZES, chunkwise_recurrent=chunkwise)
    model = RetNetDecoder(config, embed_tokens=nn.Embedding(SIZES["vocab_size"], SIZES["decoder_embed_dim"])).eval()
    maker = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=maker)
        parameter.data = values * std if parameter.ndim > 1 else 1 + values * 0.1
    return model


def step_by_step(model: nn.Module, ids: Tensor) -> Tensor:
    """The recurrent form, token after token."""
    memory: dict[str, Tensor] = {}
    return torch.cat([model(ids[:, : t + 1], incremental_state=memory)[0] for t in range(ids.shape[1])], 1)


def simple_gla() -> dict[str, Tensor]:
    """fla's plain version of the kernel that `FlaChunks` calls: a decay for each token, and a memory before them."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    maker = torch.Generator().manual_seed(3)
    shape = (2, 70, 3)
    given = {name: torch.randn(*shape, width, generator=maker) for name, width in (("q", 8), ("k", 8), ("v", 11))}
    given["g"] = torch.rand(shape, generator=maker).log()
    given["initial_state"] = torch.randn(2, 3, 8, 11, generator=maker)
    out, state = naive_chunk_simple_gla(**given, output_final_state=True, scale=0.5)
    return {f"simple_gla/{name}": value for name, value in (given | {"out": out, "state": state}).items()}


@torch.no_grad()
def main() -> None:
    """All tensors of the test in one file."""
    ids = torch.randint(0, SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
    # The test scales the matrices itself, so one set of weights serves both.
    found = {"ids": ids} | {f"weights/{key}": value.clone() for key, value in decoder(1.0).state_dict().items()}
    for name, std in (("large", 0.3), ("small", 0.02)):
        model = decoder(std)
        found[f"{name}/parallel"] = model(ids)[0]
        found[f"{name}/recurrent"] = step_by_step(model, ids)
        found[f"{name}/chunkwise"] = decoder(std, chunkwise=True)(ids)[0]
    from fla.ops.retention.naive import naive_retention

    maker = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 3, 17, 8, generator=maker) for _ in range(2))
    v = torch.randn(2, 3, 17, 10, generator=maker)
    found |= {"fla/q": q, "fla/k": k, "fla/v": v, "fla/out": naive_retention(q, k, v)} | simple_gla()
    save_file({key: value.contiguous() for key, value in found.items()}, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
