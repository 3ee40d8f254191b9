"""Muon: singular values near one, kernels as matrices, equal shapes together, and one optimizer made of several."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from vlm.train.muon import Muon, Together, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (2, 40, 5)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices, rounds=8)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.mT @ found @ right.mT  # diagonal: the same singular vectors
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-3


def test_a_step_is_the_formula() -> None:
    weight = nn.Parameter(torch.randn(6, 3))
    before, gradient = weight.detach().clone(), torch.randn(6, 3)
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    nesterov = gradient + 0.9 * (0.1 * gradient - gradient)  # towards the memory, which holds a tenth of it
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * orthogonalize(nesterov[None])[0]
    assert torch.allclose(weight, expected, atol=1e-6)


def test_kernels_are_matrices_and_equal_shapes_share_a_product() -> None:
    kernels = [nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)) for _ in range(2)]
    matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    for kernel, matrix in zip(kernels, matrices, strict=True):
        gradient = torch.randn(4, 3, 2, 2)
        kernel.grad, matrix.grad = gradient.contiguous(memory_format=torch.channels_last), gradient.flatten(1)
    Muon(kernels).step()
    for matrix in matrices:
        Muon([matrix]).step()
    for kernel, matrix in zip(kernels, matrices, strict=True):
        assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not for shapes \[\(5,\)\]"):
        Muon([nn.Parameter(torch.zeros(5))])


def test_together_steps_both_and_shares_groups_and_memory() -> None:
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    both = Together([AdamW([vector], lr=0.1), Muon([matrix], lr=0.1)])
    before = matrix.detach().clone(), vector.detach().clone()
    matrix.grad, vector.grad = torch.randn(4, 4), torch.randn(4)
    for group in both.param_groups:
        group["lr"] = 0.0
    both.step()
    assert torch.equal(matrix, before[0]) and torch.equal(vector, before[1])  # a rate set here is theirs
    for group in both.param_groups:
        group["lr"] = 0.1
    both.step()
    assert not torch.equal(matrix, before[0]) and not torch.equal(vector, before[1])
    assert set(both.state[matrix]) == {"momentum"} and "exp_avg" in both.state[vector]
    both.zero_grad()
    assert matrix.grad is None and vector.grad is None
