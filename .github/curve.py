# SPDX-License-Identifier: MIT
"""Draw the learning curves of a folder of results: success over the updates of the critic.

    python .github/curve.py .github/results/cube-double      saves .github/cube-double.svg

A line is the mean over the seeds of training; a band reaches from the worst seed to the best.
Rows that were played after one number of updates only are left out.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 210, 40, 40, 30  # of a panel and its edges, in pixels
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df")
STYLE = """text { font: 12px sans-serif; fill: #59636e }
.title { font-weight: bold }
.grid { stroke: #8c959f; stroke-opacity: .3 }
.band { stroke: none; fill-opacity: .15 }
.line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #b0b8c2 } }"""


def read(folder):
    """All rows of a folder's files episodes.csv."""
    rows = []
    for path in sorted(Path(folder).glob("**/episodes.csv")):
        with open(path) as file:
            rows += csv.DictReader(file)
    if not rows:
        sys.exit(f"{folder} holds no episodes.csv")
    return rows


def lines(rows, name, x):
    """{name(row): {x(row): success of each seed (seeds,)}}, with x in order."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        found[name(row)][x(row)][row["seed"]].append(float(row["success"]))
    return {
        label: {
            k: np.array([np.mean(v) for v in seeds.values()]) for k, seeds in sorted(by_x.items())
        }
        for label, by_x in found.items()
    }


def panel(title, series, ticks, place, x_label):
    """A chart of `lines`, as SVG: ticks are {x: text}, place maps x to 0..1."""
    parts = [f'<text class="title" x="{LEFT}" y="16">{title}</text>']
    bottom = TOP + HEIGHT

    def pixel(x, success):
        return f"{LEFT + WIDTH * place(x):.1f},{bottom - HEIGHT * success:.1f}"

    for success in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - HEIGHT * success
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{success:g}</text>')
    for x, text in ticks.items():
        at = LEFT + WIDTH * place(x)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    middle = LEFT + WIDTH / 2
    parts.append(f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle">{x_label}</text>')
    for points, colour in zip(series.values(), COLOURS, strict=False):
        mean = " ".join(pixel(x, y.mean()) for x, y in points.items())
        upper = [pixel(x, y.max()) for x, y in points.items()]
        lower = [pixel(x, y.min()) for x, y in points.items()]
        band = " ".join(upper + lower[::-1])
        parts.append(f'<polygon class="band" fill="{colour}" points="{band}"/>')
        parts.append(f'<polyline class="line" stroke="{colour}" points="{mean}"/>')
        for x, y in points.items():
            at, height = pixel(x, y.mean()).split(",")
            parts.append(f'<circle fill="{colour}" cx="{at}" cy="{height}" r="3"/>')
    return "\n".join(parts)


def legend(labels, x):
    """A coloured line for each label."""
    parts = []
    for k, (label, colour) in enumerate(zip(labels, COLOURS, strict=False)):
        y = TOP + 10 + 20 * k
        parts.append(f'<path class="line" stroke="{colour}" d="M{x} {y}h18"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{label}</text>')
    return "\n".join(parts)


def label(row):
    """A row's method, with its strength if it has one."""
    if float(row["weight"]):
        return f"{row['method']}, w {float(row['weight']):g}"
    if float(row["guidance"]):
        return f"{row['method']}, λ {float(row['guidance']):g}"
    return row["method"]


def learning(rows):
    """Success over the critic's updates -> SVG, width."""
    series = lines(rows, label, lambda row: int(row["updates"]))
    series = {name: points for name, points in series.items() if len(points) > 1}
    last = max(int(row["updates"]) for row in rows)
    ticks = {x: f"{x // 1000}k" for x in sorted({int(row["updates"]) for row in rows})}
    seeds = len({row["seed"] for row in rows})
    title = f"any goal of {rows[0]['env']}, {seeds} seed{'s' * (seeds > 1)}"
    chart = panel(title, series, ticks, lambda x: x / last, "updates of the critic")
    return chart + legend(series, LEFT + WIDTH + 16), LEFT + WIDTH + 150


def main(folder):
    body, width = learning(read(folder))
    path = HERE / f"{Path(folder).name}.svg"
    height = TOP + HEIGHT + BOTTOM
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    path.write_text(f"{svg}<style>{STYLE}</style>\n{body}</svg>\n")
    print(f"saved {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
