# SPDX-License-Identifier: MIT
"""Draw success over the updates of the critic, or over the strength of guidance.

    python .github/curves.py updates FOLDER...
    python .github/curves.py strength FOLDER...

save .github/updates.svg and .github/strength.svg, with a panel for each environment in the
folders, and for each race.csv one over the minutes of training. A line is the mean over the seeds
of training; a band reaches from the worst seed to the best. A dashed line marks the default λ.
"""

import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import qgf  # noqa: E402

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 220, 190, 40, 40, 30  # of a panel and its edges, in pixels
COLUMNS = 2  # panels side by side
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df")
STYLE = """text { font: 12px sans-serif; fill: #59636e }
.title { font-weight: bold }
.grid { stroke: #8c959f; stroke-opacity: .3 }
.band { stroke: none; fill-opacity: .15 }
.line { fill: none; stroke-width: 2 }
.default { fill: none; stroke: #8c959f; stroke-dasharray: 4 4 }
@media (prefers-color-scheme: dark) { text { fill: #b0b8c2 } }"""


def read(folders, name, column):
    """{what is in the column: rows} of all files of this name in the folders."""
    found = defaultdict(list)
    for folder in folders:
        for path in sorted(Path(folder).glob(f"**/{name}")):
            for row in qgf.read_csv(path):
                found[row[column]].append(row)
    return found


def seeds(rows):
    """In words: of how many seeds the rows are."""
    n = len({row["seed"] for row in rows})
    return f"{n} seed{'s' * (n > 1)}"


def lines(rows, label, x):
    """{label(row): {x(row): success of each seed (seeds,)}}, of more than one x, in order."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        found[label(row)][x(row)][row["seed"]].append(float(row["success"]))
    return {
        name: {
            at: np.array([np.mean(successes) for successes in seeds.values()])
            for at, seeds in sorted(by_x.items())
        }
        for name, by_x in sorted(found.items())
        if len(by_x) > 1
    }


def default_strength(rows):
    """The λ that a run of this environment takes by itself."""
    return qgf.parse(["--env", rows[0]["env"]]).guidance[0]


def by_updates(rows):
    """Lines over the critic's updates: methods at the default λ, played more than once."""
    rows = [row for row in rows if float(row["guidance"]) in (0, default_strength(rows))]
    return lines(rows, lambda row: row["method"], lambda row: int(row["updates"]))


def by_strength(rows):
    """Lines over λ of qgf after the most updates, with and without fading."""
    most = max(int(row["updates"]) for row in rows)
    rows = [row for row in rows if row["method"] == "qgf" and int(row["updates"]) == most]

    def label(row):
        return "qgf" if row["fade"] == "True" else "qgf --no-fade"

    return lines(rows, label, lambda row: float(row["guidance"]))


def by_minutes(rows):
    """Lines of race.csv over the minutes of training, in the mean of the seeds: programs."""
    found = defaultdict(dict)
    for program, updates in dict.fromkeys((row["program"], row["updates"]) for row in rows):
        key = dict(program=program, updates=updates)
        points = [row for row in rows if qgf.matches(row, key)]
        minutes = np.mean([float(row["seconds"]) for row in points]) / 60
        successes = [int(row["solved"]) / int(row["episodes"]) for row in points]
        found[program][minutes] = np.array(successes)
    return found


def linear(x, high):
    """Where x is in 0 to high, from 0 to 1."""
    return x / high


def logarithmic(x, low, high):
    """Where x is in low to high, from 0 to 1."""
    return math.log(x / low) / math.log(high / low)


