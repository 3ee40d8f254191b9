"""LoRA through peft (an extra): adapters on linear layers chosen by patterns, and folded into them again.

Hu et al. 2021, arXiv 2106.09685: y = W x + alpha / rank * B A x, where A (rank x in) and B (out x rank) learn and W
does not; B starts at zero, so that a model with fresh adapters gives what it gave before.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn

from vlm.model.vision import ImageEncoder, outline
from vlm.nn.adapter import adapters


@dataclass(frozen=True)
class Lora:
    """Adapters for the linear layers whose whole name `match` describes; the first that matches decides."""

    match: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0


def add_lora(model: nn.Module, specs: Sequence[Lora]) -> list[str]:
    """Puts adapters beside linear layers, in place, and returns these layers' names.

    A frozen part (one whose `frozen` is true) is meant only by a pattern that begins with its name and matches nothing
    elsewhere. Bases are frozen, adapters learn, all else learns as before.

    Errors, all at once: patterns that match nothing, other things than linear layers, layers that never run, or a
    frozen part by the way; ranks above a layer's width; peft not installed.
    """
    chosen, problems = _choose(model, specs)
    if problems := problems + _unused(model, chosen):
        raise ValueError("\n".join(problems))
    if chosen:
        wrap(model, chosen)
    return list(chosen)


def wrap(model: nn.Module, chosen: Mapping[str, Lora]) -> None:
    """Adapters for linear layers by name, in fp32 whatever the layer's dtype. ValueError: peft is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("adapters (model.lora) need peft: pip install 'vlm[lora]'") from None
    learned = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    for spec in dict.fromkeys(chosen.values()):
        names = [re.escape(name) for name, own in chosen.items() if own == spec]
        config = LoraConfig(  # a list of names would be one of suffixes
            r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=f"(?:{'|'.join(names)})"
        )
        inject_adapter_in_model(config, model)
        delattr(model, "peft_config")
    for parameter in model.parameters():  # peft has frozen them all
        parameter.requires_grad_(learned.get(id(parameter), True))
    for name, adapter in adapters(model).items():
        if name in chosen:
            adapter.base.requires_grad_(False)
            model.get_submodule(name).train(adapter.base.training)
            adapter.down.float()
            adapter.up.float()


def merge_lora(model: nn.Module) -> list[str]:
    """Folds all adapters into their layers, in place, which are plain again afterwards; returns these layers' names."""
    found = adapters(model)
    with torch.no_grad():
        for name, adapter in found.items():
            change = adapter.change()
            adapter.base.weight.copy_(adapter.base.weight.to(change.dtype) + change)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapter.base)
    return list(found)


def about(model: nn.Module, names: Collection[str]) -> list[str]:
    """One line for each kind of adapted layer, blocks taken together."""
    found = adapters(model)
    sizes = Counter[tuple[str, int]]()
    for name in names:
        sizes[_kind(name), len(found[name].down.weight)] += 1
    return [f"adapter of rank {rank}: {kind} ({count})" for (kind, rank), count in sizes.items()]


def _choose(model: nn.Module, specs: Sequence[Lora]) -> tuple[dict[str, Lora], list[str]]:
    things = {name: why for name, why in _things(model) if name}
    frozen = [name for name, part in model.named_children() if getattr(part, "frozen", False) is True]
    chosen: dict[str, Lora] = {}
    problems: list[str] = []
    for i, spec in enumerate(specs):
        where = f"model.lora.{i}: '{spec.match}'"
        try:
            pattern = re.compile(spec.match)
        except re.error as error:
            problems.append(f"{where} is not a regular expression ({error})")
            continue
        matched = [name for name in things if pattern.fullmatch(name)]
        fresh = [name for name in matched if name not in chosen]
        problems += [f"{where} {fault}" for fault in _faults(model, spec, fresh, things, frozen)]
        if matched and not fresh:
            problems.append(f"{where} matches nothing that an earlier pattern left over")
        elif not matched:
            problems.append(f"{where} matches nothing; linear layers are: {_near(spec.match, things)}")
        chosen |= {name: spec for name in fresh if not things[name]}
    return chosen, problems


def _faults(
    model: nn.Module, spec: Lora, names: Sequence[str], things: Mapping[str, str], frozen: Sequence[str]
) -> Iterator[str]:
    if odd := Counter(f"{_kind(name)} ({things[name]})" for name in names if things[name]):
        shown = ", ".join(list(odd)[:4]) + (", …" if len(odd) > 4 else "")
        yield f"matches more than linear layers: {shown}; end it with the names of linear layers"
    for part in frozen:
        inside = [name for name in names if name.startswith(f"{part}.")]
        if inside and not (spec.match.startswith(part) and len(inside) == len(names)):
            elsewhere = [name for name in names if name not in inside]
            yield (
                f"reaches into the frozen {part} ({_kinds(inside)})"
                + (f" as well as {_kinds(elsewhere)}" if elsewhere else "")
                + f"; a pattern that means it begins with '{part}' and matches nothing else"
            )
    for name in names:
        layer = model.get_submodule(name) if not things[name] else None
        if isinstance(layer, nn.Linear) and spec.rank > min(layer.weight.shape):
            yield f"has rank={spec.rank}, more than the {min(layer.weight.shape)} that {name} is wide"
            return


def _things(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules with weights, and tensors not called weight or bias; each with why it takes no adapter, if so."""
    taken = tuple(f"{name}." for name in adapters(model))
    for name, part in model.named_modules():
        if taken and name.startswith(taken):
            continue
        fused = isinstance(part, nn.MultiheadAttention)
        if f"{name}." in taken:
            yield name, "has one already"
        elif fused or (name.endswith("out_proj") and _inside_fused(model, name)):
            yield name, "torch's MultiheadAttention reads its fused matrices itself"
        elif any(True for _ in part.parameters()):
            yield name, "" if type(part) is nn.Linear else type(part).__name__
        for own, _ in part.named_parameters(recurse=False):
            if own not in ("weight", "bias"):
                yield f"{name}.{own}" if name else own, f"a tensor of {type(part).__name__}, which has no linear layers"


def _inside_fused(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _unused(model: nn.Module, chosen: Collection[str]) -> list[str]:
    """Chosen layers of the image encoder that a pass does not call: it may stop before them or read their weights."""
    encoder = getattr(model, "vision", None)
    inside = {model.get_submodule(name): name for name in chosen if name.startswith("vision.")}
    if not inside or not isinstance(encoder, ImageEncoder):
        return []
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in inside]
    try:
        outline(encoder.backbone, encoder.transform.size)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for layer, name in inside.items() if layer not in called]
    return [
        f"model.lora: {_kinds(idle)} of the image encoder never run as layers (they come after model.vision.layer, or "
        "the encoder reads their weights itself), so adapters would do nothing there"
    ] * bool(idle)


def _kind(name: str) -> str:
    """The name with numbers of blocks left open."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)


def _kinds(names: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(map(_kind, names)))
    return ", ".join(kinds[:4]) + (", …" if len(kinds) > 4 else "")


def _near(pattern: str, things: Mapping[str, str]) -> str:
    kinds = list(dict.fromkeys(_kind(name) for name, why in things.items() if not why))
    close = get_close_matches(re.sub(r"[\\^$()?*+]", "", pattern), kinds, n=4, cutoff=0.5)
    return ", ".join(close or kinds[:6]) + ("" if close or len(kinds) <= 6 else ", …")
