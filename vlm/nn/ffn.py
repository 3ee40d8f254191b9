"""Feed-forward networks of a block."""

from jaxtyping import Float
from torch import Tensor, nn

from vlm.nn.layout import project


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * (1.702 * x).sigmoid()


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module | None = None, bias: bool = True) -> None:
        """`dim` in and out, `hidden` between; the activation is exact GELU unless another is passed."""
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = nn.GELU() if activation is None else activation
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Applied to each token on its own."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class GatedMlp(nn.Module):
    """SwiGLU by default: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module | None = None, bias: bool = False) -> None:
        """`dim` in and out, `hidden` between; the activation is SiLU unless another is passed."""
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = nn.SiLU() if activation is None else activation
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Applied to each token on its own."""
        gate, up = project(self.readers(), x)
        out: Tensor = self.down(self.activation(gate) * up)
        return out

    def readers(self) -> tuple[nn.Module, ...]:
        """The layers that read the same input (`layout.Readers`)."""
        return self.gate, self.up
