"""Our RMSNorm is torch's, with gradients."""

import pytest
import torch
from torch import nn

from vlm.nn.norm import RMSNorm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equal_to_torch(affine: bool, dtype: torch.dtype, limit: float) -> None:
    ours, theirs = (kind(6, eps=1e-2, elementwise_affine=affine, dtype=dtype) for kind in (RMSNorm, nn.RMSNorm))
    if affine:
        ours.weight.data = theirs.weight.data = torch.randn(6, dtype=dtype)
    x = torch.randn(3, 4, 6, dtype=dtype)
    grad = torch.randn_like(x)
    found = []
    for norm in (ours, theirs):
        given = x.clone().requires_grad_()
        out = norm(given)
        out.backward(grad)
        found.append([out, given.grad, *(parameter.grad for parameter in norm.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=limit, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=limit, rtol=0)


def test_bfloat16_computes_in_float32() -> None:
    norm, x = RMSNorm(512, eps=1e-6, elementwise_affine=False), torch.randn(2, 512)
    rough = norm(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), norm(x.bfloat16().float()), atol=0, rtol=2**-8)


def test_a_bfloat16_stream_with_a_gain_in_float32() -> None:
    """As under autocast: gradients as those of fp32, but for the rounding of what comes in."""
    ours, plain = RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        plain.weight.copy_(ours.weight.normal_(1, 0.1, generator=generator))
    x = torch.randn(3, 5, 16, generator=generator).bfloat16().requires_grad_()
    like = x.detach().float().requires_grad_()
    slope = torch.randn(3, 5, 16, generator=generator).bfloat16()
    ours(x).backward(slope)
    plain(like).backward(slope.float())
    assert x.grad.dtype == torch.bfloat16 and ours.weight.grad.dtype == torch.float32
    assert torch.allclose(x.grad.float(), like.grad, atol=0.02)
    assert torch.allclose(ours.weight.grad, plain.weight.grad, atol=0.05)
