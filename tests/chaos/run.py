"""./bootstrap chaos: `kill -9` at random points of launch, grant, egress and log append; 10,000 unless said otherwise.

After each, what was acknowledged has to be there, nothing may run unrecorded or unconfined, and the log has to verify.
What is done at point N, who dies and when follows from the seed and N alone; how far the deeds have come by then is the
machine's, so a seed repeats the choices and not the race. Go on with `--seed SEED --from N` where a run was stopped.
`--jobs N` has N instances suffer at once: a point waits more than it works, and each has the others for neighbours.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
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
    if options.jobs > 1:
        return _side_by_side(options)
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


def _side_by_side(options: argparse.Namespace) -> int:
    """Rounds as commands of their own, so many at a time; stops at the first finding."""
    waiting = list(range(options.first, options.points + 1, ROUND_POINTS))
    running: dict[int, subprocess.Popen[str]] = {}
    began, done = time.monotonic(), 0
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                first = waiting.pop(0)
                running[first] = _round_of_its_own(options, first)
            time.sleep(0.2)
            for first, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[first]
                said, _ = process.communicate()
                if process.returncode:
                    print(said)
                    return 1
                done += min(ROUND_POINTS, options.points + 1 - first)
                each = (time.monotonic() - began) / done
                print(f"{first}: {said.splitlines()[-1]}; {each:.2f} s a point, {done} done", flush=True)
    except KeyboardInterrupt:
        following = min((*running, *waiting))
        print(f"stopped; go on with: ./bootstrap chaos --seed {options.seed} --from {following}", flush=True)
        return 130
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    print(f"all is as promised after {done} deaths")
    return 0


def _round_of_its_own(options: argparse.Namespace, first: int) -> subprocess.Popen[str]:
    last = min(first + ROUND_POINTS - 1, options.points)
    words = ["--seed", str(options.seed), "--from", str(first), "--points", str(last)]
    # Not of the terminal's group: what a ^C ends is said here, and they are ended in order.
    return subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, process_group=0)


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
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="instances at once; 1 unless given")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs is 1 or more")
    if not 1 <= options.first <= options.points:
        parser.error("--from is a point from 1 to --points")
    if options.seed is None:
        options.seed = random.SystemRandom().getrandbits(32)
    return options


if __name__ == "__main__":
    sys.exit(main())
