# SPDX-License-Identifier: MIT
"""The differences of all methods to QGF, paired by run and episode, pooled over the runs in a folder.

    PYTHONPATH=. python .github/paired.py .github/results/cube-single
"""
import sys
from pathlib import Path

import qgf

folders = sorted(path.parent for path in Path(sys.argv[1]).glob("**/episodes.csv"))
fresh = [e for folder in folders for e in qgf.read_episodes(folder)[1]]
names = dict(bc="plain bc", qgf="bc")  # `summary` compares with bc: let QGF be it
for row in qgf.summary([e._replace(method=names.get(e.method, e.method), weight=0) for e in fresh]):
    if "gain" in row:
        print("{method:20} {gain:+.2f} [{gain_low:+.2f}, {gain_high:+.2f}]".format(**row))
