# SPDX-License-Identifier: MIT
"""Tables of results: success by environment and method, over seeds of training.

    python .github/tools/table.py runs       print all results in a folder
    python .github/tools/table.py --write    rewrite the tables of the pages from the episodes

A mean is over seeds. Its 95% interval is by t over the seeds. With one seed, and with seeds that
all score the same, it is Wilson's over the episodes; of one seed, it tells nothing of how much
trainings differ. Differences are paired: by t over the seeds, or with one seed by McNemar's exact
test. Holm's p counts all comparisons of its table.

A page's table stands between <!-- table: NAME --> and <!-- end -->, for a NAME of TABLES.
"""

import csv
import gzip
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, t

TOP = Path(__file__).parents[2]
RESULTS = TOP / ".github/results"
PAGES = "README.md", ".github/results/README.md", ".github/forks/README.md"
GOALS = 5  # an episode's number modulo 5 is its goal


# ---- Reading
def read(folder, every=False):
    """The episodes of all runs in a folder, a dict each, with numbers for what is counted.

    Of a run, only those of its last networks, and of a method, those of its last code; or `every`.
    """
    folder = Path(folder).expanduser()
    rows = []
    paths = [*folder.glob("**/episodes.csv"), *folder.glob("**/episodes.csv.gz")]
    for path in sorted(paths):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            run = list(csv.DictReader(file))
        if run and not every:
            run = [row for row in run if row.get("networks") == run[-1].get("networks")]
            last = {row["method"]: row.get("code") for row in run}
            run = [row for row in run if row.get("code") == last[row["method"]]]
            most = max(int(row["updates"]) for row in run)
            run = [row for row in run if int(row["updates"]) == most]
        for row in run:
            row["path"] = path
            row["env"] = str(path.relative_to(folder).parent.parent / row["env"])
            row["first_seed"] = row.get("first_seed", "")
            row["updates"] = int(row["updates"])
            row["guidance"] = float(row["guidance"])
            row["weight"] = float(row["weight"])
            row["strength"] = strength(row)
            row["variant"] = variant(row)
            score = float(row["success"])
            row["score"] = float(row["return"]) if np.isnan(score) else score
        rows += run
    return rows


def strength(row):
    """λ or w in words; nothing without guidance."""
    if row["weight"]:
        return f"w {row['weight']:g}"
    return f"λ {row['guidance']:g}" if row["guidance"] else ""


def variant(row):
    """What a row of commit 3885e4d or before says of its push, which c(t) multiplied, or not."""
    if "fade" not in row or not row["strength"]:
        return ""
    words = "with c(t)" if row["fade"] == "True" else "without c(t)"
    return words if row["average_policy"] == "True" else f"{words}, raw policy"


def group(rows, *columns):
    """{values of these columns: {seed: scores of its episodes (n,)}}."""
    found = {}
    paths = {}
    for row in rows:
        key = tuple(row[column] for column in columns)
        path = paths.setdefault((key, row["seed"]), row["path"])
        if path != row["path"]:
            sys.exit(f"{path} and {row['path']} are of the same seed: give the folder of one")
        found.setdefault(key, {}).setdefault(row["seed"], []).append(row["score"])
    return {key: {k: np.array(x) for k, x in runs.items()} for key, runs in found.items()}


# ---- The statistic: runs are {seed: scores of its episodes (n,)}
def t_test(x):
    """x (n,) -> its mean, half of the mean's 95% interval, and p of a mean of 0.

    If all n are equal, the half is 0, and p is NaN: t is not defined.
    """
    x = np.round(x, 9)  # equal numbers stay equal
    error = x.std(ddof=1) / len(x) ** 0.5
    p = 2 * t.sf(abs(x.mean()) / error, len(x) - 1) if error > 0 else np.nan
    return x.mean(), t.ppf(0.975, len(x) - 1) * error, p


