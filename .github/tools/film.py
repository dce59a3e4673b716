# SPDX-License-Identifier: MIT
"""Film the first eight episodes of a run's table, not picked: above bc, below qgf.

    MUJOCO_GL=egl python .github/tools/film.py runs/cube-double-s0 film.webp

The run must have ended; w is that of its last row of qgf. Each episode is played again, alone, from
its seed: where it is close, it may end otherwise than in the table, since rounding differs between
one environment and several.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from play import last_row, play, qgf

EPISODES = 8
SIZE = 140  # pixels of a tile's side
SKY = 40  # of them at the top, left out


def tile(env, words):
    """What the camera sees now, with words below."""
    image = Image.fromarray(env.unwrapped.render()).resize((SIZE, SIZE))
    image = image.crop((0, SKY, SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    at = 4, image.height - 16
    draw.text(at, words, "white", font_size=11, stroke_width=1, stroke_fill="black")
    return np.array(image)


def film(env, nets, method, w, seed, cfg):
    """An episode as a list of tiles, two chunks apart."""
    tiles = []
    for _, _, over, (success, _, steps) in play(env, nets, method, w, seed, cfg):
        words = f"{'solved, step' if success > 0 else 'step'} {steps:.0f}"
        if over or steps % (2 * cfg.horizon) == 0:
            tiles.append(tile(env, f"{method}, {words}"))
    print(f"{method}, seed {seed}: {words}", flush=True)
    return tiles


def main(folder, path):
    nets, cfg, task = qgf.load_run(folder)
    row = last_row(folder, "qgf")
    first, w = int(row["first_seed"]), float(row["w"])
    env = qgf.Chunks(task, cfg.horizon, width=2 * SIZE, height=2 * SIZE)
    clips = {}
    for method in ("bc", "qgf"):
        for i in range(EPISODES):
            clips[method, i] = film(env, nets, method, w, first + i, cfg)
    images = []
    for k in range(max(map(len, clips.values())) + 15):  # the last frame stays a while
        now = {key: tiles[min(k, len(tiles) - 1)] for key, tiles in clips.items()}
        rows = [np.hstack([now[method, i] for i in range(EPISODES)]) for method in ("bc", "qgf")]
        images.append(Image.fromarray(np.vstack(rows)))
    settings = dict(duration=100, loop=0, quality=35, method=6)  # milliseconds a frame
    images[0].save(path, save_all=True, append_images=images[1:], **settings)
    print(f"saved {path}: {len(images)} frames, {Path(path).stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
