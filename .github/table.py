# SPDX-License-Identifier: MIT
"""All results in a folder: success by environment and method, over seeds and goals.

    python .github/table.py runs

An interval is a 95% interval of the mean: seeds of training are drawn with replacement and, for
each, episodes of each goal. With one seed it tells nothing of how much trainings differ.
"""

import csv
import sys
from pathlib import Path

import numpy as np

GOALS = 5  # an episode's number modulo 5 is its goal


def variant(row):
    """What was not as usual: the policy without average, the push without fading."""
    words = ""
    if row["average_policy"] != "True":
        words += " raw"
    if row["fade"] != "True":
        words += " no-fade"
    return words


def read(folder):
    """{(environment, updates, method, λ, w): {seed: successes (n,)}}, of a run's most updates."""
    found = {}
    for path in sorted(Path(folder).glob("**/episodes.csv")):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        most = max((int(row["updates"]), int(row["policy_updates"])) for row in rows)
        for row in rows:
            if (int(row["updates"]), int(row["policy_updates"])) == most:
                method = row["method"] + variant(row)
                key = row["env"], most[0], method, float(row["guidance"]), float(row["weight"])
                runs = found.setdefault(key, {})
                runs.setdefault(row["seed"], []).append(float(row["success"]))
    return found


def interval(runs, draws=1000):
    """runs: a list of arrays (n,) of successes -> the mean of seeds, and its 95% interval."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        seeds = rng.integers(len(runs), size=len(runs))
        goals = [
            rng.choice(runs[k][g::GOALS], len(runs[k][g::GOALS]))
            for k in seeds
            for g in range(GOALS)
        ]
        means.append(np.concatenate(goals).mean())
    return np.mean([x.mean() for x in runs]), *np.percentile(means, (2.5, 97.5))


def main(folder):
    found = read(folder)
    if not found:
        sys.exit(f"{folder} holds no results: a run has an episodes.csv once it was evaluated")
    print(
        f"{'environment':20}{'updates':>8}  {'method':22}{'strength':9}{'seeds':>6}{'n':>6} success"
    )
    for (env, updates, method, guidance, weight), by_seed in found.items():
        strength = f"w {weight:g}" if weight else f"λ {guidance:g}" if guidance else ""
        runs = [np.array(x) for x in by_seed.values()]
        n = sum(map(len, runs))
        mean, low, high = interval(runs)
        line = f"{env:20}{updates:8}  {method:22}{strength:9}{len(runs):6}{n:6}"
        print(f"{line} {mean:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
