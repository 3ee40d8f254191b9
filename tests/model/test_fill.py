"""Published weights into a module without memory, and back: equal numbers, strict, and little beside the model."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.side_by_side import peak_memory
from tests.parity.decoders import filled, logit_gap
from tests.parity.noise import noise
from vlm.model.language import Decoder, llama
from vlm.model.weights.conversion import SCALAR, Transposed
from vlm.model.weights.fill import fill
from vlm.model.weights.hollow import Hollow, hollow
from vlm.model.weights.llama import llama_table
from vlm.model.weights.rows import Experts, Row, linear
from vlm.model.weights.save import save
from vlm.model.weights.source import open_weights
from vlm.model.weights.table import Table

ROOT = Path(__file__).parents[2]


def empty(tied: bool = False, dim: int = 16) -> Decoder:
    with hollow():
        return llama(99, dim, 2, 4, 2, tied=tied)


def full(tied: bool = False) -> Decoder:
    model = llama(99, 16, 2, 4, 2, tied=tied)
    noise(model)
    return model


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, others = first.state_dict(), second.state_dict()
    assert set(ours) == set(others)
    return all(torch.equal(value, others[name]) for name, value in ours.items())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A sharded folder of a noised Llama by transformers itself."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    filled(LlamaForCausalLM(config)).save_pretrained(tmp_path / "llama", max_shard_size="30KB")
    return tmp_path / "llama"


@torch.no_grad()
def test_a_sharded_folder_of_transformers_and_the_way_back(published: Path, tmp_path: Path) -> None:
    assert len(list(published.glob("*.safetensors"))) > 2
    theirs = LlamaForCausalLM.from_pretrained(published).eval()
    with hollow():
        ours = llama(99, 32, 2, 4, 2, hidden=96, eps=1e-6, tied=False)
    fill(ours, llama_table(False), open_weights(published))
    assert logit_gap(ours.eval(), theirs) < 1e-5
    (published / "config.json").rename(tmp_path / "config.json")
    for size in (10**9, 20_000):
        out = tmp_path / str(size)
        out.mkdir()
        (out / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
        files = save(ours, llama_table(False), out, shard_bytes=size)
        assert {file.name for file in files} | {"config.json"} == {file.name for file in out.iterdir()}
        assert equal(LlamaForCausalLM.from_pretrained(out), theirs)
    name = "stack.blocks.1.ffn.down.weight"
    ours.get_parameter(name).data[0, 0] += 1  # the comparison would notice
    assert logit_gap(ours, theirs) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_filled_again_bit_by_bit(tmp_path: Path, tied: bool) -> None:
    model, other = full(tied), empty(tied)
    save(model, llama_table(tied), tmp_path)
    fill(other, llama_table(tied), open_weights(tmp_path))
    assert equal(model, other)
    assert all(not tensor.is_meta and tensor.requires_grad for tensor in other.parameters())


def test_types(tmp_path: Path) -> None:
    model, other = full(), empty()
    save(model, llama_table(False), tmp_path / "fp32")
    fill(other, llama_table(False), open_weights(tmp_path / "fp32"), torch.bfloat16, keep=[r".*norm\.weight", "head.*"])
    for name, value in other.state_dict().items():
        kept = "norm" in name or name.startswith("head")
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(value, model.state_dict()[name].to(value.dtype))
    save(model, llama_table(False), tmp_path / "half", torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    fill(as_published := empty(), llama_table(False), open_weights(tmp_path / "half"))
    assert {tensor.dtype for tensor in as_published.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match=r"^keep: patterns that match no tensor of llama: log_scale$"):
        fill(empty(), llama_table(False), open_weights(tmp_path / "half"), torch.bfloat16, keep=["log_scale"])


class Toy(nn.Module):
    """All that tensors can be: tied, buffers of both kinds, experts, a count."""

    def __init__(self, maker: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.mixer = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value")})
        self.out = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.zeros(2, 6, 4))
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.rotary = (Made if maker else Lost)()


class Lost(nn.Module):
    """With a buffer that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.arange(3.0), persistent=False)


class Made(Lost):
    """It can make it."""

    def init_non_persistent_buffers(self) -> None:
        self.turn.copy_(torch.arange(3.0))


TOY = Table(
    "toy",
    (
        Row("embed", "embedding.weight"),
        Row("qkv.weight", tuple(f"mixer.{part}.weight" for part in ("query", "key", "value"))),
        Row("qkv.bias", tuple(f"mixer.{part}.bias" for part in ("query", "key", "value"))),
        Row("proj", "out.weight", Transposed()),
        Row("proj_bias", "out.bias"),
        Experts(("expert.{e}.up", "expert.{e}.gate"), "experts"),
        Row("scale", "scale", SCALAR),
        *linear("bn", "norm"),
        *(Row(f"bn.{part}", f"norm.{part}") for part in ("running_mean", "running_var", "num_batches_tracked")),
    ),
    ignored=("lm_head",),
)


