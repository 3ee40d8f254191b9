"""The computer, as the operating system tells it: Linux in full, elsewhere what Python itself knows."""

import math
import os
import platform
import re
from pathlib import Path

from vlm.doctor.facts import Machine

# What the kernel calls the instructions that products of matrices gain from, and what people call them.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_fp16": "AVX-512 fp16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "Arm bf16",
}


def look(root: Path = Path("/")) -> Machine:
    """`root`: where proc, sys and dev are found."""
    processor = _text(root / "proc/cpuinfo")
    cores = os.cpu_count() or 1
    return Machine(
        system=platform.platform(),
        cpu=_cpu(processor),
        instructions=instructions(processor),
        cores=cores,
        usable=min(_allowed(cores), quota(root) or cores),
        memory=memory(root),
        shared=_shared(root / "dev/shm"),
        open_files=_open_files(),
        driver=_driver(root),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu(processor: str) -> str:
    name = re.search(r"^model name\s*: (.+)$", processor, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def instructions(processor: str) -> tuple[str, ...]:
    """Those of INSTRUCTIONS that a text such as /proc/cpuinfo names; none where there is no such file."""
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", processor, re.MULTILINE)
    there = set(flags[1].split()) if flags else set()
    return tuple(name for flag, name in INSTRUCTIONS.items() if flag in there)


def _allowed(cores: int) -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores


def quota(root: Path) -> int | None:
    """Cores' worth of time that a container gives, rounded up; None without a limit. Both generations of cgroups."""
    limit, _, period = _text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if not limit:
        folder = root / "sys/fs/cgroup/cpu"
        limit, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if not limit.strip().isdigit() or not period.strip().isdigit():  # "max", "-1"
        return None
    return max(1, math.ceil(int(limit) / int(period)))


def memory(root: Path) -> int | None:
    """Of the machine, or of the container where that is less."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    sizes = [int(total[1]) * 1024] if total else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        if (limit := _text(root / "sys/fs/cgroup" / name).strip()).isdigit():
            sizes.append(int(limit))
    return min(sizes, default=None)


def _shared(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    found = os.statvfs(folder)
    return found.f_frsize * found.f_blocks


def _open_files() -> int | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", _text(root / "proc/driver/nvidia/version"))
    return found[1] if found else None
