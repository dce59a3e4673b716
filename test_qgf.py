# SPDX-License-Identifier: MIT
"""Every loss, estimator and file of qgf.py against something independent."""

import errno
import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest
from scipy.integrate import quad, solve_ivp

import qgf

S, A = 4, 2
CFG = qgf.Config(width=16, depth=2, batch_size=32, horizon=3, denoise_steps=5)
KEY = jax.random.PRNGKey(0)


def random_data(n=60, lengths=(7, 20, 4, 29), seed=0):
    """Trajectories of these lengths, with some successes in the middle."""
    rng = np.random.default_rng(seed)
    last = np.cumsum(lengths) - 1
    return dict(
        observations=rng.normal(size=(n, S)).astype(np.float32),
        actions=rng.uniform(-1, 1, (n, A)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        masks=(rng.random(n) > 0.2).astype(np.float32),
        ends=last[np.searchsorted(last, np.arange(n))],
    )


DATA = qgf.to_device(random_data(), CFG.horizon)


def some_state(cfg=CFG, key=KEY):
    """A State whose target differs from its critic."""
    state = qgf.init_state(key, S, A, cfg)
    keys = jax.random.split(key, len(jax.tree.leaves(state.target)))
    keys = jax.tree.unflatten(jax.tree.structure(state.target), list(keys))
    target = jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), state.target, keys)
    return state._replace(target=target)


def numpy_mlp(layers, x):
    """The network in float64 numpy, a row at a time."""
    layers = jax.tree.map(lambda p: np.asarray(p, np.float64), layers)
    out = []
    for row in np.asarray(x, np.float64):
        for layer in layers[:-1]:
            row = row @ layer["w"] + layer["b"]
            if "scale" in layer:
                row = (row - row.mean()) / np.sqrt(row.var() + 1e-6) * layer["scale"] + layer["shift"]
            row = 0.5 * row * (1 + np.tanh(np.sqrt(2 / np.pi) * (row + 0.044715 * row**3)))
        out.append(row @ layers[-1]["w"] + layers[-1]["b"])
    return np.array(out)


def numpy_velocity(policy, s, a, t):
    angles = [[1e4 * ti * 1e4 ** (-k / 8) for k in range(8)] for ti in np.ravel(t)]
    return numpy_mlp(policy, np.concatenate([s, a, np.cos(angles), np.sin(angles)], axis=1))


def numpy_q(critic, s, a):
    x = np.concatenate([s, a], axis=1)
    return np.array([numpy_mlp(jax.tree.map(lambda p: p[k], critic), x)[:, 0] for k in range(2)])  # noqa: B023


def batch_of(cfg=CFG):
    return qgf.sample_batch(jax.random.PRNGKey(5), DATA, cfg)


# ---- losses ----------------------------------------------------------------------------------------------


def test_flow_matching_loss_equals_a_numpy_loop():
    state, batch, T = some_state(), batch_of(), CFG.denoise_steps
    loss = qgf.flow_matching_loss(state.params["policy"], batch["observations"], batch["actions"], KEY, CFG)
    key_noise, key_time = jax.random.split(KEY)
    a_0 = np.asarray(jax.random.normal(key_noise, batch["actions"].shape))
    steps = np.asarray(jax.random.randint(key_time, (CFG.batch_size, 1), 0, T + 1))
    assert steps.min() == 0 and steps.max() == T  # both ends of the grid are drawn
    total = 0.0
    for s, a_1, noise, i in zip(
        np.asarray(batch["observations"]), np.asarray(batch["actions"]), a_0, steps
    ):
        a_t = noise + (a_1 - noise) * i / T
        v = numpy_velocity(state.params["policy"], s[None], a_t[None], i / T)[0]
        total += np.mean((v - (a_1 - noise)) ** 2)
    assert loss == pytest.approx(
        total / CFG.batch_size, rel=1e-4
    )  # angles up to 1e4 in float32 cost digits


def gaussian_velocity(mu, sigma):
    """The exact flow to N(μ, σ²): E[a_1 - a_0 | a_t]."""

    def velocity(policy, s, a_t, t):
        d = (1 - t) ** 2 + (t * sigma) ** 2
        return mu + (t * sigma**2 - (1 - t)) * (a_t - t * mu) / d

    return velocity


