"""RetNet (Sun et al. 2023, arXiv 2307.08621): a decoder whose mixer is retention."""

from torch import nn

from vlm.model.language import Decoder, decoder
from vlm.nn.ffn import GatedMlp
from vlm.nn.norm import RMSNorm
from vlm.nn.retention import Decay, Retention, Schedule


def retnet(
    vocabulary: int,
    dim: int,
    layers: int,
    heads: int,
    value_dim: int | None = None,
    hidden: int | None = None,
    schedule: Schedule = "powers",
    eps: float = 1e-6,
    tied: bool = False,
    dropout: float = 0.0,
    activation: nn.Module | None = None,
) -> Decoder:
    """The published decoder (torchscale, October 2023 and later): RMSNorm, retention, GELU-gated FFN.

    `value_dim`: width of all value heads, 2 dim unless given; `hidden`: width inside the FFN, 2 dim unless given;
    `activation` of its gate: GELU unless given.
    """

    def ffn(_: int) -> nn.Module:
        return GatedMlp(dim, 2 * dim if hidden is None else hidden, nn.GELU() if activation is None else activation)

    def head_norm(width: int) -> nn.Module:
        return RMSNorm(width, eps=eps, elementwise_affine=False)

    return decoder(
        vocabulary,
        dim,
        layers,
        mixer=lambda _: Retention(dim, heads, value_dim, norm=head_norm),
        ffn=ffn,
        norm=lambda: RMSNorm(dim, eps=eps),
        decay=Decay(heads, dim // heads, schedule),
        tied=tied,
        dropout=dropout,
    )
