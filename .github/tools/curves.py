# SPDX-License-Identifier: MIT
"""Draw README's table of methods, or success over updates or over the strength of guidance.

    python .github/tools/curves.py scores
    python .github/tools/curves.py updates FOLDER...
    python .github/tools/curves.py strength FOLDER...

save scores.svg, updates.svg and strength.svg in .github/pictures, with a panel for each
environment. Each folder is one schedule of training: no line joins two. `TEXT=FOLDER` writes a text
beside it.

Scores: a large mark is the mean over seeds, a bar its 95% interval by t, and a dot one seed.
Updates: a line is the mean over seeds, and a dot one seed. Strength: a line is one seed, and a bar
Wilson's 95% interval over its episodes; without bars and markers, seeds other than the first.
"""

import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import table

PICTURES = table.TOP / ".github/pictures"
GREY = "#727b85"  # 4.3 times as bright as #0d1117, and white 4.3 times as bright as it
STYLES = {  # of a method, in all pictures: colour, line, marker
    "qgf": ("#1f7ae0", "-", "o"),
    "qgf@4": ("#1f7ae0", "--", "D"),
    "qgf-jacobian": ("#2c9a4b", "-.", "^"),
    "bptt": ("#0f9aa8", "--", "<"),
    "qfql": ("#b98a00", "-.", ">"),
    "gradstep": ("#a066d3", ":", "v"),
    "bc": (GREY, "-", "x"),
    "bc@4": ("#d9730d", "--", "s"),
    "bc@32": ("#d1443c", ":", "P"),
}
LEARNING = "qgf", "bc@4", "bc@32"  # drawn over the updates


def set_style():
    """Grey text and a transparent ground, which read on white and in the dark; text stays text."""
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    matplotlib.rcParams.update(dict.fromkeys(grey, GREY))
    matplotlib.rcParams.update(
        {
            "savefig.transparent": True,
            "axes.facecolor": "none",
            "svg.fonttype": "none",
            "svg.hashsalt": "qgf",  # the same names in each drawing
            "font.family": "sans-serif",
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.3,
            "lines.markersize": 5,
        }
    )