def toy() -> dict[str, Tensor]:
    return {
        "embed": torch.randn(6, 4),
        "lm_head": torch.zeros(1),
        "qkv.weight": torch.randn(12, 4),
        "qkv.bias": torch.randn(12),
        "proj": torch.randn(4, 3),
        "proj_bias": torch.randn(3),
        **{f"expert.{e}.{part}": torch.randn(3, 4) for e in (0, 1) for part in ("up", "gate")},
        "scale": torch.tensor(4.6),
        **{f"bn.{part}": torch.rand(3) for part in ("weight", "bias", "running_mean", "running_var")},
        "bn.num_batches_tracked": torch.tensor(7),
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_kind_of_tensor(tmp_path: Path, dtype: torch.dtype | None) -> None:
    save_file(weights := toy(), tmp_path / "toy.safetensors")
    with hollow():
        module = Toy()
    fill(module, TOY, open_weights(tmp_path), dtype, keep=["scale"])
    assert all(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert module.head.weight is module.embedding.weight
    assert module.rotary.turn.tolist() == [0, 1, 2]
    assert module.norm.num_batches_tracked == 7 and module.norm.num_batches_tracked.dtype == torch.int64
    assert module.scale.dtype == torch.float32 and not module.scale.requires_grad
    kind = dtype or torch.float32
    assert torch.equal(module.mixer["key"].weight, weights["qkv.weight"][4:8].to(kind))
    assert torch.equal(module.out.weight, weights["proj"].T.to(kind))
    assert torch.equal(module.experts[1, 3:], weights["expert.1.gate"].to(kind))
    assert {tensor.untyped_storage().nbytes() - tensor.nbytes for tensor in module.state_dict().values()} == {0}
    del weights["lm_head"]
    save(module, TOY, tmp_path / "back", torch.float32, shard_bytes=200)
    back = open_weights(tmp_path / "back")
    assert set(back) == set(weights)
    if dtype is None:
        assert all(torch.equal(back.read(name), tensor) for name, tensor in weights.items())


def test_a_tied_tensor_may_come_by_any_of_its_names_or_by_all_if_equal(tmp_path: Path) -> None:
    weights = toy() | {"head": toy()["embed"]}
    both = Table("toy", (*TOY.rows, Row("head", "head.weight")), TOY.ignored)
    for given, fits in (({"head"}, True), ({"embed"}, True), ({"head", "embed"}, False)):
        save_file(
            {n: t for n, t in weights.items() if n in given or n not in ("embed", "head")},
            tmp_path / "t.pt.safetensors",
        )
        with hollow():
            module = Toy()
        if not fits:
            with pytest.raises(
                ValueError, match=r"embedding\.weight and head\.weight are one tensor here, but two diff"
            ):
                fill(module, both, open_weights(tmp_path))
            continue
        fill(module, both, open_weights(tmp_path))
        assert module.head.weight is module.embedding.weight
        assert torch.equal(module.head.weight, weights[next(iter(given))])
    save_file(weights | {"head": weights["embed"].clone()}, tmp_path / "t.pt.safetensors")
    fill(module, both, open_weights(tmp_path))
    save(module, both, tmp_path / "back")
    assert {"embed", "head"} < set(open_weights(tmp_path / "back"))


def test_a_buffer_that_nothing_makes_is_named_before_anything_is_read(tmp_path: Path) -> None:
    save_file(toy(), tmp_path / "toy.safetensors")
    with hollow():
        module = Toy(maker=False)
    with pytest.raises(ValueError, match=r"^no file holds rotary\.turn, and no init_non_persistent_buffers\(\) makes"):
        fill(module, TOY, open_weights(tmp_path))
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_all_that_differs_is_told_at_once_and_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = toy()
    del weights["qkv.bias"], weights["expert.1.up"]
    weights |= {"stranger": torch.zeros(2), "qkv.weight": torch.zeros(9, 4), "scale": torch.zeros(2)}
    save_file(weights, tmp_path / "toy.safetensors")
    monkeypatch.setattr("vlm.model.weights.source.InFile.into", lambda *_: pytest.fail("read"))
    with hollow():
        module = Toy()
    with pytest.raises(ValueError, match="does not fit this model") as told:
        fill(module, TOY, open_weights(tmp_path))
    first, *lines = str(told.value).splitlines()
    assert first == f"{tmp_path} does not fit this model:"
    assert sorted(lines) == [
        "  missing beside others: expert.1.up",
        "  missing: experts 2x6x4",
        *(f"  missing: mixer.{part}.bias 4" for part in ("key", "query", "value")),
        "  not in the model: stranger 2",
        *(f"  other shape: mixer.{p}.weight is 3x4, the model's is 4x4" for p in ("key", "query", "value")),
        "  other shape: scale 2 cannot become scale",
    ]
    assert all(tensor.is_meta for tensor in module.parameters())


def test_whole_numbers_in_place_of_weights_are_told(tmp_path: Path) -> None:
    save_file(toy() | {"proj_bias": torch.zeros(3, dtype=torch.int8)}, tmp_path / "toy.safetensors")
    with hollow():
        module = Toy()
    with pytest.raises(
        ValueError, match=r"^\S+ does not fit this model:\n  other type: out\.bias is int8, which is not"
    ):
        fill(module, TOY, open_weights(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_little_memory_beside_the_model(tmp_path: Path, dtype: torch.dtype | None) -> None:
    with hollow():
        sizes = llama(32000, 512, 2, 8, tied=False)
    published = llama_table(False).to_theirs({n: torch.zeros(t.shape) for n, t in sizes.state_dict().items()})
    save_file(published, tmp_path / "model.safetensors")
    del published
    model_bytes = sum(tensor.numel() for tensor in sizes.parameters()) * (dtype or torch.float32).itemsize
    peak = peak_memory(lambda: fill(sizes, llama_table(False), open_weights(tmp_path), dtype)) * 2**20
    assert 0.9 < peak / model_bytes < 1.2
    assert sum(tensor.nbytes for tensor in sizes.parameters()) == model_bytes


def test_shards_are_as_large_as_they_may_be_and_the_index_adds_up(tmp_path: Path) -> None:
    model = full()
    files = save(model, llama_table(False), tmp_path, shard_bytes=8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.parameters())
    assert files[-1].name == "model.safetensors.index.json" and len(files) > 3
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files[:-1]]
    assert all(size <= 8000 for size in sizes)
    assert all(first + second > 6000 for first, second in pairwise(sizes))
    assert set(index["weight_map"].values()) == {file.name for file in files[:-1]}


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = full()
    with pytest.raises(ValueError, match=r"tensors of ours that the table does not know: head\.weight"):
        save(model, llama_table(True), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = [0]

    def failing(*_: object, **__: object) -> None:
        done[0] += 1
        if done[0] == 3:
            raise OSError(28, "No space left on device")
        save_file(*_, **__)  # type: ignore[arg-type]

    (tmp_path / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("vlm.model.weights.save.save_file", failing)
        with pytest.raises(OSError, match=r"could not save weights in .*No space left on device; nothing was written"):
            save(model, llama_table(False), tmp_path, shard_bytes=8000)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / ".weights.tmp").mkdir()
    (tmp_path / ".weights.tmp" / "left").write_text("by a save that was killed")
    save(model, llama_table(False), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match=r"holds model\.safetensors already; choose another folder, or remove it"):
        save(model, llama_table(False), tmp_path)


def test_nothing_slow_is_imported_for_shapes(tmp_path: Path) -> None:
    """In a process of its own: neither to build a module without memory, nor to plan how it is filled."""
    model = llama(9, 8, 1, 2, tied=True)
    published = model.state_dict()
    halves = {f"embed.{i}": part.clone() for i, part in enumerate(published.pop("embedding.weight").split([4, 5]))}
    save_file(published | halves, tmp_path / "model.safetensors")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vlm.model.language import llama\n"
        "from vlm.model.weights.fill import fill\n"
        "from vlm.model.weights.hollow import hollow\n"
        "from vlm.model.weights.source import open_weights\n"
        "from vlm.model.weights.rows import Row\n"
        "from vlm.model.weights.table import Table\n"
        "with hollow():\n"
        "    model = llama(9, 8, 1, 2)\n"
        "rows = [Row(n, n) for n in model.state_dict() if n != 'embedding.weight']\n"
        "rows.append(Row(('embed.0', 'embed.1'), 'embedding.weight'))\n"
        "fill(model, Table('halves', tuple(rows)), open_weights(Path(sys.argv[1])))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_joined_by_shape_as_torch_does_it(join: Callable[..., Tensor], dim: int) -> None:
    for shapes in ([(2, 3), (2, 3)], [(2, 3), (4, 3)], [(2, 3), (2, 5)], [(2,), (3,)], [(2, 3), (2,)], [(), ()]):
        real, empty = ([torch.ones(shape, device=d, dtype=torch.half) for shape in shapes] for d in ("cpu", "meta"))
        try:
            expected = join(real, dim)
        except (RuntimeError, IndexError):
            expected = None
        with Hollow():
            if expected is None:
                with pytest.raises((RuntimeError, IndexError)):
                    join(empty, dim=dim)
            else:
                assert join(empty, dim).shape == join(empty, dim=dim).shape == expected.shape
                assert join(empty, dim).dtype == torch.half and torch.equal(join(real, dim), join(real, dim=dim))


def test_hollow_modules_draw_no_numbers_and_leave_others_alone() -> None:
    before = torch.get_rng_state()
    with hollow():
        model = llama(99, 16, 2, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert bool(nn.Linear(3, 3).weight.any())
