"""GGUF files: written by gguf's own writer from a Llama of transformers, they are that Llama, tokens included."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.parity.decoders import filled, ids, logit_gap, worst_gap
from tests.parity.noise import gap
from vlm.model.weights.gguf import gguf_table, gguf_to_ours, gguf_to_theirs, load_gguf

THEIRS = {
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
CONTROL, NORMAL = 3, 1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KV_HEADS = THEIRS["num_attention_heads"], THEIRS["num_key_value_heads"]
LAYER = {  # of transformers, as llama.cpp calls them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FRAME = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEXTS = ["a red apple costs 1234 coins", "What is shown in this picture?", "Zwölf Boxkämpfer\n\tjagen  Viktor 42 ☀️"]


def bpe(words: int) -> Inner:
    """A byte-level BPE whose digits stand alone, as SmolLM's do."""
    inner = Inner(models.BPE())
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(pieces), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([*TEXTS, "11223344 a red picture"], trainer)
    return inner


def published(tied: bool) -> LlamaForCausalLM:
    config = {**THEIRS, "vocab_size": 300, "hidden_size": 96, "head_dim": 16, "intermediate_size": 64}
    return filled(LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=tied, rope_parameters=PLAIN)))


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order that llama.cpp keeps them: a rotary pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def named(model: LlamaForCausalLM, tied: bool) -> dict[str, Tensor]:
    tensors = {}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in FRAME:
            if not (tied and module == "lm_head"):
                tensors[f"{FRAME[module]}.weight"] = weight
            continue
        block, inner = module.removeprefix("model.layers.").split(".", 1)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(inner)
        tensors[f"blk.{block}.{LAYER[inner]}.weight"] = weight if heads is None else interleaved(weight, heads)
    return tensors


def write(path: Path, model: LlamaForCausalLM, tied: bool, quantised: bool = False, **changes: object) -> Path:
    """A file as llama.cpp's converter makes it; `changes` of the metadata by the last part of their name."""
    config, inner = model.config, bpe(300)
    writer = gguf.GGUFWriter(path, str(changes.get("architecture", "llama")))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(float(changes.get("theta", 5000.0)))
    writer.add_rope_dimension_count(int(changes.get("turned", 16)))
    writer.add_layer_norm_rms_eps(1e-5)
    if "scaling" in changes:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    words = [inner.id_to_token(i) for i in range(300)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(changes.get("pre", "smollm")))
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if word in SPECIAL else NORMAL for word in words])
    writer.add_token_merges([" ".join(pair) for pair in _merges(inner)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, weight in named(model, tied).items():
        if quantised and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(inner: Inner) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(inner.to_str())["model"]["merges"]
    return merges


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_the_model_it_was_written_from(tmp_path: Path, tied: bool) -> None:
    theirs = published(tied)
    ours = load_gguf(write(tmp_path / "model.gguf", theirs, tied)).language.eval()
    assert (ours.head is None) == tied
    assert worst_gap(ours, theirs) < 1e-5


def test_gradients(tmp_path: Path) -> None:
    from tests.parity.decoders import loss_and_gradient_gap

    theirs = published(tied=True)
    ours = load_gguf(write(tmp_path / "model.gguf", theirs, tied=True)).language.eval()
    assert loss_and_gradient_gap(ours, theirs, {"embedding.weight": "model.embed_tokens.weight"}) < 1e-5


def test_quantised_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", published(tied=True), tied=True, quantised=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = load_gguf(path).language.eval()
    assert worst_gap(ours, theirs) < 1e-5
    assert logit_gap(ours, published(tied=True)) > 1e-3  # 8 bits are not 32


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    theirs = named(published(tied=False), tied=False)
    ours = gguf_to_ours(theirs, HEADS, KV_HEADS, tied=False)
    back = gguf_to_theirs(ours, HEADS, KV_HEADS, tied=False)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_rows_left_in_their_order_are_noticed(tmp_path: Path) -> None:
    theirs = published(tied=True)
    ours = load_gguf(write(tmp_path / "model.gguf", theirs, tied=True)).language.eval()
    ours.load_state_dict(gguf_table(tied=True).to_ours(named(theirs, tied=True)))
    assert logit_gap(ours, theirs) > 1e-3


def test_another_base_of_the_rotation_is_noticed(tmp_path: Path) -> None:
    theirs = published(tied=True)
    ours = load_gguf(write(tmp_path / "model.gguf", theirs, tied=True, theta=5500.0)).language.eval()
    assert logit_gap(ours, theirs) > 1e-3


def test_weights_in_bfloat16_are_the_rounded_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", published(tied=True), tied=True)
    exact, rounded = load_gguf(path).language, load_gguf(path, torch.bfloat16).language
    assert gap(rounded.embedding.weight.float(), exact.embedding.weight.bfloat16().float()) == 0
    assert rounded(__tokens(rounded)).hidden.dtype == torch.bfloat16


def __tokens(model: torch.nn.Module) -> object:
    from vlm.nn.tokens import Tokens

    return Tokens.of(model.embed(ids()))


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_gguf(write(tmp_path / "model.gguf", published(tied=True), tied=True)).tokenizer
    inner = bpe(300)
    for text in TEXTS:
        assert tokenizer.encode(text) == inner.encode(text).ids and tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size) == (1, 2, 2, 300)
    spelt = tokenizer.encode("<|im_end|>")
    assert 2 not in spelt and tokenizer.decode([*spelt, 2]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "family 'qwen2'; only llama is read"),
        ({"scaling": True}, "scaled by 'linear'"),
        ({"turned": 8}, "only 8 of 16 dimensions"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'; read are gpt2 with smollm, gpt-2"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write(tmp_path / "model.gguf", published(tied=True), tied=True, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)


def test_leftovers_and_gaps_are_listed(tmp_path: Path) -> None:
    theirs = named(published(tied=True), tied=True)
    with pytest.raises(ValueError, match=r"gguf llama: .* rope_freqs\.weight"):
        gguf_to_ours({**theirs, "rope_freqs.weight": torch.ones(8)}, HEADS, KV_HEADS, tied=True)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", published(tied=True), tied=True)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        load_gguf(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        load_gguf(path)
