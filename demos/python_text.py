"""A text to train on without a network, the prose that ships with Python: python demos/python_text.py OUT

Writes OUT/train.jsonl and OUT/val.jsonl, to be read by vlm.data.documents. A document is a topic of the language
reference, or all docstrings of one module of the standard library: about 2 million characters.
"""

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics


def docstrings(file: Path) -> Iterator[str]:
    """Those of a module, its classes and its functions, from the source: nothing is imported or run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in old modules
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def documents() -> Iterator[tuple[str, list[str]]]:
    """Name and paragraphs of each document, always in the same order."""
    for name in sorted(topics):
        yield f"topic {name}", [topics[name]]
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library).with_suffix("").parts
        if name[0] in sys.stdlib_module_names and not {"test", "tests", "idle_test", "pydoc_data"} & set(name):
            yield ".".join(name), list(docstrings(file))


def main(out: str, val: float = 0.05) -> None:
    """A document goes to training or validation by the hash of its name; what is repeated is kept once."""
    texts: dict[str, list[str]] = {"train": [], "val": []}
    known = {""}
    for name, paragraphs in documents():
        new = [text for text in dict.fromkeys(map(str.strip, paragraphs)) if text not in known]
        known.update(new)
        share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        texts["val" if share < val else "train"] += ["\n\n".join(new)] if new else []
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, parts in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in parts]
        Path(out, f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(parts):,} documents, {sum(map(len, parts)):,} characters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
