"""Does a model say the same of every picture? Captions of a few, made during validation, beside the true ones."""

from dataclasses import dataclass

import torch

from vlm.data.batch import Batch
from vlm.data.template import Template
from vlm.data.text import Tokenizer
from vlm.model.describe import describe
from vlm.model.generate import Sampling
from vlm.model.transcribe import commonest, one_line
from vlm.nn.backend import autocast
from vlm.train.parallel import Passes

SAID, TRUE = "val/identical_captions", "val/identical_references"
PICTURES = 32  # the first of the validation data: enough to tell one sentence from many, at the cost of a few passes
TOKENS = 20


@dataclass(frozen=True)
class Speech:
    """How a run's model writes captions; `template` and `max_tokens` are those of the run's `data`."""

    tokenizer: Tokenizer
    template: Template
    max_tokens: int

    @property
    def decoding(self) -> Sampling:
        """Greedy and short: nothing is drawn, so that a resumed run goes on with the same random numbers."""
        return Sampling(min(TOKENS, self.max_tokens))


class Sayings:
    """Captions of the first pictures of one validation, whichever process has them.

    Nothing is said without a `Speech`, nor over sharded weights: every token is a pass that all processes would have
    to make, and they write texts of different length.
    """

    def __init__(self, passes: Passes, speech: Speech | None) -> None:
        """`passes`: of a model that is in evaluation mode, without gradients, whenever it is asked."""
        self._passes, self._speech = passes, None if passes.sharded else speech
        self._seen = 0  # pictures of all processes
        self._told: list[tuple[str, str]] = []  # what this process's model said, and the true caption

    def hear(self, batch: Batch | None) -> None:
        """Captions those of a batch that are among the first pictures; all processes must ask, with None for no batch.

        Of batches asked about at once, the lower rank's comes first.
        """
        if self._speech is None or self._seen >= PICTURES:
            return
        world, own = self._passes.world, 0 if batch is None or batch.images is None else batch.size
        sizes = [int(size) for size in world.sum([own * (rank == world.rank) for rank in range(world.size)])]
        few = min(own, PICTURES - self._seen - sum(sizes[: world.rank]))
        self._seen += sum(sizes)
        if batch is not None and few > 0:
            self._told += zip(self._say(self._speech, batch, few), _true(self._speech, batch, few), strict=True)

    def shares(self) -> dict[str, float]:
        """The share of captions that are the most common one, and the same of the true ones; none of one picture.

        All processes must ask, and are told the same.
        """
        if self._speech is None or self._seen < 2:
            return {}
        parts = self._passes.world.texts("\n".join(text for pair in self._told for text in pair))
        lines = [line for part in parts if part for line in part.split("\n")]
        return {SAID: commonest(lines[::2]), TRUE: commonest(lines[1::2])}

    def _say(self, speech: Speech, batch: Batch, few: int) -> list[str]:
        model, images = self._passes.task.model, batch.pixels[:few]
        # Compiled blocks would be compiled anew as the text grows.
        with autocast(images.device, self._passes.precision), torch.compiler.set_stance("force_eager"):
            return describe(model, speech.tokenizer, images, speech.template, speech.max_tokens, speech.decoding)


def _true(speech: Speech, batch: Batch, few: int) -> list[str]:
    """The first caption of each picture, cut where the model's own are."""
    owner: list[int] = batch.owner.tolist()
    ids = [speech.tokenizer.encode(batch.strings[owner.index(i)])[: speech.decoding.max_new] for i in range(few)]
    return [one_line(speech.tokenizer.decode(each)) for each in ids]


def monotone(said: float, true: float) -> bool:
    """Whether captions are nearly all the same and the true ones are not."""
    return said >= 0.9 and true <= 0.5
