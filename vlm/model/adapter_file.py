"""Adapters as a folder in the layout that peft publishes: adapter_config.json and adapter_model.safetensors.

Layers have our names in it, or, by a table of a family, those of the published model, whose adapters peft can read.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.data.tars import drafted
from vlm.model.lora import Lora, wrap
from vlm.model.weights.conversion import STACKED
from vlm.model.weights.files import fingerprint, read
from vlm.model.weights.table import Table
from vlm.nn.adapter import adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HASH = "base_sha256"  # in the header of the weights, where peft looks for nothing

# Settings of LoRA that change nothing in what trained adapters compute, and those that are understood.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"}
_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is


class _Pair(NamedTuple):
    down: Tensor
    up: Tensor


def save_adapter(model: nn.Module, folder: Path, base: str | None = None, table: Table | None = None) -> None:
    """Writes all adapters of a model, and the hash of the layers that they stand beside; whole or not at all.

    `base`: name of the model that they are for. `table`: gives the layers their published names.
    Errors: no adapters; a folder that exists; layers that the published model holds fused with others.
    """
    found = adapters(model)
    if not found:
        raise ValueError(f"{folder}: this model has no adapters to save")
    names = {name: name for name in found} if table is None else _published(model, table, list(found))
    ranks = {names[name]: len(own.down.weight) for name, own in found.items()}
    alphas = {names[name]: own.scale * len(own.down.weight) for name, own in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(float(getattr(own.dropout, "p", 0.0)) for own in found.values()),
        "rank_pattern": {_exactly(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {_exactly(name): own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, own in found.items():
        tensors[f"{PREFIX}{names[name]}.lora_A.weight"] = own.down.weight.detach().cpu().contiguous()
        tensors[f"{PREFIX}{names[name]}.lora_B.weight"] = own.up.weight.detach().cpu().contiguous()
    with drafted(folder, overwrite=False) as draft:
        (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        header = {"format": "pt", HASH: _base_hash({names[name]: own.base for name, own in found.items()})}
        save_file(tensors, draft / WEIGHTS, metadata=header)


def load_adapter(model: nn.Module, folder: Path, table: Table | None = None) -> list[str]:
    """Gives a model the adapters of a folder, in place, and returns the names of the layers that have one now.

    `table`: the layers have published names there. Nothing is changed by an error: no such folder, a pickle, a kind of
    adapter other than plain LoRA, layers or shapes that the model does not have (all listed), another base by its hash.
    """
    config = _settings(folder)
    pairs = _pairs(folder)
    ours = {name: name for name in pairs} if table is None else _own(table, list(pairs), folder)
    things, adapted = dict(model.named_modules()), adapters(model)
    problems = []
    for name, pair in pairs.items():
        own = ours[name]
        fault = _misfit(things, own, _spec(config, name).rank, pair)
        if fault := "has an adapter already: merge it first" if own in adapted else fault:
            problems.append(f"{own if own == name else f'{own} ({name})'} {fault}")
    if problems:
        shown = "\n  ".join(problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise ValueError(f"{folder} does not fit this model:\n  {shown}")
    _check_base({name: things[ours[name]] for name in pairs}, folder)
    wrap(model, {ours[name]: _spec(config, name) for name in pairs})
    found = adapters(model)
    with torch.no_grad():
        for name, pair in pairs.items():
            found[ours[name]].down.weight.copy_(pair.down)
            found[ours[name]].up.weight.copy_(pair.up)
    return list(ours.values())


def _base_hash(layers: Mapping[str, nn.Module]) -> str:
    """SHA-256 of the layers' weights under the names that they have in the file."""
    tensors = {f"{name}.{own}": value for name, layer in layers.items() for own, value in layer.state_dict().items()}
    return fingerprint(tensors, list(tensors))


