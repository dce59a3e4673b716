# SPDX-License-Identifier: MIT
"""Draw success against the relative weight λ, a panel for each family in which a run has several, as an SVG.
Says on stderr which λ is best.

    PYTHONPATH=. python .github/curves.py .github/results > .github/lambda.svg
"""
import sys

import numpy as np
from table import families

import qgf

COLORS = {"qgf": "#e31a1c", "qgf-jacobian": "#1f78b4", "bptt": "#b15928", "qfql": "#33a02c", "gradstep": "#ff7f00"}
WIDTH, HEIGHT, PER_ROW = 300, 285, 4  # of a panel, with its margins; panels beside each other


def curves(runs):
    """Of the runs in which qgf has more than two λ's: {method: [(λ, (runs, episodes) of successes)]}, bc, a title."""
    seeds = {name: run for name, run in runs.items() if sum(m == "qgf" and g > 0 for m, g, _ in run) > 2}
    runs, title = seeds.values(), f"{', '.join(dict.fromkeys(env for env, _ in seeds))}: {len(seeds)} seed"
    found = {}
    for method, g, _ in sorted({key for run in runs for key in run if key[0] in COLORS and key[1]}):
        found.setdefault(method, []).append((g, [run[method, g, 0.0][:, 1] for run in runs if (method, g, 0.0) in run]))
    # every point of a method has as many runs: a λ that only some runs have is left out
    found = {m: [(g, np.stack(won)) for g, won in points if len(won) == len(runs)] for m, points in found.items()}
    bc = [run["bc", 0.0, 0.0][:, 1].mean() for run in runs]
    return {m: points for m, points in found.items() if len(points) > 2}, bc, title + "s" * (len(seeds) > 1)


def panel(found, bc, title, lambdas):
    """Print a panel: success over λ, with 95% intervals for qgf."""
    x = {g: 50 + 220 * i / (len(lambdas) - 1) for i, g in enumerate(lambdas)}
    y = lambda p: 250 - 210 * p
    print(f'<text x="160" y="22" text-anchor="middle" font-weight="bold">{title}</text>')
    for p in (0, 0.25, 0.5, 0.75, 1):
        print(f'<text x="10" y="{y(p) + 4:.0f}">{p:g}</text>')
        print(f'<path d="M42 {y(p):.0f}H278" stroke="#ddd"/>')
    print('<text x="10" y="270">λ</text>')
    for g in lambdas:
        print(f'<text x="{x[g]:.0f}" y="270" text-anchor="middle">{g:g}</text>')
    print(f'<path d="M42 {y(np.mean(bc)):.0f}H278" stroke="black" stroke-dasharray="5"/>')
    for method, points in found.items():
        line = " ".join(f"{x[g]:.0f},{y(won.mean()):.0f}" for g, won in points)
        print(f'<polyline points="{line}" fill="none" stroke="{COLORS[method]}" stroke-width="2.5"/>')
        for g, won in points if method == "qgf" else ():
            low, high = qgf.interval(won)
            print(f'<path d="M{x[g]:.0f} {y(low):.0f}V{y(high):.0f}" stroke="{COLORS[method]}" opacity=".5"/>')


def main(folder):
    panels = [drawn for runs in families(folder).values() if (drawn := curves(runs))[0]]
    lambdas = sorted({g for found, *_ in panels for points in found.values() for g, _ in points})
    height = HEIGHT * -(-len(panels) // PER_ROW)
    size = f'viewBox="0 0 {WIDTH * min(len(panels), PER_ROW)} {height + 20}"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">')
    print('<rect width="100%" height="100%" fill="white"/>')
    for i, drawn in enumerate(panels):
        print(f'<g transform="translate({WIDTH * (i % PER_ROW)} {HEIGHT * (i // PER_ROW)})">')
        panel(*drawn, lambdas)
        print("</g>")
        for method, points in drawn[0].items():
            success, g = max((won.mean(), -g) for g, won in points)  # the smallest, of equals
            print(f"{drawn[-1]}: {method} is best at λ = {-g:g}, with {success:.2f}", file=sys.stderr)
    methods = [m for m in COLORS if any(m in found for found, *_ in panels)]
    for i, (label, color) in enumerate([("bc (dashed)", "black"), *((m, COLORS[m]) for m in methods)]):
        print(f'<text x="{50 + 110 * i}" y="{height + 8}" fill="{color}">{label}</text>')
    print("</svg>")


if __name__ == "__main__":
    main(sys.argv[1])
