"""What the help of each verb ends with: commands with an explanation, and what its exit codes mean. Pure data.

Keys are the verb as it is typed, without `vlm`; "" stands for `vlm` itself. tests/test_help.py parses every command.
"""

from typing import NamedTuple


class Example(NamedTuple):
    """A command to copy, at most 76 characters long, and what it does."""

    command: str
    meaning: str


EXAMPLES: dict[str, tuple[Example, ...]] = {
    "": (
        Example("vlm quickstart", "Train three small models on pictures inside the package, and test them: minutes."),
        Example("vlm caption photo.jpg --model runs/quickstart/3-caption", "Describe a picture with one of them."),
        Example("vlm doctor", "See what is installed, how fast it computes here, and what would make it faster."),
        Example("vlm train --help", "Each verb has a page of its own."),
    ),
    "quickstart": (
        Example("vlm quickstart", "Into runs/quickstart: three runs, metrics.json, report.html."),
        Example("vlm quickstart train.seed=1 --out runs/seed-1", "The same from other random weights."),
        Example(
            "vlm quickstart model.language.mixer.kind=retention --overwrite",
            "With a RetNet for a decoder, in place of what the folder holds.",
        ),
    ),
    "train": (
        Example(
            "vlm train configs/tiny/clip.yaml data.train=my_folder data.caption=txt",
            "A small CLIP on a folder of pictures with .txt beside them, into runs/clip.",
        ),
        Example("vlm train my.yaml train.steps=1000 --out runs/mine", "Another number of steps, another folder."),
        Example("vlm train runs/mine/config.yaml --out runs/mine --resume", "Go on where a run was stopped."),
        Example("vlm train my.yaml --out runs/mine --resume auto", "The same line to start and to go on: for a queue."),
        Example("vlm train my.yaml --overfit 8", "Before the long run: can eight samples be learned by heart?"),
        Example(
            "torchrun --nproc-per-node 8 -m vlm train my.yaml train.accumulate=8",
            "On eight GPUs.",
        ),
    ),
    "caption": (
        Example("vlm caption photo.jpg folder/ --model runs/quickstart/3-caption", "Path and caption, a line each."),
        Example("vlm caption photo.jpg -m Salesforce/blip2-opt-2.7b", "By a checkpoint of the Hugging Face hub."),
        Example(
            "find . -name '*.jpg' -print0 | vlm caption - -0 -m runs/mine --json",
            "The pictures that another program lists, as JSON lines.",
        ),
        Example(
            "vlm caption photos/ -m runs/mine -o captions.jsonl --json --skip-existing",
            "Into a file; the same again does what is missing.",
        ),
        Example(
            "vlm caption photos/ -m runs/mine --format sidecar --beams 5 --num-captions 3",
            "The three best captions of five beams into IMAGE.txt, for trainers.",
        ),
        Example("vlm caption --watch inbox/ -m runs/mine", "Pictures as they arrive, until Ctrl-C."),
    ),
    "evaluate": (
        Example(
            "vlm evaluate shards/ --model runs/quickstart/2-qformer",
            "Recall both ways, beside chance.",
        ),
        Example("vlm evaluate captions.csv --model runs/mine --json", "The figures for a program."),
        Example(
            "vlm evaluate coco.json --images coco/ -m runs/mine --protocol coco-5k",
            "A standard benchmark: its split, its captions.",
        ),
        Example(
            "vlm evaluate test.tar -m runs/clip --labels json:group",
            "Zero-shot classification by a field beside each picture.",
        ),
        Example(
            "vlm evaluate vqa.json -m runs/llava --task answers --images vqa/",
            "VQA accuracy, and choices by likelihood.",
        ),
    ),
    "compare": (
        Example("vlm compare runs/evaluate/before runs/evaluate/after", "Which is better, and is it more than chance?"),
        Example("vlm compare before after --json", "The differences for a program."),
    ),
    "index": (
        Example("vlm index photos/ photos.index --model runs/mine", "Encode a folder, once."),
        Example("vlm index photos.index", "Later: only what is new or has changed; what is gone goes."),
    ),
    "search": (
        Example('vlm search photos.index "a red bicycle"', "The ten nearest paths, best first."),
        Example("vlm search photos.index --image photo.jpg --top 3 --json", "Pictures like this one, with scores."),
        Example(
            "vlm search photos.index snow -0 | xargs -0 -I{} cp {} snowy/",
            "Do something with each, whatever is in its name.",
        ),
    ),
    "score": (
        Example("vlm score results.json captions_val2014.json", "COCO's result file beside its annotations."),
        Example(
            "vlm score results.json captions.json -m runs/mine --images val2014",
            "With CLIPScore by an encoder of yours.",
        ),
        Example(
            "vlm score answers.json v2_mscoco_val2014_annotations.json --task vqa --json",
            "Answers to VQA's questions, by its own rule.",
        ),
    ),
    "export": (
        Example("vlm export runs/mine exported", "A folder that transformers opens."),
        Example("vlm export runs/mine half --dtype bfloat16 --shard-gb 2", "In half the bytes, in smaller files."),
        Example("vlm export runs/lora adapters --adapters", "Only the adapters of a run, as peft reads them."),
        Example(
            "vlm export blip2.pth out --part vision=eva_vit_g.pth",
            "A file of its authors, with a part of it that lies elsewhere.",
        ),
    ),
    "config": (
        Example("vlm config configs/tiny/clip.yaml", "All settings, with those that the file does not name."),
        Example(
            "vlm config my.yaml train.steps=5 > short.yaml", "A file with a change; all mistakes are told at once."
        ),
    ),
    "models": (
        Example("vlm models", "The table."),
        Example("vlm models --json | jq -r '.[].configs[]'", "All configs that are shipped."),
    ),
    "doctor": (
        Example("vlm doctor", "Look at versions, devices and speed, and say what to do about them."),
        Example("vlm doctor --json > here.json", "The same for programs, or to send with a report of a fault."),
        Example("vlm doctor --quick && vlm train my.yaml", "Versions and devices only, as a check before a run."),
    ),
    "completion": (
        Example('eval "$(vlm completion bash)"', "Complete in this bash; in ~/.bashrc in every one."),
        Example(
            "vlm completion bash > ~/.local/share/bash-completion/completions/vlm",
            "The same for good, without starting vlm with every shell.",
        ),
        Example("vlm completion zsh > ~/.zfunc/_vlm", "For zsh, where ~/.zfunc is in fpath."),
        Example("vlm completion fish > ~/.config/fish/completions/vlm.fish", "For fish."),
    ),
    "shards": (
        Example("vlm shards write my_folder shards --size 256", "Make few large files of many small pictures."),
        Example("vlm shards check shards/", "Count what is wrong with them, before training does."),
        Example("vlm shards preview shards/", "Look at a few."),
    ),
    "shards write": (
        Example("vlm shards write my_folder shards --size 256", "Pictures with .txt beside them, made smaller."),
        Example("vlm shards write captions.csv shards --images my_folder", "A table whose paths start in my_folder."),
        Example("vlm shards write dataset_coco.json val --split val", "A split of Karpathy's JSON."),
        Example("vlm shards write 'old/{000..009}.tar' new --workers 4", "Shards from shards, cleaned."),
    ),
    "shards check": (
        Example("vlm shards check 'shards/{000..099}.tar' --workers 4", "A hundred shards, four at a time beside one."),
        Example("vlm shards check shards/ --config my.yaml", "By the limits, template and tokenizer of a config."),
        Example("vlm shards check shards/ && vlm train my.yaml", "Train only on what is healthy."),
    ),
    "shards preview": (
        Example("vlm shards preview shards/", "Three samples in words, twelve as pictures in sheet.png."),
        Example("vlm shards preview shards/ --config my.yaml --texts 1", "Which tokens are learned, which are not."),
        Example("vlm shards preview shards/ --out look.jpg --count 48", "A larger sheet."),
    ),
    "shards features": (
        Example("vlm shards features my.yaml features", "features/train and, where there is data.val, features/val."),
        Example("vlm train my.yaml data.train=features/train", "Training without the encoder, then."),
    ),
}

# What a verb means by a code where it says more than the general line, which stands under "".
EXIT: dict[str, dict[int, str]] = {
    "": {
        0: "Done.",
        1: "Failed on the way, such as a full disk; what was whole before is whole.",
        2: "Wrong input: named, with what to do; nothing was begun.",
        130: "Interrupted by Ctrl-C.",
    },
    "train": {
        1: "Failed on the way, such as a full disk, or --overfit did not learn; the last checkpoint is whole.",
        130: "Ctrl-C: saved at the step; it says how to go on.",
        143: "Terminated (SIGTERM): saved at the step; it says how to go on.",
    },
    "caption": {1: "Some pictures could not be read; the others are captioned."},
    "doctor": {0: "Healthy, if perhaps slower than it could be.", 1: "Something is wrong; it says what to do."},
    "index": {1: "Some pictures cannot be read; the others are in it."},
    "shards check": {0: "Healthy.", 1: "Too many samples are unusable."},
}
