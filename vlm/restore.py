"""A run's folder back to a model: its settings, tokenizer, parts taken from other runs, and trained weights."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm import build, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.language import HuggingFaceLanguage
from vlm.config.load import load
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.model.language import Decoder
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import MixtureOfExperts, upcycle

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Trained:
    """A model as a run left it."""

    run: schema.Run
    model: VisionLanguageModel
    tokenizer: Tokenizer
    step: int
    folder: Path


def sourced_parts(run: schema.Run) -> set[str]:
    """Parts whose starting weights can be had again: from a hub or a file by name, or from another run."""
    language = run.model.language
    named = {"language"} if isinstance(language, HuggingFaceLanguage) and language.pretrained else set()
    if run.model.vision is not None and run.model.vision.weights is not None:
        named.add("vision")
    return {part for part, source in run.model.init.items() if source} | named


def initialise(model: VisionLanguageModel, run: schema.Run, folder: Path) -> list[str]:
    """Fills parts from the runs that `model.init` names (relative to `folder` or to the working directory).

    Returns a line for each part: what was taken, what is new here, what was left behind.
    """
    lines = []
    for part, source in run.model.init.items():
        if source is None:
            continue
        path = _find(source, folder)
        if path is None:
            raise ValueError(f"model.init.{part}: '{source}' is not the folder of a run (it has no {CONFIG})")
        other = restore(path)
        module, given = getattr(model, part), getattr(other.model, part)
        if module is None or given is None:
            raise ValueError(f"model.init.{part}: {'this model' if module is None else path} has no such part")
        weights, line = given.state_dict(), ""
        if isinstance(module, Decoder) and isinstance(given, Decoder):
            weights, line = _upcycled(module, given)
        lines.append(_take(module, weights, part, path) + line)
    return lines


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


def _take(module: nn.Module, given: dict[str, Tensor], part: str, path: Path) -> str:
    own = module.state_dict()
    shared = {name for name in own if name in given}
    differing = [name for name in sorted(shared) if own[name].shape != given[name].shape]
    if differing or not shared:
        what = ", ".join(f"{n} {tuple(given[n].shape)} for {tuple(own[n].shape)}" for n in differing[:5])
        raise ValueError(f"model.init.{part}: the weights of {path} do not fit: {what or 'no name in common'}")
    module.load_state_dict({name: given[name] for name in shared}, strict=False)
    new, left = sorted(set(own) - shared), sorted(set(given) - shared)
    extra = f", new here: {', '.join(new[:4])}{' …' if len(new) > 4 else ''}" if new else ""
    return f"{part}: {len(shared)} tensors from {path}{extra}" + (f", {len(left)} left behind" if left else "")


def restore(folder: Path, device: torch.device | None = None) -> Trained:
    """A run's newest checkpoint (its best, if that is kept), ready for evaluation; a damaged one is passed over.

    Errors: no run, no checkpoint, weights that do not fit.
    """
    chosen = checkpoint.whole(folder, checkpoint.BEST)
    run = load(schema.Run, folder / CONFIG)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    model = build.model(run, tokenizer)
    initialise(model, run, folder)
    step = checkpoint.load_weights(chosen, model, sourced_parts(run))
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(device)
    return Trained(run, model, tokenizer, step, folder)


def relative_init(run: schema.Run, folder: Path) -> schema.Run:
    """Settings whose `init` folders are told from the run's own, where both lie side by side: such a tree can move."""
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
    return run.model_copy(update={"model": run.model.model_copy(update={"init": moved})})
