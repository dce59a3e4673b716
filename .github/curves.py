# SPDX-License-Identifier: MIT
"""Draw success against the relative weight λ, pooled over the runs of a folder, as an SVG.

    PYTHONPATH=. python .github/curves.py .github/results/cube-single > .github/weights.svg
"""
import sys

import numpy as np
from table import families

import qgf

COLORS = ("#e31a1c", "#1f78b4", "#b15928", "#33a02c", "#ff7f00", "#6a3d9a")


def main(folder):
    [runs] = families(folder).values()
    keys = dict.fromkeys(key for run in runs.values() for key in run)
    success = {key: np.stack([run[key][:, 1] for run in runs.values() if key in run]) for key in keys}
    lambdas = sorted({g for _, g, _ in keys if g})
    x = {g: 60 + 100 * i for i, g in enumerate(lambdas)}
    right, y = max(x.values()), lambda p: 300 - 270 * p
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 150} 350" font-family="sans-serif"')
    print(f' font-size="14"><rect width="{right + 150}" height="350" fill="white"/><text x="12" y="16">success</text>')
    print(f'<text x="{right / 2}" y="342">relative weight λ</text>')
    for p in (0, 0.2, 0.4, 0.6, 0.8, 1):
        print(f'<text x="24" y="{y(p) + 5:.0f}">{p:g}</text><path d="M50 {y(p):.0f}H{right}" stroke="#ddd"/>')
    for g in lambdas:
        print(f'<text x="{x[g]}" y="320" text-anchor="middle">{g:g}</text>')
    bc = success["bc", 0.0, 0.0].mean()
    print(f'<path d="M50 {y(bc):.0f}H{right}" stroke="black" stroke-dasharray="5"/>')
    print(f'<text x="{right + 12}" y="{y(bc) + 5:.0f}">bc</text>')
    methods = [m for m in dict.fromkeys(m for m, g, _ in keys if g) if sum(k[0] == m for k in keys) > 1]
    for i, (method, color) in enumerate(zip(methods, COLORS)):
        mine = sorted((g, won) for (m, g, _), won in success.items() if m == method and g)
        points = " ".join(f"{x[g]},{y(won.mean()):.0f}" for g, won in mine)
        print(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        for g, won in mine:
            low, high = qgf.interval(won)
            print(f'<path d="M{x[g]} {y(low):.0f}V{y(high):.0f}" stroke="{color}" opacity=".4"/>')
        print(f'<text x="{right + 12}" y="{60 + 20 * i}" fill="{color}">{method}</text>')
    print("</svg>")


if __name__ == "__main__":
    main(sys.argv[1])
