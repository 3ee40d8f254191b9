"""Advice on machines that nobody here has: each rule says its sentence there, and nothing on a healthy one."""

from dataclasses import replace
from typing import Any

import pytest

from vlm.doctor.advice import RULES, Advice, advise
from vlm.doctor.facts import Conflict, Decoding, Extra, Facts, Gpu, Machine, Package, Pictures, Rate, Torch

GIB = 2**30
MACHINE = Machine(
    system="Linux",
    cpu="A CPU",
    instructions=("AVX2", "AVX-512", "AVX-512 bf16"),
    cores=8,
    usable=8,
    memory=32 * GIB,
    shared=16 * GIB,
    open_files=20000,
    driver=None,
    load=0.5,
)
TORCH = Torch(threads=8, onednn=True, exact=True, bf16=True, cuda="13.0", gpus=(), mps=False)
GPU = Gpu("A GPU", 80 * GIB, "9.0", True)
HEALTHY = Facts(
    vlm="0.1.0",
    python="3.12.1",
    described=True,
    packages=(Package("torch", ">=2.9", "2.14.1", True), Package("pillow", ">=10.3", "13.0", True)),
    conflicts=(),
    extras=(Extra("lora", "adapters", (Package("peft", ">=0.17", None, False),)),),
    machine=MACHINE,
    torch=TORCH,
    pictures=Pictures(True, "3.2.0", True),
    rates=(Rate("cpu", "fp32", 1024, 100.0, 2e-7), Rate("cpu", "bf16", 1024, 200.0, 3e-3)),
    decoding=Decoding(3.0, 80.0, 110.0),
)


def machine(**changes: Any) -> dict[str, Any]:
    return {"machine": replace(MACHINE, **changes)}


def torch(**changes: Any) -> dict[str, Any]:
    return {"torch": replace(TORCH, **changes)}


def rates(**gflops: float) -> tuple[Rate, ...]:
    names = {"onednn": "fp32, oneDNN"}
    return tuple(Rate("cpu", names.get(kind, kind), 1024, rate, 0.0) for kind, rate in gflops.items())


