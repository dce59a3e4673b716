# SPDX-License-Identifier: MIT
"""All results in a folder: for each family, a table over all tasks and seeds of training, and success by task.

    PYTHONPATH=. python .github/table.py runs
    PYTHONPATH=. python .github/table.py runs qgf      gains over qgf (at λ = 0.1) instead of bc
"""
import re
import sys
from pathlib import Path

import numpy as np

import qgf


def families(folder):
    """{family: {run (environment, seed of training): {(method, λ, w): (episodes, 4)}}}, after a run's most updates."""
    found = {}
    for path in sorted(Path(folder).glob("**/episodes.csv")):
        inside = path.parent.relative_to(folder)  # "." if folder is a run's
        name = re.sub(r"(-task\d)?-s\d+$", "", str(inside) if inside.name else path.parent.resolve().name)
        lines = [line.split(",") for line in path.read_text().split()[1:]]
        if lines and len(lines[0]) != 10:
            raise SystemExit(f"{path} was written by another version of qgf.py")
        runs = list(dict.fromkeys((line[0], line[1]) for line in lines))
        results = qgf.read_results(path, len(runs))
        newest = max(updates for updates, *_ in results)
        for k, run in enumerate(runs):
            rows = {key[1:]: row[k] for key, row in results.items() if key[0] == newest}
            found.setdefault(name, {}).setdefault(run, {}).update(rows)
    return found


def by_task(runs, tasks):
    """Success of each method in each task, over its seeds, and the mean over tasks: lines of a Markdown table."""
    short = len({task[:-1] for task in tasks}) == 1 and "-task" in tasks[0]  # not if the default task is one of them
    heads = [tasks[0][:-1], *(task[-1] for task in tasks)] if short else ["", *tasks]
    yield "\n" + "".join(f"| {head} " for head in (*heads, "mean")) + "|"
    yield "|---" * (len(tasks) + 2) + "|"
    for key in dict.fromkeys(key for run in runs.values() for key in run):
        mean = [np.mean([run[key][:, 1] for (env, _), run in runs.items() if env == task and key in run] or [np.nan])
                for task in tasks]
        if not np.isnan(mean).any():  # a row that some task lacks has no mean
            method, guidance, weight = key
            label = f"`{method}`" + f" λ {guidance:g}" * (guidance not in (0.0, 0.1)) + f" w {weight:g}" * (weight > 0)
            yield f"| {label} " + "".join(f"| {x:.2f} " for x in (*mean, np.mean(mean))) + "|"


def main(folder, base="bc"):
    found = families(folder)
    if not found:
        raise SystemExit(f"{folder} holds no results: a run's folder has an episodes.csv once it was evaluated")
    for name, runs in found.items():
        rows, who = {}, {}
        for key in dict.fromkeys(key for run in runs.values() for key in run):
            who[key] = [name for name, run in runs.items() if key in run]
            n = min(len(runs[name][key]) for name in who[key])  # all begin with the same episodes
            rows[key] = np.stack([runs[name][key][:n] for name in who[key]])
        for method in {key[0] for key in rows if key[0].startswith("bc@")}:  # gains over it need the same runs
            peers = [w for key, w in who.items() if key[0].endswith(method[2:])]
            if any(len(w) == len(who[method, 0.0, 0.0]) and w != who[method, 0.0, 0.0] for w in peers):
                rows[method, 0.0, None] = rows.pop((method, 0.0, 0.0))  # `table` takes this key for no peer
        if base != "bc":  # `table` compares with bc
            swap = next((key for key in rows if key[0] == base and key[1] in (0.0, 0.1)), None)
            if not swap:
                continue
            rows = {("bc", 0.0, 0.0): rows.pop(swap)} | {k: v for k, v in rows.items() if k[0] != "bc"}
        lines = qgf.table(rows)
        if base != "bc":
            lines = [line for line in lines if not line.startswith("Guidance")]  # its answer is about bc
            lines = [line.replace("over bc", f"over {base}").replace("bc".ljust(18), base.ljust(18)) for line in lines]
        print(f"\n{name}: {len(runs)} run{'s' * (len(runs) > 1)}", *lines, sep="\n")
        tasks = sorted({env for env, _ in runs})
        if len(tasks) > 1:
            print(*by_task(runs, tasks), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
