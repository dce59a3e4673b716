# SPDX-License-Identifier: MIT
"""Every loss, estimator and file of qgf.py against something independent: python -m pytest."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# A GPU rounds matrix products to TF32, and the tolerances are for float32.
os.environ["JAX_PLATFORMS"] = "cpu"
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import binomtest

import qgf

HERE = Path(qgf.__file__).parent
S, G, A, H = 4, 3, 2, 3
SIZES = (S, G, A)
CFG = qgf.Config(
    policy_width=16, critic_width=16, depth=1, batch_size=32, horizon=H, denoise_steps=5
)
KEY = jax.random.PRNGKey(0)
sample_batch = jax.jit(qgf.sample_batch, static_argnums=2)
init_state = jax.jit(qgf.init_state, static_argnums=(0, 1, 2))


def random_data():
    """Trajectories of 7, 20, 4 and 29 rows, that of 20 with a success at its end; then padding."""
    rng = np.random.default_rng(0)
    last = np.array([6, 26, 30, 59])
    ends = last[np.searchsorted(last, np.arange(60))]
    masks = np.float32(rng.random(60) > 0.2)
    masks[last] = [1, 0, 1, 1]
    starts = [i for i in range(60) if i + H <= ends[i] or (i + H - 1 == ends[i] == 26)]
    columns = dict(
        observations=rng.normal(size=(60, S)),
        actions=rng.uniform(-1, 1, (60, A)),
        rewards=rng.normal(size=60),
        masks=masks,
        goals=rng.normal(size=(60, G)),
    )
    columns = {
        name: np.float32(np.append(x, x[-1:].repeat(4, 0), 0)) for name, x in columns.items()
    }
    ends = np.append(ends, [59] * 4)
    padded = np.append(starts, [59] * (64 - len(starts)))  # no chunk begins there
    return qgf.Data(**columns, ends=ends, starts=padded, chunks=np.int32(len(starts)))


DATA = random_data()
STARTS = DATA.starts[: DATA.chunks]
BATCH = jax.device_get(sample_batch(KEY, DATA, CFG))


def train(learner, state, n, cfg=CFG, data=DATA, others=None):
    """n updates of a learner by name."""
    _, loss, option = qgf.LEARNERS[learner]
    return qgf.train(loss, getattr(cfg, option), state, others or {}, data, n, cfg)


def some_state(learner):
    """A State without zeros and ones, whose averages differ from its parameters."""
    state = jax.device_get(init_state(qgf.LEARNERS[learner][0], SIZES, CFG))
    rng = np.random.default_rng(7)

    def noisy(x):
        return x + np.float32(0.1 * rng.normal(size=x.shape))

    params, average = (jax.tree.map(noisy, state.params) for _ in range(2))
    return state._replace(params=params, average=average)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# ---- losses, whose values and gradients test_golden.py compares with the official code
def test_the_critic_reads_a_goal_as_a_part_of_the_state():
    """A goal is lost or misplaced in a loss: golden.npz, which has them all, has no goals."""
    params, average, *_ = some_state("critic")
    s, g, later = BATCH.observations, BATCH.goals, BATCH.next_observations
    joined = BATCH._replace(
        observations=np.hstack([s, g]), goals=g[:, :0], next_observations=np.hstack([later, g])
    )
    loss = jax.jit(qgf.critic_loss, static_argnums=5)
    assert {*(BATCH.discounts > 0)} == {True, False}
    assert_close(
        loss(params, average, {}, BATCH, KEY, CFG),
        loss(params, average, {}, joined, KEY, CFG),
        rtol=1e-5,
    )


def test_expectile_loss_is_least_at_the_expectile():
    """V is no expectile: of 0 and 1 it solves τ (1 - V) = (1 - τ) V, which is V = τ."""
    for tau in (0.1, 0.5, 0.999):
        slope = jax.grad(lambda v: qgf.expectile_loss(jnp.array([0.0, 1.0]) - v, tau).mean())
        assert abs(slope(tau)) < 1e-6
        assert slope(tau - 0.01) < 0 < slope(tau + 0.01)


# ---- batches; test_golden.py has those without goals
def test_chunks_and_goals_are_drawn_as_dqc_says():
    """A chunk has other rows, goals have other frequencies, or rewards go on after a success."""
    row = np.arange(64)  # the last four are padding
    pairs = np.float32([row // 2 * 0.8 + row % 2 * 0.39, row % 2 * 0.39]).T  # .39 in, .41 between
    data = DATA._replace(goals=pairs, observations=np.arange(64)[:, None])
    batch = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=6000)))
    first = batch.observations[:, 0]
    assert {*first} == {*STARTS}
    window = first[:, None] + np.arange(H)
    assert_same(batch.actions, data.actions[window].reshape(6000, H * A))
    assert_same(batch.next_observations[:, 0], first + H)

    goal = (batch.goals[:, None] == pairs).all(axis=2).argmax(axis=1)  # its row
    assert goal.max() == 59
    end, left = data.ends[first], data.ends[STARTS] - STARTS
    found = [(goal == first), (first < goal) & (goal <= end), (goal == end)]
    want = [0.2 + 0.3 / 60, 0.5 + 0.3 * left.mean() / 60, (0.5 / left).mean() + 0.3 / 60]
    assert_close(np.mean(found, axis=1), np.array(want), atol=0.012)

    near = window // 2 == goal[:, None] // 2  # the goal is that of the row or of its pair
    steps = np.where(near.any(axis=1), near.argmax(axis=1), H)  # before the goal is reached
    assert_close(batch.returns, -(1 - 0.99**steps) / 0.01, atol=1e-4)  # a geometric series
    assert_close(batch.discounts, 0.99**H * (steps == H), rtol=1e-5)


# ---- training
def test_a_third_learner_sees_the_others_and_its_rate_falls(monkeypatch):
    """Its gradient is 1, so that each of Adam's steps is the rate."""

    def loss(params, average, others, batch, key, cfg):
        return params["line"].sum(), dict(mine=params["line"][0], theirs=others["policy"])

    def init(key, sizes, cfg):
        return dict(line=jnp.zeros(1))

    monkeypatch.setitem(qgf.LEARNERS, "line", (init, loss, "policy_updates"))
    for decay, last in (0.25, 1 - np.arange(25) / 25), (0.0, np.ones(25)):
        cfg = replace(CFG, policy_updates=100, lr_decay=decay)
        state, log = train("line", init_state(init, SIZES, cfg), 100, cfg, others=dict(policy=7.0))
        path = -1e-3 * np.cumsum([0, *np.ones(75), *last])
        got = np.append(log["mine"], state.params["line"])
        assert_close(got, path, rtol=1e-4, atol=1e-7)
        assert (log["theirs"] == 7).all()


