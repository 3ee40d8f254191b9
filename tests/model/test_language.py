"""Decoders of passed parts: the published ones are settings, post-norm is torch's own, memory goes on anywhere."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.model.test_placement import on_fake_cuda
from tests.parity.noise import noise
from vlm.model.language import Decoder, Language, LearnedPositions, decoder, llama, mixtral, opt
from vlm.model.retnet import retnet
from vlm.nn.attention import Attention
from vlm.nn.block import PostNorm
from vlm.nn.ffn import GatedMlp, Mlp
from vlm.nn.moe import Balance, MixtureOfExperts, softmax_router
from vlm.nn.rotary import Llama3Scaling, Rotary
from vlm.nn.state import State
from vlm.nn.tokens import Tokens
from vlm.nn.window import Window

V, D, H = 30, 24, 4
SMALL: dict[str, Callable[[], Decoder]] = {
    "llama": lambda: llama(V, D, 2, H, 2),
    "llama3": lambda: llama(V, D, 2, H, 2, scaling=Llama3Scaling(original_max_positions=16)),
    "qwen2": lambda: llama(V, D, 2, H, 2, bias=True),
    "qwen3": lambda: llama(V, D, 2, H, 2, head_dim=10, head_norm=True),
    "mistral": lambda: llama(V, D, 2, H, 2, window=3),
    "mixtral": lambda: mixtral(V, D, 2, H, 2, 16, experts=4),
    "opt": lambda: opt(V, D, 2, H, max_positions=20),
    "retnet": lambda: retnet(V, D, 2, H),
}


def made(name: str) -> Decoder:
    model = SMALL[name]()
    noise(model, scale=0.3)
    return model.eval()


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(2))


def following(model: Decoder, tokens: Tensor, state: State) -> Tokens:
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    return Tokens.of(model.embed(tokens), position=state.position[:, None] + steps)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_cached_is_uncached_and_a_batch_is_its_rows(name: str) -> None:
    model, valid = made(name), torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    whole = model(Tokens.of(model.embed(ids()), valid=valid)).hidden
    out = model(Tokens.of(model.embed(ids()[:, :6]), valid=valid[:, :6]))
    rows = [out.hidden]
    for part in (ids()[:, 6:8], ids()[:, 8:]):
        out = model(following(model, part, out.state), out.state)
        rows.append(out.hidden)
    torch.testing.assert_close(torch.cat(rows, 1)[valid], whole[valid], atol=1e-5, rtol=1e-4)
    alone = model(Tokens.of(model.embed(ids()[1:, 4:]))).hidden
    torch.testing.assert_close(whole[1:, 4:], alone, atol=1e-5, rtol=1e-4)
    assert isinstance(model, Language)


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_pinned_to_the_cpu(name: str) -> None:
    model = made(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_cuda(model, mode)
        first, second = (mode.from_tensor(part).to("cuda") for part in (ids()[:, :6], ids()[:, 6:]))
        valid = mode.from_tensor(torch.rand(2, 6) < 0.8).to("cuda")
        found = []
        for known in (None, valid):
            out = model(Tokens.of(model.embed(first), valid=known))
            more = model(following(model, second, out.state), out.state)
            one = model(following(model, second[:, :1], more.state), more.state)
            again = model(following(model, second[:, :1], one.state), one.state.crop(1))
            found += [out.hidden, more.hidden, one.hidden, model.logits(again.hidden)]
        assert {part.device.type for part in found} == {"cuda"}


def test_a_post_norm_stack_is_torchs() -> None:
    theirs = nn.ModuleList(nn.TransformerEncoderLayer(D, H, 40, 0.0, batch_first=True) for _ in range(2))
    noise(theirs, scale=0.3)
    ours = decoder(
        V,
        D,
        2,
        mixer=lambda _: Attention(D, H, bias=True),
        ffn=lambda _: Mlp(D, 40, nn.ReLU()),
        norm=lambda: nn.LayerNorm(D),
        residual=PostNorm,
        final_norm=False,
    )
    pairs = {
        "self_attn.out_proj": "mixer.out",
        "linear1": "ffn.up",
        "linear2": "ffn.down",
        "norm1": "mixer_residual.norm",
        "norm2": "ffn_residual.norm",
    }
    for layer, block in zip(theirs, ours.stack.blocks, strict=True):
        for a, b in pairs.items():
            block.get_submodule(b).load_state_dict(layer.get_submodule(a).state_dict())
        for part in ("weight", "bias"):
            fused = layer.get_parameter(f"self_attn.in_proj_{part}").chunk(3)
            for name, value in zip(("query", "key", "value"), fused, strict=True):
                block.get_parameter(f"mixer.{name}.{part}").data.copy_(value)
    x = torch.randn(2, 7, D, requires_grad=True)
    expected, mask = x, nn.Transformer.generate_square_subsequent_mask(7)
    for layer in theirs:
        expected = layer(expected, mask, is_causal=True)
    found = ours(Tokens.of(x)).hidden
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.pow(3).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(found.pow(3).sum(), x), wanted, atol=1e-4, rtol=1e-4)
    ours.stack.norm = nn.LayerNorm(D)
    assert not torch.allclose(ours(Tokens.of(x)).hidden, expected, atol=1e-3)


def test_blocks_may_differ_by_their_number() -> None:
    """DeepSeekMoE's first block is dense; Qwen2's lower ones have no window."""
    model = decoder(
        V,
        D,
        3,
        mixer=lambda i: Attention(D, H, window=None if i == 0 else 4),
        ffn=lambda i: GatedMlp(D, 40) if i == 0 else MixtureOfExperts(D, 8, softmax_router(D, 4, 2)),
        norm=lambda: nn.RMSNorm(D),
        rotary=Rotary(D // H),
    )
    assert [isinstance(block.ffn, MixtureOfExperts) for block in model.stack.blocks] == [False, True, True]
    assert [isinstance(block.mixer.memory, Window) for block in model.stack.blocks] == [False, True, True]
    assert len(model(Tokens.of(model.embed(ids()))).routings) == 2


def test_balance_losses_reach_the_experts() -> None:
    model = mixtral(V, D, 2, H, 2, 16, experts=4, balance=[Balance(0.5)])
    model(Tokens.of(model.embed(ids()))).routings[1].balance.backward()
    grad = model.get_parameter("stack.blocks.1.ffn.router.weight").grad
    assert grad is not None and float(grad.abs().max()) > 0


class Own(nn.Module):
    """Fills itself and its part in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cube = nn.Linear(D, D), nn.Parameter(torch.empty(2, 2, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.inner.weight, 7.0)
        nn.init.constant_(self.cube, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_modules_have_the_last_word_on_how_they_start() -> None:
    def build() -> Decoder:
        return decoder(V, D, 1, lambda _: Attention(D, H, bias=True), lambda _: Own(), lambda: nn.RMSNorm(D))

    with torch.device("meta"):
        later = build()
    later.to_empty(device="cpu").reset_parameters()
    for model in (build(), later):
        block = model.stack.blocks[0]
        assert bool((block.ffn.inner.weight == 7.0).all() and (block.ffn.cube == 3.0).all())
        assert 0.015 < float(block.mixer.query.weight.detach().std()) < 0.025
        assert not bool(block.mixer.query.bias.any())
        assert torch.equal(block.ffn_residual.norm.weight, torch.ones(D))


def test_experts_start_like_the_layers_around_them() -> None:
    moe = mixtral(V, D, 1, H, 2, 64).stack.blocks[0].ffn
    deviations = [float(part.detach().std()) for part in (moe.gate_up, moe.down, moe.router.weight)]
    assert all(0.015 < deviation < 0.025 for deviation in deviations)


def test_learned_positions_are_rows_of_a_table() -> None:
    positions, at = LearnedPositions(5, D, offset=2), torch.tensor([[0, 4, 1]])
    assert torch.equal(positions(at), positions.embedding.weight[at + 2])
    assert positions.embedding.weight.shape == (7, D)
    assert positions(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, D)


def test_positions_beyond_the_table_are_named() -> None:
    model = opt(V, D, 1, H, max_positions=8)
    words = r"position 8 is beyond the 8 learned ones \(max_positions\): shorten the text, lower max_new"
    with pytest.raises(ValueError, match=words):
        model(Tokens.of(model.embed(ids())))
    out = model(Tokens.of(model.embed(ids()[:, :8])))
    with pytest.raises(ValueError, match=words):
        model(following(model, ids()[:, :1], out.state), out.state)
    padded = torch.ones(2, 9, dtype=torch.bool)
    padded[:, 0] = False
    assert model(Tokens.of(model.embed(ids()), valid=padded)).hidden.shape == (2, 9, D)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: llama(V, 10, 1, 4), "heads=4 does not divide dim=10"),
        (lambda: llama(V, D, 1, 4, 3), "kv_heads=3 does not divide heads=4"),
        (lambda: llama(V, 12, 1, 4), "even head width, not 3"),
        (lambda: llama(V, D, 1, 4, window=0), "window=0"),
        (lambda: mixtral(V, D, 1, H, 2, 16, experts=2, top_k=3), "top_k=3 exceeds experts=2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=words):
        make()


def test_a_state_of_another_depth_is_refused() -> None:
    model, other = made("llama"), llama(V, D, 1, H, 2)
    state = other(Tokens.of(other.embed(ids()))).state
    with pytest.raises(ValueError, match="this state is of another model: 1 layers for 2"):
        model(following(model, ids()[:, :1], state), state)


COMPILED = """
import torch
from vlm.model.language import llama, mixtral, opt
from vlm.model.retnet import retnet
from vlm.nn.tokens import Tokens
from vlm.nn.rotary import Llama3Scaling
makers = {
    "llama": lambda: llama(30, 24, 2, 4, 2, head_dim=10, head_norm=True, bias=True, scaling=Llama3Scaling()),
    "opt": lambda: opt(30, 24, 2, 4, max_positions=20),
    "mixtral": lambda: mixtral(30, 24, 2, 4, 2, 16, experts=4, window=3),
    "retnet": lambda: retnet(30, 24, 2, 4),
}
for name, make in makers.items():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids, valid = make(), torch.randint(0, 30, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    valid[0, :3] = False

    def loss(ids, valid):
        hidden = model(Tokens.of(model.embed(ids), valid=valid)).hidden
        return torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), ids.flatten())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for known in (None, valid):
        results = []
        for run in (compiled, loss):
            value = run(ids, known)
            results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    print(name)
"""


@pytest.mark.slow
def test_compiles_as_one_graph_in_both_directions() -> None:
    """In a process of its own: the checks of shapes that the tests switch on cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["llama", "opt", "mixtral", "retnet"], done.stderr[-2000:]
