"""Settings files: what merges, what each mistake says, and that a dump reads back equal."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Discriminator, Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from vlm.config import schema
from vlm.config.language import TransformerLanguage
from vlm.config.load import ConfigError, dump, load, merge


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mlp(Part):
    kind: Literal["mlp"]
    layers: int = Field(2, gt=0)


class Moe(Part):
    kind: Literal["moe"]
    experts: int = 8
    top_k: int = 2

    @field_validator("top_k")
    @classmethod
    def fits(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data["experts"]:
            raise ValueError(f"{value} exceeds experts={info.data['experts']}")
        return value


class Qformer(Part):
    kind: Literal["qformer"]
    queries: int = 32
    ffn: Annotated[Mlp | Moe, Discriminator("kind")] = Mlp(kind="mlp")


Connector = Annotated[Mlp | Qformer, Field(discriminator="kind")]


class Loss(Part):
    kind: Literal["itc", "itm"]
    weight: float = Field(1.0, ge=0)


class Train(Part):
    steps: int
    rate: float = Field(1e-4, gt=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.98)
    bf16: bool = False
    clip: float | Literal["off"] = 1.0
    name: str = Field("run", pattern="^[a-z]+$")

    @model_validator(mode="after")
    def sane(self) -> "Train":
        if self.bf16 and self.steps == 13:
            raise ValueError("steps=13 needs bf16=false")
        return self


class Run(Part):
    connector: Connector
    second: Connector | None = None
    train: Train
    losses: list[Loss] = []
    groups: dict[str, Loss] = {}
    out: Path = Path("runs")


GOOD = "connector: {kind: qformer, queries: 8}\ntrain: {steps: 5}\nlosses: [{kind: itc}, {kind: itm, weight: 0.5}]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Run, path, overrides)
    assert str(caught.value).splitlines() == caught.value.problems
    return [line.removeprefix(f"{path}: ") for line in caught.value.problems]


def test_defaults_and_values(file: Path) -> None:
    run = load(Run, file)
    assert run.connector == Qformer(kind="qformer", queries=8)
    assert run.train == Train(steps=5)


def test_overrides_merge_but_a_new_kind_replaces(file: Path) -> None:
    run = load(Run, file, ["train.rate=1e-3", "losses.1.weight=2", "train.betas=[0.8, 0.9]", "connector.ffn.kind=mlp"])
    assert (run.train.steps, run.train.rate, run.train.betas) == (5, 1e-3, (0.8, 0.9))
    assert [loss.weight for loss in run.losses] == [1.0, 2.0]
    assert isinstance(run.connector, Qformer)
    assert run.connector.queries == 8
    assert load(Run, file, ["connector.layers=3", "connector.kind=mlp"]).connector == Mlp(kind="mlp", layers=3)
    assert load(Run, file, ["losses=[{kind: itc, weight: 3}]"]).losses == [Loss(kind="itc", weight=3)]
    assert load(Run, file, ["connector={kind: mlp}"]).connector == Mlp(kind="mlp")


def test_base_is_laid_below(file: Path) -> None:
    child = file.with_name("child.yaml")
    child.write_text("base: x.yaml\ntrain: {rate: 1e-3}\nlosses: [{kind: itm}]\n")
    run = load(Run, child, ["train.steps=7"])
    assert run.train == Train(steps=7, rate=1e-3)
    assert run.connector == Qformer(kind="qformer", queries=8)
    assert run.losses == [Loss(kind="itm")]
    grandchild = file.with_name("grandchild.yaml")
    grandchild.write_text("base: child.yaml\n")
    assert problems(grandchild) == [
        "base: child.yaml has a base of its own; only one level is allowed, so merge the two"
    ]
    child.write_text("base: none.yaml\n")
    assert problems(child) == [f"base: cannot read {file.with_name('none.yaml')}: No such file or directory"]
    child.write_text("base: [x.yaml]\n")
    assert problems(child) == ["base: expected the name of one file, got ['x.yaml']"]


def test_shared_anchors_are_not_changed_together(file: Path) -> None:
    file.write_text("connector: {kind: mlp}\ntrain: {steps: 1}\nlosses: [&a {kind: itc}, *a]\n")
    assert [loss.weight for loss in load(Run, file, ["losses.0.weight=2"]).losses] == [2.0, 1.0]


def test_all_mistakes_at_once(file: Path) -> None:
    assert problems(file, "connector.quries=9", "foo", "train.stps=5", "losses.5.weight=1") == [
        "foo: not an override; write key=value, such as train.steps=100",
        "losses.5.weight=1: no item '5' in a list of 2; items count from 0",
        "connector.quries: no such setting (did you mean 'queries'?)",
        "train.stps: no such setting (did you mean 'steps'?)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zzz=1", "zzz: no such setting; there are: connector, second, train, losses, groups, out"),
        ("connector.ffn={kind: moe, top_k: 9}", "connector.ffn.top_k: 9 exceeds experts=8"),
        ("connector.ffn={kind: moe, expert: 9}", "connector.ffn.expert: no such setting (did you mean 'experts'?)"),
        ("connector.ffn.kind=meo", "connector.ffn.kind: no kind 'meo' (did you mean 'moe'?); there are: mlp, moe"),
        ("second={layers: 1}", "second.kind: not set; choose one of: mlp, qformer"),
        ("second=mlp", "second: expected a mapping, got 'mlp'"),
        (
            "second={kind: qformer, ffn: {kind: mlp, mlp: 1}}",
            "second.ffn.mlp: no such setting; there are: kind, layers",
        ),
        ("losses.0.kind=itcc", "losses.0.kind: expected 'itc' or 'itm', got 'itcc' (did you mean 'itc'?)"),
        ("losses.0.wieght=1", "losses.0.wieght: no such setting (did you mean 'weight'?)"),
        ("losses.0.weight=-1", "losses.0.weight: must be at least 0, got -1"),
        ("losses.x.weight=1", "losses.x.weight=1: no item 'x' in a list of 2; items count from 0"),
        ("losses=5", "losses: expected a list, got 5"),
        ("groups.a={kind: itc, weigh: 1}", "groups.a.weigh: no such setting (did you mean 'weight'?)"),
        ("groups={1: {kind: itc}}", "groups.1: expected text, got 1"),
        ("train.steps=many", "train.steps: expected a whole number, got 'many'"),
        ("train.steps=2.5", "train.steps: expected a whole number, got 2.5"),
        ("train.steps=", "train.steps: expected a whole number, got nothing"),
        ("train.steps.x=1", "train.steps: expected a whole number, got a mapping"),
        ("train.rate=fast", "train.rate: expected a number, got 'fast'"),
        ("train.rate=1", "train.rate: must be less than 1, got 1"),
        ("train.betas=[0.9]", "train.betas.1: not set, and it has no default"),
        ("train.betas=[0.9, 0.9, 0.9]", "train.betas: must have at most 2 items, got 3"),
        ("train.bf16=maybe", "train.bf16: expected true or false, got 'maybe'"),
        ("train.clip=of", "train.clip: expected a number, got 'of'; or expected 'off', got 'of' (did you mean 'off'?)"),
        ("train.name=R2", "train.name: string should match pattern '^[a-z]+$', got 'R2'"),
        ("train.name=3", "train.name: expected text, got 3"),
        ("train={steps: 13, bf16: yes}", "train: steps=13 needs bf16=false"),
        ("train={on: 1}", "train: the key true is not text; put it in quotes"),
        ("out=[1]", "out: expected the name of a file or folder, got a list"),
        ("=3", "=3: not an override; write key=value, such as train.steps=100"),
        ("train..steps=3", "train..steps=3: not an override; write key=value, such as train.steps=100"),
    ],
)
def test_each_mistake_in_words(file: Path, override: str, message: str) -> None:
    assert problems(file, override) == [message]


def test_a_value_that_is_not_yaml(file: Path) -> None:
    (message,) = problems(file, "train.name={image}{text}")
    assert message.startswith("train.name={image}{text}: the value is not YAML (line 1: ")
    assert message.endswith("); text with {, [ or : needs quotes")
    assert problems(file, "train.name='{image}{text}'")[0].startswith("train.name: string should match pattern")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n", "line 2: "),
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is written twice"),
        ("- a\n", "expected settings such as 'seed: 0', got a list"),
        ("", "expected settings such as 'seed: 0', got an empty file"),
        ("steps\n", "expected settings such as 'seed: 0', got 'steps'"),
        ("a: \x07\n", "unacceptable character #x0007"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: could not determine a constructor for the tag"),
    ],
)
def test_files_that_are_no_settings(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    (line,) = problems(file)
    assert line.startswith(message)


def test_files_that_cannot_be_read(file: Path) -> None:
    missing = file.with_name("none.yaml")
    assert problems(missing) == [f"cannot read {missing}: No such file or directory"]
    assert problems(file.parent) == [f"cannot read {file.parent}: Is a directory"]
    file.write_bytes(b"a: \xff\xfe")
    assert problems(file) == [f"cannot read {file}: it is not UTF-8 text"]


def test_a_missing_setting(file: Path) -> None:
    file.write_text("train: {rate: 0.1}\n")
    assert problems(file) == [
        "connector: not set, and it has no default",
        "train.steps: not set, and it has no default",
    ]


def test_dump_is_readable(file: Path) -> None:
    text = dump(load(Run, file))
    assert text.splitlines()[:6] == [
        "connector:",
        "  kind: qformer",
        "  queries: 8",
        "  ffn:",
        "    kind: mlp",
        "    layers: 2",
    ]
    assert "  betas: [0.9, 0.98]\n" in text
    assert "losses:\n  - kind: itc\n    weight: 1.0\n" in text


numbers = st.floats(0, 1, exclude_min=True, exclude_max=True)
names = st.from_regex("[a-z]+", fullmatch=True)
losses = st.builds(
    Loss, kind=st.sampled_from(["itc", "itm"]), weight=st.floats(0, allow_nan=False, allow_infinity=False)
)
connectors = st.builds(Mlp, kind=st.just("mlp"), layers=st.integers(1)) | st.builds(Qformer, kind=st.just("qformer"))
trains = st.builds(Train, steps=st.integers(14), rate=numbers, betas=st.tuples(numbers, numbers), name=names)
runs = st.builds(
    Run, connector=connectors, second=st.none() | connectors, train=trains, losses=st.lists(losses, max_size=3),
    groups=st.dictionaries(st.text(max_size=5), losses, max_size=2),
)  # fmt: skip


@given(runs)
def test_dump_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump(run), encoding="utf-8")
    assert load(Run, path) == run


trees = st.recursive(st.integers(), lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3))


@given(trees, trees, trees)
def test_merge_invariants(a: object, b: object, c: object) -> None:
    before = repr((a, b))
    merged = merge(a, b)
    assert repr((a, b)) == before
    assert merge(a, a) == a
    assert merge(merged, b) == merged
    if all(isinstance(tree, dict) for tree in (a, b, c)):
        assert set(merged) == set(a) | set(b)  # type: ignore[call-overload]


def test_a_kind_in_a_mapping_comes_before_the_settings_below_it() -> None:
    config = Path(__file__).parents[2] / "configs" / "tiny" / "llava_stage1.yaml"
    words = ["model.language={kind: transformer}", "model.language.mixer.kind=retention"]
    for overrides in (words, words[::-1]):
        language = load(schema.Run, config, overrides).model.language
        assert isinstance(language, TransformerLanguage) and language.mixer.kind == "retention"
