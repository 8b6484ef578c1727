"""Every causal language model of the installed transformers: exact in token chunks, or refused by name.

    python -m zoo [FAMILY …] [--processes N]

Ends with 1 if one is silently wrong, or fewer than 150 are exact.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys

from zoo.families import families
from zoo.trial import Trial, try_family

LEAST_EXACT = 150


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = arguments.families or families()
    trials: list[Trial] = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=20) as pool:
        for trial in pool.imap_unordered(try_family, chosen):
            trials.append(trial)
            print(
                f"{trial.outcome:9} {trial.family:26} {trial.seconds:6.1f} s  {trial.detail[:300]}",
                flush=True,
            )
    count = collections.Counter(trial.outcome for trial in trials)
    print(", ".join(f"{count[outcome]} {outcome}" for outcome in ("exact", "refused", "wrong", "not built")))
    enough = bool(arguments.families) or count["exact"] >= LEAST_EXACT
    return int(count["wrong"] > 0 or not enough)


if __name__ == "__main__":
    sys.exit(main())