# ---- guidance; test_golden.py has the actions of each method without goals
GRADIENTS = {k: f for k, f in qgf.ESTIMATORS.items() if k not in ("bc", "gradstep")}


@pytest.mark.slow
def test_on_a_bandit_each_gradient_points_the_right_way():
    """What trains and what acts do not fit: good actions are not found, or not by following d.

    Actions are near (-.6, 0) or, one time in five, near (.6, 0), which is better.
    """
    rng = np.random.default_rng(0)
    good = rng.random((4000, 1)) < 0.2
    a = np.float32(np.where(good, [0.6, 0], [-0.6, 0]) + rng.normal(0, 0.1, (4000, 2)))
    zeros, rows = np.zeros((4000, 1), np.float32), np.arange(4000)
    data = qgf.Data(zeros, a, a[:, 0], zeros[:, 0], zeros[:, :0], rows, rows, np.int32(4000))
    cfg = qgf.Config(policy_width=32, critic_width=32, depth=2, batch_size=128, horizon=1)
    nets = {}
    for learner, (init, _, _) in qgf.LEARNERS.items():
        nets |= train(learner, init_state(init, (1, 0, 2), cfg), 1200, cfg, data, nets)[0].average

    s, g, a_t = jnp.zeros((500, 1)), jnp.zeros((500, 0)), jax.random.normal(KEY, (500, 2))
    for low, high, w, method in (0.1, 0.35, 0.0, qgf.bc), (0.9, 1.0, 10.0, qgf.qgf):
        a_1, _ = qgf.sample_actions(nets, s, g, a_t[:, None], w, method, cfg)
        assert low < (a_1[:, 0] > 0).mean() <= high

    T = cfg.denoise_steps
    flow = jax.jit(lambda a, t: qgf.velocity(nets["policy"], s, a, t, cfg))
    q = jax.jit(partial(qgf.q_min, nets["critic"], s, g))
    end = jax.jit(lambda a, t: q(qgf.integrate(flow, a, t, T)))
    for i in range(T):
        t = np.full((500, 1), i / T)
        v = flow(a_t, t)
        for name in ("bptt", "qgf", "qfql") if i in (0, 5, 9) else ():
            d = jax.jit(partial(GRADIENTS[name], q, flow, T=T))(a_t, t, v)
            d /= jnp.linalg.norm(d, axis=1, keepdims=True)
            assert np.mean(end(a_t + 0.1 * d, t) > end(a_t, t)) > 0.75, (name, i)
        a_t = a_t + v / T


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_gaussian_goes_where_each_methods_ode_says(monkeypatch, method):
    """A gradient or Euler's steps are wrong: for π_BC = N(μ, σ²) and a quadratic Q, all is known.

    Then E[a_1 | a_t], where the exact velocity points, and the end of the flow are linear in a_t.
    """
    mu, sigma, w, k, aim = 0.1, 0.2, 0.3, 2.0, 0.4

    def velocity(policy, s, a, t, cfg):
        variance = (1 - t) ** 2 + (t * sigma) ** 2
        return mu + (t * sigma**2 - (1 - t)) / variance * (a - t * mu)

    def slope(t, a):
        v = velocity(None, None, a, t, None)
        sd = math.sqrt((1 - t) ** 2 + (t * sigma) ** 2)  # of a_t
        clean = a + (1 - t) * v
        end = mu + sigma / sd * (a - t * mu)
        push = {
            "qgf": aim - clean,
            "qgf-jacobian": t * sigma**2 / sd**2 * (aim - clean),
            "bptt": sigma / sd * (aim - end),
            "qfql": aim - a,
        }
        return v + w * k * push[method]

    def q_values(critic, s, g, a):
        q = -k / 2 * (a[:, 0] - aim) ** 2
        return jnp.stack([q, q + 1])

    a_0 = np.linspace(-2, 2, 9, dtype=np.float32)
    want = solve_ivp(slope, (0, 1 - 1e-9), a_0, rtol=1e-8, atol=1e-10).y[:, -1]
    monkeypatch.setattr(qgf, "velocity", velocity)
    monkeypatch.setattr(qgf, "q_values", q_values)
    T = 200 if method == "bptt" else 1000
    cfg, none = replace(CFG, denoise_steps=T), np.zeros((9, 0))
    nets = dict(policy=0, critic=0)
    got, _ = qgf.sample_actions(nets, none, none, a_0[:, None, None], w, GRADIENTS[method], cfg)
    assert_close(got[:, 0], want, atol=4 / T)


def test_of_two_samples_the_one_with_the_larger_q_acts():
    """Samples and goals of states get mixed up, w = 0 is not bc, or each w is compiled anew."""
    rng = np.random.default_rng(3)
    nets = some_state("policy").average | some_state("critic").average
    s, g, a_0 = (np.float32(rng.normal(size=(50, *x))) for x in ((S,), (G,), (2, H * A)))

    def act(a_0, w, method=qgf.qgf):
        return np.array(qgf.sample_actions(nets, s, g, a_0, w, method, CFG)[0])

    one, two = act(a_0[:, :1], 0.3), act(a_0[:, 1:], 0.3)
    better = qgf.q_min(nets["critic"], s, g, two) > qgf.q_min(nets["critic"], s, g, one)
    assert 10 < better.sum() < 40
    assert_close(act(a_0, 0.3), np.where(better[:, None], two, one), atol=1e-5)
    compiled = qgf.sample_actions._cache_size()
    assert (act(a_0[:, :1], 0.123) != one).any()
    assert qgf.sample_actions._cache_size() == compiled
    assert_same(act(a_0, 0.0), act(a_0, 0.0, qgf.bc))


