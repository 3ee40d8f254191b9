"""Published folders as their libraries write them: small, whole, with tokenizer, processor and generation settings.

Each is the original model at random weights, and the strings that it gives are what ours is held to.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    T5Config,
)

from tests.data.vocabularies import TEXTS
from tests.parity.noise import noise
from vlm.data.text import load_tokenizer

GOLDEN = Path(__file__).parent / "parity" / "golden"
SIDE, QUERIES = 28, 6
VISION = {
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
QFORMER = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 48,
    "max_position_embeddings": 48,
}
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,:?!'"]
BERT_WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
BERT_WORDS += ["red", "blue", "green", "square", "photo", "image", "question", "answer", "short", "caption"]


class Made(NamedTuple):
    """A folder and what wrote it."""

    folder: Path
    model: Any
    processor: Any


def write(model: PreTrainedModel, folder: Path, processor: Any, scale: float = 0.2, **writing: Any) -> Made:
    """Noise in all parameters, two shards or more, and generation_config.json as given."""
    noise(model.eval(), scale=scale)
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // 2)
    assert (folder / "model.safetensors.index.json").is_file()
    if writing:
        (folder / "generation_config.json").write_text(json.dumps(writing))
    preprocessor = getattr(processor, "image_processor", None)
    if preprocessor is not None:
        preprocessor.save_pretrained(folder)
    return Made(folder, model, processor)


def word_pieces(folder: Path) -> BertTokenizer:
    """BERT's vocab.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return BertTokenizer.from_pretrained(folder)