def interval(runs):
    """-> the mean over seeds, and the ends of its 95% interval."""
    episodes = np.concatenate([*runs.values()])
    binary = np.isin(episodes, (0, 1)).all()
    seeds = np.array([x.mean() for x in runs.values()])
    if binary and np.ptp(seeds) == 0:
        test = binomtest(int(episodes.sum()), len(episodes))
        return episodes.mean(), *test.proportion_ci(method="wilson")
    mean, half, _ = t_test(seeds if len(seeds) > 1 else episodes)
    ends = mean - half, mean + half
    return mean, *(np.clip(ends, 0, 1) if binary else ends)


def paired(a, b):
    """a - b over the same seeds and episodes -> the difference in words, and its p."""
    differences = []
    for seed in sorted(a.keys() & b.keys()):
        n = min(len(a[seed]), len(b[seed]))
        differences.append(a[seed][:n] - b[seed][:n])
    if len(differences) > 1:
        mean, half, p = t_test(np.array([x.mean() for x in differences]))
        return f"{mean:+.2f}{f' ± {half:.2f}' if half else ' in each seed'}", p
    won = int((differences[0] > 0).sum())
    lost = int((differences[0] < 0).sum())
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return f"{differences[0].mean():+.2f}, {won} won, {lost} lost", p


def holm(p):
    """The p of several comparisons, adjusted, in the same order. NaN counts, and stays."""
    p = np.array(p)
    order = p.argsort()  # NaN last
    adjusted = np.empty(len(p))
    factors = np.arange(len(p), 0, -1)
    adjusted[order] = np.maximum.accumulate(p[order] * factors).clip(max=1)
    return adjusted


# ---- Cells and tables of a page
def cell(runs):
    """0.62 [0.25, 1.00]."""
    mean, low, high = interval(runs)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]{' one seed' * (len(runs) == 1)}"


def by_seed(runs):
    """0.72 0.45 0.70: seeds in order."""
    return " ".join(f"{runs[seed].mean():.2f}" for seed in sorted(runs))


def by_goal(runs):
    """The same of goals, over all seeds."""
    return " ".join(
        f"{np.mean([x[goal::GOALS].mean() for x in runs.values()]):.2f}" for goal in range(GOALS)
    )


def in_words(p):
    """A p with three decimals, or with one digit if it is small."""
    if np.isnan(p):
        return "–"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def markdown(header, rows):
    """Lines of a table; rows are lists of texts."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def compared(header, title, rows):
    """A table of rows (cells, pair): pair is two runs whose difference has this title, or None."""
    tests = [paired(*pair) for _, pair in rows if pair]
    adjusted = holm([p for _, p in tests])
    found = iter(zip(tests, adjusted, strict=True))
    lines = []
    for cells, pair in rows:
        end = ["", "", ""]
        if pair:
            (difference, p), p_holm = next(found)
            end = [difference, in_words(p), in_words(p_holm)]
        lines.append([*cells, *end])
    return markdown([*header, title, "p", "p, Holm"], lines)


# ---- README: methods by family
FAMILIES = "cube-single", "cube-double", "scene", "puzzle-3x3"
MINUTES = "3.4", "65", "30", "30"  # of training on two CPU cores, as the terminal said
PUBLISHED = {  # read off the papers' tables; the second row is of CTA, GCIVL-dual and GCIQL
    "*published, with full states as goals:*": ("", "", "", ""),
    "GCIQL, [arXiv 2410.20092](https://arxiv.org/abs/2410.20092)": ("0.68", "0.40", "0.51", "0.95"),
    "best of one table, [arXiv 2605.20609](https://arxiv.org/abs/2605.20609)": (
        "0.89",
        "0.60",
        "0.90",
        "0.95",
    ),
}
METHODS = "bc", "bc@4", "bc@32", "qgf", "qgf@4", "qgf-jacobian", "bptt", "qfql", "gradstep"


def family(name):
    """{(method, λ): runs} of a family."""
    return group(read(RESULTS / name), "method", "guidance")


def strength_of_qgf(found):
    """The one λ at which a family's qgf was played."""
    (x,) = [guidance for method, guidance in found if method == "qgf"]
    return x


