"""Rotary positions against complex numbers, and their stretching band by band."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from vlm.nn.rotary import LinearScaling, Llama3Scaling, Rotary, rotate


def turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotates pair (i, i + K/2) as one complex number, B H S K."""
    half = x.shape[3] // 2
    out = x.clone()
    for b in range(x.shape[0]):
        for s in range(x.shape[2]):
            for i in range(half):
                turn = cmath.exp(1j * float(position[b, s]) * theta ** (-i / half))
                first, second = x[b, :, s, i], x[b, :, s, i + half]
                out[b, :, s, i] = first * turn.real - second * turn.imag
                out[b, :, s, i + half] = first * turn.imag + second * turn.real
    return out


def test_rotary_equals_complex_rotation() -> None:
    x = torch.randn(2, 3, 4, 8)
    position = torch.tensor([[0, 1, 2, 3], [5, 9, 40, 100]])
    torch.testing.assert_close(rotate(x, Rotary(8, 1000.0)(position)), turned(x, position, 1000.0), atol=2e-5, rtol=0)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    x, y, rotary = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8), Rotary(8)

    def product(first: int, second: int) -> Tensor:
        a, b = (rotary(torch.tensor([[position]])) for position in (first, second))
        return (rotate(x, a) * rotate(y, b)).sum()

    torch.testing.assert_close(product(3, 7), product(20, 24))
    assert abs(float(product(3, 7) - product(3, 8))) > 1e-3


def test_angles_stay_in_fp32_for_low_precision_inputs() -> None:
    cos, _ = Rotary(4)(torch.tensor([[300, 301]]))
    assert cos.dtype == torch.float32
    assert rotate(torch.randn(1, 1, 2, 4, dtype=torch.bfloat16), (cos, cos)).dtype == torch.bfloat16


def test_fp64_inputs_get_fp64_angles() -> None:
    x, position = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.tensor([[0, 7, 100_003]])
    wide, narrow = (rotate(x, Rotary(8)(position, dtype)) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(wide, turned(x, position, 10_000.0), atol=1e-9, rtol=0)
    assert float((narrow - wide).abs().max()) > 1e-7


def test_gradients_are_those_of_the_rotation() -> None:
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    angles = Rotary(6)(torch.tensor([[0, 1, 5], [3, 4, 9]]), torch.float64)
    assert torch.autograd.gradcheck(lambda part: rotate(part, angles), (x,))


def frequencies(rotary: Rotary) -> list[float]:
    """Read off where the angles are small enough not to wrap around: at 1 over the fastest, in fp64."""
    cos, sin = rotary(torch.tensor([[1]]), torch.float64)
    half = rotary.head_dim // 2
    return torch.atan2(sin[0, 0, 0, half:], cos[0, 0, 0, half:]).tolist()


def test_llama_3_stretches_band_by_band() -> None:
    """Heads of 16 with theta 500,000: two fast, one between and five slow, against 64 and 256 tokens."""
    plain = frequencies(Rotary(16, 500_000.0))
    found = frequencies(Rotary(16, 500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 256)))
    bands = []
    for before, after in zip(plain, found, strict=True):
        length = 2 * math.pi / before
        if length < 256 / 4.0:
            bands.append("fast")
            wanted = before
        elif length > 256 / 1.0:
            bands.append("slow")
            wanted = before / 8.0
        else:
            bands.append("between")
            share = (256 / length - 1.0) / (4.0 - 1.0)
            wanted = (1 - share) * before / 8.0 + share * before
        assert after == pytest.approx(wanted, rel=1e-12)
    assert [bands.count(band) for band in ("fast", "between", "slow")] == [2, 1, 5]


def test_linear_scaling_divides_positions() -> None:
    position = torch.tensor([[0, 4, 12]])
    stretched, plain = Rotary(8, scaling=LinearScaling(4.0))(position), Rotary(8)(position // 4)
    torch.testing.assert_close(stretched, plain)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rotary(5), "even head width, not 5"),
        (lambda: LinearScaling(0.5), "factor=0.5"),
        (lambda: Llama3Scaling(factor=0.0), "factor=0.0"),
        (lambda: Llama3Scaling(low_freq_factor=4.0), "low_freq_factor=4.0 and high_freq_factor=4.0"),
    ],
)
def test_settings_without_sense_are_named(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=words):
        make()
