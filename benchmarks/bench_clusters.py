"""Faults of a Lepton workspace, injected at random moments: leaked jobs, double jobs, lost experiments, exit status.

`make bench-clusters` runs every fault several times against the stand-in of the tests and writes
benchmarks/results/clusters.json; a table for docs/LOG.md goes to stdout. All requests stay on loopback.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.lepton.faults import FAULTS, count, undisturbed
from tests.lepton.project import Toy
from tests.lepton.standin import Standin


def main(repetitions: int, seed: int, only: str) -> int:
    draw, rows = random.Random(seed), []
    print("| fault | runs | leaked | doubles | lost | exit status |\n|---|---|---|---|---|---|")
    for name, (run, due, done) in FAULTS.items():
        if only not in name:
            continue
        outcomes, began = [], time.monotonic()
        moments = name.startswith(("Ctrl-C", "SIGTERM", "kill -9"))  # the others do not depend on them
        runs = repetitions if moments else max(1, repetitions // 3)
        for _ in range(runs):
            share = draw.random()
            with tempfile.TemporaryDirectory() as folder:
                standin = Standin(Path(folder) / "standin")
                try:
                    toy = Toy(Path(folder) / "project", standin)
                    outcome = count(toy, run(toy, share))
                finally:
                    standin.close()
                good = outcome.status == due and not outcome.leaked and not outcome.doubles
                if not good or (done and outcome.lost):
                    print(f"share {share:.3f}: {outcome}\n{toy.output()}", file=sys.stderr)
                outcomes.append(outcome)
        if run is undisturbed:
            Toy.run_s = (time.monotonic() - began) / runs
        lost = [outcome.lost for outcome in outcomes]
        row = {
            "fault": name,
            "runs": runs,
            "leaked": sum(outcome.leaked for outcome in outcomes),
            "doubles": sum(outcome.doubles for outcome in outcomes),
            "lost": sum(lost) if done else None,
            "exit_status": sorted({outcome.status for outcome in outcomes}),
            "exit_status_due": due,
        }
        rows.append(row)
        if not only:
            place = Path(__file__).parent / "results/clusters.json"
            place.write_text(json.dumps({"seed": seed, "faults": rows}, indent=1) + "\n")
        text = "none was to be done" if row["lost"] is None else row["lost"]
        status = ", ".join(map(str, row["exit_status"]))
        print(f"| {name} | {runs} | {row['leaked']} | {row['doubles']} | {text} | {status} |", flush=True)
    bad = [row for row in rows if row["leaked"] or row["doubles"] or row["lost"]]
    return int(bool(bad) or any(row["exit_status"] != [row["exit_status_due"]] for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    arguments = parser.parse_args()
    sys.exit(main(arguments.repetitions, arguments.seed, arguments.only))
