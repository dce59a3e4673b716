# SPDX-License-Identifier: MIT
"""Every loss, estimator and file of qgf.py against something independent: python -m pytest."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
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
    padded = np.append(starts, [0] * (64 - len(starts)))
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


# ---- losses, which test_golden.py compares with the official code
def gaussian_velocity(mu, sigma):
    """The exact flow to N(μ, σ²): E[a_1 - a_0 | a_t]."""

    def velocity(policy, s, a_t, t, cfg):
        variance = (1 - t) ** 2 + (t * sigma) ** 2
        return mu + (t * sigma**2 - (1 - t)) * (a_t - t * mu) / variance

    return velocity


def test_policy_loss_is_least_at_the_gaussians_exact_velocity(monkeypatch):
    mu, sigma, T = 0.3, 0.5, CFG.denoise_steps
    batch = BATCH._replace(actions=mu + sigma * jax.random.normal(KEY + 1, (200_000, 1)))
    exact = gaussian_velocity(mu, sigma)

    def loss(shift, tilt):
        monkeypatch.setattr(qgf, "velocity", lambda *x: exact(*x) + shift + tilt * x[2])
        return float(qgf.policy_loss(dict(policy=None), {}, {}, batch, KEY, CFG)[0])

    t = np.arange(T + 1) / T  # the least loss is the variance of a_1 - a_0 given a_t
    least = sigma**2 / ((1 - t) ** 2 + (t * sigma) ** 2)
    assert loss(0, 0) == pytest.approx(least.mean(), rel=0.01)
    for x in (-0.05, 0.05):
        assert min(loss(x, 0), loss(0, x)) > loss(0, 0)


def test_a_goal_enters_the_critics_loss_as_a_part_of_the_state():
    """A network that reads s and g is one that reads (s, g), whose loss the golden file has."""
    params, average, *_ = some_state("critic")
    assert {*(BATCH.discounts > 0)} == {True, False}
    both, both_next = (
        np.hstack([s, BATCH.goals]) for s in (BATCH.observations, BATCH.next_observations)
    )
    joined = BATCH._replace(
        observations=both, next_observations=both_next, goals=BATCH.goals[:, :0]
    )
    loss = jax.jit(qgf.critic_loss, static_argnums=5)
    assert_close(
        loss(params, average, {}, BATCH, KEY, CFG),
        loss(params, average, {}, joined, KEY, CFG),
        rtol=1e-5,
    )


def test_each_loss_of_the_critic_trains_its_own_network():
    params, average, *_ = some_state("critic")

    def terms(params):
        return qgf.critic_loss(params, average, {}, BATCH, KEY, CFG)[1]

    reached = []
    for term, tree in jax.jit(jax.jacrev(terms))(params).items():
        reached += [(term, x) for x in tree if any(y.any() for y in jax.tree.leaves(tree[x]))]
    assert sorted(reached) == [("q_loss", "critic"), ("v_loss", "value")]


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9, 0.999])
def test_expectile_loss_is_least_at_the_expectile(tau):
    def loss(v):  # of 0 and 1, whose expectile solves τ (1 - V) = (1 - τ) V: V = τ
        return qgf.expectile_loss(jnp.array([0.0, 1.0]) - v, tau).mean()

    slope = jax.grad(loss)
    assert abs(slope(tau)) < 1e-6
    assert slope(tau - 0.01) < 0 < slope(tau + 0.01)


# ---- batches
def assert_discounted(batch, k, rewards, masks):
    total, discount = 0.0, 0.99**H
    for j in range(H):
        total += 0.99**j * rewards[j]
        if masks[j] == 0:
            discount = 0.0
            break
    assert batch.returns[k] == pytest.approx(total, abs=1e-5)
    assert batch.discounts[k] == pytest.approx(discount)


def test_chunks_are_those_of_a_brute_force_loop():
    states = np.arange(64.0)[:, None]  # a state is its row's number
    data = DATA._replace(observations=states, goals=np.zeros((64, 0)))
    batch = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=500)))
    assert batch.goals.shape == (500, 0)
    for k in range(500):
        i = int(batch.observations[k, 0])
        assert_discounted(batch, k, data.rewards[i:], data.masks[i:])
        assert_same(batch.actions[k], data.actions[i : i + H].ravel())
        if batch.discounts[k]:
            assert batch.next_observations[k] == i + H
    assert {*batch.observations[:, 0]} == {*STARTS}


def test_hindsight_equals_a_brute_force_loop():
    n, i = 6000, np.arange(64).clip(max=59)  # padding
    pairs = np.float32([i // 2 * 0.8 + i % 2 * 0.39, i % 2 * 0.39]).T  # .39 within, .41 between
    data = DATA._replace(goals=pairs, observations=np.arange(64.0)[:, None])
    batch = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=n)))
    counts, ends = [0, 0, 0, 0], data.ends
    for k in range(n):
        i = int(batch.observations[k, 0])
        goal = int(np.flatnonzero((pairs == batch.goals[k]).all(axis=1))[0])
        masks = [(i + j) // 2 != goal // 2 for j in range(H)]
        assert_discounted(batch, k, [-x for x in masks], masks)
        counts[0 if goal == i else 3 if goal == ends[i] else 1 if i < goal < ends[i] else 2] += 1
    left = ends[STARTS] - STARTS  # rows to come, the last of which is one
    later, last = (np.mean(0.5 * x + 0.3 * x * left / 60) for x in (1, 1 / left))
    want = [0.2 + 0.3 / 60, later - last, 0.8 - 0.3 / 60 - later, last]
    assert_close(np.array(counts) / n, want, atol=0.012)


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


GRADIENTS = {k: f for k, f in qgf.ESTIMATORS.items() if k not in ("bc", "gradstep")}


# ---- a bandit whose actions are near (-.6, 0) or, one time in five, (.6, 0), which is better
@pytest.fixture(scope="session")
def toy():
    rng = np.random.default_rng(0)
    good = rng.random((4000, 1)) < 0.2
    a = np.float32(np.where(good, [0.6, 0], [-0.6, 0]) + rng.normal(0, 0.1, (4000, 2)))
    zeros, rows = np.zeros((4000, 1), np.float32), np.arange(4000)
    data = qgf.Data(zeros, a, a[:, 0], zeros[:, 0], zeros[:, :0], rows, rows, np.int32(4000))
    cfg = qgf.Config(policy_width=32, critic_width=32, depth=2, batch_size=128, horizon=1)
    nets = {}
    for learner, (init, _, _) in qgf.LEARNERS.items():
        state = init_state(init, (1, 0, 2), cfg)
        nets |= train(learner, state, 1200, cfg, data, nets)[0].average
    return nets, cfg


@pytest.mark.slow
def test_a_toy_bandit_is_solved(toy):
    nets, cfg = toy

    def good(samples, w, method):
        a_0 = jax.random.normal(KEY, (500, samples, 2))
        s, g = jnp.zeros((500, 1)), jnp.zeros((500, 0))
        return (qgf.sample_actions(nets, s, g, a_0, w, method, cfg)[0][:, 0] > 0).mean()

    assert 0.1 < good(1, 0.0, qgf.bc) < 0.35  # a fifth, as in the data
    assert good(1, 10.0, qgf.qgf) > 0.9
    assert good(32, 0.0, qgf.bc) > 0.95


@pytest.mark.slow
def test_the_gradients_point_the_right_way(toy):
    """Along the unguided flow: agreement with BPTT, steadiness under noise, and effect."""
    nets, cfg = toy
    T = cfg.denoise_steps
    s, g, a_t = jnp.zeros((200, 1)), jnp.zeros((200, 0)), jax.random.normal(KEY, (200, 2))
    noise = 0.01 * jax.random.normal(KEY, a_t.shape)
    flow = jax.jit(lambda a, t: qgf.velocity(nets["policy"], s, a, t, cfg))
    q = jax.jit(partial(qgf.q_min, nets["critic"], s, g))
    end = jax.jit(lambda a, t: q(qgf.integrate(flow, a, t, T)))

    @jax.jit
    def estimates(a, t):
        found = {name: f(q, flow, a, t, flow(a, t), T) for name, f in GRADIENTS.items()}
        return {name: d / jnp.linalg.norm(d, axis=1, keepdims=True) for name, d in found.items()}

    agrees, shakes, helps = {}, {}, {}
    for i in range(T):
        t = np.full((200, 1), i / T)
        exact, noisy = (jax.device_get(estimates(a, t)) for a in (a_t, a_t + noise))
        for name, d in exact.items():
            agrees[name, i] = np.sum(d * exact["bptt"], axis=1).mean()
            shakes[name, i] = np.median(np.linalg.norm(noisy[name] - d, axis=1))
            helps[name, i] = np.mean(end(a_t + 0.1 * d, t) > end(a_t, t))
        a_t = a_t + flow(a_t, t) / T
    for i in (0, 5, 9):
        for name in ("bptt", "qgf", "qfql"):
            assert agrees[name, i] > 0.5 and helps[name, i] > 0.75, (name, i)
        assert i == 9 or shakes["qgf", i] < shakes["qgf-jacobian", i]  # the paper's Figure 3
    assert agrees["qgf-jacobian", 0] < agrees["qgf", 0]
    assert agrees["qgf-jacobian", 9] > 0.999  # with one step left, it is BPTT


# ---- guidance
def sampling(B, N=1):
    """Networks, states, goals and noise."""
    rng = np.random.default_rng(3)
    nets = some_state("policy").average | some_state("critic").average
    sizes = (B, S), (B, G), (B, N, H * A)
    return nets, *(np.float32(rng.normal(size=size)) for size in sizes)


def closures(nets, s, g):
    flow = jax.jit(lambda a, t: qgf.velocity(nets["policy"], s, a, t, CFG))
    return jax.jit(partial(qgf.q_min, nets["critic"], s, g)), flow


def test_no_weight_is_bc_and_another_weight_compiles_nothing():
    nets, *rest = sampling(6)
    bc, _ = qgf.sample_actions(nets, *rest, 1.0, qgf.bc, CFG)
    assert_same(qgf.sample_actions(nets, *rest, 0.0, qgf.qgf, CFG)[0], bc)
    compiled = qgf.sample_actions._cache_size()
    assert (qgf.sample_actions(nets, *rest, 0.123, qgf.qgf, CFG)[0] != bc).any()
    assert qgf.sample_actions._cache_size() == compiled


@pytest.mark.parametrize("method", qgf.ESTIMATORS)
def test_every_method_is_its_plain_loop_and_best_of_2(method):
    nets, s, g, a_0 = sampling(6, N=2)
    q, flow = closures(nets, s, g)
    uphill = jax.jit(jax.grad(lambda a: q(a).sum()))
    estimate = GRADIENTS.get(method, lambda q, flow, a_t, t, v, T: 0)
    estimate = jax.jit(partial(estimate, q, flow, T=5))
    candidates = []
    for n in range(2):
        a = a_0[:, n]
        for i in range(5):
            t = np.full((6, 1), i / 5)
            v = flow(a, t)
            a = a + np.array(v + 0.3 * estimate(a, t, v)) / 5
        a = np.clip(a, -1, 1)
        for _ in range(3 if method == "gradstep" else 0):
            a = np.clip(a + 0.1 * np.array(uphill(a)), -1, 1)  # together, they push by .3
        candidates.append(a)
    best = np.argmax([q(a) for a in candidates], axis=0)
    assert 0 < best.sum() < 6  # either is the better one somewhere
    got, _ = qgf.sample_actions(nets, s, g, a_0, 0.3, qgf.ESTIMATORS[method], CFG)
    assert_close(got, np.array(candidates)[best, np.arange(6)], atol=1e-4)


def test_relative_weight_of_a_linear_critic(monkeypatch):
    """∇Q is x everywhere: all pushes together have the rms λ, whatever the size of x."""
    x = np.float32([1, -2, 0.5, 3, 0, 1])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))  # no clipping
    policy = [dict(w=jnp.zeros((S + 6 + 16, 6)), b=jnp.zeros(6))]  # stays there
    for name, method in qgf.ESTIMATORS.items():
        for size in (1.0, 1e-4):
            w = np.concatenate([np.ones(S + G), size * x]).astype(np.float32)
            critic = [dict(w=np.stack([w, w])[..., None], b=np.zeros((2, 1)))]
            nets = dict(policy=policy, critic=critic)
            got = qgf.relative_weight(0.5, nets, BATCH, method, CFG)
            push = got * size * np.sqrt(np.mean(x**2))
            assert push == pytest.approx(0 if name == "bc" else 0.5, rel=1e-4)

    def steep_in_a_third(q, flow, a_t, t, v, T):
        return jnp.where(jnp.arange(len(a_t))[:, None] % 3 == 0, 1e4, 2.0) * jnp.ones_like(a_t)

    assert qgf.relative_weight(0.5, nets, BATCH, steep_in_a_third, CFG) == pytest.approx(0.25)


# ---- closed forms: π_BC is a Gaussian with its exact velocity, and guided flows are linear ODEs
def guided(monkeypatch, q, velocity, w, a_0, method, **changes):
    """Where these rows of noise (B, D) go, if the critic is q."""
    monkeypatch.setattr(qgf, "velocity", velocity)
    monkeypatch.setattr(qgf, "q_values", lambda critic, s, g, a: jnp.stack([q(a), q(a) + 1]))
    nets = dict(policy=0, critic=0)
    s = jnp.zeros((len(a_0), 0))
    run = jax.jit(qgf.sample_actions.__wrapped__, static_argnames=("method", "cfg"))
    return run(nets, s, s, a_0[:, None], w, method, replace(CFG, **changes))[0]


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_gaussian_goes_where_each_methods_ode_says(monkeypatch, method):
    mu, sigma, w, k, aim = 0.1, 0.2, 0.3, 2.0, 0.4
    a_0 = np.linspace(-2, 2, 9)

    def slope(t, a):
        variance = (1 - t) ** 2 + (t * sigma) ** 2
        clean = mu + t * sigma**2 / variance * (a - t * mu)  # E[a_1 | a_t]
        end = mu + sigma / math.sqrt(variance) * (a - t * mu)
        push = {
            "qgf": aim - clean,
            "qgf-jacobian": t * sigma**2 / variance * (aim - clean),
            "bptt": sigma / math.sqrt(variance) * (aim - end),
            "qfql": aim - a,
        }
        return (clean - a) / (1 - t) + w * k * push[method]

    want = solve_ivp(slope, (0, 1 - 1e-9), a_0, rtol=1e-8, atol=1e-10).y[:, -1]

    def q(a):
        return -k / 2 * (a[:, 0] - aim) ** 2

    T = 200 if method == "bptt" else 1000
    flow, noise = gaussian_velocity(mu, sigma), np.float32(a_0)[:, None]
    got = guided(monkeypatch, q, flow, w, noise, GRADIENTS[method], denoise_steps=T)
    assert_close(got[:, 0], want, atol=4 / T)


# ---- data
TASK, GOAL, OWN = map(qgf.find_task, ("cube-single-task1", "cube-single", "Pendulum-v1"))
TINY = replace(
    CFG, horizon=3, batch_size=8, policy_updates=1300, critic_updates=1300, guidance=(0.3,)
)
ENV = SimpleNamespace(sizes=(4, 0, 2), low=np.full(2, -1.0), high=np.ones(2), unwrapped=None)
COLLECTED = ".ogbench/data/cube-single-play-v0-collected-2000.npz"


def raw_data(**changes):
    """A file's arrays: trajectories of 7, 2 and 20 rows; the last one ends with a success."""
    rng = np.random.default_rng(0)
    raw = dict(observations=rng.normal(size=(29, 4)), actions=rng.uniform(-1, 1, (29, 2)))
    raw |= dict(rewards=rng.normal(size=29), masks=np.ones(29), terminals=np.zeros(29))
    raw["terminals"][[6, 8, 28]] = 1
    raw["masks"][[3, 28]] = 0
    return {name: x for name, x in (raw | changes).items() if x is not None}


