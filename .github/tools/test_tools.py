# SPDX-License-Identifier: MIT
"""The reader of episodes.csv, the statistic, the tables of the pages, and the drawings."""

import re
import shutil
import sys
from functools import partial
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
import calibrate
import table
from play import play, qgf

OLD = "env,seed,updates,policy_updates,average_policy,fade,method,guidance,weight,w,episode,success"
NEW = "env,seed,first_seed,code,updates,method,guidance,weight,w,episode,success"


def episodes(folder, header, *rows):
    """Write episodes.csv: rows without their last two columns, return and length."""
    folder.mkdir(parents=True)
    lines = [f"{header},return,length", *(f"{row},-7.5,9" for row in rows)]
    (folder / "episodes.csv").write_text("\n".join(lines) + "\n")


def test_the_reader_takes_an_old_file_after_its_most_updates(tmp_path):
    start = "scene,0,{},60,{},{},qgf"
    rows = [
        f"{start.format(50, True, True)},1.0,0.0,0.2,0,0.0",
        f"{start.format(90, True, True)},1.0,0.0,0.2,0,1.0",
        f"{start.format(90, True, False)},1.0,0.0,0.2,0,0.0",
        f"{start.format(90, False, False)},0.0,0.5,0.5,0,1.0",
    ]
    episodes(tmp_path / "scene-s0", OLD, *rows)
    found = table.group(table.read(tmp_path), "env", "variant", "strength")
    assert {key: runs["0"].tolist() for key, runs in found.items()} == {
        ("scene", "with c(t)", "λ 1"): [1.0],
        ("scene", "without c(t)", "λ 1"): [0.0],
        ("scene", "without c(t), raw policy", "w 0.5"): [1.0],
    }
    assert len(table.read(tmp_path, every=True)) == 4


def test_the_reader_takes_the_last_code_of_a_new_file(tmp_path, capsys):
    rows = [
        "scene,3,7,old,60,qgf,0.3,0.0,0.2,0,0.0",
        "scene,3,7,older,60,bc,0.0,0.0,0.0,0,1.0",
        "scene,3,7,new,50,bc,0.0,0.0,0.0,0,1.0",
        "scene,3,7,new,60,bc,0.0,0.0,0.0,0,0.0",
        "scene,3,7,new,60,bc,0.0,0.0,0.0,1,1.0",
        "scene,3,8,new,60,bc,0.0,0.0,0.0,0,nan",
    ]
    episodes(tmp_path / "scene-s3", NEW, *rows)
    found = table.group(table.read(tmp_path), "method", "first_seed", "variant", "updates")
    assert found["bc", "7", "", 60]["3"].tolist() == [0.0, 1.0]
    assert found["bc", "8", "", 60]["3"].tolist() == [-7.5]  # without success, the return
    assert len(found) == 3  # qgf's code is another
    del rows[-1]
    episodes(tmp_path / "out/scene-s3", NEW, *rows)
    table.show(tmp_path / "out")
    assert "0.50 [0.09, 0.91] one seed" in capsys.readouterr().out
    episodes(tmp_path / "out/again", NEW, *rows)
    with pytest.raises(SystemExit, match="of the same seed"):
        table.show(tmp_path / "out")


def test_an_interval_of_seeds_covers_the_mean():
    rng = np.random.default_rng(0)
    for mean, spread in ((0.6, 0.15), (0.8, 0.05), (0.4, 0.0)):
        hits = 0
        for _ in range(2000):
            rates = rng.normal(mean, spread, 5).clip(0, 1)
            runs = {seed: rng.random(100) < rate for seed, rate in enumerate(rates)}
            _, low, high = table.interval(runs)
            hits += low <= mean <= high
        assert hits / 2000 >= 0.93, (mean, spread)


def test_intervals_equal_their_formulas():
    runs = {seed: np.repeat([1.0, 0.0], [k, 100 - k]) for seed, k in enumerate((72, 45, 70))}
    half = 4.302653 * np.std([0.72, 0.45, 0.70], ddof=1) / 3**0.5  # 97.5% of t with two degrees
    mean = (72 + 45 + 70) / 300
    assert np.allclose(table.interval(runs), (mean, mean - half, mean + half), atol=1e-6)
    one = {0: runs[0]}
    z, n, p = 1.959964, 100, 0.72
    middle = (p + z**2 / 2 / n) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
    assert np.allclose(table.interval(one), (p, middle - half, middle + half), atol=1e-6)
    equal = {seed: np.ones(100) for seed in range(3)}
    assert table.interval(equal)[1] < 0.99  # an interval of no width would be too sure
    assert table.cell(one).endswith("one seed") and not table.cell(runs).endswith("seed")


