"""Loading 1 GB of sharded safetensors into a Llama: time beside reading the bytes, peak memory beside the model's size.

    python -m tests.bench.load [--rounds 5] [--types fp32 bf16] [--only fill …]

Every figure is of a process of its own, which has imported everything and owns no freed memory; the files are in the
page cache. Candidates of a round run one after another, each round from another one on; medians, of peaks the range.
CPU seconds of the process count, since other work on a shared machine stretches the time on the wall.
Peak: resident memory above that before the call, mapped files included, over the bytes of the tensors that come out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tests.bench.side_by_side import peak_memory
from vlm.model.language import Decoder, llama
from vlm.model.weights.fill import fill
from vlm.model.weights.hollow import hollow
from vlm.model.weights.llama import llama_table
from vlm.model.weights.save import save
from vlm.model.weights.source import open_weights

VOCABULARY, WIDTH, HEADS, HIDDEN, SHARD = 32000, 1024, 16, 2816, 300_000_000
LAYERS = {"fp32": 14, "bf16": 34}  # about 1 GB either way
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAST = {"float32": torch.bfloat16, "bfloat16": torch.float32}
BASE = "read the bytes"


def empty(layers: int) -> Decoder:
    """Ours, without memory."""
    with hollow():
        return llama(VOCABULARY, WIDTH, layers, HEADS, hidden=HIDDEN, eps=1e-6, tied=False)


def written(folder: Path, kind: str) -> Path:
    """A published folder of random weights."""
    model = empty(LAYERS[kind]).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    save(model, llama_table(False), folder, TYPES[kind], SHARD)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS[kind],
        num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=1e-6, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype=str(TYPES[kind]).removeprefix("torch."),
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def reused(folder: Path) -> object:
    """The bytes into one buffer again and again, which keeps nothing."""
    buffer = bytearray(2**23)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return b""


def ours(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    model = empty(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    fill(model, llama_table(False), open_weights(folder), dtype)
    return model


def at_once(folder: Path) -> nn.Module:
    """All shards as a dictionary, converted, assigned: the tensors are the mapped files themselves."""
    published = {name: tensor for path in files(folder) for name, tensor in load_file(path).items()}
    model = empty(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    model.load_state_dict(llama_table(False).to_ours(published), assign=True)
    return copied(model)


def copied(model: nn.Module) -> nn.Module:
    """With every page read, as the first forward pass would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    return model


def transformers(folder: Path) -> nn.Module:
    logging.disable_progress_bar()
    return copied(LlamaForCausalLM.from_pretrained(folder, dtype="auto"))


CANDIDATES: dict[str, Callable[[Path], Any]] = {
    BASE: lambda folder: [path.read_bytes() for path in files(folder)],
    "the same into one buffer": reused,
    "fill": ours,
    "fill, cast": lambda folder: ours(folder, CAST[json.loads((folder / "config.json").read_text())["dtype"]]),
    "load_file of all, assigned": at_once,
    "transformers, from_pretrained": transformers,
}


def child(name: str, folder: Path) -> dict[str, float]:
    """One candidate in this process: CPU and wall seconds, MiB."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    result: list[Any] = []

    def run() -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        result.append(CANDIDATES[name](folder))
        found.update(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)

    found["peak"] = peak_memory(run)
    [made] = result
    sizes = (p.nbytes for p in made.parameters()) if isinstance(made, nn.Module) else map(len, made)
    found["bytes"] = sum(sizes) / 2**20
    return found


def measure(folder: Path, names: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """All candidates, in processes of their own."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for path in files(folder):
        path.read_bytes()
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            command = [sys.executable, "-m", "tests.bench.load", "--child", name, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help=f"besides '{BASE}'")
    parser.add_argument("--child", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.folder)))
        return
    for kind in given.types:
        with tempfile.TemporaryDirectory() as name:
            folder = written(Path(name), kind)
            found = measure(folder, [BASE, *(name for name in given.only if name != BASE)], given.rounds)
        print(f"\n{kind}: {sum(run['bytes'] for run in found[BASE][:1]):.0f} MiB in shards of {SHARD / 1e6:.0f} MB")
        base = [run["cpu"] for run in found[BASE]]
        for candidate, runs in found.items():
            ratio = statistics.median(run["cpu"] / b for run, b in zip(runs, base, strict=True))
            peaks = [run["peak"] / run["bytes"] if run["bytes"] else 0.0 for run in runs]
            cpu, wall = (statistics.median(run[key] for run in runs) for key in ("cpu", "wall"))
            times = f"{cpu:6.2f} s CPU {wall:6.2f} s  time / {BASE} {ratio:5.2f}"
            print(f"  {candidate:30s} {times}  peak / model {min(peaks):.2f} to {max(peaks):.2f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
