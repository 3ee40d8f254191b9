"""fla's kernel behind our retention: what it computes (kept outputs of fla's plain version), and that we ask for it.

The kernel itself needs a GPU. A plain one with the same arguments stands in for it, and is first shown to be fla's.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.nn.retain import parallel
from vlm.nn.retain_fla import FlaChunks
from vlm.nn.retention import Decay
from vlm.nn.tokens import Tokens

GOLDEN = load_file(Path(__file__).parent / "golden" / "retnet.safetensors")


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence that `fla.ops.simple_gla.chunk_simple_gla` computes: state = exp(g) state + k v, out = q state."""
    assert output_final_state
    batch, length, heads, width = q.shape
    state = q.new_zeros(batch, heads, width, v.shape[3]) if initial_state is None else initial_state
    rows = []
    for t in range(length):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((scale * q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(rows, 1), state


def test_the_plain_kernel_is_fla_s() -> None:
    given = {name: GOLDEN[f"simple_gla/{name}"] for name in ("q", "k", "v", "g", "initial_state")}
    out, state = simple_gla(**given, scale=0.5, output_final_state=True)
    torch.testing.assert_close(out, GOLDEN["simple_gla/out"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state, GOLDEN["simple_gla/state"], rtol=1e-5, atol=1e-4)
    other = simple_gla(**given | {"g": given["g"].roll(1, 1)}, scale=0.5, output_final_state=True)[0]
    assert (other - out).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_it_is_asked_for_retention(padded: bool, after: bool) -> None:
    """Outputs, memory and gradients of the definition, with padding and after a memory."""
    maker = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=maker, dtype=torch.float64).requires_grad_()

    q, k, v = draw(2, 9, 3, 4), draw(2, 9, 3, 4), draw(2, 9, 3, 5)
    past = draw(2, 3, 4, 6) if after else None
    valid = torch.rand(2, 9, generator=maker) > 0.3 if padded else None
    tokens = Tokens.of(q.new_zeros(2, 9, 1), valid=valid)
    fading = Decay(3, 4)(tokens, torch.tensor([5.0, 2.0]) if after else None)
    results = []
    for form in (parallel, FlaChunks(simple_gla)):
        out, total = form(q, k, v, fading, past)
        leaves = [x for x in (q, k, v, past) if x is not None]
        grads = torch.autograd.grad(out.sin().sum() + total[..., :-1].cos().sum(), leaves)
        # The memory's column of ones takes no part in learning.
        results.append([out, total, *grads[:3], *(grad[..., :-1] for grad in grads[3:])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_without_the_extra_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    with pytest.raises(ValueError, match=r"pip install 'vlm\[fla\]'"):
        FlaChunks()
    module = type(sys)("fla.ops.simple_gla")
    module.chunk_simple_gla = simple_gla  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match="NVIDIA GPUs, not on cpu; use kernel=torch"):
        FlaChunks()(x, x, x, Decay(2, 4)(Tokens.of(torch.zeros(1, 3, 1))))