def test_paired_differences_equal_scipys():
    rng = np.random.default_rng(1)
    a = {seed: np.float64(rng.random(100) < 0.7) for seed in "34567"}
    b = {seed: np.float64(rng.random(100) < 0.5) for seed in "76543"}  # in another order
    test = stats.ttest_rel([a[k].mean() for k in "34567"], [b[k].mean() for k in "34567"])
    low, high = test.confidence_interval()
    words, p = table.paired(a, b)
    assert words == f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"
    assert np.isclose(p, test.pvalue)
    words, p = table.paired({"3": a["3"]}, b)
    won, lost = (a["3"] > b["3"]).sum(), (a["3"] < b["3"]).sum()
    assert f"{won} won, {lost} lost" in words
    assert np.isclose(p, stats.binomtest(won, won + lost).pvalue)
    words, p = table.paired(a, {seed: x - 0.1 for seed, x in a.items()})
    assert words == "+0.10 in each seed" and np.isnan(p)


def test_holm_equals_a_computation_by_hand():
    adjusted = table.holm([0.01, 0.04, 0.03, 0.005, np.nan])
    assert np.allclose(adjusted, [0.04, 0.09, 0.09, 0.025, np.nan], equal_nan=True)
    assert table.holm([0.6, 0.7]).tolist() == [1, 1]


def test_the_tables_of_the_pages_follow_from_the_episodes(tmp_path):
    names = set()
    for page in table.PAGES:
        text = (table.TOP / page).read_text()
        tables = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
        names |= {found[2] for found in tables.finditer(text)}
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(tables.sub(r"\1", text))
    table.write(tmp_path)
    for page in table.PAGES:
        assert (tmp_path / page).read_text() == (table.TOP / page).read_text(), page
    assert names >= table.TABLES.keys() - {"forks"}


def test_an_episode_is_played_as_a_run_plays_it():
    task = qgf.find_task("cube-single")
    cfg = qgf.Config(policy_width=8, critic_width=8, depth=1, episodes=3)
    make = partial(qgf.Chunks, task, 5, max_episode_steps=22)
    envs = gymnasium.vector.SyncVectorEnv([make], autoreset_mode="Disabled")
    env = make()
    nets = {}
    for init, _, _ in qgf.LEARNERS.values():
        nets |= init(jax.random.PRNGKey(0), env.sizes, cfg)
    results = qgf.rollout(envs, nets, 0.5, "qgf@2", env.sizes, cfg)
    for i, result in enumerate(results):
        chunks = [*play(env, nets, "qgf@2", 0.5, cfg.first_seed + i, cfg)]
        assert np.allclose(chunks[-1][-1], result) and len(chunks) == 5
        assert [over for _, _, over, _ in chunks] == [False] * 4 + [True]


def test_the_steps_that_q_predicts():
    k = np.array([0, 1, 30, 200])
    q = [-sum(0.99**i for i in range(n)) for n in k]
    assert np.allclose(calibrate.steps_to_go(q, 0.99), k)
    assert np.isinf(calibrate.steps_to_go(-100.5, 0.99))


def test_the_curves_draw(tmp_path):
    pytest.importorskip("matplotlib").use("svg")
    import curves

    results = table.RESULTS
    curves.main("scores", to=tmp_path)
    text = (tmp_path / "scores.svg").read_text()
    assert all(f">{name}<" in text for name in table.METHODS)
    curves.main("updates", f"words={results / 'cube-double-constant'}", to=tmp_path)
    shutil.copytree(results / "selection/scene", tmp_path / "runs/scene-s0")
    curves.main("strength", tmp_path / "runs", to=tmp_path)
    assert ">words<" in (tmp_path / "updates.svg").read_text()
    text = (tmp_path / "strength.svg").read_text()
    assert "qgf without c(t)" in text and "any goal of scene" in text


@pytest.mark.slow
def test_the_toy_draws():
    pytest.importorskip("matplotlib").use("svg")
    import toy

    assert len(toy.draw(updates=5).axes) == 8
