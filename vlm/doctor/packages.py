"""What is installed beside what vlm and its dependencies ask for, read from their own metadata; nothing is imported."""

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vlm.doctor.facts import Conflict, Extra, Package

GIVES = {
    "tensorboard": "curves in TensorBoard (train.report_to)",
    "hf": "language models of transformers that have no parts here (kind: huggingface)",
    "fla": "Triton kernels of retention, on NVIDIA GPUs",
    "lora": "training LoRA adapters, and reading peft's",
    "parquet": "tables of pictures and captions as Parquet",
    "gguf": "language models in GGUF files",
    "remote": "shards in object stores (s3fs, gcsfs or adlfs too)",
    "search": "fast search of more than a million pictures",
    "coco": "METEOR and SPICE, beside a Java runtime",
    "dev": "tests, lint and types of vlm itself",
}


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def asked(name: str) -> list[Requirement] | None:
    """What a distribution asks for, all its extras included; None where it is not installed."""
    try:
        return [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return None


def extra_of(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return None
    return next((name for name in _extras(str(marker)) if marker.evaluate({"extra": name})), "")


def _extras(marker: str) -> Iterator[str]:
    words = marker.replace('"', "'").split("'")
    yield from words[1::2]


def package(requirement: Requirement) -> Package:
    """The state of one requirement; a development version of a new enough one will do."""
    found = installed(requirement.name)
    fits = found is not None and requirement.specifier.contains(found, prereleases=True)
    return Package(canonicalize_name(requirement.name), str(requirement.specifier), found, fits)


def core(requirements: Iterable[Requirement]) -> tuple[Package, ...]:
    """What vlm cannot do without."""
    return tuple(package(one) for one in requirements if extra_of(one) is None)


def extras(requirements: Iterable[Requirement]) -> tuple[Extra, ...]:
    """All extras, by name."""
    found: dict[str, list[Package]] = {}
    for one in requirements:
        if name := extra_of(one):
            found.setdefault(name, []).append(package(one))
    return tuple(Extra(name, GIVES.get(name, ""), tuple(found[name])) for name in sorted(found))


def conflicts(names: Iterable[str]) -> tuple[Conflict, ...]:
    """Among these packages: whatever one asks of another that is not so, as torchvision of torch."""
    known = {name: found for name in names if (found := installed(name)) is not None}
    wrong = []
    for name in known:
        for one in asked(name) or ():
            found = known.get(canonicalize_name(one.name))
            if found and extra_of(one) is None and not one.specifier.contains(found, prereleases=True):
                wrong.append(Conflict(name, f"{canonicalize_name(one.name)}{one.specifier}", found))
    return tuple(wrong)