OLD_PEFT = Extra("lora", "adapters", (Package("peft", ">=0.17", "0.5", False),))
FLA = Extra("fla", "kernels", (Package("flash-linear-attention", ">=0.6", "0.7", True),))
NO_NUMBERS = {"rates": ()}
# What differs from a healthy machine; level, and words of the sentence and of its remedy.
CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "too old": (
        {"packages": (Package("torch", ">=2.9", "2.4.0", False),)},
        "wrong",
        "torch 2.4.0 is installed, >=2.9 is needed",
        "pip install 'torch>=2.9'",
    ),
    "missing": (
        {"packages": (Package("timm", ">=1.0", None, False),)},
        "wrong",
        "timm is not installed",
        "pip install 'timm>=1.0'",
    ),
    "an old extra": (
        {"extras": (OLD_PEFT,)},
        "wrong",
        "peft 0.5 is installed, >=0.17 is needed for the extra lora",
        "pip install 'vlm[lora]'",
    ),
    "not installed": ({"described": False, "packages": ()}, "note", "vlm is not installed, only found", "pip install"),
    "torchvision of another torch": (
        {"conflicts": (Conflict("torchvision", "torch==2.9.0", "2.14.1"),)},
        "wrong",
        "torchvision asks for torch==2.9.0, 2.14.1 is installed",
        "pip install --upgrade torchvision 'torch==2.9.0'",
    ),
    "torchvision that does not load": (
        {"failed": {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}},
        "wrong",
        "torchvision cannot be used (RuntimeError: operator torchvision::nms does not exist)",
        "install both together",
    ),
    "torch that does not load": (
        {"failed": {"torch": "OSError: libcudart.so.13: cannot open"}, "torch": None, **NO_NUMBERS},
        "wrong",
        "torch cannot be used (OSError: libcudart.so.13: cannot open)",
        "pip install --force-reinstall torch",
    ),
    "no JPEG": ({"pictures": Pictures(False, None, True)}, "wrong", "Pillow was built without JPEG", "--only-binary"),
    "no turbo": ({"pictures": Pictures(True, None, True)}, "slow", "without libjpeg-turbo", "--only-binary"),
    "no WebP": ({"pictures": Pictures(True, "3.0", False)}, "slow", "without WebP", "--only-binary"),
    "one thread": (torch(threads=1), "slow", "products use 1 thread, 8 cores are usable", "unset OMP_NUM_THREADS"),
    "a container with a quota": (
        machine(usable=2),
        "slow",
        "products use 8 threads, 2 of 8 cores are usable",
        "export OMP_NUM_THREADS=2",
    ),
    "emulated bf16": (
        {**torch(bf16=False), "rates": rates(fp32=100.0, bf16=5.0)},
        "slow",
        "no instructions for it, at 0.05 of the speed of fp32",
        "train.precision at auto",
    ),
    "emulated bf16, not measured": (
        {**torch(bf16=False), **NO_NUMBERS},
        "slow",
        "bf16 is emulated: the CPU has no instructions for it",
        "train.precision at auto",
    ),
    "slow fp16": ({"rates": rates(fp32=100.0, fp16=2.0)}, "note", "fp16 runs at 0.02", "computes fp16 checkpoints"),
    "a torch without oneDNN": (torch(onednn=False, exact=False), "slow", "without oneDNN", "--force-reinstall torch"),
    "oneDNN is faster": ({"rates": rates(fp32=50.0, onednn=105.0)}, "note", "2.1 times as fast", "fast_float32"),
    "a GPU and torch for CPUs": (
        {**machine(driver="570.1"), **torch(cuda=None)},
        "slow",
        "an NVIDIA driver (570.1), but torch was built for the CPU alone",
        "from the index of a CUDA version",
    ),
    "a GPU that torch does not find": (
        machine(driver="470.82"),
        "wrong",
        "torch was built for CUDA 13.0 and finds no GPU, though there is an NVIDIA driver (470.82)",
        "update the driver",
    ),
    "hidden GPUs": (
        {**machine(driver="570.1"), "environment": {"CUDA_VISIBLE_DEVICES": ""}},
        "note",
        "CUDA_VISIBLE_DEVICES hides all GPUs",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "a GPU without its kernels": (torch(gpus=(GPU,)), "note", "retention has faster kernels", "pip install 'vlm[fla]'"),
    "Apple's GPU": (torch(mps=True, cuda=None), "note", "does not use Apple's GPU", "CUDA"),
    "few open files": (machine(open_files=256), "slow", "a process may open 256 files", "ulimit -n 4096"),
    "a container's /dev/shm": (machine(shared=64 * 2**20), "slow", "/dev/shm holds 64 MiB", "--shm-size=2g"),
    "little memory": (machine(memory=2 * GIB), "slow", "2.0 GiB of memory", "data.workers=0"),
    "others compute": (machine(load=20.0), "note", "20.0 processes compete for 8 cores", "measure again"),
    "a cache that cannot be written": (
        {"cache": "/cache: Permission denied"},
        "wrong",
        "the cache of shards cannot be written: /cache: Permission denied",
        "export VLM_CACHE=FOLDER",
    ),
    "offline": ({"environment": {"HF_HUB_OFFLINE": "1"}}, "note", "HF_HUB_OFFLINE is set", "unset it"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_fault_is_told_alone(case: tuple[dict[str, Any], str, str, str]) -> None:
    changes, level, what, remedy = case
    (found,) = advise(replace(HEALTHY, **changes))
    assert found.level == level and what in found.what and remedy in found.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**torch(gpus=(GPU,)), "extras": (FLA,)},
        {**torch(gpus=(GPU,), bf16=False, onednn=False), "extras": (FLA,)},  # the CPU's types do not matter then
        machine(load=None, memory=None, shared=None, open_files=None),  # a system that tells less
        machine(open_files=-1),  # no limit
        {"environment": {"HF_HUB_OFFLINE": "0"}},
        {**machine(usable=1), **torch(threads=1)},
        {"rates": rates(fp32=100.0, onednn=101.0, fp16=90.0)},
    ],
)
def test_nothing_to_say(changes: dict[str, Any]) -> None:
    assert advise(replace(HEALTHY, **changes)) == ()


def test_what_is_wrong_comes_first() -> None:
    changes: dict[str, Any] = {**machine(load=20.0), **torch(threads=1), "cache": "full"}
    assert [advice.level for advice in advise(replace(HEALTHY, **changes))] == ["wrong", "slow", "note"]


def test_every_rule_has_a_case() -> None:
    def speaks(rule: Any) -> bool:
        return any(isinstance(one, Advice) for case in CASES.values() for one in rule(replace(HEALTHY, **case[0])))

    assert [rule.__name__ for rule in RULES if not speaks(rule)] == []
