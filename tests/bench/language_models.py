"""RetNet, Transformer and DeepSeekMoE on real text: equal tokens, equal active parameters. Writes a table.

    python -m tests.bench.language_models [OUT]      (docs/language-models.md unless given; `make language-models`)

The text is the prose that ships with Python (demos/python_text.py), so the numbers need no download. One seed: of
differences below about 0.02 nothing should be concluded.
"""

import subprocess
import sys
from pathlib import Path

from vlm.config.load import load
from vlm.config.schema import Run
from vlm.model.language import Decoder
from vlm.restore import restore
from vlm.train.log import read_metrics
from vlm.train.run import train_run
from vlm.train.speed import flops_per_token

ROOT = Path(__file__).parent.parent.parent
CONFIGS = {
    "Transformer": "lm_pretrain",
    "RetNet": "lm_pretrain_retnet",
    "DeepSeekMoE": "lm_pretrain_deepseekmoe",
}


def row(name: str, file: str, text: Path, folder: Path) -> str:
    """Trains one of them and tells what came of it."""
    names = [f"data.train={text / 'train.jsonl'}", f"data.val={text / 'val.jsonl'}"]
    run = load(Run, ROOT / "configs" / "tiny" / f"{file}.yaml", names)
    train_run(run, folder / file, overwrite=True, title=name)
    records = read_metrics(folder / file)
    losses = {int(record["step"]): record["val/loss_lm"] for record in records if "val/loss_lm" in record}
    model = restore(folder / file).model.language
    assert isinstance(model, Decoder)
    stored = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    cost = flops_per_token(model, run.data.length) / 6e6  # type: ignore[union-attr]
    tokens = run.train.steps * run.train.batch_size * run.data.length  # type: ignore[union-attr]
    curve = " | ".join(f"{value:.3f}" for _, value in sorted(losses.items()))
    return f"| {name} | {stored:.2f} | {cost:.2f} | {tokens:,} | {curve} |"


def main() -> None:
    """All of them, one after the other."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "language-models.md"
    folder = ROOT / "runs" / "language-models"
    text = folder / "text"
    said = subprocess.run(
        [sys.executable, str(ROOT / "demos" / "python_text.py"), str(text)], check=True, capture_output=True, text=True
    ).stdout
    rows = [row(name, file, text, folder) for name, file in CONFIGS.items()]
    every = load(Run, ROOT / "configs" / "tiny" / "lm_pretrain.yaml").train.eval_every or 1
    count = rows[0].count("|") - 5
    steps = " | ".join(f"step {every * (i + 1)}" for i in range(count))
    lines = [
        "# Three language backbones on the same text",
        "",
        "Made by `make language-models`: validation loss (nats per token) after equal tokens, with about equal",
        "parameters for each token. Text: the documentation that ships with Python; one seed.",
        "",
        *(f"- {line}" for line in said.splitlines()),
        "",
        f"| backbone | parameters, M | per token, M (FLOPs / 6) | tokens | {steps} |",
        "|---" * (4 + count) + "|",
        *rows,
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[7:]))


if __name__ == "__main__":
    main()
