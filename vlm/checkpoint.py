"""Checkpoints: what was trained, as safetensors, written whole or not at all; frozen weights are hashed, not stored.

A run folder holds config.yaml, tokenizer.json, metrics.jsonl, step-0001000/ … and `latest`, the name of the newest.
`best`, where that is kept too, names the one of the lowest validation loss.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vlm import sharded
from vlm.model.weights.files import differences, fingerprint, read
from vlm.world import World

CONFIG, LATEST, BEST = "config.yaml", "latest", "best"
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
PARTS = "optimizer"  # a folder in place of that file where several processes keep its tensors divided (FSDP)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """Names of a model's tensors that a checkpoint holds, and those it leaves to their source."""

    kept: list[str]
    frozen: list[str]
    sha256: str  # of the frozen ones, which no step changes: hashed once, however often is saved


def divide(model: nn.Module, sourced: Collection[str]) -> Stored:
    """`sourced`: parts whose weights a named file or run can give again; their frozen tensors are not stored."""
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters()}
    awake = {name.split(".")[0] for name in learning}
    kept, frozen = list[str](), list[str]()
    for name in model.state_dict():
        part = name.split(".")[0]
        asleep = name not in learning if name in parameters else part not in awake
        (frozen if part in sourced and asleep else kept).append(name)
    return Stored(kept, frozen, fingerprint(model.state_dict(), frozen))


def save(
    run: Path,
    step: int,
    model: nn.Module,
    stored: Stored,
    optimizer: Optimizer,
    world: World,
    average: Mapping[str, Tensor] | None = None,
    keep: int = 2,
    extra: Mapping[str, Any] | None = None,
    best: bool = False,
) -> Path:
    """Writes step-N beside the others and then moves `latest` to it; an interrupted or failed save changes nothing.

    All processes of a run must call. `best`: it is the best so far, and outlives the `keep` newest. Checkpoints of
    later steps go: they are damaged, or will be made again.

    Errors: OSError when the disk is full or not writable.
    """
    final = run / f"step-{step:07d}"
    draft = run / f".{final.name}.tmp"
    weights = model.state_dict()
    kept = {name: weights[name] for name in stored.kept}
    memory = optimizer_tensors(model, optimizer)
    frozen = {"tensors": len(stored.frozen), "sha256": stored.sha256}

    def finish() -> None:
        seal(draft, {"step": step, "frozen": frozen, **(extra or {})})
        _commit(run, draft, final, keep, best)

    try:
        world.first_does(lambda: _begin(run, draft))
        if sharded.in_parts(kept):
            sharded.write_whole(draft / MODEL, kept, world)
            sharded.write(draft / PARTS, memory)
            if average is not None:
                sharded.write_whole(draft / AVERAGE, average, world)
        else:
            world.first_does(lambda: _write_all(draft, kept, memory, average))
        world.first_does(finish)
    except OSError as error:
        if world.first:
            shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"could not save step {step} in {run}: {error}; the checkpoints before it are whole") from None
    return final


def _begin(run: Path, draft: Path) -> None:
    for left in run.glob(".step-*.tmp"):  # by a process that was killed while saving
        shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)


def _write_all(
    draft: Path, kept: Mapping[str, Tensor], memory: Mapping[str, Tensor], average: Mapping[str, Tensor] | None
) -> None:
    _write(draft / MODEL, kept)
    _write(draft / OPTIMIZER, memory)
    if average is not None:
        _write(draft / AVERAGE, average)


def _commit(run: Path, draft: Path, final: Path, keep: int, best: bool) -> None:
    for file in draft.rglob("*"):
        _sync(file)
    if final.exists():
        _remove(final)
    draft.replace(final)
    _point(run, LATEST, final.name)
    if best:
        _point(run, BEST, final.name)
    found = checkpoints(run)
    mine = found.index(final)
    for other in found[: max(0, mine + 1 - keep)] + found[mine + 1 :]:
        if other != _named(run, BEST):
            _remove(other)


def _remove(folder: Path) -> None:
    """Under another name first, so that a kill leaves no checkpoint with some of its files."""
    draft = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    folder.replace(draft)
    shutil.rmtree(draft)


def checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in run.glob("step-*") if (path / "state.json").is_file())


def begun(run: Path) -> bool:
    """Whether something was ever saved in the folder."""
    return any(run.glob("step-*"))