def test_relative_weight_is_of_the_median_state(monkeypatch):
    """λ means another strength, or GradStep, which pushes only after the flow, gets none."""
    x = np.float32([1, -2, 0.5, 3, 0, 1])
    slope = np.append(np.zeros(S + G), x).astype(np.float32)
    critic = [dict(w=np.stack([slope, slope])[..., None], b=np.zeros((2, 1)))]  # ∇Q is x
    nets = dict(policy=0, critic=critic)
    monkeypatch.setattr(qgf, "velocity", lambda policy, s, a, t, cfg: -5 * a)  # at 0 in one step
    size = np.arange(1.0, 33.0)[:, None]  # of a state's push, which grows with t as well

    def uneven(q, flow, a_t, t, v, T):
        return t * (size**2 * x + 1000 * a_t)

    rms = np.sqrt(np.mean(x**2))
    uneven_rms = np.median(size**2) * np.sqrt(np.mean((np.arange(5) / 5) ** 2)) * rms
    wanted = (qgf.gradstep, rms), (qgf.qfql, rms), (uneven, uneven_rms), (qgf.bc, math.inf)
    for method, rms in wanted:
        w = qgf.relative_weight(0.5, nets, BATCH, method, CFG)
        assert w == pytest.approx(0.5 / rms, rel=1e-4)


# ---- data
TASK, GOAL, OWN = map(qgf.find_task, ("cube-single-task1", "cube-single", "Pendulum-v1"))
TINY = replace(CFG, batch_size=8, policy_updates=1300, critic_updates=1300, guidance=(0.3,))
ENV = SimpleNamespace(sizes=(4, 0, 2), low=np.full(2, -1.0), high=np.ones(2))
COLLECTED = ".ogbench/data/cube-single-play-v0-collected-2000.npz"


def write(path, **changes):
    """A file of data: trajectories of 7, 2 and 20 rows; the last one ends with a success."""
    rng = np.random.default_rng(0)
    raw = dict(observations=rng.normal(size=(29, 4)), actions=rng.uniform(-1, 1, (29, 2)))
    raw |= dict(rewards=rng.normal(size=29), masks=np.ones(29), terminals=np.zeros(29))
    raw["terminals"][[6, 8, 28]] = 1
    raw["masks"][[3, 28]] = 0
    np.savez(path, **{name: x for name, x in (raw | changes).items() if x is not None})
    return path


def load(folder, task=TASK, env=ENV, cfg=TINY, **changes):
    """Data of such a file, without its padding."""
    data = jax.device_get(qgf.load_data(write(folder / "d.npz", **changes), task, env, cfg))
    assert {len(x) for x in data[:-1]} == {32} and data.ends[-1] == 28
    return qgf.Data(*(x[:29] for x in data[:6]), data.starts[: data.chunks], data.chunks)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder with two episodes of cube-single, of smooth random actions."""
    path = tmp_path_factory.mktemp("home") / COLLECTED
    path.parent.mkdir(parents=True)
    env = gymnasium.make("cube-single-v0")
    rng = np.random.default_rng(0)
    raw = dict(observations=[], actions=[], qpos=[], terminals=[*[0] * 199, 1] * 2)
    for _ in range(2):
        state, _ = env.reset(seed=0, options=dict(task_id=1))
        action = np.zeros(5)
        for _ in range(200):
            action = np.clip(0.9 * action + 0.3 * rng.normal(size=5), -1, 1)
            raw["observations"].append(state)
            raw["actions"].append(action)
            raw["qpos"].append(env.unwrapped._data.qpos.copy())
            state = env.step(action)[0]
    np.savez(path, **raw)
    return path.parents[2]


def test_names_of_tasks():
    """A name gets another environment or dataset, or two names of one task are two runs."""
    double = "cube-double", "cube-double-v0", "cube-double-play-v0", True
    third = "cube-double-task3", "cube-double-singletask-task3-v0", "cube-double-play-v0", False
    assert qgf.find_task("cube-double") == qgf.find_task("cube-double-play-v0") == double
    assert qgf.find_task("cube-double-play-singletask-task3-v0") == qgf.find_task(third[0]) == third
    assert qgf.find_task("cube-double-noisy")[::2] == ("cube-double-noisy", "cube-double-noisy-v0")
    assert qgf.find_task("antmaze-large").dataset == "antmaze-large-navigate-v0"
    assert OWN == ("Pendulum-v1", "Pendulum-v1", "", False)
    for name in ("cube-duble", "visual-cube-single", "cube-single-task9", "no:A-v0"):
        with pytest.raises(qgf.UserError, match=rf"^--env {name}.*\Z"):
            qgf.Chunks(qgf.find_task(name), 1)


def test_chunks_stay_in_a_trajectory_and_need_no_state_after_a_success(tmp_path):
    """A chunk joins two trajectories, successes are lost, or columns without use are read."""
    unused = dict(infos=np.array([0, "a"] * 14 + [{}], object), last_names=np.zeros(3))
    data = load(tmp_path, **unused)
    assert data.ends.tolist() == [6] * 7 + [8] * 2 + [28] * 20
    assert data.starts.tolist() == [0, 1, 2, 3, *range(9, 27)]  # 26: the chunk ends with the task
    sparse = load(tmp_path, cfg=replace(TINY, sparse=True))
    assert_same(sparse.rewards, -data.masks)
    without = load(tmp_path, masks=None)
    assert without.starts[-1] == 25 and without.masks.all()
    assert_same(without.rewards, data.rewards)
    with np.load(tmp_path / "d.npz") as raw:
        assert_same(data.rewards, np.float32(raw["rewards"]))


def test_d4rls_terminals_are_successes_and_its_timeouts_ends(tmp_path):
    """Files of D4RL are read as if they were OGBench's, whose terminals are ends."""
    timeouts, terminals = np.zeros((2, 29), bool)
    timeouts[6] = terminals[8] = True
    changes = dict(terminals=terminals, timeouts=timeouts[:, None], masks=None)
    data = load(tmp_path, **changes, next_observations=np.zeros(29))
    assert np.unique(data.ends).tolist() == [6, 8, 28]
    assert np.flatnonzero(data.masks == 0).tolist() == [8]


def test_actions_of_your_own_environment_are_rescaled(tmp_path):
    """The policy learns actions that it then executes on another scale."""
    env = SimpleNamespace(sizes=(4, 0, 2), low=np.float32([-2, 0]), high=np.float32([2, 4]))
    actions = np.resize(np.float32([[-2, 0], [2, 4], [1, 2]]), (29, 2))
    data = load(tmp_path, OWN, env, actions=actions)
    assert_close(data.actions[:3], np.array([[-1, -1], [1, 1], [0.5, 0]]))