def test_flow_matching_loss_is_least_at_the_gaussians_exact_velocity(monkeypatch):
    mu, sigma, n, T = 0.3, 0.5, 200_000, CFG.denoise_steps
    a_1 = mu + sigma * jax.random.normal(jax.random.PRNGKey(1), (n, 1))
    exact = gaussian_velocity(mu, sigma)

    def loss(shift, tilt):
        monkeypatch.setattr(qgf, "velocity", lambda p, s, a, t: exact(p, s, a, t) + shift + tilt * a)
        return float(qgf.flow_matching_loss(None, None, a_1, KEY, CFG))

    t = np.arange(T + 1) / T  # the least loss is the variance of a_1 - a_0 given a_t
    least = np.mean(sigma**2 + 1 - (t * sigma**2 - (1 - t)) ** 2 / ((1 - t) ** 2 + (t * sigma) ** 2))
    assert loss(0, 0) == pytest.approx(least, rel=0.01)
    assert all(loss(*d) > loss(0, 0) for d in [(0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)])


def test_critic_and_value_loss_equal_a_numpy_loop():
    state, batch = some_state(), batch_of()
    q = numpy_q(state.params["critic"], batch["observations"], batch["actions"])
    q_target = numpy_q(state.target, batch["observations"], batch["actions"])
    v = numpy_mlp(state.params["value"], batch["observations"])[:, 0]
    v_next = numpy_mlp(state.params["value"], batch["next_observations"])[:, 0]
    y = batch["returns"] + CFG.discount**CFG.horizon * batch["masks"] * v_next
    loss, _ = qgf.critic_loss(state.params["critic"], state.params["value"], batch, CFG)
    assert loss == pytest.approx(np.mean([(q[0] - y) ** 2, (q[1] - y) ** 2]), rel=1e-5)
    u = np.minimum(*q_target) - v
    loss, _ = qgf.value_loss(state.params["value"], state.target, batch, CFG)
    want = np.mean([(CFG.expectile if x > 0 else 1 - CFG.expectile) * x * x for x in u])
    assert loss == pytest.approx(want, rel=1e-5)


def test_each_loss_reaches_its_own_network_alone():
    state, batch = some_state(), batch_of()
    g = jax.grad(lambda p: qgf.critic_loss(p["critic"], p["value"], batch, CFG)[0])(state.params)
    assert not any(x.any() for x in jax.tree.leaves(g["value"]))
    assert any(x.any() for x in jax.tree.leaves(g["critic"]))
    together, _ = qgf.update(state, batch, KEY, CFG)
    for name, loss in dict(
        policy=lambda p: qgf.flow_matching_loss(p, batch["observations"], batch["actions"], KEY, CFG),
        critic=lambda p: qgf.critic_loss(p, state.params["value"], batch, CFG)[0],
        value=lambda p: qgf.value_loss(p, state.target, batch, CFG)[0],
    ).items():  # Adam's first step is lr * g / (|g| + 1e-8)
        params = state.params[name]
        alone = jax.tree.map(lambda p, g: p - CFG.lr * g / (abs(g) + 1e-8), params, jax.grad(loss)(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), together.params[name], alone)
    averaged = jax.tree.map(lambda q, old: 0.005 * q + 0.995 * old, state.params["critic"], state.target)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), together.target, averaged
    )


def test_expectile_loss():
    u = jnp.linspace(-2, 2, 41)
    np.testing.assert_allclose(qgf.expectile_loss(u, 0.5), u**2 / 2, rtol=1e-6)
    sample = jnp.array([0.0, 1.0])
    for tau in (
        0.1,
        0.5,
        0.9,
        0.999,
    ):  # at the minimum τ (1 - V) = (1 - τ) V, so V = τ: the maximum, as τ -> 1
        slope = jax.grad(lambda v: qgf.expectile_loss(sample - v, tau).mean())
        assert abs(slope(tau)) < 1e-6 and slope(tau - 0.01) < 0 < slope(tau + 0.01)


# ---- batches ---------------------------------------------------------------------------------------------


