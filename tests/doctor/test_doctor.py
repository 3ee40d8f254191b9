"""`vlm doctor` on this machine: what it finds, what it prints, its exit code; and on folders that look like others."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from vlm import cli
from vlm.doctor import devices, machine, measure, packages
from vlm.doctor import run as doctor
from vlm.doctor.facts import Conflict
from vlm.doctor.variables import VARIABLES
from vlm.nn.backend import onednn_is_exact

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code and both streams, with rates measured in moments."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(measure, "SIDE", 64)
        monkeypatch.setattr(measure, "SMALL", 32)
        monkeypatch.setattr(measure, "PICTURE", (400, 300))
        monkeypatch.setattr(measure, "SHRUNK", 100)
        monkeypatch.setattr(sys, "argv", ["vlm", "doctor", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capsys.readouterr()
        return int(caught.value.code or 0), told.out, told.err

    return run


# --- what is installed -----------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_metadata() -> None:
    requirements = packages.asked("vlm")
    assert requirements is not None
    found = {one.name: one for one in packages.core(requirements)}
    assert {"torch", "torchvision", "open-clip-torch", "timm", "pillow", "webdataset", "tokenizers"} <= set(found)
    assert found["torch"].version == version("torch") and found["torch"].wanted.startswith(">=") and found["torch"].fits
    assert not {"transformers", "peft", "ruff"} & set(found), "those belong to extras"


def test_every_extra_says_what_it_is_for() -> None:
    found = packages.extras(packages.asked("vlm") or ())
    assert {"lora", "gguf", "remote", "dev"} <= {extra.name for extra in found}
    assert [extra.name for extra in found if not extra.gives] == []
    (lora,) = [extra for extra in found if extra.name == "lora"]
    assert [one.name for one in lora.packages] == ["peft"]


@pytest.mark.parametrize(
    ("line", "version", "fits"),
    [
        ("pillow>=10.3", "10.2.0", False),
        ("pillow>=10.3", "10.3", True),
        ("torch>=2.9", "2.14.1+cpu", True),
        ("torch>=2.9", "2.15.0.dev20261101", True),
        ("torch>=2.9", "2.9.0rc1", False),
        ("torch>=2.9", None, False),
    ],
)
def test_requirements(line: str, version: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: version)
    found = packages.package(Requirement(line))
    assert (found.version, found.fits) == (version, fits)


def test_extras_and_markers_are_told_apart() -> None:
    lines = ["a>=1", "b; extra == 'x'", "c; python_version < '3'", "d; extra == 'y' and python_version < '3'"]
    assert [packages.extra_of(Requirement(line)) for line in lines] == [None, "x", "", ""]


def test_a_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.14.1+cpu", "torchvision": "0.24.0"}
    needs = {"torchvision": ["numpy", "torch==2.9.0", "pillow (>=5.3.0)"], "torch": ["sympy", "optree; extra == 'x'"]}
    monkeypatch.setattr(packages, "installed", there.get)
    monkeypatch.setattr(packages, "asked", lambda name: [Requirement(line) for line in needs[name]])
    assert packages.conflicts(there) == (Conflict("torchvision", "torch==2.9.0", "2.14.1+cpu"),)
    there["torch"] = "2.9.0+cpu"
    assert packages.conflicts(there) == ()


def test_a_package_that_is_not_there() -> None:
    assert packages.installed("no-such-package-of-ours") is None and packages.asked("no-such-package-of-ours") is None
    with pytest.raises(PackageNotFoundError):
        version("no-such-package-of-ours")


# --- the machine -----------------------------------------------------------------------------------------------------


def system(root: Path, **files: str) -> Path:
    """A folder with files of a system, `__` standing for the slash."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_a_container_of_either_generation(tmp_path: Path) -> None:
    new = system(tmp_path / "new", **{"sys__fs__cgroup__cpu.max": "150000 100000\n"})
    assert machine.quota(new) == 2
    assert machine.quota(system(tmp_path / "free", **{"sys__fs__cgroup__cpu.max": "max 100000\n"})) is None
    old = {"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "50000\n", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n"}
    assert machine.quota(system(tmp_path / "old", **old)) == 1
    assert machine.quota(tmp_path / "nothing") is None
    memory = {"proc__meminfo": "MemTotal:  8388608 kB\n", "sys__fs__cgroup__memory.max": "1073741824\n"}
    assert machine.memory(system(tmp_path / "memory", **memory)) == 2**30
    assert machine.memory(system(tmp_path / "all", proc__meminfo="MemTotal:  1024 kB\n")) == 2**20
    assert machine.memory(tmp_path / "nothing") is None


def test_processors(tmp_path: Path) -> None:
    intel = "model name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16\nmodel name\t: A CPU @ 2 GHz\n"
    found = machine.look(system(tmp_path, proc__cpuinfo=intel, proc__driver__nvidia__version=DRIVER))
    assert (found.cpu, found.driver) == ("A CPU @ 2 GHz", "570.86.15")
    assert found.instructions == ("AVX2", "AVX-512", "AMX", "AMX bf16")
    assert machine.instructions("Features\t: fp asimd sve bf16\n") == ("NEON", "SVE", "Arm bf16")
    assert machine.instructions("") == ()


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24 00:00:00 UTC 2025\nGCC version: 12\n"


