"""The size rules of the house."""

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "vlm").rglob("*.py"))
DEMOS = sorted((ROOT / "demos").glob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def where(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno} {getattr(node, 'name', '')}".rstrip()


def functions() -> Iterator[tuple[Path, Function]]:
    for path in FILES:
        yield from ((path, node) for node in ast.walk(parse(path)) if isinstance(node, Function))


def length(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def p90(lengths: list[int]) -> float:
    return statistics.quantiles(lengths, n=10)[-1] if len(lengths) > 1 else lengths[0]


def public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | Function]:
    """Classes, functions and methods that others may use; forward is described by its class."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_") and node.name != "forward":
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert [f"{path.relative_to(ROOT)}: {count}" for path, count in lines.items() if count > 400] == []


def test_demos_are_shorter() -> None:
    limits = {"llava": 180}  # a whole system, from two packages to a report
    lengths = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in DEMOS}
    assert [name for name, lines in lengths.items() if lines >= limits.get(name, 60)] == []


def test_functions_are_short() -> None:
    assert [where(path, node) for path, node in functions() if length(node) > 60] == []
    lengths = [length(node) for _, node in functions()]
    assert statistics.median(lengths) <= 10
    assert p90(lengths) <= 35


def test_forwards_are_short() -> None:
    assert p90([length(node) for _, node in functions() if node.name == "forward"] or [0]) <= 25


def test_everything_public_has_a_docstring() -> None:
    modules = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(parse(path))]
    names = [where(path, node) for path in FILES for node in public(parse(path).body) if not ast.get_docstring(node)]
    assert modules + names == []


def test_every_function_is_typed() -> None:
    def typed(node: Function) -> bool:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        rest = [a for a in arguments if a is not None and a.arg not in ("self", "cls")]
        return node.returns is not None and all(argument.annotation for argument in rest)

    assert [where(path, node) for path, node in functions() if not typed(node)] == []


def test_comments_are_few_but_there() -> None:
    comments = total = 0
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
        total += sum(bool(line.strip()) for line in text.splitlines())
    assert 0.01 <= comments / total <= 0.12


@pytest.mark.parametrize("package", ["nn", "model", "loss", "data"])
def test_no_process_group_below_training(package: str) -> None:
    files = (ROOT / "vlm" / package).rglob("*.py")
    assert [path.name for path in files if "torch.distributed" in path.read_text(encoding="utf-8")] == []