def panel(title, series, colours, x_label, place, text, default=None, ticks=()):
    """A chart of `lines`, as SVG: place maps x to 0..1, text labels it, at ticks or at each x."""
    bottom = TOP + HEIGHT

    def pixel(x, success):
        return f"{LEFT + WIDTH * place(x):.1f},{bottom - HEIGHT * success:.1f}"

    parts = [f'<text class="title" x="{LEFT}" y="16">{title}</text>']
    for success in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - HEIGHT * success
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{success:g}</text>')
    for x in ticks or sorted({x for points in series.values() for x in points}):
        at = LEFT + WIDTH * place(x)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{text(x)}</text>')
    middle = LEFT + WIDTH / 2
    parts.append(f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle">{x_label}</text>')
    if default is not None:
        at = LEFT + WIDTH * place(default)
        parts.append(f'<path class="default" d="M{at:.1f} {TOP}v{HEIGHT}"/>')
    for name, points in series.items():
        colour = colours[name]
        upper = [pixel(x, y.max()) for x, y in points.items()]
        lower = [pixel(x, y.min()) for x, y in points.items()]
        mean = [pixel(x, y.mean()) for x, y in points.items()]
        band = " ".join(upper + lower[::-1])
        parts.append(f'<polygon class="band" fill="{colour}" points="{band}"/>')
        parts.append(f'<polyline class="line" stroke="{colour}" points="{" ".join(mean)}"/>')
        for point in mean:
            x, y = point.split(",")
            parts.append(f'<circle fill="{colour}" cx="{x}" cy="{y}" r="3"/>')
    return "\n".join(parts)


def legend(colours, x):
    """A coloured line for each name."""
    parts = []
    for k, (name, colour) in enumerate(colours.items()):
        y = TOP + 10 + 20 * k
        parts.append(f'<path class="line" stroke="{colour}" d="M{x} {y}h18"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{name}</text>')
    return "\n".join(parts)


def drawing(charts, colours):
    """Charts side by side, and the legend -> SVG."""
    body = ""
    for k, chart in enumerate(charts):
        right, down = k % COLUMNS * (LEFT + WIDTH + 20), k // COLUMNS * (TOP + HEIGHT + BOTTOM)
        body += f'<g transform="translate({right},{down})">{chart}</g>\n'
    width = min(len(charts), COLUMNS) * (LEFT + WIDTH + 20)
    height = math.ceil(len(charts) / COLUMNS) * (TOP + HEIGHT + BOTTOM)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 130} {height}">'
    return f"{svg}<style>{STYLE}</style>\n{body}{legend(colours, width)}</svg>\n"


def main(kind, *folders):
    find = by_updates if kind == "updates" else by_strength
    results = read(folders, "episodes.csv", "env")
    races = read(folders, "race.csv", "task")
    if not results:
        sys.exit(f"no episodes.csv in {' '.join(folders)}")
    found = {env: find(rows) for env, rows in results.items()}
    raced = {task: by_minutes(rows) for task, rows in races.items()}
    names = dict.fromkeys(name for series in [*found.values(), *raced.values()] for name in series)
    colours = dict(zip(names, COLOURS, strict=False))
    charts = []
    for env, series in found.items():
        rows = results[env]
        title = f"any goal of {env}, {seeds(rows)}"
        xs = [x for points in series.values() for x in points]
        low, high = min(xs), max(xs)
        if kind == "updates":
            x_label = "thousands of updates of the critic"
            place = partial(linear, high=high)
            chart = panel(title, series, colours, x_label, place, lambda x: x // 1000)
        else:
            place = partial(logarithmic, low=low, high=high)
            default = default_strength(rows)
            chart = panel(title, series, colours, "λ", place, lambda x: f"{x:g}", default)
        charts.append(chart)
    for task, series in raced.items():
        high = max(x for points in series.values() for x in points)
        place = partial(linear, high=high)
        ticks = range(1, math.floor(high) + 1)
        title = f"{task}, {seeds(races[task])}"
        chart = panel(title, series, colours, "minutes of training", place, str, ticks=ticks)
        charts.append(chart)
    path = HERE / f"{kind}.svg"
    path.write_text(drawing(charts, colours))
    print(f"saved {path}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("updates", "strength"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
