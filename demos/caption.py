"""Several captions of each picture: python demos/caption.py MODEL photo.jpg folder/ … (a run, or a published folder)

What `vlm caption` does, in the parts that it is made of.
"""

import sys

from vlm.captioning.inputs import Given, standard_input
from vlm.captioning.speak import Speaker
from vlm.captioning.wishes import Words
from vlm.data.image import BadSample
from vlm.ready import open_model


def main(model: str, *names: str) -> None:
    """Prints a greedy caption and three sampled ones for each picture."""
    ready = open_model(model)  # settings, tokenizer and weights; the encoder owns its transform
    greedy = Speaker(ready, Words())
    drawn = Speaker(ready, Words(temperature=0.7, top_p=0.9, captions=3))

    for picture in Given(names, standard_input()):  # files, folders, patterns, shards
        try:
            pixels = greedy.transform.read(picture.read())
        except (BadSample, OSError) as error:
            print(f"{picture.name}: {error}", file=sys.stderr)
            continue
        ((best,),) = greedy([picture.name], [pixels])
        (others,) = drawn([picture.name], [pixels])
        cut = " …" if best.finish == "length" else ""
        print(f"{picture.name}: {best.text}{cut}\n    or: {' | '.join(other.text for other in others)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python demos/caption.py MODEL PICTURE …")
    main(*sys.argv[1:])