def save(figure, path):
    """Write the picture, its paths with one decimal, and without the time of drawing."""
    figure.savefig(path, dpi=100, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    lines = path.read_text().splitlines()
    short = [x if "matrix" in x else re.sub(r"(\.\d)\d+", r"\1", x) for x in lines]
    path.write_text("\n".join(short) + "\n")
    print(f"saved {path}, {path.stat().st_size / 1000:.0f} kB")


def panels(names):
    """A figure with a panel for each environment, two in a row -> figure, {name: axes}."""
    rows = -(-len(names) // 2)
    columns = min(len(names), 2)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False)
    for extra in axes.flat[len(names) :]:
        extra.remove()
    for name, ax in zip(names, axes.flat, strict=False):
        ax.set(title=f"any goal of {name}", ylim=(-0.02, 1.02), ylabel="success")
        ax.grid(axis="y")
    return figure, dict(zip(names, axes.flat, strict=False))


def legend(figure, axes):
    """One legend for all panels, at the right."""
    handles = {}
    for ax in axes.values():
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.tight_layout()
    place = dict(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=3.5)
    figure.legend(handles.values(), handles.keys(), **place)


def style_of(method, variant):
    """How errorbar and plot draw a method: hollow and dashed without c(t)."""
    colour, line, marker = STYLES.get(method, (GREY, "-", "."))
    style = dict(c=colour, ls=line, marker=marker, label=f"{method} {variant}".strip())
    return style | dict(ls="--", mfc="none") if variant.startswith("without") else style


def environments(folders):
    """Their names: README's families first."""
    names = {row["env"] for folder in folders for row in table.read(folder)}
    return [name for name in table.FAMILIES if name in names] + sorted(names - {*table.FAMILIES})


def scores(_):
    """README's table of methods -> a figure."""
    names = table.FAMILIES
    figure, axes = plt.subplots(1, len(names), figsize=(2.5 * len(names), 3.2), sharey=True)
    for name, ax in zip(names, axes, strict=True):
        found = table.runs_of(name)
        for y, (method, runs) in enumerate(found.items()):
            colour, _, marker = STYLES[method]
            mean, low, high = table.interval(runs)
            seeds = [x.mean() for x in runs.values()]
            ax.plot(seeds, [y + 0.25] * len(seeds), ".", c=colour, ms=4, alpha=0.7)
            bars = [[mean - low], [high - mean]]
            ax.errorbar(mean, y, xerr=bars, c=colour, marker=marker, capsize=2, elinewidth=0.8)
        ax.set(title=f"any goal of {name}", xlim=(-0.03, 1.03), xlabel="success")
        ax.set_yticks(range(len(found)), found)
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def updates(folders):
    """{folder: text} -> a figure."""
    figure, axes = panels(environments(folders))
    for folder, text in folders.items():
        lines = {}
        columns = "env", "method", "variant", "updates"
        for (*key, at), runs in table.group(table.read(folder, every=True), *columns).items():
            lines.setdefault(tuple(key), {})[at / 1000] = [x.mean() for x in runs.values()]
        for (env, method, variant), points in lines.items():
            if method not in LEARNING:
                continue
            ax = axes[env]
            x = sorted(points)
            style = style_of(method, variant)
            ax.plot(x, [np.mean(points[at]) for at in x], **style)
            for at in x:
                ax.plot([at] * len(points[at]), points[at], ".", c=style["c"], alpha=0.45, ms=4)
            if method == "qgf":
                ax.text(np.mean(x), 1, text, ha="center", va="top", fontsize=9)
    for ax in axes.values():
        ax.set(xlim=(0, 1.15 * ax.dataLim.x1), xlabel="thousands of updates of the critic")
    legend(figure, axes)
    return figure


def strength(folders):
    """{folder: text} -> a figure."""
    figure, axes = panels(environments(folders))
    lines = {}
    for folder in folders:
        rows = [row for row in table.read(folder) if row["guidance"]]
        columns = "env", "method", "variant", "seed", "guidance"
        for (*key, x), runs in table.group(rows, *columns).items():
            lines.setdefault(tuple(key), {})[x] = table.interval(runs)
    ticks = {env: set() for env in axes}
    drawn = set()
    for (env, method, variant, _), points in lines.items():
        ax = axes[env]
        x = sorted(points)
        ticks[env].update(x)
        mean, low, high = np.transpose([points[at] for at in x])
        style = style_of(method, variant)
        if (env, style["label"]) in drawn:
            ax.plot(x, mean, style["ls"], c=style["c"], alpha=0.5, lw=1)
            continue
        drawn.add((env, style["label"]))
        aside = 1.03 if variant.startswith("without") else 1  # bars side by side
        bars = [mean - low, high - mean]
        ax.errorbar(np.array(x) * aside, mean, bars, capsize=2, elinewidth=0.8, **style)
    for env, ax in axes.items():
        ax.set(xscale="log", xlabel="relative strength λ (logarithmic)")
        ax.set_xticks(sorted(ticks[env]), [f"{x:g}" for x in sorted(ticks[env])])
        ax.minorticks_off()
    legend(figure, axes)
    return figure


def main(kind, *folders, to=PICTURES):
    set_style()
    named = {}
    for folder in folders:
        text, _, path = str(folder).rpartition("=")
        named[Path(path)] = text
    save(DRAWINGS[kind](named), Path(to) / f"{kind}.svg")


DRAWINGS = dict(scores=scores, updates=updates, strength=strength)

if __name__ == "__main__":
    kind, folders = sys.argv[1:2], sys.argv[2:]
    if kind != ["scores"] and (not folders or kind[0] not in DRAWINGS):
        sys.exit(__doc__)
    main(*kind, *folders)