def test_chunks_stay_in_one_trajectory_and_returns_stop_at_success():
    raw, H = random_data(), CFG.horizon
    starts = [i for i in range(60) if i + H < 60 and raw["ends"][i] == raw["ends"][i + H]]
    assert DATA["starts"].tolist() == starts and len(starts) == 60 - 4 * H
    batch = qgf.sample_batch(KEY, DATA, replace(CFG, batch_size=500))
    drawn = set()
    for k in range(500):
        i = int(np.flatnonzero((raw["observations"] == batch["observations"][k]).all(axis=1))[0])
        drawn.add(i)
        ret, mask = 0.0, 1.0
        for j in range(H):
            ret += CFG.discount**j * raw["rewards"][i + j]
            if raw["masks"][i + j] == 0:
                mask = 0.0
                break
        assert batch["returns"][k] == pytest.approx(ret, abs=1e-5) and batch["masks"][k] == mask
        np.testing.assert_array_equal(batch["actions"][k], raw["actions"][i : i + H].ravel())
        np.testing.assert_array_equal(batch["next_observations"][k], raw["observations"][i + H])
    assert drawn == set(starts)  # 500 draws of 48 starts


# ---- training --------------------------------------------------------------------------------------------


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_scanned_updates_equal_single_updates_however_they_are_grouped():
    scanned, info = qgf.train(some_state(), DATA, 6, CFG)
    grouped = some_state()
    for n in (2, 4):
        grouped, last = qgf.train(grouped, DATA, n, CFG)
    assert_same(scanned, grouped)
    assert_same({k: v[2:] for k, v in info.items()}, last)
    single, update = (
        some_state(),
        jax.jit(qgf.update, static_argnums=3),
    )  # compiled apart: equal but for rounding
    for _ in range(6):
        key_batch, key_update = jax.random.split(jax.random.fold_in(single.key, single.step))
        single, _ = update(single, qgf.sample_batch(key_batch, DATA, CFG), key_update, CFG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), scanned, single)
    assert int(scanned.step) == int(single.step) == 6


def test_vmapped_seeds_differ_and_equal_single_runs():
    keys = jax.random.split(KEY, 3)
    states = jax.vmap(lambda k: qgf.init_state(k, S, A, CFG))(keys)
    states, info = jax.vmap(lambda state: qgf.train(state, DATA, 5, CFG))(states)
    assert len({float(x) for x in info["flow_loss"][:, 0]}) == 3  # other batches, other noise
    for i, key in enumerate(keys):
        alone, _ = qgf.train(qgf.init_state(key, S, A, CFG), DATA, 5, CFG)
        ours = jax.tree.map(lambda x: x[i], states.params)  # noqa: B023
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), ours, alone.params
        )


def test_a_toy_bandit_is_solved():
    """Actions are near (-.6, 0) or, one time in five, the better (.6, 0). BC imitates, QGF improves."""
    rng, n = np.random.default_rng(0), 4000
    good = rng.random(n) < 0.2
    actions = np.where(good[:, None], [0.6, 0], [-0.6, 0]) + rng.normal(0, 0.1, (n, 2))
    data = dict(
        observations=np.zeros((n, 1), np.float32),
        actions=actions.astype(np.float32),
        rewards=actions[:, 0].astype(np.float32),
        masks=np.zeros(n, np.float32),
        ends=np.arange(n) | 1,
    )
    cfg = qgf.Config(width=64, depth=2, horizon=1)
    state, info = qgf.train(qgf.init_state(KEY, 1, 2, cfg), qgf.to_device(data, 1), 1500, cfg)
    assert info["flow_loss"][-100:].mean() < info["flow_loss"][:20].mean()
    assert info["critic_loss"][-100:].mean() < 0.01  # Q(a) is the reward, which is the first action
    nets, noise = qgf.acting_nets(state), jax.random.normal(KEY, (500, 1, 2))
    bc, guided = (qgf.sample_actions(nets, jnp.zeros((500, 1)), noise, w)[:, 0] for w in (0.0, 10.0))
    assert 0.1 < (bc > 0).mean() < 0.35  # a fifth, as in the data
    assert (guided > 0).mean() > 0.9
    best = qgf.sample_actions(nets, jnp.zeros((100, 1)), jax.random.normal(KEY, (100, 32, 2)), 0.0)
    assert (best[:, 0] > 0).mean() > 0.95  # best of 32