def merges(folder: Path) -> PreTrainedTokenizerFast:
    """OPT's vocab.json and merges.txt, as BLIP-2 has them: <image> is added at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(TEXTS, trainer)
    inner.model.save(str(folder))
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **_added(inner)}))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return _theirs(inner, "</s> $A", bos="</s>", eos="</s>", pad="<pad>")


def sentencepiece(folder: Path, name: str) -> PreTrainedTokenizerFast:
    """A kept SentencePiece model as "llama" (tokenizer.model) or "t5" (spiece.model) is published, with <image>.

    transformers could read it with that library alone, so it gets what ours made of it (`test_tokenizers` compares).
    """
    folder.mkdir(parents=True, exist_ok=True)
    llama = name == "llama"
    file = folder / ("tokenizer.model" if llama else "spiece.model")
    shutil.copy(GOLDEN / f"tokens_{name}.model", file)
    inner = load_tokenizer(folder).inner
    ends = {"eos_token": "</s>", "unk_token": "<unk>"}
    config = {"bos_token": "<s>", "pad_token": "<unk>", "add_bos_token": True} if llama else {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**ends, **config, **_added(inner)}))
    if llama:
        return _theirs(inner, "<s> $A", bos="<s>", eos="</s>", pad="<unk>")
    return _theirs(inner, "$A </s>", eos="</s>", pad="<pad>")


def _added(inner: tokenizers.Tokenizer) -> dict[str, Any]:
    """How a tokenizer_config.json adds <image>."""
    return {"added_tokens_decoder": {str(inner.get_vocab_size()): {"content": "<image>", "special": True}}}


def _theirs(inner: tokenizers.Tokenizer, single: str, **names: str) -> PreTrainedTokenizerFast:
    copy = tokenizers.Tokenizer.from_str(inner.to_str())
    copy.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    control = [(name, copy.token_to_id(name)) for name in dict.fromkeys(names.values())]
    copy.post_processor = processors.TemplateProcessing(single=single, special_tokens=control)
    named: dict[str, Any] = {f"{role}_token": name for role, name in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=copy, padding_side="left", **named)


def blip2(folder: Path, family: str, **writing: Any) -> Made:
    """BLIP-2 before OPT or T5; a line's end is OPT's end, as it is published."""
    tokenizer = merges(folder) if family == "opt" else sentencepiece(folder, "t5")
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids("Ċ" if family == "opt" else "</s>")}
    size = len(tokenizer)
    text = opt_config(size, ends["eos_token_id"]) if family == "opt" else t5_config(size)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": 60},
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_id=size - 1,
    )
    model = Blip2ForConditionalGeneration(config)
    if family == "t5":
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(size, 40))
    processor = Blip2Processor(squash(), tokenizer, num_query_tokens=QUERIES)
    return write(model, folder, processor, 0.3 if family == "opt" else 0.2, **ends, **writing)


def opt_config(size: int, eos: int) -> OPTConfig:
    """Two blocks."""
    sizes = {"hidden_size": 40, "ffn_dim": 72, "max_position_embeddings": 128, "word_embed_proj_dim": 40}
    control = {"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": eos}
    return OPTConfig(vocab_size=size, num_hidden_layers=2, num_attention_heads=4, **sizes, **control)


def t5_config(size: int) -> T5Config:
    """Two blocks on either side, as Flan-T5."""
    return T5Config(
        vocab_size=size,
        d_model=40,
        d_kv=8,
        d_ff=72,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )


def llama_config(size: int) -> LlamaConfig:
    """Two blocks."""
    return LlamaConfig(
        vocab_size=size,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def retrieval(folder: Path) -> Made:
    """BLIP-2's first stage with its heads, and BERT's vocabulary."""
    tokenizer = word_pieces(folder)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": len(tokenizer), "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=20,
    )
    model = Blip2ForImageTextRetrieval(config)
    return write(model, folder, Blip2Processor(squash(), tokenizer), scale=0.25)


def instructblip(folder: Path, **writing: Any) -> Made:
    """InstructBLIP before a Llama, with two vocabularies."""
    tokenizer, reader = sentencepiece(folder, "llama"), word_pieces(folder / "qformer_tokenizer")
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": len(reader)},
        text_config=llama_config(len(tokenizer)).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=len(tokenizer) - 1,
    )
    model = InstructBlipForConditionalGeneration(config)
    processor = InstructBlipProcessor(squash(), tokenizer, reader, num_query_tokens=QUERIES)
    return write(model, folder, processor, eos_token_id=2, **writing)


def llava(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **writing: Any) -> Made:
    """LLaVA-1.5 in the layout of the hub."""
    tokenizer = sentencepiece(folder, "llama") if tokenizer is None else tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=llama_config(len(tokenizer)).to_dict(),
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return write(LlavaForConditionalGeneration(config), folder, processor, **writing)


def clip(folder: Path) -> Made:
    """CLIP with a tokenizer.json."""
    tokenizer = clip_words()
    config = CLIPConfig(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**VISION, "projection_dim": 16},
        projection_dim=16,
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tokenizer.save_pretrained(folder)
    return write(CLIPModel(config), folder, CLIPProcessor(pixels, tokenizer))


def siglip(folder: Path) -> Made:
    """SigLIP with SentencePiece's unigrams; its texts are filled up with the end token."""
    tokenizer = sentencepiece(folder, "t5")
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "right"
    config = SiglipConfig(
        text_config={**_TEXT, "hidden_size": 48, "vocab_size": len(tokenizer), "pad_token_id": 1},
        vision_config=VISION,
    )
    pixels = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    return write(SiglipModel(config), folder, SiglipProcessor(pixels, tokenizer))


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 16,
}


def clip_words() -> PreTrainedTokenizerFast:
    """Bytes with CLIP's control tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=[(names[0], 0), (names[1], 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=names[0], eos_token=names[1], pad_token=names[1], model_max_length=16
    )


def squash() -> BlipImageProcessor:
    """Of BLIP-2: proportions are not kept."""
    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})


@torch.no_grad()
def written(made: Made, images: list[Image.Image], prompt: str, **how: Any) -> list[str]:
    """What the original writes about each picture after a prompt; `how`: of its `generate`."""
    found = []
    for image in images:
        given = made.processor(images=image, text=prompt, return_tensors="pt")
        given.pop("token_type_ids", None)
        ids = made.model.generate(**given, **how)[0]
        whole = getattr(made.model.config.text_config, "is_encoder_decoder", False)
        new = ids if whole else ids[given["input_ids"].shape[1] :]
        found.append(made.processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def photographs(count: int = 3) -> list[Image.Image]:
    """Pictures of soft shapes, of the size that the models take: no processor has to resize them."""
    maker = torch.Generator().manual_seed(5)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=maker).float()
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in smooth]
