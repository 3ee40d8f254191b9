"""Captions of pictures by BLIP-2 and LLaVA of 350M parameters: ours beside transformers' `generate`, whole captions.

Same weights, written by transformers and opened by `load`; in fp32 the same tokens, which is checked. Encoder,
connector, prompt and 20 new tokens are timed, and how often a picture passes the encoder is counted on both sides.
    python -m tests.bench.captions [--systems blip2 llava t5] [--beams 1 5] [--pictures 1 8] [--types fp32 bf16]
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.utils import logging

from tests.bench.side_by_side import Candidate, alternate, switched, table
from vlm.data.batch import Text
from vlm.model.beam import Beams
from vlm.model.fast import prepare_for_decoding
from vlm.model.generate import Sampling, generate
from vlm.model.published.load import load
from vlm.model.vlm import VisionLanguageModel, last_valid
from vlm.nn.backend import bfloat16_is_fast, fast_float32, onednn_is_exact
from vlm.nn.tokens import IGNORE, IMAGE_ID

NEW, IMAGE, PAD, EOS, PATCHES, QUERIES = 20, 9, 1, 2, 256, 32
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VIT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PICTURE = {"image_size": 224, "patch_size": 14}
WORDS = {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD}


class Shape(NamedTuple):
    """A published system: how it is made, what its prompt is around the image, which module is its image encoder."""

    make: Callable[[], PreTrainedModel]
    image: int
    before: int
    after: int
    encoder: str
    replies: bool = False  # writes its answer apart from the prompt


def blip2(text: OPTConfig | T5Config) -> PreTrainedModel:
    """ViT of 86M, Q-Former of 12 layers, and a language model."""
    qformer = {
        "vocab_size": 64, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
        "cross_attention_frequency": 2, "encoder_hidden_size": VIT["hidden_size"],
    }  # fmt: skip
    sizes = {"num_query_tokens": QUERIES, "image_token_id": IMAGE, "image_token_index": IMAGE}
    config = Blip2Config(vision_config={**VIT, **PICTURE}, qformer_config=qformer, text_config=text.to_dict(), **sizes)
    return Blip2ForConditionalGeneration(config)


def blip2_opt() -> PreTrainedModel:
    """OPT of 253M."""
    sizes = {"hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 1024, "max_position_embeddings": 512}
    return blip2(OPTConfig(vocab_size=50304, num_hidden_layers=16, num_attention_heads=16, **sizes, **WORDS))


def blip2_t5() -> PreTrainedModel:
    """Flan-T5 of 248M, as LAVIS runs it."""
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    kind = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}
    model = blip2(T5Config(vocab_size=32128, decoder_start_token_id=0, **sizes, **kind, **WORDS))
    model.language_model.lm_head.weight = nn.Parameter(torch.randn(32128, 768) * 0.02)  # transformers 5 ties it
    return model


def llava() -> PreTrainedModel:
    """CLIP's ViT of 86M read before its last block, MLP of 2, Llama of 268M."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16, "num_attention_heads": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VIT, **PICTURE, projection_dim=512),
        text_config=LlamaConfig(vocab_size=32000, **sizes, **WORDS),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


SHAPES = {
    "blip2": Shape(blip2_opt, QUERIES, 0, 4, "vision_model"),
    "llava": Shape(llava, PATCHES, 5, 15, "vision_tower"),
    "t5": Shape(blip2_t5, QUERIES, 0, 4, "vision_model", replies=True),
}


def written(shape: Shape, folder: Path) -> None:
    """A published folder of random weights, so much noise that the words depend on the picture."""
    torch.manual_seed(0)
    model = shape.make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0, 0.04)
    model.generation_config = GenerationConfig(**WORDS)
    model.save_pretrained(folder)


def opened(shape: Shape, folder: Path, dtype: torch.dtype) -> tuple[VisionLanguageModel, PreTrainedModel]:
    """The same weights twice."""
    ours = load(str(folder), dtype=dtype).model
    kind = LlavaForConditionalGeneration if shape.make is llava else Blip2ForConditionalGeneration
    return ours, kind.from_pretrained(folder, dtype=dtype).eval()


def prompt(shape: Shape, rows: int) -> Tensor:
    """Word ids with the image among them, the same in every row."""
    words = torch.randint(10, 30000, (shape.before + shape.after,), generator=torch.Generator().manual_seed(1))
    line = torch.cat([words[: shape.before], torch.full((shape.image,), IMAGE_ID), words[shape.before :]])
    return line.expand(rows, -1)