# ---- guidance --------------------------------------------------------------------------------------------


def sampling(B=6, N=1, seed=3):
    rng, shape = np.random.default_rng(seed), (B, N, CFG.horizon * A)
    s, a_0 = rng.normal(size=(B, S)), rng.normal(size=shape)
    return qgf.acting_nets(some_state()), jnp.float32(s), jnp.float32(a_0)


def test_qgf_gradient_equals_finite_differences_at_the_clean_estimate():
    nets, s, a_0 = sampling()
    a_t, t = a_0[:, 0], jnp.full((6, 1), 0.4)
    v = qgf.velocity(nets["policy"], s, a_t, t)
    g = qgf.qgf(nets, s, a_t, t, v)
    clean = np.clip(np.asarray(a_t, np.float64) + 0.6 * np.asarray(v), -1, 1)
    assert (abs(clean) == 1).any()  # also where the estimate was clipped, the gradient is Q's there
    for d in range(a_t.shape[1]):
        e = 1e-5 * np.eye(a_t.shape[1])[d]
        up, down = (numpy_q(nets["critic"], s, a).min(axis=0) for a in (clean + e, clean - e))
        np.testing.assert_allclose(g[:, d], (up - down) / 2e-5, rtol=1e-3, atol=1e-5)


def test_a_small_guided_step_raises_q_of_the_clean_estimate_by_its_squared_gradient():
    nets, s, a_0 = sampling(B=50)
    for t in (0.0, 0.5, 0.9):
        tt = jnp.full((50, 1), t)
        v = qgf.velocity(nets["policy"], s, a_0[:, 0], tt)
        a_1 = jnp.clip(a_0[:, 0] + (1 - t) * v, -1, 1)
        g = qgf.qgf(nets, s, a_0[:, 0], tt, v)
        gain = qgf.q_min(nets, s, a_1 + 0.01 * g) - qgf.q_min(nets, s, a_1)
        assert (gain > 0).mean() > 0.9  # the smaller of two critics has kinks
        assert float(gain.sum()) == pytest.approx(float(0.01 * (g**2).sum()), rel=0.1)


