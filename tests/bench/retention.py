"""Retention beside torchscale's, transformers' attention and the bare projections, in one process, in alternation.

    python -m tests.bench.retention [layer] [memory] [prefill] [decode]      (all sections unless some are named)

Width 512, 8 heads of 64, values 128 wide; decoding with 12 layers of equal parameters. torchscale is timed where it is
installed (tests/parity/golden/retnet.py says how); it cannot share an environment with our other peers' pins.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from tests.bench.side_by_side import Candidate, alternate, peak_memory, switched, table
from vlm.model.generate import advance
from vlm.model.language import Decoder
from vlm.model.retnet import retnet
from vlm.model.weights.files import load_strict
from vlm.model.weights.retnet import retnet_table
from vlm.nn.backend import fast_float32
from vlm.nn.context import Context
from vlm.nn.layout import lay_out_for_decoding
from vlm.nn.retain import Chunkwise
from vlm.nn.retention import Decay, Retention
from vlm.nn.state import State
from vlm.nn.tokens import Tokens

DIM, HEADS, VALUES, LAYERS = 512, 8, 1024, 12
TORCHSCALE = find_spec("torchscale") is not None
PEER = "torchscale chunkwise 512" if TORCHSCALE else "projections alone"


def scale_config(chunkwise: bool = False) -> object:
    """torchscale's settings of these sizes."""
    from torchscale.architecture.config import RetNetConfig

    return RetNetConfig(
        decoder_embed_dim=DIM,
        decoder_value_embed_dim=VALUES,
        decoder_retention_heads=HEADS,
        decoder_ffn_embed_dim=704,
        decoder_layers=LAYERS,
        activation_fn="swish",
        chunkwise_recurrent=chunkwise,
        recurrent_chunk_size=512,
        vocab_size=64,
    )


def llama_config() -> LlamaConfig:
    """A Llama with as many parameters."""
    return LlamaConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        vocab_size=64,
        attn_implementation="sdpa",
        max_position_embeddings=16384,
    )


def run(module: Callable[[Tensor], Tensor], x: Tensor, train: bool, owner: nn.Module) -> Candidate:
    """One pass, with all gradients if `train`."""

    def once() -> None:
        if not train:
            with torch.no_grad():
                module(x)
            return
        owner.zero_grad(set_to_none=True)
        y = module(x)
        y.backward(torch.ones_like(y))

    return once


