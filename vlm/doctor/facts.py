"""What the doctor knows: plain data, so that its advice can be tried on machines that nobody here has."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Package:
    """A distribution that is needed: `wanted`, such as ">=2.9"; `version`: None where it is not installed."""

    name: str
    wanted: str
    version: str | None
    fits: bool


@dataclass(frozen=True)
class Conflict:
    """`package` asks for `wants`, such as "torch==2.14.1", and `found` is installed."""

    package: str
    wants: str
    found: str


@dataclass(frozen=True)
class Extra:
    """An optional dependency of vlm and what it is for."""

    name: str
    gives: str
    packages: tuple[Package, ...]


@dataclass(frozen=True)
class Machine:
    """The computer, or what of it this process may use. Sizes in bytes; None: not to be found out here.

    `cores`: of the machine; `usable`: after affinity and the quota of a container. `shared`: size of /dev/shm.
    `driver`: version of NVIDIA's. `load`: processes that wanted a core in the last minute.
    """

    system: str
    cpu: str
    instructions: tuple[str, ...]
    cores: int
    usable: int
    memory: int | None
    shared: int | None
    open_files: int | None
    driver: str | None
    load: float | None


@dataclass(frozen=True)
class Gpu:
    """One that torch can use."""

    name: str
    memory: int
    capability: str
    bf16: bool


@dataclass(frozen=True)
class Torch:
    """What torch says of itself. `exact`: fp32 products may go to oneDNN; `cuda`: the version it was built for."""

    threads: int
    onednn: bool
    exact: bool
    bf16: bool
    cuda: str | None
    gpus: tuple[Gpu, ...]
    mps: bool


@dataclass(frozen=True)
class Pictures:
    """How Pillow was built: `turbo`: version of libjpeg-turbo, None without."""

    jpeg: bool
    turbo: str | None
    webp: bool


@dataclass(frozen=True)
class Rate:
    """A product of square matrices: GFLOP/s, and the relative error beside fp64."""

    device: str
    kind: str
    side: int
    gflops: float
    error: float


@dataclass(frozen=True)
class Decoding:
    """Pictures a second and core, of JPEGs of so many megapixels: whole, and at a part of the size (DCT scaling)."""

    megapixels: float
    whole: float
    scaled: float


@dataclass(frozen=True)
class Facts:
    """Everything. `failed`: packages that are installed and cannot be used, with the reason."""

    vlm: str
    python: str
    described: bool  # vlm is installed, so that its requirements can be read
    packages: tuple[Package, ...]
    conflicts: tuple[Conflict, ...]
    extras: tuple[Extra, ...]
    machine: Machine
    failed: dict[str, str] = field(default_factory=dict)
    torch: Torch | None = None
    pictures: Pictures | None = None
    cache: str | None = None  # why nothing can be written into the cache of shards
    rates: tuple[Rate, ...] = ()
    decoding: Decoding | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def rate(self, kind: str, device: str = "cpu") -> float | None:
        """GFLOP/s of one that was measured."""
        return next((rate.gflops for rate in self.rates if (rate.device, rate.kind) == (device, kind)), None)