def test_no_weight_is_bc_exactly_and_each_row_has_its_own_weight():
    nets, s, a_0 = sampling()
    bc = qgf.sample_actions(nets, s, a_0, 1.0, "bc", 5)
    np.testing.assert_array_equal(qgf.sample_actions(nets, s, a_0, 0.0, "qgf", 5), bc)
    weights = jnp.array([0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
    rows = qgf.sample_actions(nets, s, a_0, weights, "qgf", 5)
    for i, w in enumerate(weights):
        np.testing.assert_array_equal(rows[i], qgf.sample_actions(nets, s, a_0, w, "qgf", 5)[i])
    assert (rows[1:] != bc[1:]).any(axis=1).all()
    compiled = qgf.sample_actions._cache_size()
    qgf.sample_actions(nets, s, a_0, 0.123, "qgf", 5)
    assert qgf.sample_actions._cache_size() == compiled  # another weight compiles nothing


def test_the_sampler_equals_a_plain_loop_and_best_of_n_takes_the_largest_q():
    nets, s, a_0 = sampling(N=4)
    candidates = []
    for n in range(4):
        a = a_0[:, n]
        for i in range(5):
            t = jnp.full((6, 1), i / 5)
            v = qgf.velocity(nets["policy"], s, a, t)
            a = a + (v + 0.3 * qgf.qgf(nets, s, a, t, v)) / 5
        candidates.append(jnp.clip(a, -1, 1))
        got = qgf.sample_actions(nets, s, a_0[:, n : n + 1], 0.3, "qgf", 5)
        np.testing.assert_allclose(got, candidates[-1], atol=1e-4)
    best = np.argmax([qgf.q_min(nets, s, a) for a in candidates], axis=0)
    assert len(set(best.tolist())) > 1
    want = np.array(candidates)[best, np.arange(6)]
    np.testing.assert_allclose(qgf.sample_actions(nets, s, a_0, 0.3, "qgf", 5), want, atol=1e-4)


@pytest.mark.parametrize("critic", ["linear", "quadratic"])
def test_guided_samples_of_a_gaussian_land_where_the_ode_says(monkeypatch, critic):
    """The reference is N(μ, σ²) with its exact velocity; da/dt = v + w ∇Q(â_1) is then linear."""
    mu, sigma, w, k, target = 0.1, 0.2, 0.15, 2.0, 0.4
    monkeypatch.setattr(qgf, "velocity", gaussian_velocity(mu, sigma))
    if critic == "linear":  # a_1 = μ + σ a_0 + w σ ∫ dt / sqrt((1-t)² + t²σ²), an integral in closed form
        monkeypatch.setattr(qgf, "q_values", lambda c, s, a: jnp.stack([a[:, 0], a[:, 0] + 1]))
        integral = (math.asinh(sigma) + math.asinh(1 / sigma)) / math.sqrt(1 + sigma**2)
        assert integral == pytest.approx(quad(lambda t: ((1 - t) ** 2 + (t * sigma) ** 2) ** -0.5, 0, 1)[0])
        want = lambda a_0: mu + sigma * a_0 + w * sigma * integral  # noqa: E731
    else:
        monkeypatch.setattr(
            qgf, "q_values", lambda c, s, a: -k / 2 * jnp.stack([(a[:, 0] - target) ** 2] * 2)
        )

        def slope(t, a):
            d = (1 - t) ** 2 + (t * sigma) ** 2
            clean = mu + t * sigma**2 / d * (a - t * mu)  # the posterior mean E[a_1 | a_t]
            return (clean - a) / (1 - t) + w * k * (target - clean)

        want = lambda a_0: solve_ivp(slope, (0, 1 - 1e-9), [a_0], rtol=1e-8, atol=1e-10).y[0, -1]  # noqa: E731
    a_0 = jnp.linspace(-2, 2, 9)[:, None, None]
    nets = dict(policy=None, critic=None)
    got = qgf.sample_actions.__wrapped__(nets, jnp.zeros((9, 1)), a_0, w, "qgf", 2000)
    np.testing.assert_allclose(got[:, 0], [want(float(x)) for x in a_0.ravel()], atol=2e-3)


# ---- names, tables, episodes -----------------------------------------------------------------------------


def test_names_of_tasks():
    want = ("cube-double", "cube-double", "cube-double-singletask-v0", "cube-double-play-v0")
    assert qgf.find_task("cube-double") == want
    for name in (
        "cube-double-task3",
        "cube-double-play-singletask-task3-v0",
        "cube-double-singletask-task3-v0",
    ):
        assert qgf.find_task(name)[1:3] == ("cube-double-task3", "cube-double-singletask-task3-v0")
    assert qgf.find_task("scene-noisy")[1:] == ("scene-noisy", "scene-singletask-v0", "scene-noisy-v0")
    assert qgf.find_task("antmaze-large")[3] == "antmaze-large-navigate-v0"


def test_table_and_choice_of_the_weight():
    wins = [(0.3, 8), (0.1, 8), (0.03, 5)]
    episodes = [qgf.Episode("qgf", w, i, i < n, -10.0 * w, 100) for w, n in wins for i in range(10)]
    assert qgf.best_weight(episodes) == 0.1  # as many successes as 0.3, and the larger return
    row = qgf.table(episodes)[2]
    assert (
        row.split()[:4] == ["qgf", "0.1", "10", "0.80"] and "[0.49, 0.94]" in row
    )  # Wilson's, for 8 of 10

    def verdict(bc, guided):
        pair = [("bc", 0.0, bc), ("qgf", 0.1, guided)]
        return qgf.verdict([qgf.Episode(m, w, i, i < n, 0.0, 1) for m, w, n in pair for i in range(50)])

    assert (
        verdict(3, 40).startswith("yes")
        and verdict(40, 3).startswith("no,")
        and "not shown" in verdict(20, 25)
    )


def test_rollout_runs_every_job_once_and_pairs_rows_by_seed(monkeypatch):
    nets = sampling()[0]
    noises = {}

    def fake_actions(nets, obs, noise, weights, method, steps):
        return noise[:, 0]

    monkeypatch.setattr(qgf, "sample_actions", fake_actions)
    now = {}

    def run(commands):
        replies = []
        for i, c in enumerate(commands):
            if isinstance(c, int):
                now[i] = [c, 0]
                replies.append((np.full(S, c), [], False, False))
            elif c is None:
                replies.append(None)
            else:
                seed, k = now[i]
                now[i][1] += 1
                noises.setdefault((seed, k), []).append(c.copy())
                done = k == seed % 3
                replies.append((np.full(S, c[0, 0]), [-1.0] * (1 if done else 3), done, seed % 2 == 0))
        return replies

    jobs = [(w, seed) for w in (0.0, 0.5, 1.0) for seed in range(7)]
    episodes = qgf.rollout(nets, run, jobs, CFG, "test")
    assert [(e.weight, e.seed) for e in episodes] == jobs
    assert all(
        e.method == ("qgf" if e.weight else "bc") and e.success == (e.seed % 2 == 0) for e in episodes
    )
    assert all(e.length == 3 * (e.seed % 3) + 1 and e.ret == -e.length for e in episodes)
    assert all(len(v) == 3 and (v[0] == v[1]).all() and (v[0] == v[2]).all() for v in noises.values())
    assert len({v[0].tobytes() for v in noises.values()}) == len(noises)  # and no noise is used twice


# ---- data ------------------------------------------------------------------------------------------------


class FakeEnv:
    """Enough of an environment for load_dataset."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (S,)), gymnasium.spaces.Box(-1, 1, (A,))
    spec = gymnasium.spec("cube-single-singletask-v0")


def write(path, **changes):
    raw = random_data()
    terminals = np.arange(60) == raw.pop("ends")
    np.savez(
        path, **{k: v for k, v in (raw | dict(terminals=terminals) | changes).items() if v is not None}
    )
    return path


def test_a_file_with_rewards_is_used_as_it_is(tmp_path):
    data = qgf.load_dataset(write(tmp_path / "d.npz"), FakeEnv)
    assert_same(data, random_data())
    assert (qgf.load_dataset(write(tmp_path / "d.npz", masks=None), FakeEnv)["masks"] == 1).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(actions=np.zeros((60, 3))), "`actions` is (60, 3), expected (60, 2)"),
        (dict(observations=np.zeros((60, 9))), "`observations` is (60, 9)"),
        (dict(terminals=np.zeros(5)), "`terminals` is (5,)"),
        (dict(rewards=None), "`rewards` is missing"),
        (dict(rewards=np.full(60, np.nan)), "`rewards` has NaN or Inf in row 0"),
        (dict(observations=np.full((60, S), np.inf)), "`observations` has NaN"),
        (dict(actions=np.full((60, A), 3.0)), "actions reach 3"),
    ],
)
def test_a_foreign_dataset_is_refused(tmp_path, changes, words):
    with pytest.raises(qgf.UserError) as e:
        qgf.load_dataset(write(tmp_path / "d.npz", **changes), FakeEnv)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_missing_truncated_and_unreadable_datasets_are_refused(tmp_path):
    whole = write(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("<html>not found</html>")
    np.savez(tmp_path / "pickle.npz", observations=np.array([dict(a=1)], object))
    for name in ("none", "cut", "text", "pickle"):
        with pytest.raises(qgf.UserError, match="missing, truncated or no .npz"):
            qgf.load_dataset(tmp_path / f"{name}.npz", FakeEnv)
    with pytest.raises(qgf.UserError, match="--horizon"):
        qgf.to_device(random_data(), 40)


def test_download_takes_the_second_host_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "/first/" in self.path and "cut" not in self.path else 200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * (500 if "cut" in self.path else 1000))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"{url}/first")
    monkeypatch.setattr(qgf, "MIRROR", f"{url}/second")
    assert qgf.download("set", tmp_path / "set.npz") and (tmp_path / "set.npz").read_bytes() == b"x" * 1000
    assert not qgf.download("cut", tmp_path / "cut.npz")  # both break off
    server.shutdown()
    server.server_close()
    assert not qgf.download("gone", tmp_path / "gone.npz")  # nobody answers
    assert [p.name for p in tmp_path.iterdir()] == ["set.npz"]
    assert capsys.readouterr().out.count("cannot download http") == 5  # each failure was told


# ---- runs: the command line, on collected data, in the real simulator ------------------------------------

SMALL = [
    "--width",
    "16",
    "--depth",
    "2",
    "--batch-size",
    "32",
    "--weights",
    "0.1",
    "--choose",
    "1",
    "--episodes",
    "2",
]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder with two collected episodes of cube-single."""
    home = tmp_path_factory.mktemp("home")
    mp = pytest.MonkeyPatch()
    mp.setattr(qgf, "DATA_DIR", home / ".ogbench/data")
    path, origin = qgf.find_dataset(qgf.Config(collect=2000), "cube-single", "cube-single-play-v0")
    assert "collected" in path.name and "play policies" in origin
    stamp = path.stat().st_mtime_ns
    qgf.find_dataset(qgf.Config(collect=2000), "cube-single", "cube-single-play-v0")
    assert path.stat().st_mtime_ns == stamp  # used again, not collected again
    yield home
    mp.undo()


def start(home, *args):
    """The command line in a process of its own."""
    env = os.environ | dict(HOME=str(home))
    command = [sys.executable, qgf.__file__, "--env", "cube-single", "--collect", "2000", *SMALL, *args]
    return subprocess.Popen(
        command, env=env, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def checkpoint(folder):
    with np.load(Path(folder) / "cube-single-s0/checkpoint.npz") as file:
        return dict(file)


def test_collected_data_has_the_form_of_ogbenchs(home):
    with np.load(home / ".ogbench/data/cube-single-play-v0-collected-2000.npz") as file:
        data = dict(file)
    assert {k: (v.shape, v.dtype.name) for k, v in data.items()} == dict(
        observations=((2002, 28), "float32"),
        actions=((2002, 5), "float32"),
        terminals=((2002,), "bool"),
        qpos=((2002, 21), "float32"),
    )
    assert np.flatnonzero(data["terminals"]).tolist() == [1000, 2001]
    assert abs(data["actions"]).max() <= 1 and 0.05 < data["actions"].std() < 0.6
    cube = data["qpos"][:, 14:17]
    assert cube[:, 2].max() > 0.08 and np.ptp(cube[:1001, 1]) > 0.1  # the cube is lifted, and carried about
    np.testing.assert_allclose(
        (cube - [0.425, 0, 0]) * 10, data["observations"][:, 19:22], atol=1e-4
    )  # same row


def test_a_real_run_from_the_command_line(home):
    p = start(home, "--updates", "300", "--out", "real")
    out, err = p.communicate(timeout=170)
    assert p.returncode == 0, err
    for words in (
        "cube-single-singletask-v0, seed 0",
        "2,000 transitions in 2 trajectories",
        "rewards -1 to",
        "parameters",
        "fresh episodes",
        "bc ",
        "qgf ",
        "did guidance help?",
        "saved in real/cube-single-s0",
    ):
        assert words in out, (words, out)
    folder = home / "real/cube-single-s0"
    rows = (folder / "episodes.csv").read_text().splitlines()
    assert rows[0] == "purpose,method,weight,seed,success,ret,length" and len(rows) == 1 + 1 + 4
    assert {r.split(",")[3] for r in rows[2:4]} == {r.split(",")[3] for r in rows[4:6]}  # paired seeds
    assert not {r.split(",")[3] for r in rows[1:2]} & {
        r.split(",")[3] for r in rows[2:]
    }  # chosen on others
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["width"] == 16 and "jax" in record["versions"]
    assert "play policies" in record["data"]
    metrics = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    assert (
        metrics["step"].tolist() == [100, 200, 300] and metrics["flow_loss"][-1] < metrics["flow_loss"][0]
    )
    assert np.isfinite(metrics["q"]).all()


def test_a_run_stopped_or_killed_goes_on_bitwise(home):
    stopped = start(home, "--updates", "1000000", "--out", "stopped")  # far more than it will live to see
    for line in stopped.stdout:  # the plan is printed when training begins
        if line.startswith("plan"):
            break
    time.sleep(3)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 1 and "stopped at update" in err and "Traceback" not in err
    first = int(checkpoint(home / "stopped")["step"])
    assert 100 <= first < 1000000
    again = start(home, "--updates", "1000000", "--out", "stopped")
    for line in again.stdout:
        if line.startswith("plan"):
            assert f"updates {first} to 1000000" in line
            break
    again.kill()  # kill -9, as a power cut would: the checkpoint is whole and the last one
    again.wait()
    assert int(checkpoint(home / "stopped")["step"]) == first
    for name in ("stopped", "whole"):
        p = start(home, "--updates", str(first + 200), "--out", name)
        _, err = p.communicate(timeout=170)
        assert p.returncode == 0, err
    a, b = checkpoint(home / "whole"), checkpoint(home / "stopped")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a if k != "record")
    for name in ("metrics.csv", "episodes.csv"):
        whole, stopped = (home / run / "cube-single-s0" / name for run in ("whole", "stopped"))
        assert whole.read_text() == stopped.read_text()


def main(home, *args):
    whole = str(home / "whole")
    return qgf.main(["--env", "cube-single", "--collect", "2000", "--out", whole, *SMALL, *args])


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env", "cube-duble"], "did you mean cube-double"),
        (["--env", "cube-single-task9"], "did you mean"),
        (["--lr", "-1"], "--lr -1.0 is out of range"),
        (["--data", "nowhere.npz", "--out", "other"], "nowhere.npz is missing"),
        (["--width", "32"], "holds a run with --width 16"),
        (["--eval", "--width", "32"], "holds a run with --width 16"),
        (["--eval", "--seed", "7"], "train first, without --eval"),
        (
            ["--env", "antmaze-large-navigate-singletask-v0"],
            "no scripted policy makes antmaze-large-navigate-v0",
        ),
    ],
)
def test_a_users_mistake_gets_one_clear_line(home, monkeypatch, capsys, args, words):
    monkeypatch.chdir(home)
    before = checkpoint(home / "whole")
    assert main(home, *args) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("qgf: ") and words in err and len(err) < 400
    assert all((v == before[k]).all() for k, v in checkpoint(home / "whole").items())


