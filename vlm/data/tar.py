"""What a tar holds, read header by header: its members, and the groups of them that make samples."""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

CODE = (".pyd", ".pkl", ".pickle", ".pth", ".pt")  # other readers unpickle these, which runs what they say
_BLOCK = 512

Passed = Callable[[str, str], None]  # takes what is odd about a member, and its name


def _ignore(oddity: str, name: str) -> None:
    """Training passes over odd members in silence: none of them is ever followed or unpacked."""


@dataclass(frozen=True)
class Group:
    """Members of one key that stand side by side: offset and size by suffix. `fault`: why they are no sample."""

    key: str
    members: dict[str, tuple[int, int]]
    fault: str = ""


def groups(file: BinaryIO, label: str, damage: list[str], passed: Passed = _ignore) -> Iterator[Group]:
    """Samples of an open tar by webdataset's rule: the key ends at the first dot of the file name.

    Members that come after their sample was left are a group of their own, with a fault: "duplicate key" when they
    repeat one of its suffixes, else "members apart". Where the tar is damaged, the last group comes after `damage` has
    its message, which begins with `label`. Errors: as `members`.
    """
    finished: dict[str, set[str]] = {}
    key, found = "", dict[str, tuple[int, int]]()
    for name, offset, size in members(file, label, damage, passed):
        stem, _, suffix = name.rpartition("/")[2].partition(".")
        if not stem or not suffix:
            continue  # no sample by webdataset's rule: README, hidden files
        suffix, own = suffix.lower(), name[: len(name) - len(suffix) - 1]
        if own != key or suffix in found:
            if found:
                yield _group(key, found, finished)
            key, found = own, {}
        found[suffix] = offset, size
    if found:
        yield _group(key, found, finished)


def _group(key: str, found: dict[str, tuple[int, int]], finished: dict[str, set[str]]) -> Group:
    before = finished.setdefault(key, set())
    fault = "" if not before else "duplicate key" if before & found.keys() else "members apart"
    before.update(found)
    return Group(key, found, fault)


def _oddity(member: tarfile.TarInfo, plain: bool) -> str:
    if not plain:
        return "" if member.isdir() else "link or device"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe name"
    return "code" if member.name.lower().endswith(CODE) else ""


def members(file: BinaryIO, label: str, damage: list[str], passed: Passed = _ignore) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file in a tar; links, devices and folders are told to `passed`.

    Ends early, with a message added to `damage`, where the tar is cut off or damaged outside its files' contents.
    ValueError when it cannot be read at all.
    """
    end, whole = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                plain = member.isreg() and not member.issparse()
                if odd := _oddity(member, plain):
                    passed(odd, member.name)
                if plain and member.offset_data + member.size > whole:
                    raise tarfile.ReadError(f"{member.name!r} is not all there")
                end = tar.offset
                if plain:
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except OSError as error:
        raise ValueError(f"{label}: cannot be read: {error.strerror}") from None
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        damage.append(f"{label}: {_damage(file, label, end)} ({error})")
        return
    # tarfile takes a damaged header for the end of the archive; the real end is marked by two blocks of zeros.
    file.seek(end)
    if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
        damage.append(f"{label}: {_damage(file, label, end)}")


def _damage(file: BinaryIO, label: str, end: int) -> str:
    whole = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(4)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
        raise ValueError(f"{label}: is compressed, which allows no random access; unpack it to a plain .tar")
    if not end:
        return "is not a tar file, or its very beginning is damaged; fetch or write it anew"
    return f"is cut off or damaged at or after byte {end} of {whole}; fetch or write it anew"