def whole(run: Path, prefer: str = LATEST) -> Path:
    """The checkpoint that the pointer `prefer` names (else the newest) if its hashes are right, or the one before it.

    What is damaged is passed over with a warning that names it and the one used. Errors: as of `latest`; none whole.
    """
    if not begun(run):
        return latest(run)
    first = _named(run, prefer) or _named(run, LATEST)
    found = sorted(run.glob("step-*"), reverse=True)
    order = found if first is None else [first, *(path for path in found if path != first)]
    faults: list[str] = []
    for path in order:
        if not (fault := damage(path)):
            for bad in faults:
                log.warning("warning: %s; using %s in its place", bad, path.name)
            return path
        faults.append(f"{path} is damaged ({fault})")
    raise ValueError("\n".join([f"{run} holds no whole checkpoint:", *(f"  {fault}" for fault in faults)]))


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes state.json with the hashes of all other files in the folder, and of itself."""
    files = {name: _file_hash(folder / name) for name in sorted(_names(folder))}
    sealed = {**{key: value for key, value in state.items() if key != "sha256"}, "files": files}
    (folder / "state.json").write_text(json.dumps({**sealed, "sha256": _own_hash(sealed)}, indent=1) + "\n")


def damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if they are, byte for byte, what was saved."""
    try:
        state = read_state(checkpoint)
        files = dict(state["files"])
        if state.pop("sha256") != _own_hash(state):
            return "state.json has changed"
    except FileNotFoundError:
        return "state.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json cannot be read"
    for name, digest in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _file_hash(checkpoint / name) != digest:
            return f"{name} has changed"
    added = sorted(_names(checkpoint) - files.keys())
    return f"{added[0]} was not saved with it" if added else ""


def _names(folder: Path) -> set[str]:
    """Of the files in it, but for state.json and hidden ones, which systems leave where they like."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name for name in files if name != "state.json" and not name.rpartition("/")[2].startswith(".")}


def latest(run: Path) -> Path:
    """The newest complete checkpoint. Errors: a folder that is no run, or a run that has saved nothing yet."""
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no {CONFIG}")
    if (named := _named(run, LATEST)) is not None:
        return named
    found = checkpoints(run)
    if not found:
        raise ValueError(f"{run} holds no checkpoint yet: let it train up to its first save")
    return found[-1]


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _own_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _named(run: Path, pointer: str) -> Path | None:
    file = run / pointer
    named = run / file.read_text(errors="replace").strip() if file.is_file() else None
    return named if named is not None and (named / "state.json").is_file() else None


def load_weights(checkpoint: Path, model: nn.Module, sourced: Collection[str], averaged: bool = True) -> int:
    """Puts a checkpoint's weights (its average, if it has one and `averaged`) into the model; returns its step.

    What the checkpoint leaves out must lie in a `sourced` part and be, by its hash, what it was trained with.
    Errors: names, shapes or types that differ, all listed; other frozen weights.
    """
    state = read_state(checkpoint)
    own = model.state_dict()
    given = read(checkpoint / MODEL)
    if averaged and (checkpoint / AVERAGE).is_file():
        given |= read(checkpoint / AVERAGE)
    frozen = [name for name in own if name not in given and name.split(".")[0] in sourced]
    problems = differences({name: tensor for name, tensor in own.items() if name not in frozen}, given)
    problems += [  # loading would cast them in silence
        f"other type: {name} is {_dtype(tensor)}, the model's is {_dtype(own[name])}"
        for name, tensor in given.items()
        if name in own and own[name].dtype != tensor.dtype
    ]
    if problems:
        shown = "\n  ".join(problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise ValueError(f"{checkpoint} does not fit the model of its config:\n  {shown}")
    if state["frozen"]["sha256"] != fingerprint(own, frozen):
        raise ValueError(
            f"{checkpoint} was trained on other frozen weights than those found now: "
            "look at model.vision.weights and model.init in its config.yaml"
        )
    model.load_state_dict(given, strict=False)
    return int(state["step"])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The small facts of a checkpoint: step, hash of the frozen weights, and what the run added."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory, named after the parameters it belongs to."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value
    return found


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Gives an optimizer its memory back, whoever wrote it, one process or many, and whoever reads it now.

    Errors: memory of parameters that do not learn now.
    """
    learning = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in learning}

    def room(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = parameters.get(key.rpartition("/")[0])
        if parameter is None or parameter.shape != size:
            return torch.empty(size, dtype=dtype)
        return torch.empty_like(parameter.detach(), dtype=dtype)

    divided = checkpoint / PARTS
    for key, value in (sharded.read(divided, room) if divided.is_dir() else read(checkpoint / OPTIMIZER)).items():
        name, part = key.rsplit("/", 1)
        if (parameter := parameters.get(name)) is None:
            raise ValueError(f"{checkpoint} was trained with {name}, which does not learn now: compare train.params")
        value = sharded.like(value.to(parameter.device), parameter)
        # The fused optimizer walks raw memory: what has the parameter's shape needs its order of strides too.
        like = parameter.detach() if value.shape == parameter.shape else value
        optimizer.state[parameter][part] = torch.empty_like(like, dtype=value.dtype, device=parameter.device).copy_(
            value
        )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _point(run: Path, pointer: str, name: str) -> None:
    draft = run / f".{pointer}.tmp"
    try:
        draft.write_text(name + "\n")
        _sync(draft)
        draft.replace(run / pointer)
    finally:
        draft.unlink(missing_ok=True)
    _sync(run)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