def test_this_machine() -> None:
    found = machine.look()
    assert 1 <= found.usable <= found.cores and found.system
    assert found.memory is None or found.memory > 2**28


# --- what is measured ------------------------------------------------------------------------------------------------


def test_rates_and_errors() -> None:
    found = {rate.kind: rate for rate in measure.products(CPU, seconds=0.0)}
    assert set(found) == {"fp32", "bf16", "fp16"} | ({"fp32, oneDNN"} if onednn_is_exact() else set())
    assert all(rate.gflops > 0 for rate in found.values())
    assert found["fp32"].error < 1e-6 < found["fp16"].error < found["bf16"].error < 1e-2
    assert all(rate.error < 1e-6 for kind, rate in found.items() if kind.startswith("fp32"))


def test_what_is_only_emulated_is_measured_on_smaller_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.product(CPU, "fp32", 512, 0.0).side == 512
    monkeypatch.setattr(measure, "SLOW", 0.0)
    assert measure.product(CPU, "fp32", 512, 0.0).side == measure.SMALL


def test_the_rate_is_that_of_the_clock() -> None:
    times = iter([0.0, 2.0, 5.0, 6.0, 7.0, 11.0])
    assert measure.median_seconds(lambda: None, 0.0, lambda: next(times)) == 2.0


def test_pictures_decode_faster_at_a_part_of_their_size() -> None:
    found = measure.decoding(seconds=0.2)
    assert found.scaled > found.whole > 0
    assert 0.1 < len(measure.photograph()) / (found.megapixels * 1e6) < 0.5, "bytes of a pixel, as of photographs"


# --- the verb --------------------------------------------------------------------------------------------------------


def test_plain_lines(vlm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = vlm()
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[-1].startswith("healthy")
    titles = [line.split()[0] for line in lines[:-1]]
    assert (
        list(dict.fromkeys(titles))
        == ["versions", "extras", "devices", "rates", "environment", "advice"][: len(set(titles))]
    )
    assert any(line.split()[:3] == ["versions", "torch", version("torch")] for line in lines)
    assert any(line.startswith("rates  cpu fp32 ") and "GFLOP/s" in line for line in lines)
    assert {line.split()[1] for line in lines if line.startswith("environment")} == set(VARIABLES)


def test_quick_measures_nothing(vlm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "product", None)
    code, out, _ = vlm("--quick")
    assert code == 0 and "devices" in out and "rates" not in out


def test_json(vlm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = vlm("--json")
    found = json.loads(out)
    assert (code, err, found["healthy"]) == (0, "", True)
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert {rate["kind"] for rate in found["rates"]} >= {"fp32", "bf16"} and found["decoding"]["whole"] > 0
    assert any(one["level"] == "note" and "HF_HUB_OFFLINE" in one["what"] for one in found["advice"])


def test_a_version_below_the_range_is_an_exit_code(
    vlm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: "9.0.0" if name == "pillow" else own(name))
    code, out, _ = vlm("--quick")
    assert code == 1 and "1 wrong" in out.splitlines()[-1]
    assert "advice  wrong  pillow 9.0.0 is installed, >=10.3 is needed → pip install 'pillow>=10.3'" in out


def test_a_torch_that_cannot_be_imported(
    vlm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(devices, "_torch", missing)
    code, out, err = vlm()
    assert (code, err) == (1, "") and "rates" not in out
    assert "torch cannot be used (OSError: libcudart.so.13: cannot open shared object file) →" in out
    assert json.loads(vlm("--json")[1])["torch"] is None


def test_a_cache_that_cannot_be_made(
    vlm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file" / "cache"))
    code, out, _ = vlm("--quick")
    assert code == 1 and f"the cache of shards cannot be written: {tmp_path / 'file' / 'cache'}: Not a directory" in out


def test_each_part_is_printed_before_the_next_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = doctor._parts(quick=True)
    monkeypatch.setattr(doctor, "_parts", lambda quick: parts)
    told: list[str] = []

    def watched(facts: Any) -> Any:
        told.append(capsys.readouterr().out)
        return facts

    monkeypatch.setattr(devices, "with_devices", watched)
    doctor.doctor(quick=True)
    assert "versions  torch" in told[0] and "extras  lora" in told[0] and "devices" not in told[0]


def test_tables_on_a_terminal() -> None:
    """A process of its own whose output is one."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "vlm", "doctor", "--quick"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "VLM_CACHE": str(ROOT / "README.md" / "x")}
    with subprocess.Popen(command, cwd=ROOT, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        said = b""
        while chunk := _read(leader):
            said += chunk
    os.close(leader)
    assert process.returncode == 1
    text = said.decode()
    assert "\x1b[1mversions" in text and "\x1b[31mwrong\x1b[0m" in text and "versions  torch" not in text


def _read(leader: int) -> bytes:
    """Nothing once the process has ended, which Linux tells as an error."""
    try:
        return os.read(leader, 65536)
    except OSError:
        return b""
