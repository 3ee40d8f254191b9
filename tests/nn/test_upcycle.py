"""Experts that start as copies of a trained network, whole or cut into pieces."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import Router, sigmoid_router, softmax_router, upcycle

D = 5


def dense_network(hidden: int = 6) -> GatedMlp:
    dense = GatedMlp(D, hidden)
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    return dense


@pytest.mark.parametrize("make", [softmax_router, sigmoid_router])
def test_upcycled_experts_equal_the_dense_network(make: Callable[..., Router]) -> None:
    dense, x = dense_network(), torch.randn(2, 9, D)
    moe = upcycle(dense, make(D, 4, 2))
    nn.init.normal_(moe.router.weight)
    torch.testing.assert_close(moe(x)[0], dense(x), atol=1e-5, rtol=1e-5)
    moe.down.data.add_(0.1)
    assert not torch.allclose(moe(x)[0], dense(x), atol=1e-3)
    torch.testing.assert_close(dense.gate.weight, moe.gate_up[0, :6])


def test_upcycled_pieces_sum_to_the_dense_network() -> None:
    dense, x = dense_network(), torch.randn(2, 9, D)
    all_pieces = upcycle(dense, softmax_router(D, 3, 3, scale=3.0), pieces=3)
    all_pieces.router.weight.data.zero_()
    torch.testing.assert_close(all_pieces(x)[0], dense(x), atol=1e-5, rtol=1e-5)
    copies = upcycle(dense, softmax_router(D, 6, 2, scale=2.0), pieces=2)
    assert torch.equal(copies.gate_up[0], copies.gate_up[4]) and not torch.equal(copies.down[0], copies.down[1])
    with pytest.raises(ValueError, match=r"pieces=4.*hidden=6.*experts=8"):
        upcycle(dense, softmax_router(D, 8, 2), pieces=4)
    with pytest.raises(ValueError, match="SiLU"):
        upcycle(GatedMlp(D, 6, nn.GELU()), softmax_router(D, 4, 2))