def runs_of(name):
    """{method: runs} of a family, at the λ of qgf."""
    found = family(name)
    x = strength_of_qgf(found)
    return {method: found[method, 0.0 if method.startswith("bc") else x] for method in METHODS}


def families():
    """README's table of methods, at the λ of qgf."""
    header = ["any goal (oracle goals) of"]
    columns = []
    for name in FAMILIES:
        header.append(f"{name}, λ {strength_of_qgf(family(name)):g}")
        columns.append({method: cell(runs) for method, runs in runs_of(name).items()})
    rows = [["minutes of training", *MINUTES]]
    rows += [[f"`{method}`", *(column[method] for column in columns)] for method in METHODS]
    rows += [[name, *scores] for name, scores in PUBLISHED.items()]
    return markdown(header, rows)


# ---- The page of results
def methods_of(name):
    """A family's methods, each compared with qgf."""
    found = family(name)
    reference = found["qgf", strength_of_qgf(found)]
    rows = []
    for method in METHODS:
        for (other, x), runs in found.items():
            if other == method:
                cells = [f"`{method}`", f"{x:g}" if x else "", by_seed(runs), cell(runs)]
                pair = None if method == "qgf" else (reference, runs)
                rows.append(([*cells, by_goal(runs)], pair))
    return compared(["method", "λ", "by seed", "success", "by goal"], "`qgf` − it", rows)


def variants():
    """Trainings of cube-double: the defaults, a constant rate, the paper's variant."""
    names = {
        "cube-double": "defaults: falling rate, λ 3",
        "cube-double-constant": "constant rate, λ 3",
        "cube-double-paper": "the paper's variant, w 1",
    }
    runs = {name: group(read(RESULTS / name), "method")[("qgf",)] for name in names}
    reference = runs["cube-double"]
    rows = [
        ([names[name], by_seed(x), cell(x)], None if x is reference else (reference, x))
        for name, x in runs.items()
    ]
    return compared(["`qgf`", "by seed", "success"], "defaults − it", rows)


def sizes():
    """cube-double with smaller networks, one seed."""
    folders = {
        "64, 64": "cube-double-sizes/64-units",
        "256, 256": "cube-double-sizes/256-units",
        "512, 256 (the defaults)": "cube-double/s0",
    }
    methods = "bc@4", "bc@32", "qgf"
    rows = []
    for name, folder in folders.items():
        found = group(read(RESULTS / folder), "method")
        rows.append([name, *(cell(found[(method,)]) for method in methods)])
    return markdown(["units of policy, of critic", *(f"`{x}`" for x in methods)], rows)


def single_tasks():
    """A task's own critic, and on the same goal any goal's critic of the same seed."""
    rows = []
    for path in sorted((RESULTS / "single-tasks").iterdir()):
        name, number = path.name.split("-task")
        found = group(read(path), "method", "guidance")
        any_goal = family(f"{name}/s0")
        for (method, x), runs in found.items():
            (seed,) = runs
            theirs = "not played"
            if (method, x) in any_goal:
                scores = any_goal[method, x][seed]
                theirs = cell({seed: scores[int(number) - 1 :: GOALS]})
            rows.append([path.name, f"`{method}`", f"{x:g}" if x else "", cell(runs), theirs])
    return markdown(["task", "method", "λ", "its own critic", "any goal's critic"], rows)


def selection():
    """Success over the strength on the choosing episodes, a row for each seed."""
    found = {}
    for folder in ("selection", "selection-seeds", "selection-paper"):
        columns = "env", "method", "variant", "seed", "strength", "guidance", "weight"
        for (*key, words, x, w), runs in group(read(RESULTS / folder), *columns).items():
            (scores,) = runs.values()
            found.setdefault(tuple(key), {})[x, w] = f"{words}: {scores.mean():.2f}"
    rows = []
    for key, scores in sorted(found.items()):
        env, method, push, seed = key
        successes = ", ".join(text for _, text in sorted(scores.items()))
        rows.append([env, f"`{method}`", push, seed, successes])
    return markdown(["any goal of", "method", "push", "seed", "success at each strength"], rows)


