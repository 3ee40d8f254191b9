"""Calls that could run what a file or a setting says have no place in the package or the demos."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_style import DEMOS, FILES, ROOT, parse, where

BANNED_CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "torch.hub.load",
}  # fmt: skip
SAFE_ONLY = {"torch.load": "weights_only"}  # calls that need a keyword, since their default differs by version
BANNED_KEYWORDS = {"shell": True, "weights_only": False, "trust_remote_code": True, "allow_pickle": True}
BANNED_IMPORTS = {"pickle", "marshal", "shelve", "dill"}


def banned(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""
            if name in BANNED_CALLS or method in (".extract", ".extractall"):
                yield node
            if name in SAFE_ONLY and SAFE_ONLY[name] not in [keyword.arg for keyword in node.keywords]:
                yield node
            yield from (node for keyword in node.keywords if _forbidden(keyword))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (node for module, name in _imported(node) if module in BANNED_IMPORTS and name[-5:] != "Error")


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    for alias in node.names:
        module = alias.name if isinstance(node, ast.Import) else node.module or ""
        yield module.split(".")[0], alias.name


def _forbidden(keyword: ast.keyword) -> bool:
    # A variable in place of the constant could hide the same value, so only the safe constant passes.
    if keyword.arg not in BANNED_KEYWORDS:
        return False
    return not isinstance(keyword.value, ast.Constant) or keyword.value.value is BANNED_KEYWORDS[keyword.arg]


def test_no_unsafe_call() -> None:
    assert [where(path, node) for path in [*FILES, *DEMOS] for node in banned(parse(path))] == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "exec(text)", "os.system('ls')", "yaml.load(text)", "import pickle", "from pickle import loads",
        "pickle.load(f)", "torch.load(p, weights_only=False)", "torch.load(p)", "torch.load(p, weights_only=flag)",
        "tar.extractall()", "tarfile.open(p).extract(m)", "subprocess.run(c, shell=True)",
        "load(n, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_unsafe_calls_are_found(code: str) -> None:
    assert list(banned(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "yaml.safe_load(t)",
        "torch.load(p, weights_only=True)",
        "tar.extractfile(m)",
        "from pickle import UnpicklingError",
    ],
)
def test_safe_calls_pass(code: str) -> None:
    assert not list(banned(ast.parse(code)))


def test_one_place_runs_commands() -> None:
    files = [path for path in FILES if "subprocess" in path.read_text(encoding="utf-8")]
    assert [str(path.relative_to(ROOT)) for path in files] == ["vlm/data/fetch.py"]  # pipe:, where a flag allows it
