"""What is wrong or slow here and what to do about it: facts in, advice out. Nothing is looked up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from vlm.doctor.facts import Facts, Package, Torch

Level = Literal["wrong", "slow", "note"]
OPEN_FILES = 1024  # that workers and shards need at least
SHARED = 256 * 2**20  # bytes of /dev/shm through which workers hand over batches
MEMORY = 4 * 2**30  # bytes, of which torch and its libraries alone take about a quarter
BUSY = 0.5  # further processes for each core, from which on the rates are too low
EMULATED = 0.5  # of the rate of fp32, below which a shorter type only saves memory


@dataclass(frozen=True)
class Advice:
    """`wrong`: vlm or a part of it cannot work; `slow`: it could be faster; `note`: worth knowing."""

    level: Level
    what: str
    remedy: str


def advise(facts: Facts) -> tuple[Advice, ...]:
    """All of it, what is wrong first."""
    found = [advice for rule in RULES for advice in rule(facts)]
    return tuple(sorted(found, key=lambda advice: ("wrong", "slow", "note").index(advice.level)))


def packages(facts: Facts) -> Iterator[Advice]:
    """What is missing, or older than what vlm was written for."""
    for one in facts.packages:
        if not one.fits:
            yield Advice("wrong", _misfit(one), f"pip install '{one.name}{one.wanted}'")
    for extra in facts.extras:
        for one in extra.packages:
            if one.version is not None and not one.fits:
                yield Advice("wrong", f"{_misfit(one)} for the extra {extra.name}", f"pip install 'vlm[{extra.name}]'")
    if not facts.described:
        yield Advice(
            "note",
            "vlm is not installed, only found: its needs cannot be read",
            "pip install -e . in its folder",
        )


def _misfit(one: Package) -> str:
    if one.version is None:
        return f"{one.name} is not installed"
    return f"{one.name} {one.version} is installed, {one.wanted} is needed"


def conflicts(facts: Facts) -> Iterator[Advice]:
    """Packages that do not go together, above all torchvision and torch."""
    for one in facts.conflicts:
        what = f"{one.package} asks for {one.wants}, {one.found} is installed"
        yield Advice("wrong", what, f"pip install --upgrade {one.package} '{one.wants}'")


def broken(facts: Facts) -> Iterator[Advice]:
    """What is installed and cannot be used."""
    remedies = {"torchvision": "install both together, from one index: pip install -U torch torchvision"}
    for name, reason in facts.failed.items():
        remedy = remedies.get(name, f"pip install --force-reinstall {name}")
        yield Advice("wrong", f"{name} cannot be used ({reason})", remedy)


def pictures(facts: Facts) -> Iterator[Advice]:
    """How Pillow was built."""
    built = facts.pictures
    if built is None:
        return
    wheel = "pip install --force-reinstall --only-binary :all: pillow"
    if not built.jpeg:
        yield Advice("wrong", "Pillow was built without JPEG", wheel)
    elif built.turbo is None:
        yield Advice("slow", "Pillow was built without libjpeg-turbo, which decodes JPEGs several times faster", wheel)
    if not built.webp:
        yield Advice("slow", "Pillow was built without WebP: such pictures count as unusable", wheel)


def threads(facts: Facts) -> Iterator[Advice]:
    """One where there could be several, or more than there are cores for."""
    if facts.torch is None:
        return
    usable, used = facts.machine.usable, facts.torch.threads
    if used == 1 and usable > 1:
        remedy = f"unset OMP_NUM_THREADS, or set it to {usable}, unless several jobs share the machine"
        yield Advice("slow", f"products use 1 thread, {usable} cores are usable", remedy)
    elif used > usable:
        what = f"products use {used} threads, {usable} of {facts.machine.cores} cores are usable"
        yield Advice("slow", f"{what}: they wait for one another", f"export OMP_NUM_THREADS={usable}")


def short_types(facts: Facts) -> Iterator[Advice]:
    """Products in half precision that the CPU has no instructions for."""
    if facts.torch is None or facts.torch.gpus:
        return
    full, bf16, fp16 = (facts.rate(kind) for kind in ("fp32", "bf16", "fp16"))
    if not facts.torch.bf16:
        cost = f", at {bf16 / full:.2f} of the speed of fp32" if bf16 and full else ""
        remedy = "leave train.precision at auto; model.vision.dtype and language.dtype at float32"
        yield Advice("slow", f"bf16 is emulated: the CPU has no instructions for it{cost}", remedy)
    if fp16 and full and fp16 < EMULATED * full:
        what = f"fp16 runs at {fp16 / full:.2f} of the speed of fp32 on this CPU"
        yield Advice("note", what, "nothing: vlm computes fp16 checkpoints in fp32 here; code of your own should too")


def onednn(facts: Facts) -> Iterator[Advice]:
    """The library that makes products fast on CPUs."""
    if facts.torch is None or facts.torch.gpus:
        return
    if not facts.torch.onednn:
        what = "torch was built without oneDNN: convolutions and bf16 are slow on the CPU"
        yield Advice("slow", what, "install the wheel of pytorch.org: pip install --force-reinstall torch")
        return
    default, fast = facts.rate("fp32"), facts.rate("fp32, oneDNN")
    if default and fast and fast > 1.05 * default:
        what = f"fp32 products by oneDNN are {fast / default:.1f} times as fast, and exact"
        yield Advice("note", what, "nothing: vlm takes them; in code of your own, use vlm.nn.backend.fast_float32")


def gpus(facts: Facts) -> Iterator[Advice]:
    """One that is there and not used, or not fully."""
    torch, driver = facts.torch, facts.machine.driver
    if torch is None:
        return
    if driver and not torch.gpus:
        yield _unused_gpu(torch, driver, facts.environment.get("CUDA_VISIBLE_DEVICES"))
    if torch.gpus and not any(extra.name == "fla" and _there(extra.packages) for extra in facts.extras):
        yield Advice("note", "retention has faster kernels for NVIDIA GPUs", "pip install 'vlm[fla]'; mixer.kernel=fla")
    if torch.mps and not torch.gpus:
        yield Advice("note", "vlm does not use Apple's GPU yet, only the CPU", "small models, or a machine with CUDA")


def _unused_gpu(torch: Torch, driver: str, visible: str | None) -> Advice:
    if visible is not None and visible.strip() in ("", "-1"):
        return Advice("note", "CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    if torch.cuda is None:
        what = f"there is an NVIDIA driver ({driver}), but torch was built for the CPU alone"
        return Advice("slow", what, "pip install --force-reinstall torch torchvision, from the index of a CUDA version")
    what = f"torch was built for CUDA {torch.cuda} and finds no GPU, though there is an NVIDIA driver ({driver})"
    return Advice("wrong", what, "update the driver, or install torch for an older CUDA; nvidia-smi shows both")


def _there(needed: tuple[Package, ...]) -> bool:
    return all(one.fits for one in needed)


def limits(facts: Facts) -> Iterator[Advice]:
    """What the system allows a process."""
    machine = facts.machine
    if machine.open_files is not None and 0 <= machine.open_files < OPEN_FILES:  # -1: no limit
        what = f"a process may open {machine.open_files} files: many shards and workers need more"
        yield Advice("slow", what, f"ulimit -n {4 * OPEN_FILES}")
    if machine.shared is not None and machine.shared < SHARED:
        what = f"/dev/shm holds {machine.shared / 2**20:.0f} MiB: data workers hand batches over in it, and die without"
        yield Advice("slow", what, "data.workers=0, or start the container with --shm-size=2g (or --ipc=host)")
    if machine.memory is not None and machine.memory < MEMORY:
        what = f"{machine.memory / 2**30:.1f} GiB of memory: vlm starts at about 0.5 GiB, each data worker adds to it"
        yield Advice("slow", what, "data.workers=0, a small data.cache_mb and train.batch_size")


def busy(facts: Facts) -> Iterator[Advice]:
    """Others compute here, so what was measured is less than the machine can do."""
    load, usable = facts.machine.load, facts.machine.usable
    if facts.rates and load is not None and load > (1 + BUSY) * usable:
        what = f"{load:.1f} processes compete for {usable} cores: the rates above are too low"
        yield Advice("note", what, "measure again when the machine is quiet")


def files(facts: Facts) -> Iterator[Advice]:
    """Where things are kept."""
    if facts.cache is not None:
        yield Advice("wrong", f"the cache of shards cannot be written: {facts.cache}", "export VLM_CACHE=FOLDER")
    if facts.environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Advice("note", "HF_HUB_OFFLINE is set: names of the hub are looked up in its cache only", "unset it")


Rule = Callable[[Facts], Iterator[Advice]]
RULES: tuple[Rule, ...] = (
    packages, conflicts, broken, pictures, threads, short_types, onednn, gpus, limits, busy, files,
)  # fmt: skip