def placebos():
    """Pushes in a wrong direction, each compared with bc."""
    shifted = [(name, f"{name}/s0", "placebo", "shifted by one") for name in FAMILIES]
    folder = "forks/placebo-reversed"
    flat = "reversed, the vertical set to 0"
    kinds = [("scene", folder, "reversed", "reversed"), ("scene", folder, "reversed-flat", flat)]
    rows = []
    for name, folder, method, words in [*shifted, *kinds]:
        runs = group(read(RESULTS / folder), "method")[(method,)]
        bc = group(read(RESULTS / name / "s0"), "method")[("bc",)]
        rows.append(([name, words, cell(runs)], (runs, bc)))
    return compared(["any goal of", "dimensions of ∇Q", "success"], "it − `bc`", rows)


def edp():
    """EDP compared with qgf, which has the same critic."""
    rows = []
    for name in ("cube-single", "scene"):
        runs = group(read(RESULTS / "forks/edp" / name), "method")[("edp",)]
        qgf = group(read(RESULTS / name / "s0"), "method")[("qgf",)]
        rows.append(([name, cell(runs), cell(qgf)], (qgf, runs)))
    today = group(read(RESULTS / "forks/edp/frozen-critic"), "method")
    runs, qgf = today[("edp",)], today[("qgf",)]
    rows.append((["cube-single, f9f3884, no c(t)", cell(runs), cell(qgf)], (qgf, runs)))
    return compared(["any goal of", "`edp`, α 30", "`qgf`"], "`qgf` − `edp`", rows)


def edp_alpha():
    """EDP's weight on the choosing episodes of cube-single."""
    rows = []
    for alpha in (10, 30, 100, 300):
        folder = RESULTS / f"forks/edp/other-episodes/alpha-{alpha}"
        rows.append([f"{alpha}", cell(group(read(folder), "method")[("edp",)])])
    return markdown(["α", "`edp`, cube-single"], rows)


# ---- The page of forks
def forks():
    """What the forks score, each compared with the code without a diff."""
    folder = RESULTS / "forks/scores"
    base = group(read(folder / "none"), "method")[("qgf",)]
    rows = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.name != "none", path.name)):
        for (method, words), runs in group(read(path), "method", "strength").items():
            if method != "bc":
                pair = None if path.name == "none" else (runs, base)
                rows.append(([path.name, f"`{method}`", words, cell(runs)], pair))
    return compared(["diff", "row", "strength", "success"], "it − none", rows)


TABLES = {
    "families": families,
    **{name: partial(methods_of, name) for name in FAMILIES},
    "variants": variants,
    "sizes": sizes,
    "single-tasks": single_tasks,
    "selection": selection,
    "placebos": placebos,
    "edp": edp,
    "edp-alpha": edp_alpha,
    "forks": forks,
}


def write(top=TOP):
    """Rewrite the tables of the pages in this folder."""

    def table(found):
        return "\n".join([found[1], *TABLES[found[2]](), "<!-- end -->"])

    for page in PAGES:
        path = Path(top) / page
        text = path.read_text()
        new = re.sub(r"(<!-- table: (\S+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL)
        if new != text:
            path.write_text(new)
            print(f"rewrote {path}")


def show(folder):
    """Print all results of a folder."""
    columns = "env", "updates", "method", "variant", "strength", "first_seed"
    found = group(read(folder), *columns)
    if not found:
        sys.exit(f"{folder} holds no results: a run has an episodes.csv once it was evaluated")
    line = "{:20}{:>8}  {:25}{:9}{:>10}{:>6}{:>5}  {}"
    header = "environment", "updates", "method", "strength", "first seed", "seeds", "n", "success"
    print(line.format(*header))
    for (env, updates, method, push, strength, first), runs in found.items():
        n = sum(map(len, runs.values()))
        method = f"{method} {push}".strip()
        print(line.format(env, updates, method, strength, first, len(runs), n, cell(runs)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--write":
        write()
    else:
        show(sys.argv[1])