def layers(length: int, train: bool) -> dict[str, Candidate]:
    """One mixer of each kind over `length` tokens."""
    torch.manual_seed(0)
    x = torch.randn(1, length, DIM, requires_grad=train)
    found: dict[str, Candidate] = {}
    if TORCHSCALE:
        from torchscale.architecture.retnet import RetNetRelPos
        from torchscale.component.multiscale_retention import MultiScaleRetention

        peer = MultiScaleRetention(scale_config(), DIM, VALUES, HEADS)
        places = RetNetRelPos(scale_config(chunkwise=True))(length, chunkwise_recurrent=True)
        found[PEER] = run(lambda z: peer(z, places, chunkwise_recurrent=True), x, train, peer)
    attention = LlamaAttention(llama_config(), 0)
    angles = LlamaRotaryEmbedding(llama_config())(x, torch.arange(length)[None])
    found["transformers LlamaAttention (sdpa)"] = run(
        lambda z: attention(z, position_embeddings=angles, attention_mask=None)[0], x, train, attention
    )
    bare = nn.ModuleList([nn.Linear(DIM, 2 * DIM + 2 * VALUES, bias=False), nn.Linear(VALUES, DIM, bias=False)])
    found["projections alone"] = run(lambda z: bare[1](bare[0](z)[..., :VALUES]), x, train, bare)
    tokens = Tokens.of(x)
    context = Context(tokens, fading=Decay(HEADS, DIM // HEADS)(tokens))
    for chunk in (64, 128):
        ours = Retention(DIM, HEADS, VALUES, form=Chunkwise(chunk))
        found[f"ours, chunks of {chunk}"] = run(lambda z, m=ours: m(z, context)[0], x, train, ours)
    return found | {f"{name}, oneDNN switch": switched(call, fast_float32) for name, call in found.items()}


def layer_section() -> None:
    """Forward, and forward with backward, from 512 to 8192 tokens."""
    for length in (512, 2048, 8192):
        for train in (False, True):
            title = f"retention layer, {length} tokens, {'forward + backward' if train else 'forward'}"
            table(title, alternate(layers(length, train), rounds=5), PEER)


def memory_section() -> None:
    """What a training step adds to the process at 4096 tokens."""
    print("\nMiB above the level before, one layer, 4096 tokens, forward + backward")
    for name, call in layers(4096, True).items():
        if "switch" not in name:
            print(f"  {name:42s} {min(peak_memory(call) for _ in range(3)):8.0f}")


def models() -> tuple[Decoder, nn.Module, nn.Module | None]:
    """Ours as `vlm caption` lays it out, transformers' Llama and torchscale's, where installed, of the same weights."""
    torch.manual_seed(0)
    ours = retnet(64, DIM, LAYERS, HEADS, VALUES, hidden=704, activation=nn.SiLU()).eval()
    peer = None
    if TORCHSCALE:
        from torchscale.architecture.retnet import RetNetDecoder

        peer = RetNetDecoder(scale_config(), embed_tokens=nn.Embedding(64, DIM)).eval()
        load_strict(ours, retnet_table().to_ours(peer.state_dict()), "torchscale")
    lay_out_for_decoding(ours)
    return ours, LlamaModel(llama_config()).eval(), peer


@torch.inference_mode()
def prefill_section() -> None:
    """A prompt of 257 tokens into a state that decoding can go on from."""
    ours, llama, peer = models()
    ids = torch.randint(0, 64, (1, 257))
    x = ours.embed(ids)
    found: dict[str, Candidate] = {"transformers Llama": lambda: llama(inputs_embeds=x, use_cache=True)}
    if peer is not None:

        def by_token() -> None:
            memory: dict[str, object] = {}
            for t in range(ids.shape[1]):
                peer(ids[:, : t + 1], incremental_state=memory, features_only=True)

        found["torchscale, token by token"] = by_token
    found["ours"] = lambda: ours(Tokens.of(x))
    found |= {f"{name}, oneDNN switch": switched(call, fast_float32) for name, call in found.items()}
    table("prompt of 257 tokens, 12 layers", alternate(found, rounds=5), "transformers Llama")


@torch.inference_mode()
def decode_section() -> None:
    """One more token after a context; the state of torchscale and of ours has one size whatever its length."""
    ours, llama, peer = models()
    for batch, context in ((1, 512), (1, 8192), (8, 512), (8, 8192)):
        x = torch.randn(batch, 1, DIM)
        found = caches(llama, x, context)
        if peer is not None:
            memory = {
                i: {
                    "prev_key_value": torch.randn(batch, HEADS, VALUES // HEADS, DIM // HEADS),
                    "scale": torch.ones(HEADS),
                }
                for i in range(LAYERS)
            }
            ids = torch.zeros(batch, context, dtype=torch.long)
            found["torchscale recurrent"] = lambda m=memory, i=ids: peer(
                i, incremental_state={k: dict(v) for k, v in m.items()}, features_only=True
            )
        found["ours"] = our_step(ours, x, context)
        weights = torch.cat([p.flatten() for p in ours.stack.parameters()])
        matrix = weights[: weights.numel() // 4096 * 4096].view(-1, 4096)
        row = torch.randn(batch, 4096)
        found["weights streamed once"] = lambda m=matrix, r=row: nn.functional.linear(r, m)
        found |= {f"{name}, oneDNN switch": switched(call, fast_float32) for name, call in found.items()}
        table(f"next token, batch {batch}, context {context}", alternate(found, rounds=9), "transformers StaticCache")


def our_step(ours: Decoder, x: Tensor, context: int) -> Candidate:
    """One step after another of ours, as `generate` makes them."""
    state = ours(Tokens.of(torch.randn(len(x), 16, DIM))).state
    position = torch.full((len(x), 1), context)

    def step(_: Tensor, before: State) -> tuple[Tensor, State]:
        out = ours(Tokens.of(x, position=position), before)
        return out.hidden[:, -1], out.state

    def once() -> None:
        nonlocal state
        state = advance(step, position, state, own=True)[1]

    return once


def caches(llama: nn.Module, x: Tensor, context: int) -> dict[str, Candidate]:
    """transformers' Llama with its two caches filled up to `context`."""
    batch, shape = len(x), (len(x), HEADS, context, DIM // HEADS)
    dynamic = DynamicCache(config=llama.config)
    static = StaticCache(config=llama.config, max_cache_len=context + 64)
    for i in range(LAYERS):
        dynamic.update(torch.randn(shape), torch.randn(shape), i)
        static.update(torch.randn(shape), torch.randn(shape), i)
    place = torch.full((batch, 1), context)

    def grow() -> None:
        llama(inputs_embeds=x, past_key_values=dynamic, use_cache=True, position_ids=place)
        dynamic.crop(-1)

    def fixed() -> None:
        for layer in static.layers:  # a step leaves its length one higher
            layer.cumulative_length.fill_(context)
        llama(inputs_embeds=x, past_key_values=static, use_cache=True, position_ids=place)

    return {"transformers StaticCache": fixed, "transformers DynamicCache": grow}


def main() -> None:
    """The sections named on the command line, or all."""
    torch.set_num_threads(1)
    sections = {
        "layer": layer_section,
        "memory": memory_section,
        "prefill": prefill_section,
        "decode": decode_section,
    }
    for name in sys.argv[1:] or sections:
        sections[name]()


if __name__ == "__main__":
    main()