def write(folder, name="d.npz", **changes):
    np.savez(folder / name, **raw_data(**changes))
    return folder / name


def load(folder, task=TASK, env=ENV, cfg=TINY, **changes):
    """Data of such a file, without its padding."""
    data = jax.device_get(qgf.load_data(write(folder, **changes), task, env, cfg))
    assert {len(x) for x in data[:-1]} == {32} and data.ends[-1] == 28
    return qgf.Data(*(x[:29] for x in data[:6]), data.starts[: data.chunks], data.chunks)


def save_rows(path, names, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **dict(zip(names.split(), zip(*rows, strict=True), strict=True)))


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder with two episodes of cube-single, of smooth random actions."""
    home = tmp_path_factory.mktemp("home")
    env = gymnasium.make("cube-single-v0")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2):
        state, _ = env.reset(seed=0, options=dict(task_id=1))
        action = np.zeros(5)
        for i in range(200):
            action = np.clip(0.9 * action + 0.3 * rng.normal(size=5), -1, 1)
            rows.append((state, action, i == 199, env.unwrapped._data.qpos.copy()))
            state = env.step(action)[0]
    save_rows(home / COLLECTED, "observations actions terminals qpos", rows)
    return home


def test_names_of_tasks():
    for name, run, env_id, kind in (
        ("cube-double", "cube-double", "cube-double-v0", "play"),
        ("cube-double-noisy", "cube-double-noisy", "cube-double-v0", "noisy"),
        ("antmaze-large", "antmaze-large", "antmaze-large-v0", "navigate"),
    ):
        dataset = f"{name.removesuffix('-noisy')}-{kind}-v0"
        assert qgf.find_task(name) == (run, env_id, dataset, True)
    one = "cube-double-task3", "cube-double-singletask-task3-v0", "cube-double-play-v0", False
    assert qgf.find_task(one[0]) == qgf.find_task("cube-double-play-singletask-task3-v0") == one
    assert OWN == ("Pendulum-v1", "Pendulum-v1", "", False)


@pytest.mark.parametrize(
    "name",
    ["cube-duble", "visual-cube-single", "halfcheetah-medium-v2", "cube-single-task9", "no:A-v0"],
)
def test_other_names_are_refused(name):
    with pytest.raises(qgf.UserError, match=rf"^--env {name}.*\Z"):
        qgf.find_task(name)


def test_chunks_stay_in_a_trajectory_and_need_no_state_after_a_success(tmp_path):
    data = load(tmp_path)
    assert data.ends.tolist() == [6] * 7 + [8] * 2 + [28] * 20
    assert data.starts.tolist() == [0, 1, 2, 3, *range(9, 27)]  # 26: the chunk ends with the task
    data = load(tmp_path, masks=None)
    assert data.starts[-1] == 25 and data.masks.all()
    assert_same(data.rewards, np.float32(raw_data()["rewards"]))
    data = load(tmp_path, cfg=replace(TINY, sparse=True))
    assert_same(data.rewards, -np.float32(raw_data()["masks"]))


def test_d4rls_terminals_are_successes_and_its_timeouts_ends(tmp_path):
    timeouts, terminals = np.zeros((2, 29), bool)
    timeouts[6] = terminals[8] = True
    changes = dict(terminals=terminals, timeouts=timeouts[:, None], masks=None)
    data = load(tmp_path, cfg=replace(TINY, horizon=2), **changes, next_observations=np.zeros(29))
    assert np.unique(data.ends).tolist() == [6, 8, 28]
    assert np.flatnonzero(data.masks == 0).tolist() == [8]
    assert data.starts.tolist() == [0, 1, 2, 3, 4, 7, *range(9, 27)]


def test_actions_of_your_own_environment_are_rescaled(tmp_path):
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
        ("terminals has", dict(terminals=np.zeros((29, 2)))),
        ("truncations is not understood", dict(truncations=np.zeros(29))),
        ("rewards holds no numbers", dict(rewards=np.array(["a"] * 29))),
        ("no whole .npz of numbers", dict(rewards=np.array([0, "a"] * 14 + [{}], object))),
        ("--horizon", dict(terminals=np.ones(29))),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, words, changes):
    with pytest.raises(qgf.UserError, match=rf"d\.npz.*{words}"):
        qgf.load_data(write(tmp_path, **changes), TASK, ENV, TINY)


@pytest.mark.parametrize("column", ["observations", "actions", "terminals", "rewards", "qpos"])
def test_a_column_that_lacks_is_named(tmp_path, column):
    task = GOAL if column == "qpos" else OWN
    cube = SimpleNamespace(unwrapped=SimpleNamespace(_num_cubes=1))
    env = SimpleNamespace(**vars(ENV) | dict(unwrapped=cube))
    with pytest.raises(qgf.UserError, match=f"lack a column: '{column}'"):
        qgf.load_data(write(tmp_path, **{column: None}), task, env, TINY)


def test_what_does_not_matter_is_not_read(tmp_path):
    load(tmp_path, infos=np.array([0, "a"] * 14 + [{}], object), last_names=np.zeros(3))


def test_files_that_are_not_whole_are_refused(tmp_path):
    path = write(tmp_path)
    for content in (path.read_bytes()[:2000], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(qgf.UserError, match=r"d\.npz is no whole .npz"):
            qgf.load_data(path, TASK, ENV, TINY)


def test_rewards_of_a_task_are_those_of_ogbench(home, tmp_path):
    env = qgf.Chunks(qgf.find_task("cube-single-task2"), 5)
    env.reset(seed=1)
    with np.load(home / COLLECTED) as file:
        raw = dict(file)
    raw["qpos"][10:20, 14:17] = env.unwrapped._data.mocap_pos  # where the cube shall go
    np.savez(tmp_path / "d.npz", **raw)
    data = qgf.load_data(tmp_path / "d.npz", env.task, env, replace(TINY, horizon=5))
    assert np.flatnonzero(data.rewards == 0).tolist() == list(range(10, 20))
    assert_same(data.masks, -data.rewards)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cube-double", "scene"])
def test_goals_in_data_are_those_that_the_environment_gives(name, tmp_path):
    env = qgf.Chunks(qgf.find_task(name), 1)
    inner, oracle, raw = env.unwrapped, env.unwrapped.compute_oracle_observation, {}

    def spy():  # called inside reset, when the environment is in its goal state
        row = dict(qpos=inner._data.qpos.copy(), observations=inner.compute_observation())
        row |= dict(button_states=np.copy(getattr(inner, "_cur_button_states", 0)))
        row |= dict(actions=np.zeros(5), terminals=0)
        raw.update({k: np.array([x] * 4) for k, x in row.items()})
        return oracle()

    inner.compute_oracle_observation = spy
    env.reset(seed=2)
    np.savez(tmp_path / "d.npz", **raw)
    data = qgf.load_data(tmp_path / "d.npz", env.task, env, replace(TINY, horizon=1))
    assert_close(data.goals, np.array([env.goal] * 4), atol=1e-5)


def test_where_data_come_from(tmp_path, monkeypatch, capsys):
    official = tmp_path / "cube-single-play-v0.npz"
    collected = tmp_path / "cube-single-play-v0-collected-7.npz"
    calls = []
    fault = None

    def download(names, folder):
        calls.append(names)
        if isinstance(fault, Exception):
            raise fault
        official.write_text(fault) if fault else write(tmp_path, official.name)

    def run(command, check):
        calls.append([str(x) for x in command[1:]])
        write(tmp_path, collected.name)
        return SimpleNamespace(returncode=status)

    def find():
        calls.clear()
        return qgf.find_files(TASK, replace(TINY, collect=7))

    monkeypatch.setattr(qgf, "DATA", tmp_path)
    monkeypatch.setattr(ogbench, "download_datasets", download)
    monkeypatch.setattr(subprocess, "run", run)
    names = ["cube-single-play-v0"]
    status = 0
    assert find() == [official] and calls == [names]
    assert find() == [official] and not calls
    official.write_text("<html>")  # which an earlier download has left
    assert find() == [official] and calls == [names]
    for fault in (OSError("no route to host"), "<html>"):  # noqa: B007 (download raises it)
        for path in (official, collected):
            path.unlink(missing_ok=True)
        assert find() == [collected] and not official.exists()
        assert calls == [names, [str(qgf.COLLECT), *names, "7", str(collected)]]
        assert find() == [collected] and not calls
    assert "no route to host" in capsys.readouterr().out
    collected.unlink()
    status = 1
    with pytest.raises(qgf.UserError, match="--data"):
        find()
    monkeypatch.setattr(qgf, "COLLECT", tmp_path / "none.py")
    collected.unlink()
    with pytest.raises(qgf.UserError, match=r"none\.py is missing: clone"):
        find()


def test_your_own_files(tmp_path):
    def find(path, task=TASK):
        return [x.name for x in qgf.find_files(task, replace(TINY, data=str(path)))]

    sets = tmp_path / "sets/cube-single-play-100m-v0"
    for folder in (tmp_path / "slices", sets):
        folder.mkdir(parents=True)
    for name in ("b.npz", "a.npz", ".a.npz", "a-val.npz", "a.txt"):
        (tmp_path / "slices" / name).touch()
    for path in (sets / "cube-single-play-100m-v0-0.npz", sets.parent / "scene-play-v0.npz"):
        path.touch()
    for task in (TASK, OWN):
        assert find(tmp_path / "slices", task) == ["a.npz", "b.npz"]
        assert find(tmp_path / "slices/b.npz", task) == ["b.npz"]
    assert find(sets.parent) == find(sets) == ["cube-single-play-100m-v0-0.npz"]
    (sets.parent / "cube-single-play-v0.npz").touch()
    with pytest.raises(qgf.UserError, match="more than one"):
        find(sets.parent)
    with pytest.raises(qgf.UserError, match=r"Pendulum-v1 .* --data"):
        find("", OWN)


# ---- episodes
class Envs(list):
    """Chunks side by side, as AsyncVectorEnv(autoreset_mode="Disabled") has them."""

    @property
    def num_envs(self):
        return len(self)

    def reset(self, seed, options=None):
        mask = options["reset_mask"] if options else [True] * len(self)
        for env, s, wanted in zip(self, seed, mask, strict=True):
            if wanted:
                env.reset(seed=s)
        return np.stack([env.obs for env in self]), {}

    def step(self, actions):
        assert type(actions) is np.ndarray  # JAX's would claim a GPU in each process
        obs, _, over, _, info = zip(*map(qgf.Chunks.step, self, actions), strict=True)
        return np.stack(obs), None, np.array(over), None, dict(episode=[x["episode"] for x in info])


def test_every_episode_is_played_once_and_as_if_it_were_alone(monkeypatch):
    """Actions are of noise and state; the return tells episodes apart."""

    def act(nets, s, g, a_0, w, method, cfg):
        return jnp.array(nets[method.__name__] * w * a_0[:, -1] + s[:, -1:] - g[:, :1]), 0.0

    monkeypatch.setattr(qgf, "sample_actions", act)
    *three, one = [qgf.Chunks(GOAL, 5, max_episode_steps=22) for _ in range(4)]  # 4 chunks and 2/5
    monkeypatch.setattr(type(one.unwrapped), "compute_reward", lambda self: self._data.qpos.sum())
    cfg = replace(TINY, episodes=7, horizon=5, first_seed=5_000_000)
    results = qgf.rollout(Envs(three), dict(qgf=2.0), 0.05, "qgf@2", one.sizes, cfg)
    goals = []
    for i in range(7):
        x, _ = one.reset(seed=5_000_000 + i)
        goals.append((one.unwrapped.cur_task_id, *one.goal))
        rng, over = np.random.default_rng(5_000_000 + i), False
        while not over:
            noise = np.float32(rng.standard_normal((2, 25)))[-1]
            x, _, over, _, info = one.step((0.1 * noise + x[27] - x[28]).reshape(5, 5))
        np.testing.assert_allclose(results[i], info["episode"], rtol=1e-9)
    assert one.sizes == (28, 3, 5) and results[:, 2].tolist() == [22] * 7
    assert len(set(results[:, 1])) == 7
    assert [g[0] for g in goals] == [1, 2, 3, 4, 5, 1, 2] and len(set(goals[:5])) == 5


def test_an_environment_without_success_gives_its_return():
    env, plain = qgf.Chunks(OWN, 3), gymnasium.make("Pendulum-v1")
    np.testing.assert_allclose(env.reset(seed=5)[0], plain.reset(seed=5)[0])
    over = False
    while not over:
        _, _, over, _, info = env.step(np.full((3, 1), 0.25, np.float32))
    total = sum(plain.step(np.float32([0.5]))[1] for _ in range(200))
    np.testing.assert_allclose(info["episode"], [math.nan, total, 200], rtol=1e-5)


@pytest.mark.parametrize(
    "words, space",
    [
        ("finite ranges", gymnasium.spaces.Box(-np.inf, np.inf, (2,))),
        ("finite ranges", gymnasium.spaces.Box(-3e38, 3e38, (2,))),
        ("finite ranges", gymnasium.spaces.Box(0, 255, (2,), np.uint8)),
        ("finite ranges", gymnasium.spaces.Box(np.float32([0, 1]), np.float32([1, 1]))),
        ("no vector", gymnasium.spaces.Discrete(2)),
        ("no vector", gymnasium.spaces.Box(-1, 1, (2, 2))),
    ],
)
def test_environments_that_do_not_fit_are_refused(monkeypatch, words, space):
    class Odd(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (3,))
        action_space = space

    gymnasium.register("Odd-v0", Odd, max_episode_steps=9)
    gymnasium.register("Endless-v0", lambda: gymnasium.make("Pendulum-v1").unwrapped)
    with pytest.raises(qgf.UserError, match=f"--env Odd-v0.*{words}"):
        qgf.Chunks(qgf.find_task("Odd-v0"), 3)
    with pytest.raises(qgf.UserError, match="Endless-v0 may never end"):
        qgf.Chunks(qgf.find_task("Endless-v0"), 3)


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
    played = fake_rollout(monkeypatch)
    write(tmp_path)

    def evaluate(updates=300, episodes=4, **changes):
        played.clear()
        cfg = replace(TINY, episodes=episodes, out=str(tmp_path), **changes)
        run = qgf.Run(TASK, SIZES, [tmp_path / "d.npz"], 29, None, cfg)
        found = qgf.evaluate(None, updates, None, run)
        assert {x.shape for x in found.values()} == {(2, 4)} or episodes != 4
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


def test_the_table_counts_wins_and_losses_against_bc():
    found = {
        ("bc", ""): played(10, 50),
        ("qgf", "λ 0.5"): played(40, 50),
        ("bc@4", ""): played(8, 20),
    }
    lines = qgf.table(found, GOAL)
    assert lines[1].split() == ["bc", "50", "0.20", *5 * ["0.20"]]
    p = 2 * 0.5**30
    assert lines[2].split() == ["qgf", "λ", "0.5", "50", "0.80", "30:0", f"{p:.2g}", *5 * ["0.80"]]
    assert lines[3].split()[:5] == ["bc@4", "20", "0.40", "0:2", "0.5"]
    words = "qgf wins 30 and loses 0 of 50 episodes against bc"
    assert lines[4] == f"Guidance helped: {words} (p = {p:.2g})."
    assert len(lines) == 5 and max(map(len, lines)) <= 90
    for wins, verdict in (20, "No significant"), (25, "No significant"), (3, "Guidance did harm"):
        found = {("bc", ""): played(20, 50), ("qgf", "w 1"): played(wins, 50)}
        assert qgf.table(found, TASK)[-1].startswith(verdict)
    found = {("bc", ""): played(0, 5), ("qgf", "λ 1"): played(5, 5), ("bc@4", ""): played(5, 5)}
    assert qgf.table(found, TASK)[-1].startswith("No significant")  # of five episodes
    del found["qgf", "λ 1"]
    assert len(qgf.table(found, TASK)) == 3  # nothing was guided


def test_without_success_the_return_is_compared():
    lines = qgf.table({("bc", ""): played(None, 6), ("qgf", "λ 1"): played(None, 6, 2.5)}, OWN)
    assert lines[1].split() == ["bc", "6", "-2.5"] and "nan" not in "".join(lines)
    assert lines[2].split()[4:] == ["6:0", "0.031", "0.0"] and "helped" in lines[3]


# ---- runs
SLICES = tempfile.TemporaryDirectory()
for letter in "abc":
    np.savez(f"{SLICES.name}/{letter}.npz", letter)


def some_data(path):
    rng = np.random.default_rng(ord(path.stem))
    return DATA._replace(rewards=np.float32(rng.normal(size=64)))


def fit(out, updates, learner="policy", files="ab", load_file=some_data, **changes):
    files = [Path(SLICES.name, f"{x}.npz") for x in files]
    cfg = replace(TINY, out=str(out), **changes)
    return qgf.fit(learner, updates, {}, qgf.Run(TASK, SIZES, files, 60, load_file, cfg))


def folder_of(out, learner="policy"):
    return qgf.folder_of(learner, TASK, replace(TINY, out=str(out)))


def files_of(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.mark.parametrize("learner", qgf.LEARNERS)
def test_a_run_that_stops_goes_on_bitwise(tmp_path, learner):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = fit(one, 1300, learner)
    for updates in (100, 1100, 1300):
        state = fit(two, updates, learner)
    assert_same(whole, state)
    one, two = folder_of(one, learner), folder_of(two, learner)
    assert files_of(one) == files_of(two) and len(files_of(one)) == 3
    metrics = qgf.read_csv(one / "metrics.csv")
    assert [int(row["updates"]) for row in metrics] == [*range(100, 1301, 100)]
    out = tmp_path / "one"
    assert_same(fit(out, 1200, learner), whole)  # it has gone further
    for name, what in ("metrics.csv", "rows"), ("checkpoint.npz", "training begins again"):
        (one / name).write_bytes(files_of(one)[name].replace(b",", b"", 1)[:-30])
        with pytest.raises(qgf.UserError, match=rf"{name} is damaged, without it, .*{what}"):
            fit(out, 1300, learner)


def test_a_folder_belongs_to_one_run(tmp_path):
    fit(tmp_path, 100)
    folder = folder_of(tmp_path)
    saved = qgf.read_json(folder / "config.json")
    qgf.check_settings(folder, saved, False)
    for name, x in dict(lr=2e-3, data="b", new=1).items():
        for keep in (False, True):
            with pytest.raises(qgf.UserError, match=rf"{name} .*--out"):
                qgf.check_settings(folder, saved | {name: x}, keep)
    with pytest.raises(qgf.UserError, match=r"other code: .*--out NEW, or --keep"):
        qgf.check_settings(folder, saved | dict(code="def"), False)
    qgf.check_settings(folder, saved | dict(code="def"), keep=True)
    with pytest.raises(qgf.UserError, match=r"data a\.npz, 60 rows, hash .*, not b\.npz"):
        fit(tmp_path, 200, files="b")
    (folder / "config.json").write_text("")
    with pytest.raises(qgf.UserError, match=r"config\.json is damaged"):
        qgf.check_settings(folder, saved, False)
    (folder / "config.json").unlink()
    with pytest.raises(qgf.UserError, match=r"trained with seed None"):
        qgf.check_settings(folder, saved, False)


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


def test_a_slower_run_takes_over_what_is_ahead(tmp_path, monkeypatch):
    alone = fit(tmp_path / "alone", 1300)
    calls = during_training(monkeypatch, lambda: fit(tmp_path / "both", 1100))
    monkeypatch.setattr(qgf, "SAVE", 0)
    assert_same(fit(tmp_path / "both", 1300), alone)
    assert len(calls) == 3 + 9 + 2  # it goes on where the faster one was
    assert files_of(folder_of(tmp_path / "both")) == files_of(folder_of(tmp_path / "alone"))


def test_two_runs_with_other_options_do_not_mix(tmp_path, monkeypatch):

    def other():
        shutil.rmtree(folder_of(tmp_path))  # both began before there was one
        fit(tmp_path, 300, lr=1e-9)

    during_training(monkeypatch, other)
    with pytest.raises(qgf.UserError, match=r"trained with lr 1e-09, not 0\.001"):
        fit(tmp_path, 500)


def test_files_take_turns_and_each_20_seconds_are_saved(tmp_path, monkeypatch):
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
        fit(tmp_path, updates, files="abc", load_file=lambda path: path)
    assert "".join(seen) == 20 * "a" + 20 * "b" + 20 * "c" + 5 * "a"
    assert saved == [0, 600, 950, 950, 1500, 2100, 2700, 3250]


def test_nan_is_refused_and_the_last_checkpoint_kept(tmp_path, monkeypatch):
    fit(tmp_path, 100)
    before = files_of(folder_of(tmp_path))

    def train(loss, total, state, others, data, n, cfg):
        params = jax.tree.map(lambda x: x * np.nan, state.params)
        return state._replace(params=params, step=state.step + n), dict(policy_loss=np.zeros(n))

    monkeypatch.setattr(qgf, "train", train)
    with pytest.raises(qgf.UserError, match=r"NaN.* 200 updates"):
        fit(tmp_path, 200)
    assert files_of(folder_of(tmp_path)) == before


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(qgf.UserError, match=r"cannot write .*file/x/.*/config\.json"):
        fit(tmp_path / "file/x", 100)


def test_the_codes_hash_follows_the_code(monkeypatch):
    def hashes(source=qgf.SOURCE, *functions):
        monkeypatch.setattr(qgf, "SOURCE", source)
        return [qgf.code_hash(end, [qgf.qgf, *functions]) for end in ("# ---- 6", "# ====")]

    def same(old, new):
        assert old in qgf.SOURCE
        edited = hashes(plain_source.replace(old, new))
        monkeypatch.setattr(qgf, "SOURCE", plain_source)
        return [x == y for x, y in zip(edited, before, strict=True)]

    plain_source = qgf.SOURCE
    before = hashes()
    assert same("POLYAK = 0.005  #", "POLYAK   =   0.005  # other") == [True, True]
    assert same("GOALS = 5", "GOALS = 6") == [True, True]
    assert same("q_loss + v_loss", "q_loss + 2 * v_loss") == [False, False]
    assert same("ASCENTS = 3", "ASCENTS = 4") == [True, False]
    other = hashes(plain_source, fake_rollout), hashes(plain_source, eval("lambda: 1"))
    assert before not in other and other[0] != other[1]
    assert other[0] == hashes(plain_source, fake_rollout)


# ---- the command line, and Python
def parse(text):
    return qgf.parse(text.split())


def test_words_of_the_command_line():
    line = "--guidance 0.3 1 --methods qgf@4 bptt --lr 1e-4 --no-keep --seed 3"
    given = dict(guidance=(0.3, 1.0), methods=("qgf@4", "bptt"), lr=1e-4, seed=3)
    assert parse(line) == qgf.config(**given) == replace(qgf.config(), **given)
    assert parse("--weights 0.1") == replace(qgf.config(), weights=(0.1,), guidance=())
    assert parse("--weights 0.1 --guidance 2").guidance == (2.0,)
    for names, defaults in qgf.FAMILY.items():
        for name in np.ravel(names):
            want = defaults | dict(env=f"{name}-task2", depth=2)
            assert qgf.config(env=f"{name}-task2", depth=2) == qgf.Config(**want)


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
    with pytest.raises(qgf.UserError, match=rf"^.*{words}.*\Z"):
        parse(line)


@pytest.mark.parametrize("line", ["--seed 1.5", "--policy-update 5", "cube-double"])
def test_argparse_refuses_the_rest(line, capsys):
    with pytest.raises(SystemExit):
        parse(line)
    assert capsys.readouterr().err.count("\n") == 2


def test_readmes_commands_are_understood():
    lines = (HERE / "README.md").read_text().splitlines()
    commands = [x.split("#")[0].split()[2:] for x in lines if x.startswith("python qgf.py ")]
    commands = [x for x in commands if "qgf-midpoint" not in x]  # a fork's
    assert len(commands) >= 2
    for command in commands:
        qgf.find_task(qgf.parse(command).env)


def test_quick_start_printed_its_table():
    played = {("bc", ""): [], ("qgf", "λ 0.03"): []}
    for row in qgf.read_csv(HERE / ".github/results/quick-start/episodes.csv"):
        strength = "λ 0.03" if row["method"] == "qgf" else ""
        played[row["method"], strength].append((float(row["success"]), float(row["return"])))
    lines = qgf.table({key: np.array(x).T for key, x in played.items()}, GOAL)
    readme = (HERE / "README.md").read_text()
    assert "\n".join(lines) in readme
    assert f"reaches\n{lines[2].split()[4]} of the goals" in readme
    assert f"cannot see the goal, {lines[1].split()[2]} (one seed" in readme


def test_uv_installs_what_pip_installs():
    block = re.search(r"^# /// script\n(.*?)^# ///$", qgf.SOURCE, re.MULTILINE | re.DOTALL)[1]
    script = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    lines = (HERE / "requirements.txt").read_text().splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    assert script["dependencies"] == [
        x for x in wanted if x and not x.startswith(("pytest", "ruff"))
    ]
    assert script["requires-python"] == ">=3.11"


SMALL = "--policy-width 8 --critic-width 8 --depth 1 --batch-size 8 --episodes 2"
SMALL += " --policy-updates 100 --critic-updates 600"


@pytest.mark.slow
def test_main_trains_once_plays_what_lacks_and_python_loads_it(home, tmp_path, monkeypatch, capsys):
    played = fake_rollout(monkeypatch)
    monkeypatch.setattr(qgf, "DATA", (home / COLLECTED).parent)
    monkeypatch.setenv("HOME", str(tmp_path))

    def main(line="", env="cube-single"):
        played.clear()
        text = f"{SMALL} --eval-every 300 --out=~/x --env {env} --collect 2000 {line}"
        qgf.main(text.split())
        return [method for method, _, _ in played]

    assert main() == 2 * ["bc", "qgf"]
    out = capsys.readouterr().out
    assert "400 rows, 2 trajectories, any goal" in out and "after 600 updates" in out
    folders = tmp_path / "x/cube-single-play-v0-policy-s0", tmp_path / "x/cube-single-s0"
    nets, cfg, task = qgf.load_run("~/x/cube-single-s0")
    assert_same(nets, played[-1][2])
    assert nets.keys() == {"policy", "critic", "value"} and task == GOAL
    assert (cfg.critic_width, cfg.critic_updates, cfg.expectile) == (8, 600, 0.9)
    before = files_of(folders[0])
    assert main() == [] and main("--methods bptt") == ["bptt"]
    assert "100 of 100 updates found" in capsys.readouterr().out
    assert main("--first-seed 7") == ["bc", "qgf"]
    assert main(env="cube-single-task2") == 2 * ["bc", "qgf"]
    monkeypatch.setitem(qgf.ESTIMATORS, "qgf", lambda q, flow, a_t, t, v, T: 0 * v)
    assert main() == ["bc", "qgf"]  # a function from elsewhere; at 300 updates, no network is left
    monkeypatch.undo()
    assert files_of(folders[0]) == before  # all tasks share the policy


def test_readmes_lines_load_a_run_and_act(home, tmp_path, monkeypatch):
    fake_rollout(monkeypatch)
    monkeypatch.setattr(qgf, "DATA", (home / COLLECTED).parent)
    monkeypatch.chdir(tmp_path)
    qgf.main(f"{SMALL} --env cube-single --collect 2000".split())
    (code,) = re.findall(r"```python\n(import.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["a"].shape == (1, 25) and (abs(names["a"]) <= 1).all()
    with pytest.raises(qgf.UserError, match="no run"):
        qgf.load_run("elsewhere")


# ---- real runs, in processes of their own
def start(home, *args, flags=(), script=qgf.__file__, **env):
    command = [sys.executable, *flags, script, *map(str, args)]
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


def family(p):
    """The processes of a run, but for the first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.name) != p.pid and os.getsid(int(path.name)) == p.pid:
                found.append(int(path.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_run_stopped_in_three_ways_equals_an_uninterrupted_one(home):
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
        while family(p):  # all of its processes end
            time.sleep(0.1)
    faults = dict(TMPDIR=f"/tmp/{'x' * 99}")
    os.makedirs(faults["TMPDIR"], exist_ok=True)
    finish(start(home, *args, "stopped", **faults))
    assert "cube-single after 4000 updates" in finish(whole)
    for folder in ("cube-single-play-v0-policy-s1", "cube-single-s1"):
        assert files_of(home / "whole" / folder) == files_of(home / "stopped" / folder)


@pytest.mark.slow
def test_edited_code_never_gets_old_numbers(home):
    (home / "edited").mkdir()
    script = home / "edited/qgf.py"
    args = [*SMALL.split(), "--env", "cube-single", "--collect", 2000, "--out", "parent"]

    def run(old, new, *more, status=0):
        assert old in qgf.SOURCE
        script.write_text(qgf.SOURCE.replace(old, new))
        return finish(start(home, *args, *more, script=script), status)

    run("", "")
    found = "2 episodes found"
    assert run("GOALS = 5  #", "GOALS = 5  # a comment").count(found) == 2
    edit = "return q_loss + v_loss", "return q_loss + 2 * v_loss"
    err = run(*edit, status=1)
    assert err.splitlines()[-1].startswith("qgf.py: ") and "--out NEW, or --keep" in err
    before = files_of(home / "parent/cube-single-s0")["checkpoint.npz"]
    out = run(*edit, "--keep")
    assert found not in out and "600 of 600 updates found" in out
    assert run(*edit, "--keep").count(found) == 2
    assert files_of(home / "parent/cube-single-s0")["checkpoint.npz"] == before


@pytest.mark.slow
def test_your_own_environment(home):
    """It is of a package, shows no success, and gives its reward as an array."""
    (home / "mine.py").write_text(
        "import gymnasium, numpy as np\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Mine(PendulumEnv):\n"
        "    def step(self, a):\n"
        "        s, r, *rest = super().step(a)\n"
        "        return s, np.array([r]), *rest\n"
        "gymnasium.register('Mine-v0', Mine, max_episode_steps=200)\n"
    )
    env, rows = gymnasium.make("Pendulum-v1"), []
    for seed in range(3):
        state, _ = env.reset(seed=seed)
        for i in range(200):
            action = np.random.default_rng(i).uniform(-2, 2, 1)
            after, reward, *_ = env.step(action)
            rows.append((state, action, reward, i == 199))
            state = after
    save_rows(home / "p.npz", "observations actions rewards terminals", rows)
    args = [*SMALL.split(), "--env", "mine:Mine-v0", "--data", "p.npz"]
    out = finish(start(home, *args, PYTHONPATH=str(home)))
    assert "600 rows, 3 trajectories, 0.00% solved; rewards of 3 last rows are not used" in out
    rows = qgf.read_csv(home / "runs/mine-Mine-v0-s0/episodes.csv")
    assert len(rows) == 4 and {row["success"] for row in rows} == {"nan"}
    assert all(-2000 < float(row["return"]) < 0 for row in rows)


@pytest.mark.slow
def test_odd_machines(home):
    """A terminal without Greek letters, no docstrings, no home, no GPU, a folder that cannot be."""
    text = finish(start(home, "--help", flags=["-OO"], PYTHONIOENCODING="latin-1", HOME="/none"))
    assert all(f"--{name.replace('_', '-')}" in text for name in qgf.Config.__annotations__)
    args = [*SMALL.split(), "--env", "cube-single", "--collect", 2000]
    assert "/proc/x" in finish(start(home, *args, "--out", "/proc/x"), 1).splitlines()[-1]
    assert "JAX_PLATFORMS" in finish(start(home, *args, JAX_PLATFORMS="cuda"), 1).splitlines()[-1]


@pytest.mark.slow
def test_guidance_solves_a_real_task(home, tmp_path):
    """cube-single, on 20,000 rows of OGBench's scripted policy and for about a minute."""
    args = "--env cube-single --collect 20000 --policy-updates 7000 --critic-updates 7000"
    out = finish(start(tmp_path, *args.split(), "--batch-size", 128))
    pairs, p = re.search(r"^qgf .* (\d+:\d+) +(\S+) ", out, re.MULTILINE).groups()
    won, lost = map(int, pairs.split(":"))
    assert won > lost and binomtest(won, won + lost).pvalue < 0.01 and float(p) < 0.01