@pytest.mark.parametrize(
    "words, changes",
    [
        ("masks must be 0 or 1", dict(masks=np.full(29, 0.5))),
        ("terminals must be 0 or 1", dict(terminals=np.full(29, np.nan))),
        (r"observations has .*\(30, 4\)", dict(observations=np.zeros((30, 4)))),
        ("observations has NaN", dict(observations=np.full((29, 4), np.nan))),
        (r"actions .*\(29, 3\).*\(29, 2\)", dict(actions=np.zeros((29, 3)))),
        ("actions leave the range", dict(actions=np.full((29, 2), 1.1))),
        ("has the shape", dict(actions=np.float64(0.5))),
        ("terminals has", dict(terminals=np.zeros((29, 2)))),
        ("truncations is not understood", dict(truncations=np.zeros(29))),
        ("rewards holds no numbers", dict(rewards=np.array(["a"] * 29))),
        ("no whole .npz of numbers", dict(rewards=np.array([0, "a"] * 14 + [{}], object))),
        ("--horizon", dict(terminals=np.ones(29))),
        ("lack a column: 'terminals'", dict(terminals=None)),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, words, changes):
    """A run trains on nonsense, or ends with a traceback."""
    with pytest.raises(qgf.UserError, match=words):
        load(tmp_path, **changes)


def test_files_that_are_not_whole_are_refused(tmp_path):
    """What a broken download has left ends with a traceback."""
    path = write(tmp_path / "d.npz")
    for content in (path.read_bytes()[:2000], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(qgf.UserError, match=r"d\.npz is no whole .npz"):
            qgf.load_data(path, TASK, ENV, TINY)


def test_goals_and_rewards_of_data_are_those_of_the_environment(home, tmp_path):
    """The critic learns to reach goals in another form than the environment shows them."""
    with np.load(home / COLLECTED) as file:
        raw = dict(file)
    for name in ("cube-single", "cube-single-task2"):
        env = qgf.Chunks(qgf.find_task(name), 3)
        env.reset(seed=1)
        raw["qpos"][10:20, 14:17] = env.unwrapped._data.mocap_pos  # where the cube shall go
        np.savez(tmp_path / "d.npz", **raw)
        data = qgf.load_data(tmp_path / "d.npz", env.task, env, TINY)
        if env.task.has_goals:
            assert_close(data.goals[10:20], np.array([env.goal] * 10), atol=0.05)
    assert np.flatnonzero(data.rewards == 0).tolist() == list(range(10, 20))
    assert_same(data.masks, -data.rewards)


def test_where_data_come_from(tmp_path, monkeypatch):
    """A run stops although data can be had, or takes for data what is none."""
    official = tmp_path / "cube-single-play-v0.npz"
    collected = tmp_path / "cube-single-play-v0-collected-7.npz"
    calls = []

    def download(names, folder):
        calls.append("download")
        if isinstance(comes, Exception):
            raise comes
        comes(official)

    def run(command, check):
        calls.append("collect")
        assert command[1:] == [qgf.COLLECT, "cube-single-play-v0", "7", collected]
        write(collected)
        return SimpleNamespace(returncode=status)

    def find():
        calls.clear()
        return qgf.find_files(TASK, replace(TINY, collect=7)), calls

    def html(path):
        path.write_text("<html>")

    monkeypatch.setattr(qgf, "DATA", tmp_path)
    monkeypatch.setattr(ogbench, "download_datasets", download)
    monkeypatch.setattr(subprocess, "run", run)
    status = 0
    for fault in (OSError("no route to host"), html):
        comes = fault
        assert find() == ([collected], ["download", "collect"])
        assert find() == ([collected], [])
        collected.unlink()
    html(official)  # which an earlier download has left
    comes = write
    assert find() == ([official], ["download"])
    assert find() == ([official], [])
    official.unlink()
    comes, status = html, 1
    with pytest.raises(qgf.UserError, match=r"clone the whole repository.*--data"):
        find()


def test_your_own_files(tmp_path):
    """--data takes files of another dataset, of validation, or half-written ones."""

    def find(path, task=TASK):
        return [x.name for x in qgf.find_files(task, replace(TINY, data=str(path)))]

    slices, sets = tmp_path / "slices", tmp_path / "sets"
    big = "cube-single-play-100m-v0"
    files = [slices / x for x in ("b.npz", "a.npz", ".a.npz", "a-val.npz", "a.txt")]
    for path in (*files, sets / big / f"{big}-0.npz", sets / "scene-play-v0.npz"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for task in (TASK, OWN):
        assert find(slices, task) == ["a.npz", "b.npz"]
        assert find(slices / "b.npz", task) == ["b.npz"]
    assert find(sets) == find(sets / big) == [f"{big}-0.npz"]
    (sets / "cube-single-play-v0.npz").touch()
    with pytest.raises(qgf.UserError, match="more than one"):
        find(sets)
    with pytest.raises(qgf.UserError, match=r"Pendulum-v1 .* --data"):
        find("", OWN)


# ---- episodes
class Envs(gymnasium.vector.SyncVectorEnv):
    """AsyncVectorEnv(autoreset_mode="Disabled") in one process: it steps what has ended, too."""

    def step(self, actions):
        assert type(actions) is np.ndarray  # JAX's would claim a GPU in each process
        self._autoreset_envs[:] = False
        return super().step(actions)


class Uneven(qgf.Chunks):
    """Episodes of task k end after k chunks, but at the latest with the time limit."""

    def step(self, actions):
        obs, reward, over, *rest = super().step(actions)
        self.over = over or self.episode[2] >= 5 * self.unwrapped.cur_task_id
        return obs, reward, self.over, *rest


def test_every_episode_is_played_once_and_as_if_it_were_alone(monkeypatch):
    """Methods are compared on unequal episodes, or one is lost: a return tells episodes apart."""

    def act(nets, s, g, a_0, w, method, cfg):  # of noise, state and goal
        return jnp.array(nets[method.__name__] * w * a_0[:, -1] + s[:, -1:] - g[:, :1]), 0.0

    monkeypatch.setattr(qgf, "sample_actions", act)
    make = partial(Uneven, GOAL, 5, max_episode_steps=22)  # at most 4 chunks and 2/5
    envs = Envs([make] * 3, autoreset_mode="Disabled")
    one = make()
    monkeypatch.setattr(type(one.unwrapped), "compute_reward", lambda self: self._data.qpos.sum())
    cfg = replace(TINY, episodes=7, horizon=5, first_seed=5_000_000)
    results = qgf.rollout(envs, dict(qgf=2.0), 0.05, "qgf@2", one.sizes, cfg)
    for i in range(7):
        x, _ = one.reset(seed=5_000_000 + i)
        assert one.unwrapped.cur_task_id == 1 + i % 5
        rng, over = np.random.default_rng(5_000_000 + i), False
        while not over:
            noise = np.float32(rng.standard_normal((2, 25)))[-1]
            x, _, over, _, info = one.step((0.1 * noise + x[27] - x[28]).reshape(5, 5))
        np.testing.assert_allclose(results[i], info["episode"], rtol=1e-9)
    assert one.sizes == (28, 3, 5) and results[:, 2].tolist() == [5, 10, 15, 20, 22, 5, 10]
    assert len(set(results[:, 1])) == 7


def test_an_environment_without_success_gives_its_return():
    """A chunk executes other actions, on another scale, or some of its rewards are lost."""
    env, plain = qgf.Chunks(OWN, 3), gymnasium.make("Pendulum-v1")
    np.testing.assert_allclose(env.reset(seed=5)[0], plain.reset(seed=5)[0])
    over = False
    while not over:
        _, _, over, _, info = env.step(np.full((3, 1), 0.25, np.float32))
    total = sum(plain.step(np.float32([0.5]))[1] for _ in range(200))
    np.testing.assert_allclose(info["episode"], [math.nan, total, 200], rtol=1e-5)


@pytest.mark.parametrize(
    "words, space, limit",
    [
        ("finite ranges", gymnasium.spaces.Box(-3e38, 3e38, (2,)), 9),
        ("finite ranges", gymnasium.spaces.Box(0, 255, (2,), np.uint8), 9),
        ("finite ranges", gymnasium.spaces.Box(np.float32([0, 1]), np.float32([1, 1])), 9),
        ("no vector", gymnasium.spaces.Discrete(2), 9),
        ("no vector", gymnasium.spaces.Box(-1, 1, (2, 2)), 9),
        ("may never end", gymnasium.spaces.Box(-1, 1, (2,)), None),
    ],
)
def test_environments_that_do_not_fit_are_refused(monkeypatch, words, space, limit):
    """Actions are scaled by a range that is none, or an episode is played for ever."""

    class Odd(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (3,))
        action_space = space

    spec = gymnasium.envs.registration.EnvSpec("Odd-v0", Odd, max_episode_steps=limit)
    monkeypatch.setitem(gymnasium.registry, "Odd-v0", spec)
    with pytest.raises(qgf.UserError, match=f"--env Odd-v0.*{words}"):
        qgf.Chunks(qgf.find_task("Odd-v0"), 3)


# ---- rows and the table
def fake_rollout(monkeypatch):
    """Each call of rollout and its nets, from now on; all episodes are won."""
    played = []

    def rollout(envs, nets, w, method, sizes, cfg):
        played.append((method, w, nets))
        return np.ones((cfg.episodes, 3))

    monkeypatch.setattr(qgf, "rollout", rollout)
    monkeypatch.setattr(qgf, "relative_weight", lambda guidance, *_: 10 * guidance)
    monkeypatch.setattr(qgf, "make_envs", lambda *_: SimpleNamespace(close=lambda terminate: None))
    return played


def test_only_rows_that_lack_are_played(tmp_path, monkeypatch):
    """A table shows episodes of other settings, or hours of playing are done again."""
    played = fake_rollout(monkeypatch)
    write(tmp_path / "d.npz")

    def evaluate(updates=300, episodes=4, **changes):
        played.clear()
        cfg = replace(TINY, episodes=episodes, out=str(tmp_path), **changes)
        run = qgf.Run(TASK, SIZES, [tmp_path / "d.npz"], 29, None, cfg)
        found = qgf.evaluate(None, updates, None, run)
        assert all(len(x[0]) >= episodes for x in found.values())
        return [f"{method} {w}" for method, w, _ in played], [*found]

    both = ["bc 0.0", "qgf 3.0"]
    assert evaluate() == (both, [("bc", ""), ("qgf", "λ 0.3")])
    assert evaluate()[0] == evaluate(episodes=3)[0] == []
    new = ["qgf 0.5", "bptt 3.0", "bptt 0.5", "bc@2 0.0"]
    assert evaluate(methods=("qgf", "bptt", "bc@2"), weights=(0.5,))[0] == new
    assert evaluate(400)[0] == evaluate(400, episodes=6)[0] == evaluate(first_seed=7)[0] == both
    rows = qgf.read_csv(tmp_path / "cube-single-task1-s0/episodes.csv")
    assert len(rows) == 8 + 16 + 12 + 8 and rows[0]["w"] == "0" and rows[4]["w"] == "3"


def played(wins, n, total=0.0):
    """Success and return of n episodes; the first ones are won."""
    success = np.full(n, math.nan) if wins is None else np.arange(n) < wins
    return np.array([success, total - np.arange(n)], float)


@pytest.mark.parametrize(
    "bc, wins, n, words",
    [
        (10, 40, 50, "Guidance helped: qgf wins 30 and loses 0 of 50 episodes"),
        (20, 25, 50, "No significant difference"),
        (20, 20, 50, "No significant difference"),
        (20, 3, 50, "Guidance did harm"),
        (0, 5, 5, "No significant difference"),
    ],
)
def test_the_table_says_whether_guidance_helped(bc, wins, n, words):
    """The verdict contradicts the exact test: of k episodes that differ, all won, p = 2 / 2^k."""
    found = {("bc", ""): played(bc, n), ("bc@4", ""): played(1, n), ("qgf", "w 1"): played(wins, n)}
    lines = qgf.table(found, TASK)
    p = min(1, 2 * 0.5 ** abs(wins - bc))
    pair = f"{max(wins - bc, 0)}:{max(bc - wins, 0)}"
    assert lines[1].split()[:3] == ["bc", str(n), f"{bc / n:.2f}"]
    assert lines[3].split()[3:7] == [str(n), f"{wins / n:.2f}", pair, f"{p:.2g}"]
    assert lines[4].startswith(words) and f"(p = {p:.2g})" in lines[4]
    del found["qgf", "w 1"]
    assert len(qgf.table(found, TASK)) == 3  # nothing was guided


def test_without_success_the_return_is_compared():
    """Your own environment gets a table of nan."""
    lines = qgf.table({("bc", ""): played(None, 6), ("qgf", "λ 1"): played(None, 6, 2.5)}, OWN)
    assert lines[1].split() == ["bc", "6", "-2.5"] and "nan" not in "".join(lines)
    assert lines[2].split()[4:] == ["6:0", "0.031", "0.0"] and "helped" in lines[3]


# ---- runs
@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    """A folder of files a.npz, b.npz and c.npz."""
    folder = tmp_path_factory.mktemp("slices")
    for letter in "abc":
        np.savez(folder / f"{letter}.npz", letter)
    return folder


@pytest.fixture
def fit(slices, tmp_path):
    """Train a learner for so many updates, in a folder of tmp_path, on files of these letters."""

    def some_data(path):
        rng = np.random.default_rng(ord(path.stem))
        return DATA._replace(rewards=np.float32(rng.normal(size=64)))

    def fit(updates, out="out", learner="policy", files="ab", load_file=some_data, **changes):
        files = [slices / f"{x}.npz" for x in files]
        cfg = replace(TINY, out=str(tmp_path / out), **changes)
        return qgf.fit(learner, updates, {}, qgf.Run(TASK, SIZES, files, 60, load_file, cfg))

    return fit


POLICY, CRITIC = "cube-single-play-v0-policy-s0", "cube-single-task1-s0"


def files_of(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.mark.parametrize("learner, name", [("policy", POLICY), ("critic", CRITIC)])
def test_a_run_that_stops_goes_on_bitwise(fit, tmp_path, learner, name):
    """A resumed run is another run, or one with damaged files begins again without a word."""
    whole = fit(1300, "one", learner)
    for updates in (100, 1100, 1300):
        state = fit(updates, "two", learner)
    assert_same(whole, state)
    one, two = files_of(tmp_path / "one" / name), files_of(tmp_path / "two" / name)
    assert one == two and one.keys() == {"config.json", "metrics.csv", "checkpoint.npz"}
    metrics = qgf.read_csv(tmp_path / "one" / name / "metrics.csv")
    assert [int(row["updates"]) for row in metrics] == [*range(100, 1301, 100)]
    assert_same(fit(1200, "one", learner), whole)  # it has gone further
    for file, what in ("metrics.csv", "rows"), ("checkpoint.npz", "training begins again"):
        (tmp_path / "one" / name / file).write_bytes(one[file].replace(b",", b"", 1)[:-30])
        with pytest.raises(qgf.UserError, match=rf"{file} is damaged, without it, .*{what}"):
            fit(1300, "one", learner)


def test_a_folder_belongs_to_one_run(fit, tmp_path):
    """A run with other options, data or code goes on with these networks, or writes over them."""
    fit(100)
    folder = tmp_path / "out" / POLICY
    saved = qgf.read_json(folder / "config.json")
    for keep in (False, True):
        qgf.check_settings(folder, saved, keep)
        for name, x in dict(lr=2e-3, new=1).items():
            with pytest.raises(qgf.UserError, match=rf"{name} .*--out"):
                qgf.check_settings(folder, saved | {name: x}, keep)
    with pytest.raises(qgf.UserError, match=r"other code: .*--out NEW, or --keep"):
        qgf.check_settings(folder, saved | dict(code="def"), False)
    qgf.check_settings(folder, saved | dict(code="def"), keep=True)
    with pytest.raises(qgf.UserError, match=r"data a\.npz, 60 rows, hash .*, not b\.npz"):
        fit(200, files="b")
    (folder / "config.json").write_text("")
    with pytest.raises(qgf.UserError, match=r"config\.json is damaged"):
        fit(200)
    (folder / "config.json").unlink()
    with pytest.raises(qgf.UserError, match=r"trained with seed None"):
        fit(200)


def during_training(monkeypatch, what):
    """Let something happen in the third call of train."""
    calls, train = [], qgf.train

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            what()
        return train(*args)

    monkeypatch.setattr(qgf, "train", interrupted)
    return calls


def test_a_slower_run_takes_over_what_is_ahead(fit, tmp_path, monkeypatch):
    """Of two runs that share a policy, the slower one destroys what the faster one has saved."""
    alone = fit(1300, "alone")
    calls = during_training(monkeypatch, lambda: fit(1100))
    monkeypatch.setattr(qgf, "SAVE", 0)
    assert_same(fit(1300), alone)
    assert len(calls) == 3 + 9 + 2  # it goes on where the faster one was
    assert files_of(tmp_path / "out" / POLICY) == files_of(tmp_path / "alone" / POLICY)


def test_two_runs_with_other_options_do_not_mix(fit, tmp_path, monkeypatch):
    """Of two runs that begin at once in one folder, the last to save passes for both."""

    def other():
        shutil.rmtree(tmp_path / "out" / POLICY)  # both began before there was one
        fit(300, lr=1e-9)

    during_training(monkeypatch, other)
    with pytest.raises(qgf.UserError, match=r"trained with lr 1e-09, not 0\.001"):
        fit(500)


def test_files_take_turns_and_each_20_seconds_are_saved(fit, monkeypatch):
    """A resumed run reads other files, or a killed one loses more than it must."""
    seen, saved, save = [], [], qgf.save
    clock = iter(range(0, 10**6, 4))  # each look at the clock takes 4 s

    def train(loss, total, state, others, data, n, cfg):
        seen.extend(data.stem * (n // 50))
        return state._replace(step=state.step + n), dict(x=np.zeros(n))

    def watched_save(folder, state, *rest):
        saved.append(int(state.step))
        save(folder, state, *rest)

    monkeypatch.setattr(qgf, "train", train)
    monkeypatch.setattr(qgf, "save", watched_save)
    monkeypatch.setattr(qgf, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for updates in (950, 3250):
        fit(updates, files="abc", load_file=lambda path: path)
    assert "".join(seen) == 20 * "a" + 20 * "b" + 20 * "c" + 5 * "a"
    assert saved == [0, 600, 950, 950, 1500, 2100, 2700, 3250]


def test_networks_of_other_shapes_are_refused(fit, tmp_path):
    """After an edit of a network, --keep ends in an error of JAX's, or acts wrongly."""
    fit(100)
    other = qgf.init_state(qgf.init_policy, SIZES, replace(CFG, policy_width=8))
    with pytest.raises(qgf.UserError, match=r"other shapes: give another --out"):
        qgf.load(tmp_path / "out" / POLICY, other)


def test_what_cannot_be_saved_is_refused(fit, tmp_path, monkeypatch):
    """NaN replaces the last good checkpoint, or a folder that cannot be gives a traceback."""
    fit(100)
    before = files_of(tmp_path / "out" / POLICY)

    def train(loss, total, state, others, data, n, cfg):
        params = jax.tree.map(lambda x: x * np.nan, state.params)
        return state._replace(params=params, step=state.step + n), dict(policy_loss=np.zeros(n))

    monkeypatch.setattr(qgf, "train", train)
    with pytest.raises(qgf.UserError, match=r"NaN.* 200 updates"):
        fit(200)
    assert files_of(tmp_path / "out" / POLICY) == before
    (tmp_path / "file").touch()
    with pytest.raises(qgf.UserError, match=r"cannot write .*file/x/.*/config\.json"):
        fit(100, "file/x")


def test_the_codes_hash_follows_what_is_used(monkeypatch):
    """An edit is missed, or it counts for learners and methods that do not use it."""
    source = qgf.SOURCE + "\nX1: float = 1\nX2, X3 = 2, 3\nX3 += 4\nif X3:\n    X5 = 5\n"
    source += "def uses():\n    return X1, X2, X3, X5\n"
    monkeypatch.setattr(qgf, "uses", lambda: 0, raising=False)

    def hashes(old="", new="", loss=qgf.critic_loss):
        assert old in source
        monkeypatch.setattr(qgf, "SOURCE", source.replace(old, new))
        return np.array(
            [
                qgf.code_hash(qgf.train, qgf.init_policy, qgf.policy_loss),
                qgf.code_hash(qgf.train, qgf.init_critic, loss),
                qgf.code_hash(qgf.sample_actions, qgf.relative_weight, qgf.qgf),
                qgf.code_hash(qgf.sample_actions, qgf.relative_weight, qgf.gradstep),
                qgf.code_hash(qgf.uses),
            ]
        )

    before = hashes()
    for old, new, changed in (
        ("POLYAK = 0.005  #", "POLYAK   =   0.005  # other", [0, 0, 0, 0, 0]),
        ("GOALS = 5", "GOALS = 6", [0, 0, 0, 0, 0]),
        ("POLYAK = 0.005", "POLYAK = 0.004", [1, 1, 0, 0, 0]),
        ("kind < 0.2", "kind < 0.3", [1, 1, 0, 0, 0]),
        ("q_loss + v_loss", "q_loss + 2 * v_loss", [0, 1, 0, 0, 0]),
        ("return jax.vmap(mlp", "return 2 * jax.vmap(mlp", [0, 1, 1, 1, 0]),
        ("jnp.clip(a_t + (1 - t) * v", "(a_t + (1 - t) * v", [0, 0, 1, 0, 0]),
        ("ASCENTS = 3", "ASCENTS = 4", [0, 0, 1, 1, 0]),
        ("X1: float = 1", "X1: float = 2", [0, 0, 0, 0, 1]),
        ("X3 = 2, 3", "X3 = 1, 3", [0, 0, 0, 0, 1]),
        ("X3 += 4", "X3 += 5", [0, 0, 0, 0, 1]),
        ("    X5 = 5", "    X5 = 6", [0, 0, 0, 0, 1]),
    ):
        assert (hashes(old, new) != before).tolist() == [bool(x) for x in changed], old
    others = [hashes(loss=loss)[1] for loss in (fake_rollout, fake_rollout, eval("lambda: 1"))]
    assert others[0] == others[1] and len({before[1], *others}) == 3
    assert hashes("GOALS = 5", "GOALS = 6", fake_rollout)[1] != others[0]


# ---- the command line, and Python
def test_words_of_the_command_line():
    """An option is ignored, or a family's defaults win against it."""
    line = "--guidance 0.3 1 --methods qgf@4 bptt --lr 1e-4 --no-keep --seed 3"
    given = dict(guidance=(0.3, 1.0), methods=("qgf@4", "bptt"), lr=1e-4, seed=3)
    assert qgf.parse(line.split()) == qgf.config(**given) == replace(qgf.config(), **given)
    assert qgf.config(weights=(0.1,)) == replace(qgf.config(), weights=(0.1,), guidance=())
    assert qgf.config(weights=[0.1], guidance=[2.0]).guidance == (2.0,)
    for name, defaults in qgf.FAMILY.items():
        given = dict(env=f"{name}-task2", depth=2)
        assert qgf.config(**given) == qgf.Config(**defaults | given)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--lr nan", "--lr nan: give a number from 1e-09"),
        ("--discount 1.5", "--discount 1.5"),
        ("--methods qgf best", "best.*qgf-jacobian"),
        ("--methods qgf@0", "qgf@0"),
        ("--env cube-single --sparse", "--sparse"),
        ("--collect 5 --data x", "--collect"),
    ],
)
def test_a_wrong_word_gets_one_line(line, words):
    """A run trains for hours with an option that means nothing."""
    with pytest.raises(qgf.UserError, match=rf"^.*{words}.*\Z"):
        qgf.parse(line.split())


README = (HERE / "README.md").read_text()


def test_readmes_commands_are_understood():
    """README tells people to type what is refused."""
    commands = re.findall(r"^python qgf.py ([^#\n]*)", README, re.MULTILINE)
    commands = [x.split() for x in commands if "qgf-midpoint" not in x]  # a fork's
    assert len(commands) >= 2
    for command in commands:
        qgf.find_task(qgf.parse(command).env)


def test_quick_start_printed_its_table():
    """README's table, or a number in its text, is not that of the episodes in the repository."""
    played = {("bc", ""): [], ("qgf", "λ 0.03"): []}
    for row in qgf.read_csv(HERE / ".github/results/quick-start/episodes.csv"):
        strength = "λ 0.03" if row["method"] == "qgf" else ""
        played[row["method"], strength].append((float(row["success"]), float(row["return"])))
    lines = qgf.table({key: np.array(x).T for key, x in played.items()}, GOAL)
    assert "\n".join(lines) in README
    assert f"reaches\n{lines[2].split()[4]} of the goals" in README
    assert f"cannot see the goal, {lines[1].split()[2]} (one seed" in README


def test_uv_installs_what_pip_installs():
    """The file's last lines and requirements.txt name other versions."""
    block = re.search(r"^# dependencies = \[(.*?)\]", qgf.SOURCE, re.MULTILINE | re.DOTALL)[1]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    wanted = [x.split("#")[0].strip() for x in lines if not x.startswith(("pytest", "ruff"))]
    assert re.findall('"(.*?)"', block) == [x for x in wanted if x]


SMALL = "--policy-width 8 --critic-width 8 --depth 1 --batch-size 8 --episodes 2"
SMALL += " --policy-updates 100 --critic-updates 600"


def test_main_trains_once_plays_what_lacks_and_readmes_lines_act(
    home, tmp_path, monkeypatch, capsys
):
    """A run trains or plays again what it has, or what code has changed is not played again."""
    played = fake_rollout(monkeypatch)
    monkeypatch.setattr(qgf, "DATA", (home / COLLECTED).parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def main(line="", env="cube-single"):
        played.clear()
        text = f"{SMALL} --eval-every 300 --out=~/runs --env {env} --collect 2000 {line}"
        qgf.main(text.split())
        return [method for method, _, _ in played]

    assert main() == 2 * ["bc", "qgf"]
    out = capsys.readouterr().out
    assert "400 rows, 2 trajectories, any goal" in out and "after 600 updates" in out
    nets, cfg, task = qgf.load_run("~/runs/cube-single-s0")
    assert_same(nets, played[-1][2])
    assert nets.keys() == {"policy", "critic", "value"} and task == GOAL
    assert (cfg.critic_width, cfg.critic_updates, cfg.expectile) == (8, 600, 0.9)
    (code,) = re.findall(r"```python\n(import.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["a"].shape == (1, 25) and (abs(names["a"]) <= 1).all()
    with pytest.raises(qgf.UserError, match="no run"):
        qgf.load_run("elsewhere")

    before = files_of(tmp_path / "runs/cube-single-play-v0-policy-s0")
    assert main() == [] and main("--methods bptt") == ["bptt"]
    assert "100 of 100 updates found" in capsys.readouterr().out
    assert main("--first-seed 7") == ["bc", "qgf"]
    assert main(env="cube-single-task2") == 2 * ["bc", "qgf"]
    with monkeypatch.context() as patch:
        patch.setitem(qgf.ESTIMATORS, "qgf", lambda q, flow, a_t, t, v, T: 0 * v)
        assert main() == ["qgf"]  # at 300 updates, no network is left
    edited = qgf.SOURCE.replace("q_loss + v_loss", "q_loss + 2 * v_loss")
    monkeypatch.setattr(qgf, "SOURCE", edited)
    with pytest.raises(qgf.UserError, match="--out NEW, or --keep"):
        main()
    assert main("--keep") == ["bc", "qgf"] and main("--keep") == []
    assert files_of(tmp_path / "runs/cube-single-play-v0-policy-s0") == before  # all tasks share it


# ---- real runs, in processes of their own
def start(home, *args, flags=(), **env):
    command = [sys.executable, *flags, qgf.__file__, *map(str, args)]
    env = os.environ | dict(HOME=str(home)) | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="latin-1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of the background ignores it
    return subprocess.Popen(command, env=env, cwd=home, start_new_session=True, **pipes)


def finish(p, status=0):
    """What a run prints, or its error, which is a line."""
    out, err = p.communicate()
    assert p.returncode == status, err
    assert "Traceback" not in err or status == -signal.SIGKILL
    return out if status == 0 else err


def alive(p):
    """Is there a process of this run?"""
    try:
        os.killpg(p.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_run_stopped_in_three_ways_equals_an_uninterrupted_one(home):
    """Ctrl-C, SIGTERM or kill -9 lose training, spoil a file, or leave processes behind."""
    args = [*SMALL.split(), "--critic-updates", 4000, "--eval-every", 2000, "--collect", 2000]
    args += ["--env", "cube-single", "--methods", "qgf@2", "--seed", 1, "--out"]
    whole = start(home, *args, "whole")
    stops = [("playing qgf", signal.SIGINT), ("critic:  50%", signal.SIGTERM)]
    for words, number in [*stops, ("critic:  50%", signal.SIGKILL)]:
        p, text = start(home, *args, "stopped"), ""
        while words not in text:  # of progress bars
            text += p.stderr.read(1)
            assert p.poll() is None, text
        os.killpg(p.pid, number) if number == signal.SIGINT else p.send_signal(number)
        if number == signal.SIGKILL:
            finish(p, -number)
        else:
            assert "stopped: the same command" in finish(p, 1)
        while alive(p):  # all of its processes end
            time.sleep(0.1)
    finish(start(home, *args, "stopped"))
    assert "cube-single after 4000 updates" in finish(whole)
    for folder in ("cube-single-play-v0-policy-s1", "cube-single-s1"):
        assert files_of(home / "whole" / folder) == files_of(home / "stopped" / folder)


@pytest.mark.slow
def test_your_own_environment(home):
    """One of a package that shows no success, and gives its reward as an array, does not run."""
    (home / "mine.py").write_text(
        "import gymnasium, numpy as np\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Mine(PendulumEnv):\n"
        "    def step(self, a):\n"
        "        s, r, *rest = super().step(a)\n"
        "        return s, np.array([r]), *rest\n"
        "gymnasium.register('Mine-v0', Mine, max_episode_steps=200)\n"
    )
    rng = np.random.default_rng(0)
    raw = dict(observations=rng.normal(size=(600, 3)), actions=rng.uniform(-2, 2, (600, 1)))
    np.savez(home / "p.npz", **raw, rewards=-np.ones(600), terminals=np.arange(600) % 200 == 199)
    args = [*SMALL.split(), "--env", "mine:Mine-v0", "--data", "p.npz"]
    out = finish(start(home, *args, PYTHONPATH=str(home)))
    assert "600 rows, 3 trajectories, 0.00% solved; rewards of 3 last rows are not used" in out
    rows = qgf.read_csv(home / "runs/mine-Mine-v0-s0/episodes.csv")
    assert len(rows) == 4 and {row["success"] for row in rows} == {"nan"}
    assert all(-2000 < float(row["return"]) < 0 for row in rows)


@pytest.mark.slow
def test_odd_machines(home):
    """A terminal without Greek letters, no docstrings and no home, or no GPU: a traceback."""
    text = finish(start(home, "--help", flags=["-OO"], PYTHONIOENCODING="latin-1", HOME="/none"))
    assert all(f"--{name.replace('_', '-')}" in text for name in qgf.Config.__annotations__)
    line = finish(start(home, "--env", "cube-single", JAX_PLATFORMS="cuda"), 1)
    assert "JAX_PLATFORMS" in line.splitlines()[-1]


@pytest.mark.slow
def test_guidance_solves_a_real_task(tmp_path):
    """All parts work, but not together: cube-single, on 20,000 rows of OGBench's script."""
    args = "--env cube-single --collect 20000 --policy-updates 7000 --critic-updates 7000"
    out = finish(start(tmp_path, *args.split(), "--batch-size", 128))
    pairs, p = re.search(r"^qgf .* (\d+:\d+) +(\S+) ", out, re.MULTILINE).groups()
    won, lost = map(int, pairs.split(":"))
    assert won > lost and binomtest(won, won + lost).pvalue < 0.01 and float(p) < 0.01