def our_captions(
    model: VisionLanguageModel, shape: Shape, images: Tensor, how: Sampling | Beams
) -> Callable[[], list[list[int]]]:
    """What `describe` and `answer` do between pixels and token ids."""
    ids = prompt(shape, len(images))
    reply = None
    if shape.replies:
        start = torch.zeros(len(ids), 1, dtype=torch.long)
        reply = Text(start, start == 0, torch.full_like(start, IGNORE), full=True)
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORE), full=True, reply=reply)

    @torch.no_grad()
    def run() -> list[list[int]]:
        out = model.write(model.see(images), text)
        logits = model.logits(last_valid(out.hidden, text.written.valid))
        return generate(model.proceed, logits, out.state, text.written.ids, EOS, how)

    return run


def their_captions(model: PreTrainedModel, shape: Shape, images: Tensor, beams: int) -> Callable[[], list[list[int]]]:
    """Theirs, new tokens alone."""
    ids = prompt(shape, len(images))
    given = {"input_ids": ids.masked_fill(ids == IMAGE_ID, IMAGE), "attention_mask": torch.ones_like(ids)}
    begin = 1 if shape.replies else ids.shape[1]
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}

    @torch.no_grad()
    def run() -> list[list[int]]:
        found = model.generate(pixel_values=images, num_beams=beams, do_sample=False, **lengths, **given)
        rows: list[list[int]] = found[:, begin:].tolist()
        return rows

    return run


@contextmanager
def counted(encoder: nn.Module) -> Iterator[list[int]]:
    """How many pictures each call of an encoder takes."""
    calls: list[int] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        calls.append(len(args[0] if args else named["pixel_values"]))

    handle = encoder.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    handle.remove()


def encodings(encoder: nn.Module, run: Callable[[], list[list[int]]], pictures: int) -> tuple[str, list[list[int]]]:
    """How often a picture is encoded for its caption, in words, and the captions."""
    with counted(encoder) as calls:
        found = run()
    return f"{sum(calls) / pictures:g} times in {len(calls)} call(s)", found


def section(
    name: str, kind: str, pair: tuple[VisionLanguageModel, PreTrainedModel], rows: int, beams: int, rounds: int
) -> None:
    """One table."""
    shape, dtype = SHAPES[name], TYPES[kind]
    prepare_for_decoding(pair[0], rows * beams)  # as `vlm caption` does; more rows than before may change the order
    images = torch.randn(rows, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(dtype)
    how = Sampling(NEW, NEW) if beams == 1 else Beams(beams, NEW, NEW)
    mine, other = our_captions(pair[0], shape, images, how), their_captions(pair[1], shape, images, beams)
    encoder = next(part for part_name, part in pair[1].named_modules() if part_name.endswith(shape.encoder))
    assert isinstance(pair[0].vision, nn.Module)
    (our_count, ours), (their_count, theirs) = encodings(pair[0].vision, mine, rows), encodings(encoder, other, rows)
    assert all(len(row) == NEW for row in ours + theirs)
    assert kind != "fp32" or ours == theirs, f"{name}: other tokens than transformers"
    candidates: dict[str, Candidate] = {"transformers": other, "ours, as shipped": switched(mine, fast_float32)}
    if kind == "fp32" and onednn_is_exact():
        candidates["transformers, oneDNN switch"] = switched(other, fast_float32)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    title = f"{name} {kind}: {rows} pictures, {beams} beams, {NEW} new tokens, {same} of {rows} captions equal"
    table(title, alternate(candidates, rounds), "transformers")
    print(f"  a picture is encoded: ours {our_count}, transformers {their_count}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--systems", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    types = [kind for kind in given.types if kind == "fp32" or bfloat16_is_fast(torch.device("cpu"))]
    for name in given.systems:
        with tempfile.TemporaryDirectory() as folder:
            written(SHAPES[name], Path(folder))
            for kind in types:
                pair = opened(SHAPES[name], Path(folder), TYPES[kind])
                for rows, beams in product(given.pictures, given.beams):
                    section(name, kind, pair, rows, beams, given.rounds)
                del pair
                gc.collect()


if __name__ == "__main__":
    main()
