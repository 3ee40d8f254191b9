"""The published systems: their configs, how they are read, and what they were proven equal to. Pure data.

`vlm models` prints this table, and README.md holds it (tests/test_models.py compares them).
"""

from typing import NamedTuple

from rich.table import Table


class System(NamedTuple):
    """A published system; `configs`: without folder and ending, starred where configs/tiny has a small twin.

    `layouts`: whose files `--model` opens. `proof`: the original at random weights, and the largest difference in fp32
    that was seen once; the tests hold 1e-4.
    """

    name: str
    paper: str  # arXiv number, or empty
    configs: tuple[str, ...]
    layouts: str
    proof: str


# What was measured of BLIP-2 and what is built on it.
SAME = "transformers 4e-6, greedy and beams identical"

LLAVA = ("llava_stage1*", "llava_stage2*", "llava15_stage1*", "llava15_stage2*")

SYSTEMS = (
    System("CLIP", "2103.00020", ("clip*",), "Hugging Face, open_clip, OpenAI", "transformers 7e-7, open_clip 1e-5"),
    System("SigLIP", "2303.15343", (), "Hugging Face, open_clip", "transformers 1.5e-5, at temperature 118"),
    System("CoCa", "2205.01917", (), "open_clip", "open_clip 9.5e-7, both losses 4.8e-7"),
    System("ViT, EVA", "2211.07636", (), "timm, Hugging Face, LAVIS", "timm and transformers, bit-equal"),
    System("BERT, MiniLM", "1810.04805", (), "Hugging Face", "transformers 1.6e-6"),
    System(
        "BLIP-2 stage 1",
        "2301.12597",
        ("blip2_stage1*",),
        "LAVIS, Hugging Face",
        "transformers 8.3e-7; LAVIS' own losses, kept",
    ),
    System(
        "BLIP-2 stage 2",
        "2301.12597",
        ("blip2_stage2_opt*", "blip2_stage2_t5*", "tiny/blip2_stage2", "tiny/blip2_retnet"),
        "Hugging Face, LAVIS",
        f"OPT, Llama, Flan-T5: {SAME}",
    ),
    System(
        "InstructBLIP",
        "2305.06500",
        ("instructblip*",),
        "Hugging Face, LAVIS",
        SAME,
    ),
    System(
        "MiniGPT-4",
        "2304.10592",
        ("minigpt4_stage1*", "minigpt4_stage2*"),
        "the authors'",
        SAME,
    ),
    System(
        "LLaVA, LLaVA-1.5",
        "2310.03744",
        (*LLAVA, "tiny/adapter", "tiny/llava_deepseekmoe"),
        "Hugging Face, the authors'",
        "transformers 1.1e-6, loss 4.8e-7",
    ),
    System(
        "Llama 1-3.2, Vicuna, SmolLM, Mistral, Qwen2, Qwen3, OPT",
        "2302.13971",
        ("lm_pretrain*",),
        "Hugging Face, GGUF",
        "transformers 3.2e-6, greedy and beams identical",
    ),
    System(
        "T5, Flan-T5",
        "1910.10683",
        ("blip2_stage2_t5*",),
        "Hugging Face",
        "transformers 2.3e-5; texts identical",
    ),
    System(
        "DeepSeekMoE, Mixtral, Qwen2-MoE",
        "2401.06066",
        ("deepseekmoe_2b", "deepseekmoe_16b", "lm_pretrain_deepseekmoe*"),
        "Hugging Face",
        "transformers' models and DeepSeek-V2 and -V3 blocks < 1e-5",
    ),
    System(
        "RetNet",
        "2307.08621",
        ("retnet_1b3", "retnet_2b7", "retnet_6b7", "lm_pretrain_retnet*"),
        "torchscale",
        "torchscale in all three forms < 1e-4 (kept outputs)",
    ),
    System("LoRA", "2106.09685", (), "peft", "peft 1e-5, gradients too"),
)


def files(system: System) -> list[str]:
    """Its config files."""
    names = [name.removesuffix("*") for name in system.configs]
    twins = [f"tiny/{name.removesuffix('*')}" for name in system.configs if name.endswith("*")]
    return [f"configs/{name}.yaml" for name in (*names, *twins)]


def rows() -> list[tuple[str, str, str, str]]:
    """The table for people: system with its paper, configs, whose files are read, what was proven."""
    return [(f"{s.name} ({s.paper})", ", ".join(s.configs) or "–", s.layouts, s.proof) for s in SYSTEMS]


HEADER = ("system (arXiv)", "configs (* with a twin in tiny/)", "reads files of", "equal at random weights to")


def markdown() -> str:
    """As README.md has it."""
    lines = [HEADER, ("---",) * len(HEADER), *((a, b.replace("*", "\\*"), c, d) for a, b, c, d in rows())]
    return "\n".join(f"| {' | '.join(cells).replace('(*', '(' + chr(92) + '*')} |" for cells in lines)


def as_table() -> Table:
    """For a terminal of any width."""
    table = Table(*HEADER, box=None, pad_edge=False, header_style="bold")
    for row in rows():
        table.add_row(*row)
    return table


def as_json() -> list[dict[str, object]]:
    """For programs."""
    return [{**s._asdict(), "configs": files(s)} for s in SYSTEMS]
