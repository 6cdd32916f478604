"""./bootstrap fuzz: coverage-guided fuzzing (atheris) of what reads an agent's bytes, for a bounded time.

`--seconds N` is for each target, `--target NAME` takes one. A finding is printed with its input, which is kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

INPUT_BYTES_MAX: Final = 4096
INPUT_SECONDS_MAX: Final = 5  # one that takes longer stalls a worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="bootstrap fuzz", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--target", choices=names())
    options = parser.parse_args()
    broken = []
    for name in [options.target] if options.target else names():
        print(f"==> {name}, {options.seconds} s", flush=True)
        with tempfile.TemporaryDirectory(prefix="stockade-fuzz-") as corpus:
            done = subprocess.run(
                [sys.executable, __file__, "--inside", name, corpus, str(options.seconds)], check=False
            )
        if done.returncode != 0:
            broken.append(name)
    print(f"findings in: {', '.join(broken)}" if broken else "no findings")
    return 1 if broken else 0


def names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def inside(name: str, corpus: str, seconds: str) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris  # type: ignore[import-untyped]  # ships no types

    with atheris.instrument_imports(include=["gateway_client"]):
        from tests.fuzz.targets import SEEDS, TARGETS
    for number, seed in enumerate(SEEDS[name]):
        Path(corpus, f"seed{number}").write_bytes(seed)
    kept = Path.cwd() / "fuzz-"
    bounds = [f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}", f"-timeout={INPUT_SECONDS_MAX}"]
    atheris.Setup(
        [sys.argv[0], corpus, *bounds, f"-artifact_prefix={kept}{name}-", "-print_final_stats=1"], TARGETS[name]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    sys.exit(main())
