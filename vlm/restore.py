"""A run's folder back to a model: its settings, tokenizer, parts taken from other runs, and trained weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm import build, build_data, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.load import load
from vlm.config.vision import Vision
from vlm.data.talk_batch import Reader, TalkForm
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.model.language import Decoder
from vlm.model.lora import merge_lora
from vlm.model.published.start import starting_weights
from vlm.model.published.usage import Usage
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import MixtureOfExperts, upcycle

TOKENIZER = "tokenizer.json"
READER = "reader.json"  # the tokenizer of a Q-Former that reads questions


@dataclass(frozen=True)
class Ready:
    """A model ready for use, from a run or as published."""

    name: str  # by which the user called it
    model: VisionLanguageModel
    tokenizer: Tokenizer
    settings: schema.Data  # how texts reach it
    writes: bool  # was it trained to?
    batch_size: int = 32  # pictures that it takes at a time
    vision: Vision | None = None  # which encoder features of a run are of
    reads: Reader | None = None  # how its Q-Former reads questions
    usage: Usage | None = None  # how the authors of a published model have it write

    @property
    def data(self) -> schema.PairData | schema.ChatData:
        """How pictures and texts reach it. ValueError: it knows text alone."""
        if isinstance(self.settings, schema.TextData):
            raise ValueError(f"{self.name} knows text alone: it cannot look at pictures")
        return self.settings

    def form(self, question: str | None) -> tuple[TalkForm, str, Sequence[str]]:
        """How a question about a picture becomes text for it, the question in its authors' words, strings that end it.

        Without a question: what is said where a caption is wanted. ValueError: it was not trained on conversations.
        """
        data, usage = self.data, self.usage
        if not isinstance(data, schema.ChatData):
            raise ValueError(f"{self.name} was trained on captions (data.kind={data.kind}), not to answer questions")
        name, words = data.template, question or ""
        if usage is not None:
            name, words = usage.asked(question)
        form = TalkForm(
            self.tokenizer,
            build_data.template(name),
            self.model.image_tokens,
            data.max_tokens,
            data.turns,
            data.system,
            reader=self.reads,
            reply_start=self.model.reply_start,
        )
        return form, words, () if usage is None else usage.stop


@dataclass(frozen=True)
class Trained(Ready):
    """A model as a run left it."""

    run: schema.Run = field(kw_only=True)
    step: int = field(kw_only=True)


def sourced_parts(run: schema.Run) -> set[str]:
    """Parts whose starting weights can be had again: from a hub or a file by name, or from another run."""
    return {part for part, source in run.model.init.items() if source} | (
        {part for part, named in _named(run.model).items() if named}
    )


def _named(model: schema.Model) -> dict[str, str | None]:
    """Parts whose settings can name a source of their own."""
    parts = {"vision": model.vision, "language": model.language}
    return {name: None if part is None else part.source for name, part in parts.items()}


def initialise(model: VisionLanguageModel, run: schema.Run, folder: Path) -> list[str]:
    """Fills parts from the runs that `model.init` names (relative to `folder` or to the working directory), or from
    published checkpoints.

    Adapters of these runs come merged; those of `model.lora` are put in at the end.
    Returns a line for each part: what was taken, what is new here, what was left behind; then the adapters'.
    """
    lines = []
    for part, source in run.model.init.items():
        if source is None:
            continue
        module = getattr(model, part)
        if module is None:
            raise ValueError(f"model.init.{part}: this model has no such part")
        if (path := _find(source, folder)) is not None:
            weights, line = _of_run(module, part, path)
        else:
            weights, line = _of_published(module, part, source)
        lines.append(_take(module, weights, part, source if path is None else str(path)) + line)
    return lines + build.adapt(run, model)


def _of_run(module: nn.Module, part: str, path: Path) -> tuple[dict[str, Tensor], str]:
    other = restore(path)
    merge_lora(other.model)
    given = getattr(other.model, part)
    if given is None:
        raise ValueError(f"model.init.{part}: {path} has no such part")
    if isinstance(module, Decoder) and isinstance(given, Decoder):
        return _upcycled(module, given)
    return given.state_dict(), ""


def _of_published(module: nn.Module, part: str, source: str) -> tuple[dict[str, Tensor], str]:
    try:
        return starting_weights(module, part, source)
    except ValueError as error:
        raise ValueError(f"model.init.{part}: no folder of a run (it has no {CONFIG}); {error}") from None


def _upcycled(module: Decoder, given: Decoder) -> tuple[dict[str, Tensor], str]:
    """Weights of `given` for `module`: where a dense network meets experts, they start as its copies or slices."""
    weights, count = given.state_dict(), 0
    for i, (own, old) in enumerate(zip(module.stack.blocks, given.stack.blocks, strict=False)):
        if not isinstance(own.ffn, MixtureOfExperts) or not isinstance(old.ffn, GatedMlp):
            continue
        width, hidden = old.ffn.gate.weight.shape[0], own.ffn.down.shape[2]
        if width % hidden:
            raise ValueError(f"model.language.ffn.hidden: {hidden} does not divide {width}, which is to be upcycled")
        made = upcycle(old.ffn, own.ffn.router, width // hidden, own.ffn.shared)
        prefix = f"stack.blocks.{i}.ffn."
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights |= {prefix + name: value for name, value in made.state_dict().items()}
        count += 1
    return weights, f", {count} dense networks upcycled to experts" if count else ""


def _find(source: str, folder: Path) -> Path | None:
    places = (Path(os.path.normpath(folder / source)), Path(source))
    return next((path for path in places if (path / CONFIG).is_file()), None)


def _take(module: nn.Module, given: dict[str, Tensor], part: str, source: str) -> str:
    own = module.state_dict()
    shared = {name for name in own if name in given}
    differing = [name for name in sorted(shared) if own[name].shape != given[name].shape]
    if differing or not shared:
        what = ", ".join(f"{n} {tuple(given[n].shape)} for {tuple(own[n].shape)}" for n in differing[:5])
        raise ValueError(f"model.init.{part}: the weights of {source} do not fit: {what or 'no name in common'}")
    module.load_state_dict({name: given[name] for name in shared}, strict=False)
    new, left = sorted(set(own) - shared), sorted(set(given) - shared)
    extra = f", new here: {', '.join(new[:4])}{' …' if len(new) > 4 else ''}" if new else ""
    return f"{part}: {len(shared)} tensors from {source}{extra}" + (f", {len(left)} left behind" if left else "")


def restore(folder: Path, device: torch.device | None = None) -> Trained:
    """A run's newest checkpoint (its best, if that is kept), ready for evaluation; a damaged one is passed over.

    Errors: no run, no checkpoint, weights that do not fit.
    """
    chosen = checkpoint.whole(folder, checkpoint.BEST)
    run = load(schema.Run, folder / CONFIG)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    reads = build_data.reader(run, tokenizer, folder / READER)
    model = build.model(run, tokenizer, reads)
    initialise(model, run, folder)
    step = checkpoint.load_weights(chosen, model, sourced_parts(run))
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(device)
    return Trained(
        str(folder),
        model,
        tokenizer,
        run.data,
        any(loss.kind == "lm" for loss in run.losses),
        run.train.batch_size,
        run.model.vision,
        reads,
        run=run,
        step=step,
    )


def relative_init(run: schema.Run, folder: Path) -> schema.Run:
    """Settings whose `init` folders are told from the run's own, where both lie side by side: such a tree can move.

    Published folders under parts are told by their whole path.
    """
    moved = {}
    for part, source in run.model.init.items():
        if source is None:
            continue
        found = _find(source, folder)
        if found is None:  # said by `initialise`, as it was written
            moved[part] = source
            continue
        path = found.resolve()
        beside = path.parent == folder.resolve().parent
        moved[part] = os.path.relpath(path, folder.resolve()) if beside else str(path)
    return run.model_copy(update={"model": run.model.model_copy(update={"init": moved, **_placed(run.model)})})


def _placed(model: schema.Model) -> dict[str, object]:
    """Parts of published folders by their whole path, so that the run can be used from any working directory."""
    found: dict[str, object] = {}
    for part in ("vision", "language"):
        settings = getattr(model, part)
        if settings is None or settings.kind not in ("published", "huggingface") or settings.name is None:
            continue
        if (path := Path(settings.name).expanduser()).exists():
            found[part] = settings.model_copy(update={"name": str(path.resolve())})
    return found
