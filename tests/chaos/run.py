"""./bootstrap chaos: `kill -9` at random points of launch, grant, egress and log append; 10,000 unless said otherwise.

After each, what was acknowledged has to be there, nothing may run unrecorded or unconfined, and the log has to verify.
What is done at point N, who dies and when follows from the seed and N alone; how far the deeds have come by then is the
machine's, so a seed repeats the choices and not the race. Go on with `--seed SEED --from N` where a run was stopped.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chaos.points import Point, point
from tests.chaos.rounds import Round

POINTS: Final = 10_000
ROUND_POINTS: Final = 50  # then a new instance: what is judged grows with what has happened on one
SHOWN_EVERY: Final = 10


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind then, either
    print(f"seed {options.seed}, points {options.first} to {options.points}", flush=True)
    done: Counter[str] = Counter()
    began = time.monotonic()
    try:
        for first in range(options.first, options.points + 1, ROUND_POINTS):
            with Round.begin() as current:
                for number in range(first, min(first + ROUND_POINTS, options.points + 1)):
                    here = point(options.seed, number)
                    if not _come_to(current, here, options.seed):
                        return 1
                    done[here.deed] += 1
                    if number % SHOWN_EVERY == 0 or number == options.points:
                        _show(number, options, time.monotonic() - began)
                current.end()
    except KeyboardInterrupt:
        following = options.first + done.total()
        print(f"stopped; go on with: ./bootstrap chaos --seed {options.seed} --from {following}", flush=True)
        return 130
    counts = ", ".join(f"{count} at {deed}" for deed, count in sorted(done.items()))
    print(f"all is as promised after {done.total()} deaths: {counts}")
    return 0


def _come_to(current: Round, here: Point, seed: int) -> bool:
    try:
        current.come_to(here)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding, and says where
        print(f"point {here.describe()}\n  {type(error).__name__}: {error}\n  log and journal: {current.keep()}")
        print(f"again: ./bootstrap chaos --seed {seed} --from {here.number} --points {here.number}", flush=True)
        return False
    return True


def _show(number: int, options: argparse.Namespace, seconds: float) -> None:
    each = seconds / (number - options.first + 1)
    left = each * (options.points - number) / 60
    print(f"{number}/{options.points}  {each:.1f} s a point, {left:.0f} min left", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./bootstrap chaos", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--points", type=int, default=POINTS, metavar="N", help=f"the last point; {POINTS} unless given"
    )
    parser.add_argument("--seed", type=int, help="of an earlier run; without it, one is drawn and printed")
    parser.add_argument("--from", dest="first", type=int, default=1, metavar="N", help="the first point")
    options = parser.parse_args()
    if not 1 <= options.first <= options.points:
        parser.error("--from is a point from 1 to --points")
    if options.seed is None:
        options.seed = random.SystemRandom().getrandbits(32)
    return options


if __name__ == "__main__":
    sys.exit(main())
