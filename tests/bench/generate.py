"""Captions from 32 prefix embeddings by a Llama-like decoder of 124M parameters: ours beside transformers' `generate`.

Same weights; in fp32 the same tokens, which is checked. Ours lies in memory as `lay_out_for_decoding` lays it
out; `vlm caption` packs it where more than two rows are written, which tests.bench.captions measures.
    python -m tests.bench.generate [greedy1 greedy8 beam1 beam8]
"""

import sys
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.side_by_side import Candidate, alternate, switched, table
from vlm.model.beam import Beams
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.language import Decoder, llama
from vlm.model.weights.files import load_strict
from vlm.model.weights.llama import llama_table
from vlm.nn.backend import bfloat16_is_fast, fast_float32, onednn_is_exact
from vlm.nn.layout import lay_out_for_decoding
from vlm.nn.state import State
from vlm.nn.tokens import Tokens

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN, PREFIX, EOS = 50272, 768, 12, 12, 2048, 32, 2
# Rows, beams, new tokens; the end token is forbidden until then, so that both sides do the same work.
SECTIONS = {"greedy1": (1, 1, 64), "greedy8": (8, 1, 24), "beam1": (1, 5, 64), "beam8": (8, 5, 24)}
ROUNDS = {"greedy1": 5, "greedy8": 5, "beam1": 5, "beam8": 3}


def pair() -> tuple[Decoder, LlamaForCausalLM]:
    """The same random weights twice."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=HIDDEN,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    theirs = LlamaForCausalLM(config).eval()
    ours = llama(VOCABULARY, WIDTH, LAYERS, HEADS, hidden=HIDDEN, eps=1e-6).eval()
    load_strict(ours, llama_table(True).to_ours(theirs.state_dict()), "transformers")
    lay_out_for_decoding(ours)
    return ours, theirs


Pair = tuple[Decoder, LlamaForCausalLM]


def our_text(model: Decoder, prefix: Tensor, decoding: Decoding) -> Callable[[], list[list[int]]]:
    """Our decoding of the prefix."""

    def step(ids: Tensor, state: State) -> tuple[Tensor, State]:
        out = model(Tokens.of(model.embed(ids), position=state.position[:, None]), state)
        return model.logits(out.hidden[:, -1]), out.state

    @torch.no_grad()
    def run() -> list[list[int]]:
        out = model(Tokens.of(prefix))
        prompt = torch.empty(len(prefix), 0, dtype=torch.long)
        return generate(step, model.logits(out.hidden[:, -1]), out.state, prompt, EOS, decoding)

    return run


def their_text(model: LlamaForCausalLM, prefix: Tensor, beams: int, new: int) -> Callable[[], list[list[int]]]:
    """Theirs."""
    valid = torch.ones(prefix.shape[:2], dtype=torch.long)
    lengths = {"max_new_tokens": new, "min_new_tokens": new}

    @torch.no_grad()
    def run() -> list[list[int]]:
        out = model.generate(inputs_embeds=prefix, attention_mask=valid, num_beams=beams, do_sample=False, **lengths)
        rows: list[list[int]] = out.tolist()
        return rows

    return run


def section(name: str, full: Pair, half: Pair | None) -> None:
    """One table; `half`: the same in bf16, where the CPU has instructions for it."""
    rows, beams, new = SECTIONS[name]
    prefix = torch.randn(rows, PREFIX, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02
    decoding = Sampling(new, new) if beams == 1 else Beams(beams, new, new)
    mine, other = our_text(full[0], prefix, decoding), their_text(full[1], prefix, beams, new)
    assert mine() == other(), f"{name}: other tokens than transformers"
    candidates: dict[str, Candidate] = {"transformers": other, "ours": mine}
    if onednn_is_exact():
        candidates["transformers, oneDNN switch"] = switched(other, fast_float32)
        candidates["ours, oneDNN switch (as shipped)"] = switched(mine, fast_float32)
    if half is not None:
        short = prefix.bfloat16()
        candidates["transformers bf16"] = their_text(half[1], short, beams, new)
        candidates["ours bf16"] = our_text(half[0], short, decoding)
    title = f"{name}: {rows} rows, {beams} beams, {new} new tokens, the same as transformers'"
    table(title, alternate(candidates, ROUNDS[name]), "transformers")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    full = pair()
    half = None
    if bfloat16_is_fast(torch.device("cpu")):
        half = (deepcopy(full[0]).bfloat16(), deepcopy(full[1]).bfloat16())
        lay_out_for_decoding(half[0])
    for name in sys.argv[1:] or SECTIONS:
        section(name, full, half)


if __name__ == "__main__":
    main()
