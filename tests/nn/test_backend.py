"""The switch that sends fp32 products to oneDNN: put back whatever happens, and never less exact than fp32."""

import pytest
import torch

from vlm.nn import backend
from vlm.nn.backend import EXACT, best_device, bfloat16_is_fast, default_for_few, fast_float32

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(params=[True, False])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Machines where oneDNN is exact, and machines where it is not."""
    monkeypatch.setattr(backend, "onednn_is_exact", lambda: request.param)
    return bool(request.param)


def test_switch_is_put_back(exact: bool) -> None:
    before = MATMUL.fp32_precision
    with fast_float32():
        assert (MATMUL.fp32_precision == "bf16") == exact
        with fast_float32():
            pass
        assert (MATMUL.fp32_precision == "bf16") == exact
    assert MATMUL.fp32_precision == before


def test_switch_is_put_back_after_an_exception(exact: bool) -> None:
    before = MATMUL.fp32_precision
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert MATMUL.fp32_precision == before


def test_trying_leaves_the_switch_alone() -> None:
    before = MATMUL.fp32_precision
    backend.onednn_is_exact.cache_clear()
    assert isinstance(backend.onednn_is_exact(), bool)
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize("shape", [(64, 256, 64), (33, 700, 129), (1, 1024, 512)])
def test_products_inside_are_fp32(shape: tuple[int, int, int]) -> None:
    left, right = torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2])
    with fast_float32():
        product = left @ right
        layer = torch.nn.functional.linear(left, right.T.contiguous())
    truth = left.double() @ right.double()
    for found in (product, layer):
        assert float((found.double() - truth).norm() / truth.norm()) < EXACT


def test_rounded_products_would_be_noticed() -> None:
    left, right = torch.randn(64, 256), torch.randn(256, 64)
    truth = left.double() @ right.double()
    rounded = (left.bfloat16() @ right.bfloat16()).double()
    assert float((rounded - truth).norm() / truth.norm()) > 100 * EXACT


def test_questions_about_devices_have_answers() -> None:
    assert isinstance(bfloat16_is_fast(torch.device("cpu")), bool)
    assert best_device().type in ("cpu", "cuda")


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows_are_taken_back_from_onednn(exact: bool, rows: int) -> None:
    with fast_float32():
        outside = MATMUL.fp32_precision
        with default_for_few(rows):
            assert MATMUL.fp32_precision == ("ieee" if exact and rows < 3 else outside)
        assert MATMUL.fp32_precision == outside
