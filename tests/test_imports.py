"""What starts fast stays fast, and no module imports itself in a circle."""

import graphlib
import resource
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "transformers",
    "peft",
    "tokenizers",
    "numpy",
    "webdataset",
    "PIL",
    "rich",
}
PROBE = """
import sys
try:
    {code}
except SystemExit:
    pass
print("loaded:", *sorted({heavy} & set(sys.modules)))
"""
CONFIG = str(min((ROOT / "vlm" / "quickstart").glob("*.yaml")))
LIGHT = {
    "--help": ["--help"],
    "--version": ["--version"],
    "verb help": ["train", "--help"],
    "verb of a group": ["shards", "write", "--help"],
    "completion": ["completion", "fish"],
    "wrong verb": ["trian"],
    "wrong option": ["train", "x.yaml", "--stps=3"],
}


def loaded(code: str) -> str:
    probe = PROBE.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main(arguments: list[str]) -> str:
    return f"import sys; sys.argv = {['vlm', *arguments]}; from vlm.cli import main; main()"


def test_import_vlm_loads_nothing_heavy() -> None:
    assert loaded("import vlm") == "loaded:"
    assert loaded("import vlm, numpy") == "loaded: numpy"


@pytest.mark.parametrize("arguments", [*LIGHT.values(), ["config", CONFIG]], ids=[*LIGHT, "config"])
def test_light_verbs_load_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(main(arguments)) == "loaded:"


def cpu_seconds(arguments: list[str]) -> float:
    """Processor time of the command, the best of three: the least disturbed."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", main(arguments)], cwd=ROOT, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT)
def test_help_and_mistakes_start_fast(arguments: list[str]) -> None:
    assert cpu_seconds(arguments) < 0.3


def test_config_starts_fast() -> None:
    assert cpu_seconds(["config", CONFIG]) < 0.6


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = grimp.build_graph("vlm", cache_dir=None)
    below = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert list(graphlib.TopologicalSorter(below).static_order())