def _check_base(layers: Mapping[str, nn.Module], folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        known = (file.metadata() or {}).get(HASH)
    if known is not None and known != _base_hash(layers):
        raise ValueError(
            f"{folder}: these adapters were trained beside other weights than this model's (or in another dtype)"
        )


def _settings(folder: Path) -> dict[str, Any]:
    pickles = sorted(path.name for path in folder.glob("adapter_model.*") if path.suffix in (".bin", ".pt", ".pth"))
    if not (folder / WEIGHTS).is_file() and pickles:
        raise ValueError(f"{folder}: {pickles[0]} is refused, for a pickle can run code; save it as {WEIGHTS}")
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: no folder of adapters: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder / CONFIG}: peft_type is {kind!r}; LORA alone can be read")
    unknown = {name: value for name, value in config.items() if name not in _HARMLESS | _UNDERSTOOD}
    begins, bias = unknown.pop("init_lora_weights", True), unknown.pop("bias", "none")
    odd = [f"{name}={value!r}" for name, value in unknown.items() if value and name != "megatron_config"]
    odd += [f"bias={bias!r}"] * (bias != "none") + [f"init_lora_weights={begins!r}"] * (begins not in _STARTS)
    if odd:
        raise ValueError(f"{folder / CONFIG}: plain LoRA alone can be read, not {', '.join(odd)}")
    return config


def _pairs(folder: Path) -> dict[str, _Pair]:
    """Matrices by the name of their layer."""
    tensors = read(folder / WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    odd = []
    for name, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if match is None or tensor.ndim != 2:
            odd.append(name)
        else:
            halves.setdefault(match[1], {})[match[2]] = tensor
    odd += [
        f"{PREFIX}{name}.lora_{'AB'.strip(next(iter(own)))} (missing)" for name, own in halves.items() if len(own) < 2
    ]
    if odd or not halves:
        raise ValueError(
            f"{folder / WEIGHTS}: not the adapters of linear layers alone: {', '.join(odd[:5]) or 'empty'}"
        )
    return {name: _Pair(own["A"], own["B"]) for name, own in halves.items()}


def _spec(config: Mapping[str, Any], name: str) -> Lora:
    rank = _of(config, "rank_pattern", name, config.get("r", 8))
    alpha = float(_of(config, "alpha_pattern", name, config.get("lora_alpha", 8)))
    # Rank-stabilised adapters are scaled by alpha / sqrt(rank).
    return Lora(name, rank, alpha * rank**0.5 if config.get("use_rslora") else alpha, config.get("lora_dropout", 0.0))


def _of(config: Mapping[str, Any], patterns: str, name: str, otherwise: Any) -> Any:
    """As peft looks patterns up: the first whose end of a name it is."""
    given = config.get(patterns) or {}
    return next((own for pattern, own in given.items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)


def _misfit(modules: Mapping[str, nn.Module], name: str, rank: int, pair: _Pair) -> str:
    layer = modules.get(name)
    if layer is None:
        return "is not in the model"
    if type(layer) is not nn.Linear or isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
        return "is no linear layer here"
    out, into = layer.weight.shape
    given = tuple(pair.down.shape), tuple(pair.up.shape)
    if given == ((rank, into), (out, rank)):
        return ""
    return f"has A {given[0]} and B {given[1]}, which at rank {rank} must be {(rank, into)} and {(out, rank)}"


def _published(model: nn.Module, table: Table, names: list[str]) -> dict[str, str]:
    found = adapters(model)
    units = table.writing({f"{name}.weight": found[name].base.weight for name in names})
    return _layers({unit.ours: unit.theirs for unit in units if unit.via is STACKED}, names, table.family)


def _own(table: Table, names: list[str], folder: Path) -> dict[str, str]:
    try:
        units = table.reading([f"{name}.weight" for name in names])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return _layers({unit.theirs: unit.ours for unit in units if unit.via is STACKED}, names, table.family)


def _layers(made: Mapping[tuple[str, ...], tuple[str, ...]], names: list[str], family: str) -> dict[str, str]:
    """Names of layers on the other side. ValueError: matrices that are cut, fused or turned on the way."""
    alone = {ours[0]: theirs[0] for ours, theirs in made.items() if len(ours) == len(theirs) == 1}
    if fused := [name for name in names if f"{name}.weight" not in alone]:
        raise ValueError(f"{family}: {', '.join(fused[:4])}: fused or tied with others in one of the two layouts")
    return {name: alone[f"{name}.weight"].removesuffix(".weight") for name in names}


def _exactly(name: str) -> str:
    """A pattern that peft finds in this name alone."""
    return "^" + re.escape(name)