def test_other_data_in_a_runs_way_is_refused(home, capsys):
    collected = home / ".ogbench/data/cube-single-play-v0-collected-2000.npz"
    with np.load(collected) as file:
        np.savez(home / "other.npz", **{k: v[:1001] for k, v in file.items()})
    assert main(home, "--updates", "500", "--data", str(home / "other.npz")) == 1
    assert "was trained on other data" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_and_kept(home, capsys):
    path = home / "damaged/cube-single-s0/checkpoint.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes((home / "whole/cube-single-s0/checkpoint.npz").read_bytes()[:3000])
    assert main(home, "--out", str(home / "damaged")) == 1
    assert "is no whole checkpoint" in capsys.readouterr().err and path.stat().st_size == 3000


def test_a_diverging_run_stops_with_its_step_and_keeps_the_last_good_checkpoint(home, capsys, monkeypatch):
    before = checkpoint(home / "whole")
    real = qgf.train

    def diverging(state, data, n, cfg):
        state, info = real(state, data, n, cfg)
        return state, info | dict(q=info["q"].at[37].set(np.nan))

    monkeypatch.setattr(qgf, "train", diverging)
    step = int(before["step"])
    assert main(home, "--updates", str(step + 100)) == 1
    assert f"NaN or Inf at update {step + 38};" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C is the caller's again
    assert all((v == before[k]).all() for k, v in checkpoint(home / "whole").items())
    state, record = qgf.load_run(home / "whole/cube-single-s0", {})
    with pytest.raises(qgf.UserError, match="params/value/0/b is NaN"):
        state.params["value"][0]["b"][0] = np.nan
        qgf.save_run(home / "whole/cube-single-s0", state, [], record)


def test_a_full_or_unwritable_disk_is_named_and_leaves_the_old_file(home, tmp_path, capsys, monkeypatch):
    folder, before = home / "whole/cube-single-s0", checkpoint(home / "whole")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        assert main(home, "--updates", str(int(before["step"]) + 100)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert all((v == before[k]).all() for k, v in checkpoint(home / "whole").items())
    assert not list(folder.glob("*.part"))
    (tmp_path / "file").touch()
    assert main(home, "--out", str(tmp_path / "file")) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
