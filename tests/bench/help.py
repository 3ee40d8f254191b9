"""How long help takes: `vlm --help` and the help of its verbs beside open_clip's training script.

    pip install 'open_clip_torch[training]'
    python -m tests.bench.help [--rounds 7]

Each figure is of a process of its own,.
The candidates of a round run one after another, each round from another one on; the first round, which fills the page
cache, is not counted. CPU seconds of the process count, since other work on a shared machine stretches the clock.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

OURS = [sys.executable, "-m", "vlm"]
BASE = "open_clip_train --help"
CANDIDATES = {
    BASE: [sys.executable, "-m", "open_clip_train.main", "--help"],
    "vlm --help": [*OURS, "--help"],
    "vlm train --help": [*OURS, "train", "--help"],
    "vlm shards write --help": [*OURS, "shards", "write", "--help"],
    "vlm completion fish": [*OURS, "completion", "fish"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def once(command: list[str]) -> tuple[float, float]:
    """Seconds of the processor and of the clock; help that fails is no help."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """In alternation."""
    names = list(CANDIDATES)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            seconds = once(CANDIDATES[name])
            if number:
                found[name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    found = measure(parser.parse_args().rounds)
    print(f"CPU time, medians; ratio above 1: faster than {BASE} (median, least and most of the rounds)")
    for name, seconds in found.items():
        ratios = [base[0] / own[0] for base, own in zip(found[BASE], seconds, strict=True)]
        cpu, wall = (statistics.median(values) * 1e3 for values in zip(*seconds, strict=True))
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"  {name:26s} {cpu:7.0f} ms CPU {wall:7.0f} ms wall  ratio {statistics.median(ratios):5.1f}  ({spread})")


if __name__ == "__main__":
    main()
