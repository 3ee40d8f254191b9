"""Small tokenizers of the kinds that published models have, made here: nothing is downloaded."""

import json
from functools import cache

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vlm.data.text import Tokenizer, train_bpe

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is it? ASSISTANT: It is a red fox, and it sits on the snow.",
    "Question: what colour is the bird? Answer: blue",
    "###Human: <Img></Img> Describe this image in detail. ###Assistant: two birds in a tree",
    "a photo of a red fox that sits on the snow and looks at the bird in the tree",
] * 3


@cache
def llama(pad_is_eos: bool = True) -> Tokenizer:
    """As Llama's: byte-pair encoding over "▁", a space put before each stretch of text, other characters as bytes."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(steps)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no entry reaches over a space
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    spec = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256)), *spec["vocab"]]
    merges = [tuple(merge) for merge in spec["merges"]]
    inner = tokenizers.Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    inner.normalizer = normalizers.Sequence(steps)
    steps_back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps_back)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[1:4]])
    return Tokenizer(inner, bos=1, eos=2, pad=2 if pad_is_eos else 3, dec=1)


@cache
def qwen(pad_is_eos: bool = True) -> Tokenizer:
    """As Qwen's and Llama 3's: bytes, no space put before anything, control tokens of chats."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    inner = tokenizers.Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'m)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    inner.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True, normalized=False) for name in [*names, "<|pad|>"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    pad = inner.token_to_id("<|pad|>")
    return Tokenizer(inner, bos=0, eos=0, pad=0 if pad_is_eos else pad, dec=0)


@cache
def words(pad_is_eos: bool = True) -> Tokenizer:
    """Our own: bytes, a space put before the first word, no control tokens of chats."""
    made = train_bpe(TEXTS, 420)
    return Tokenizer(made.inner, made.bos, made.eos, made.eos if pad_is_eos else made.pad, made.dec)


KINDS = {"llama": llama, "qwen": qwen, "words": words}
