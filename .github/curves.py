# SPDX-License-Identifier: MIT
"""Draw success against guidance weight, pooled over the runs in a folder, as an SVG.

    PYTHONPATH=. python .github/curves.py .github/results/cube-single > .github/weights.svg

From the episodes that chose the weight, with 95 % intervals: a method's best point is a little flattered. The
dashed line is behaviour cloning on the reported episodes. Weights are evenly spaced.
"""
import sys
from pathlib import Path

import qgf

SHOWN = ("bptt", "qgf-jacobian", "qgf", "qgf-chain", "gradstep", "qfql", "qgf+score")
COLORS = ("#b15928", "#1f78b4", "#e31a1c", "#33a02c", "#6a3d9a", "#ff7f00", "#888888")


def main(folder):
    runs = [qgf.read_episodes(path.parent) for path in sorted(Path(folder).glob("*/episodes.csv"))]
    rows = qgf.summary([e for chosen, _ in runs for e in chosen if e.method in SHOWN])
    [bc] = qgf.summary([e for _, fresh in runs for e in fresh if e.method == "bc"])
    weights = sorted({r["weight"] for r in rows})
    x = {w: 60 + 110 * i for i, w in enumerate(weights)}
    right, y = max(x.values()), lambda p: 300 - 270 * p
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 160} 350"')
    print(' font-family="sans-serif" font-size="14">')
    print(f'<rect width="{right + 160}" height="350" fill="white"/><text x="12" y="16">success</text>')
    print(f'<text x="{right / 2}" y="342">guidance weight w</text>')
    for p in (0, 0.2, 0.4, 0.6, 0.8, 1):
        print(f'<text x="24" y="{y(p) + 5:.0f}">{p:g}</text><path d="M50 {y(p):.0f}H{right}" stroke="#ddd"/>')
    for w in weights:
        print(f'<text x="{x[w]}" y="320" text-anchor="middle">{w:g}</text>')
    print(f'<path d="M50 {y(bc["success"]):.0f}H{right}" stroke="black" stroke-dasharray="5"/>')
    print(f'<text x="{right + 12}" y="{y(bc["success"]) + 5:.0f}">bc</text>')
    for i, (method, color) in enumerate(zip(SHOWN, COLORS)):
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["weight"])
        points = " ".join(f"{x[r['weight']]},{y(r['success']):.0f}" for r in mine)
        print(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        for r in mine:
            bar = f"M{x[r['weight']]} {y(r['low']):.0f}V{y(r['high']):.0f}"
            print(f'<path d="{bar}" stroke="{color}" opacity=".4"/>')
        print(f'<text x="{right + 12}" y="{60 + 20 * i}" fill="{color}">{method}</text>')
    print("</svg>")


if __name__ == "__main__":
    main(sys.argv[1])
