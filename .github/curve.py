# SPDX-License-Identifier: MIT
"""Draw the learning curves of a folder of results: success over the updates of the critic.

    python .github/curve.py .github/results/cube-double-policy-50k

saves .github/cube-double-policy-50k.svg.

A line is the mean over the seeds of training; a band reaches from the worst seed to the best.
Rows that were played after one number of updates only are left out.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import qgf  # noqa: E402

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
    rows = [
        row for path in sorted(Path(folder).glob("**/episodes.csv")) for row in qgf.read_csv(path)
    ]
    if not rows:
        sys.exit(f"{folder} holds no episodes.csv")
    return rows


def lines(rows):
    """{method and λ: {updates: success of each seed (seeds,)}}, of more than one point."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        strength = float(row["guidance"])
        label = f"{row['method']}, λ {strength:g}" if strength else row["method"]
        found[label][int(row["updates"])][row["seed"]].append(float(row["success"]))
    return {
        label: {
            x: np.array([np.mean(successes) for successes in seeds.values()])
            for x, seeds in sorted(by_updates.items())
        }
        for label, by_updates in found.items()
        if len(by_updates) > 1
    }


def panel(title, series):
    """A chart of `lines`, as SVG."""
    updates = sorted({x for points in series.values() for x in points})
    parts = [f'<text class="title" x="{LEFT}" y="16">{title}</text>']
    bottom = TOP + HEIGHT

    def pixel(x, success):
        return f"{LEFT + WIDTH * x / updates[-1]:.1f},{bottom - HEIGHT * success:.1f}"

    for success in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - HEIGHT * success
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{success:g}</text>')
    for x in updates:
        at = LEFT + WIDTH * x / updates[-1]
        text = f"{x // 1000}k"
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    at = LEFT + WIDTH / 2
    text = "updates of the critic"
    parts.append(f'<text x="{at}" y="{bottom + 33}" text-anchor="middle">{text}</text>')
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


def main(folder):
    rows = read(folder)
    series = lines(rows)
    seeds = len({row["seed"] for row in rows})
    title = f"any goal of {rows[0]['env']}, {seeds} seed{'s' * (seeds > 1)}"
    body = panel(title, series) + legend(series, LEFT + WIDTH + 16)
    path = HERE / f"{Path(folder).name}.svg"
    size = f"{LEFT + WIDTH + 150} {TOP + HEIGHT + BOTTOM}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">'
    path.write_text(f"{svg}<style>{STYLE}</style>\n{body}</svg>\n")
    print(f"saved {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
