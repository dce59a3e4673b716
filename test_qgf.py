# SPDX-License-Identifier: MIT
"""Every loss, estimator and file of qgf.py against something independent."""

import errno
import http.server
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest
from PIL import Image, ImageSequence
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm

import qgf

S, A = 4, 2
CFG = qgf.Config(width=16, depth=2, batch_size=32, horizon=3, denoise_steps=5)
KEY = jax.random.PRNGKey(0)
jit = partial(jax.jit, static_argnames="cfg")
update, sample_batch = jit(qgf.update), jit(qgf.sample_batch)
flow_matching_loss, critic_loss, value_loss = map(
    jit, (qgf.flow_matching_loss, qgf.critic_loss, qgf.value_loss)
)


def random_data(n=60, lengths=(7, 20, 4, 29), seed=0):
    """Trajectories of these lengths, with some successes in the middle, and one that ends with one."""
    rng = np.random.default_rng(seed)
    last = np.cumsum(lengths) - 1
    data = dict(
        observations=rng.normal(size=(n, S)).astype(np.float32),
        actions=rng.uniform(-1, 1, (n, A)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        masks=(rng.random(n) > 0.2).astype(np.float32),
        ends=last[np.searchsorted(last, np.arange(n))],
    )
    data["masks"][last] = np.arange(len(last)) != 1
    return data


DATA = qgf.to_device(random_data(), CFG.horizon)


def some_state(cfg=CFG, key=KEY):
    """A State whose target differs from its critic."""
    state, rng = qgf.init_state(key, S, A, cfg), np.random.default_rng(7)
    target = jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), state.target)
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
    return sample_batch(jax.random.PRNGKey(5), DATA, cfg)


# ---- losses ----------------------------------------------------------------------------------------------


def test_flow_matching_loss_equals_a_numpy_loop():
    state, batch, T = some_state(), batch_of(), CFG.denoise_steps
    loss = flow_matching_loss(state.params["policy"], batch["observations"], batch["actions"], KEY, CFG)
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
    loss, _ = critic_loss(state.params["critic"], state.params["value"], batch, CFG)
    assert loss == pytest.approx(np.mean([(q[0] - y) ** 2, (q[1] - y) ** 2]), rel=1e-5)
    u = np.minimum(*q_target) - v
    loss, _ = value_loss(state.params["value"], state.target, batch, CFG)
    want = np.mean([(CFG.expectile if x > 0 else 1 - CFG.expectile) * x * x for x in u])
    assert loss == pytest.approx(want, rel=1e-5)


def test_edp_loss_equals_a_numpy_loop_and_leaves_the_others_alone():
    cfg = replace(CFG, edp=3.0)
    state, batch = some_state(cfg), batch_of()
    s, a_1 = batch["observations"], batch["actions"]
    assert_same(state.params["edp"], state.params["policy"])
    edp_loss = jax.jit(lambda p: qgf.edp_loss(p, state.target, s, a_1, KEY, cfg))
    a_0, a_t, t = (np.asarray(x, np.float64) for x in qgf.noisy_actions(a_1, KEY, cfg))
    v = numpy_velocity(state.params["edp"], s, a_t, t)
    q = numpy_q(state.target, s, np.clip(a_t + (1 - t) * v, -1, 1)).min(axis=0)
    assert edp_loss(state.params["edp"]) == pytest.approx(
        3 * np.mean((v - (np.asarray(a_1) - a_0)) ** 2) - q.mean(), rel=1e-4
    )
    with_edp, _ = update(state, batch, KEY, cfg)
    without, _ = update(some_state(), batch, KEY, CFG)
    for name in ("policy", "critic", "value"):
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=2e-5), with_edp.params[name], without.params[name]
        )
    grads = jax.jit(jax.grad(edp_loss))(state.params["edp"])
    moved = jax.tree.map(lambda a, b: a - b, with_edp.params["edp"], state.params["edp"])
    for g, d in zip(
        jax.tree.leaves(grads), jax.tree.leaves(moved)
    ):  # Adam's first step is -lr g / (|g| + 1e-8)
        np.testing.assert_allclose(d, -CFG.lr * g / (abs(g) + 1e-8), atol=2e-5)


def test_the_flow_may_be_blind_to_goals_while_that_of_edp_sees_them():
    params = qgf.init_params(KEY, S + 2, A, replace(CFG, edp=1.0), unseen=2)
    a, t = jnp.zeros((2, CFG.horizon * A)), jnp.zeros((2, 1))
    s = jnp.zeros((2, S + 2)).at[1, S:].set(1.0)  # two goals in the same state
    blind, seeing = (qgf.velocity(params[k], s, a, t) for k in ("policy", "edp"))
    assert (blind[0] == blind[1]).all() and (seeing[0] != seeing[1]).any()


def test_dqc_loss_equals_a_numpy_loop_and_reaches_both_critics_alone():
    cfg = replace(CFG, long_horizon=4, kappa=0.8)
    data = qgf.to_device(random_data(), cfg.reach)
    assert data["n_starts"] == 60 - 4 * 4 + 1  # whole long chunks only; one needs no state after it
    batch = jax.device_get(sample_batch(jax.random.PRNGKey(5), data, cfg))
    assert batch["long_actions"].shape == (32, 4 * A) and batch["actions"].shape == (32, 3 * A)
    np.testing.assert_array_equal(batch["long_actions"][:, : 3 * A], batch["actions"])
    state, s = some_state(cfg), batch["observations"]
    assert_same(state.params["critic"], some_state().params["critic"])
    q_long = numpy_q(state.params["long_critic"], s, batch["long_actions"])
    q = numpy_q(state.params["critic"], s, batch["actions"])
    v_next = numpy_mlp(state.params["value"], batch["next_observations"])[:, 0]
    y = batch["returns"] + cfg.discount**4 * batch["masks"] * v_next
    gap = q_long - q
    want = np.mean((q_long - y) ** 2) + np.mean(np.where(gap > 0, 0.8, 0.2) * gap**2)
    loss, _ = jit(qgf.dqc_loss)(state.params, batch, cfg)
    assert loss == pytest.approx(want, rel=1e-5)
    g = jax.jit(jax.grad(lambda p: qgf.dqc_loss(p, batch, cfg)[0]))(state.params)
    reached = {k for k, v in g.items() if any(x.any() for x in jax.tree.leaves(v))}
    assert reached == {"critic", "long_critic"}
    alone, _ = jit(
        lambda p, cfg: jax.grad(qgf.critic_loss, has_aux=True)(
            p["long_critic"], p["value"], batch | dict(actions=batch["long_actions"]), cfg
        )
    )(state.params, cfg)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), g["long_critic"], alone)
    updated, info = update(state, batch, KEY, cfg)
    assert info["critic_loss"] == pytest.approx(want, rel=1e-5)
    assert (updated.params["long_critic"][0]["w"] != state.params["long_critic"][0]["w"]).any()


def test_each_loss_reaches_its_own_network_alone():
    state, batch = some_state(), batch_of()
    g = jax.jit(jax.grad(lambda p: qgf.critic_loss(p["critic"], p["value"], batch, CFG)[0]))(state.params)
    assert not any(x.any() for x in jax.tree.leaves(g["value"]))
    assert any(x.any() for x in jax.tree.leaves(g["critic"]))
    together, _ = update(state, batch, KEY, CFG)
    for name, loss in dict(
        policy=lambda p: qgf.flow_matching_loss(p, batch["observations"], batch["actions"], KEY, CFG),
        critic=lambda p: qgf.critic_loss(p, state.params["value"], batch, CFG)[0],
        value=lambda p: qgf.value_loss(p, state.target, batch, CFG)[0],
    ).items():  # Adam's first step is lr * g / (|g| + 1e-8)
        params = state.params[name]
        grads = jax.jit(jax.grad(loss))(params)
        alone = jax.tree.map(lambda p, g: p - CFG.lr * g / (abs(g) + 1e-8), params, grads)
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
    starts = sorted([*starts, 27 - H])  # rows 7 to 26 end with a success, and need no state after that
    assert DATA["starts"][: DATA["n_starts"]].tolist() == starts and len(starts) == 60 - 4 * H + 1
    batch = jax.device_get(sample_batch(KEY, DATA, replace(CFG, batch_size=500)))
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
        if mask:
            np.testing.assert_array_equal(batch["next_observations"][k], raw["observations"][i + H])
    assert drawn == set(starts)  # 500 draws of 49 starts


def test_a_slice_with_fewer_chunks_compiles_nothing_anew():
    fewer = qgf.to_device(random_data() | dict(masks=np.ones(60, np.float32)), CFG.horizon)
    assert fewer["n_starts"] < DATA["n_starts"]
    state, _ = qgf.train(some_state(), DATA, 2, CFG)
    compiled = qgf.train._cache_size()
    qgf.train(state, fewer, 2, CFG)
    assert qgf.train._cache_size() == compiled


def test_a_success_in_the_last_row_of_all_is_learned_from():
    data = random_data(12, (12,)) | dict(masks=np.float32(np.arange(12) < 11))
    batch = sample_batch(KEY, qgf.to_device(data, CFG.horizon), replace(CFG, batch_size=200))
    last = (batch["observations"] == data["observations"][9]).all(axis=1)  # of three actions, rows 9 to 11
    assert 0 < last.sum() < 40 and (batch["masks"] == ~last).all()
    loss, _ = jit(qgf.critic_loss)(some_state().params["critic"], some_state().params["value"], batch, CFG)
    assert np.isfinite(loss)  # the row after it does not exist


# ---- goals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [1, 4])
def test_hindsight_goals_rewards_and_masks_equal_a_brute_force_loop(alike):
    raw, n = random_data() | dict(masks=np.ones(60)), 6000  # as `load_dataset` has them
    i = np.arange(60)
    rows = np.float32(i // alike + 0.1 * (i % alike))[
        :, None
    ]  # so many successive rows are near each other
    data = qgf.to_device(raw | dict(goals=rows), CFG.horizon)
    batch = jax.device_get(sample_batch(KEY, data, replace(CFG, goal="oracle", batch_size=n)))
    kinds = dict(present=0, later=0, other=0)
    for k in range(n):
        s, goal = batch["observations"][k, :S], int(np.flatnonzero(rows == batch["observations"][k, S])[0])
        i = int(np.flatnonzero((raw["observations"] == s).all(axis=1))[0])
        ret, mask = 0.0, 1.0
        for j in range(CFG.horizon):
            if (i + j) // alike == goal // alike:
                mask = 0.0
                break
            ret -= CFG.discount**j
        assert batch["returns"][k] == pytest.approx(ret, abs=1e-5) and batch["masks"][k] == mask
        assert (
            batch["next_observations"][k, S] == rows[goal, 0]
        )  # the state after the chunk has the same goal
        np.testing.assert_array_equal(
            batch["next_observations"][k, :S], raw["observations"][i + CFG.horizon]
        )
        kinds["present" if goal == i else "later" if i < goal <= raw["ends"][i] else "other"] += 1
    starts = np.asarray(data["starts"][: data["n_starts"]])
    later = np.mean(
        (raw["ends"][starts] - starts) / 60
    )  # how often any row is a later one of the trajectory
    want = dict(present=0.2 + 0.3 / 60, later=0.5 + 0.3 * later)
    for kind, share in (want | dict(other=1 - sum(want.values()))).items():
        assert kinds[kind] / n == pytest.approx(share, abs=0.02), kind


@pytest.mark.parametrize("env_id", ["cube-double-v0", "scene-v0"])
def test_a_state_as_a_goal_is_what_the_environment_gives(env_id, tmp_path):
    env = qgf.make_env(env_id, "oracle")
    seen, oracle = {}, env.unwrapped.compute_oracle_observation

    def spy():  # called inside reset, when the environment is in its goal state
        seen.update(qpos=env.unwrapped._data.qpos.copy(), ob=env.unwrapped.compute_observation())
        if "scene" in env_id or "puzzle" in env_id:
            seen["button_states"] = env.unwrapped._cur_button_states.copy()
        return oracle()

    env.unwrapped.compute_oracle_observation = spy
    _, info = env.reset(seed=1, options=dict(task_id=3))
    ob = seen["ob"]  # `load_dataset` resets, too
    two = {k: np.stack([v, v]).astype(np.float32) for k, v in seen.items() if k != "ob"}
    two |= dict(observations=np.stack([ob] * 2), actions=np.zeros((2, 5)), terminals=[0, 1])
    np.savez(tmp_path / "two.npz", **two)
    goals = qgf.load_dataset(tmp_path / "two.npz", env, "oracle")["goals"]
    np.testing.assert_allclose(goals, [info["goal"]] * 2, atol=1e-5)
    whole = qgf.load_dataset(tmp_path / "two.npz", qgf.make_env(env_id, "state"), "state")["goals"]
    np.testing.assert_allclose(whole[0], ob, atol=1e-6)


def test_an_episodes_start_and_goal_depend_on_its_seed_alone():
    first, again, other = (
        r[0] for r in qgf.act("cube-single-v0", "oracle", {0: 13, 1: 13, 2: 14}).values()
    )
    assert first.shape == (28 + 3,)  # the goal, a cube's position, is the observation's end
    np.testing.assert_array_equal(first, again)  # in another environment of the process
    assert (first[28:] != other[28:]).any()  # goal 5 instead of 4
    chunk = np.zeros((5, 5))
    reply = qgf.act("cube-single-v0", "oracle", {0: chunk})[0]
    np.testing.assert_array_equal(reply[0][28:], first[28:])  # and it stays while the episode lasts
    assert len(reply[1]) == 5 and not reply[2]


def test_a_toy_is_steered_to_any_goal_by_the_critic_alone():
    """On a line, x' = x + 0.2 a. The data wander, the flow sees no goal, and no goal here was drawn."""
    rng, n, length = np.random.default_rng(0), 300, 20
    a = rng.uniform(-1, 1, (n, length)).astype(np.float32)
    x = rng.uniform(-1, 1, (n, 1)) + np.cumsum(np.pad(0.2 * a[:, :-1], ((0, 0), (1, 0))), axis=1)
    x = np.float32(x.reshape(-1, 1))
    ends = np.int32(np.repeat(np.arange(n) * length + length - 1, length))
    data = dict(observations=x, actions=a.reshape(-1, 1), goals=10 * np.round(x, 1), ends=ends)
    data |= dict(masks=np.ones(len(x)))  # as `load_dataset` has them
    cfg = qgf.Config(width=64, depth=2, horizon=1, goal="state", discount=0.9)
    state = qgf.init_state(KEY, 2, 1, cfg, unseen=1)
    assert len(state.params["policy"][0]["w"]) == 1 + 1 + 16  # state, action, time: the flow sees no goal
    state, _ = qgf.train(state, qgf.to_device(data, 1), 2000, cfg)
    nets, goal = qgf.acting_nets(state), jnp.linspace(-0.85, 0.85, 18)[:, None]  # between those of the data

    def far(w):
        now = jnp.zeros((18, 1))
        for i in range(12):
            s, noise = (
                jnp.concatenate([now, 10 * goal], axis=1),
                jax.random.normal(jax.random.PRNGKey(i), (18, 1, 1)),
            )
            now = now + 0.2 * qgf.sample_actions(nets, s, noise, w)
        return float(abs(now - goal).mean())

    assert far(3.0) < 0.2 and far(0.0) > 0.35


# ---- training --------------------------------------------------------------------------------------------


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_scanned_updates_equal_single_updates_however_they_are_grouped():
    scanned, info = qgf.train(some_state(), DATA, 6, CFG)
    grouped = some_state()
    for n in (3, 3):
        grouped, last = qgf.train(grouped, DATA, n, CFG)
    assert_same(scanned, grouped)
    assert_same({k: v[3:] for k, v in info.items()}, last)
    single = some_state()  # compiled apart: equal but for rounding
    for _ in range(6):
        key_batch, key_update = jax.random.split(jax.random.fold_in(single.key, single.step))
        single, _ = update(single, sample_batch(key_batch, DATA, CFG), key_update, CFG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), scanned, single)
    assert int(scanned.step) == int(single.step) == 6


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_a_critic_of_another_width_leaves_the_flow_as_it_is():
    trained = [
        qgf.train(qgf.init_state(KEY, S, A, c), DATA, 3, c)[0] for c in (CFG, replace(CFG, critic_width=8))
    ]
    assert_close(trained[0].params["policy"], trained[1].params["policy"])
    biases = [x["b"].shape for name in ("critic", "value") for x in trained[1].params[name]]
    assert biases == [(2, 8), (2, 8), (2, 1), (8,), (8,), (1,)]


def test_seeds_trained_at_once_differ_and_are_those_of_single_runs():
    cfg = replace(CFG, depth=1, seed=5, seeds=3)
    states, info = qgf.train_seeds(qgf.init_seeds(S, A, 0, cfg), DATA, 3, cfg)
    assert len({float(x) for x in info["flow_loss"][:, 0]}) == 3  # other batches, other noise
    for i in range(3):
        alone, _ = qgf.train(qgf.init_state(jax.random.PRNGKey(5 + i), S, A, cfg), DATA, 3, cfg)
        assert_same(jax.tree.map(lambda x: x[i], states), alone)  # noqa: B023


ON_TWO_DEVICES = """
import sys, jax, numpy as np
sys.path.insert(0, sys.argv[1])
import test_qgf as t
from qgf import *

def train(seeds, devices):
    cfg = t.replace(t.CFG, depth=1, seeds=seeds)
    mesh = device_mesh(seeds, cfg.batch_size, devices)
    by_seed, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("seed",), ()))
    states = jax.device_put(init_seeds(t.S, t.A, 0, cfg), by_seed)
    data = to_device(t.random_data(), cfg.horizon, everywhere)
    with jax.set_mesh(mesh):
        program = train_seeds.lower(states, data, 4, cfg).compile()
        states, info = program(states, data)
    kernel = states.params["policy"][0]["w"].addressable_shards[0].data
    return mesh.devices.shape, len(kernel), "all-reduce(" in program.as_text(), jax.device_get((states, info))

*_, alone = train(4, jax.devices()[:1])
shape, seeds, talk, end = train(4, jax.devices())
assert (shape, seeds, talk) == ((2, 1), 2, False)  # two seeds each, which need not talk
t.assert_close(end, alone)
shape, seeds, talk, end = train(1, jax.devices())
assert (shape, seeds, talk) == ((1, 2), 1, True)  # half a batch each: gradients are added up
t.assert_close(end, jax.tree.map(lambda x: x[:1], alone))
print("the same")
"""


def test_two_devices_share_the_seeds_or_a_batch_and_find_the_same():
    env = os.environ | dict(
        XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    )
    command = [sys.executable, "-c", ON_TWO_DEVICES, str(Path(qgf.__file__).parent)]
    p = subprocess.run(command, env=env, text=True, capture_output=True)
    assert p.stdout == "the same\n", p.stderr


@pytest.fixture(scope="session")
def toy():
    """Nets for a bandit: actions near (-.6, 0) or, one time in five, the better (.6, 0); Q is the first."""
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
    cfg = qgf.Config(width=64, depth=2, horizon=1, edp=0.2)
    state, info = qgf.train(qgf.init_state(KEY, 1, 2, cfg), qgf.to_device(data, 1), 1500, cfg)
    assert info["flow_loss"][-100:].mean() < info["flow_loss"][:20].mean()
    assert info["critic_loss"][-100:].mean() < 0.01
    return qgf.acting_nets(state)


def test_a_toy_bandit_is_solved(toy):
    def good(N, *how):
        a = qgf.sample_actions(toy, jnp.zeros((500, 1)), jax.random.normal(KEY, (500, N, 2)), *how)
        return (a[:, 0] > 0).mean()

    assert 0.1 < good(1, 0.0) < 0.35  # a fifth, as in the data
    assert good(1, 10.0) > 0.9 and good(32, 0.0) > 0.95  # QGF; best of 32
    assert good(1, 0.0, "edp") > 0.9  # trained towards Q


def diagnose(nets, s, a_0, T, steps, nudge=0.1):
    """At these steps of the unguided flow, for each estimator: its mean cosine with BPTT's gradient, its
    relative change under a little noise on a_t, and how often a nudge along it raises Q̄ at the flow's end."""
    found, noise, a_t = {}, 0.01 * jax.random.normal(KEY, a_0.shape), a_0
    names = ("bptt", "qgf", "qgf-jacobian", "qgf-chain", "qfql")
    estimators = {name: jax.jit(partial(qgf.GUIDANCE[name], nets, T=T)) for name in names}
    end, velocity = jax.jit(partial(qgf.integrate, nets, T=T)), partial(qgf.velocity, nets["policy"])
    for i in range(T):
        t, true = jnp.full((len(a_0), 1), i / T), None
        for name in names if i in steps else ():
            g, moved = (estimators[name](s, a, t, velocity(s, a, t)) for a in (a_t, a_t + noise))
            length, change = (jnp.linalg.norm(x, axis=1, keepdims=True) for x in (g, moved - g))
            true = g / length if true is None else true  # BPTT's, the first
            before, after = (
                qgf.q_min(nets["critic"], s, end(s, a, t)) for a in (a_t, a_t + nudge * g / length)
            )
            cosine, rough = (g / length * true).sum(axis=1).mean(), jnp.median(change / length)
            found[name, i] = float(cosine), float(rough), float((after > before).mean())
        a_t = a_t + velocity(s, a_t, t) / T
    return found


def test_the_gradients_point_the_right_way(toy):
    found = diagnose(toy, jnp.zeros((200, 1)), jax.random.normal(KEY, (200, 2)), 10, steps=(0, 5, 9))
    for i in (0, 5, 9):
        for name in ("bptt", "qgf", "qgf-chain", "qfql"):
            assert found[name, i][0] > 0.5 and found[name, i][2] > 0.75, (name, i)
        # without the Jacobian the direction is steadier, as QGF has it (the paper's Figure 3)
        assert found["qgf", i][1] < found["qgf-jacobian", i][1]
    assert found["qgf-jacobian", 0][0] < found["qgf", 0][0]  # from pure noise J says nothing
    assert found["qgf-jacobian", 9][0] > 0.999  # with one step left, it is BPTT


# ---- guidance --------------------------------------------------------------------------------------------


def sampling(B=6, N=1, seed=3):
    rng, shape = np.random.default_rng(seed), (B, N, CFG.horizon * A)
    s, a_0 = rng.normal(size=(B, S)), rng.normal(size=shape)
    return qgf.acting_nets(some_state()), jnp.float32(s), jnp.float32(a_0)


sample = partial(qgf.sample_actions, denoise_steps=5)


def test_qgf_gradient_equals_finite_differences_at_the_clean_estimate():
    nets, s, a_0 = sampling()
    a_t, t = a_0[:, 0], jnp.full((6, 1), 0.4)
    v = qgf.velocity(nets["policy"], s, a_t, t)
    g = qgf.qgf(nets, s, a_t, t, v, 5)
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
        g = jax.jit(qgf.qgf, static_argnames="T")(nets, s, a_0[:, 0], tt, v, T=10)
        q = jax.jit(partial(qgf.q_min, nets["critic"], s))
        gain = q(a_1 + 0.01 * g) - q(a_1)
        assert (gain > 0).mean() > 0.9  # the smaller of two critics has kinks
        assert float(gain.sum()) == pytest.approx(float(0.01 * (g**2).sum()), rel=0.1)


def test_no_weight_is_bc_exactly_and_each_row_has_its_own_weight():
    nets, s, a_0 = sampling()
    bc = sample(nets, s, a_0, 1.0, "bc")
    np.testing.assert_array_equal(sample(nets, s, a_0, 0.0), bc)
    weights = jnp.array([0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
    rows = sample(nets, s, a_0, weights)
    for i, w in enumerate(weights):
        np.testing.assert_array_equal(rows[i], sample(nets, s, a_0, w)[i])
    assert (rows[1:] != bc[1:]).any(axis=1).all()
    compiled = qgf.sample_actions._cache_size()
    sample(nets, s, a_0, 0.123)
    assert qgf.sample_actions._cache_size() == compiled  # another weight compiles nothing


def numpy_end(nets, s, a, t, T=5):
    """The unguided flow from a at t, in float64 numpy."""
    a = np.asarray(a, np.float64)
    for i in range(round(t * T), T):
        a = a + numpy_velocity(nets["policy"], s, a, np.full(len(a), i / T)) / T
    return np.clip(a, -1, 1)


def test_estimators_equal_finite_differences_of_what_they_are_the_gradient_of():
    nets, s, a_0 = sampling()
    a_t, t = 0.5 * a_0[:, 0], 0.4  # some clean actions are clipped, most are not
    tt = jnp.full((6, 1), t)
    v = qgf.velocity(nets["policy"], s, a_t, tt)

    def q(a):
        return numpy_q(nets["critic"], s, a).min(axis=0)

    def clean(a):
        return np.clip(a + (1 - t) * numpy_velocity(nets["policy"], s, a, np.full(6, t)), -1, 1)

    a = np.asarray(a_t, np.float64)
    end = numpy_end(nets, s, a, t)
    assert (abs(end) == 1).any() and (abs(end) < 1).mean() > 0.5
    np.testing.assert_allclose(qgf.integrate(nets, s, a_t, tt, 5), end, atol=1e-4)
    for name, at, f in [
        ("qfql", a, q),
        ("qgf-jacobian", a, lambda a: q(clean(a))),
        ("qgf-chain", end, q),
        ("bptt", a, lambda a: q(numpy_end(nets, s, a, t))),
    ]:
        g = qgf.GUIDANCE[name](nets, s, a_t, tt, v, 5)
        for d in range(a.shape[1]):
            e = 1e-5 * np.eye(a.shape[1])[d]
            np.testing.assert_allclose(g[:, d], (f(at + e) - f(at - e)) / 2e-5, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("method", [m for m in qgf.GUIDANCE if m != "edp"])
def test_every_method_is_its_plain_loop_and_best_of_2(method):
    nets, s, a_0 = sampling(N=2)
    schedule = "score" if "qgf" in method else "constant"
    estimate = jax.jit(partial(qgf.GUIDANCE[method], nets, T=5))
    candidates = []
    for n in range(2):
        a = a_0[:, n]
        for i in range(5):
            t, middle = jnp.full((6, 1), i / 5), (i + 0.5) / 5
            v = qgf.velocity(nets["policy"], s, a, t)
            c = (1 - middle) / middle if schedule == "score" else 1
            a = a + (v + 0.1 * c * estimate(s, a, t, v)) / 5
        a = np.clip(a, -1, 1)
        for _ in range(qgf.ASCENTS if method == "gradstep" else 0):
            a = np.clip(a + 0.1 * qgf.qfql(nets, s, a, t, v, 5), -1, 1)
        candidates.append(a)
    best = np.argmax([qgf.q_min(nets["critic"], s, a) for a in candidates], axis=0)
    assert 0 < best.sum() < 6  # either candidate is the better one somewhere
    got = sample(nets, s, a_0, 0.1, method, schedule)
    np.testing.assert_allclose(got, np.array(candidates)[best, np.arange(6)], atol=1e-4)
    if method != "bc":
        assert (abs(got - sample(nets, s, a_0, 0.0)).max(axis=1) > 1e-3).all()


def forked(number):
    """qgf.py with the README's diff of that number: its + lines go behind the unchanged one before them."""
    here = Path(qgf.__file__).parent
    source = (here / "qgf.py").read_text()
    lines = (here / "README.md").read_text().split("```diff\n")[number].split("```")[0].splitlines()
    assert len(lines) < 12
    for line in lines:
        if line[0] == " ":
            assert source.count(line[1:] + "\n") == 1, line
            place = source.index(line[1:] + "\n") + len(line)
        else:
            source = source[:place] + line[1:] + "\n" + source[place:]
            place += len(line)
    fork = types.ModuleType("fork")
    sys.modules["fork"] = fork  # where dataclasses look
    exec(source, vars(fork))
    return fork


def test_the_readmes_new_guidance_runs():
    fork = forked(1)
    (name,) = fork.GUIDANCE.keys() - qgf.GUIDANCE.keys()
    nets, s, a_0 = sampling()
    ours, bc, plain = (fork.sample_actions(nets, s, a_0, 0.5, method) for method in (name, "bc", "qgf"))
    assert np.isfinite(ours).all() and (ours != bc).any() and (ours != plain).any()


def test_the_readmes_new_loss_runs_and_reaches_the_critic_alone():
    fork, state, batch = forked(2), some_state(), batch_of()
    ours, info = jit(fork.update)(state, batch, KEY, CFG)
    plain, without = update(state, batch, KEY, CFG)
    assert info["critic_loss"] != without["critic_loss"]
    assert info["value_loss"] == pytest.approx(without["value_loss"])
    for a, b in zip(jax.tree.leaves(ours.params["policy"]), jax.tree.leaves(plain.params["policy"])):
        np.testing.assert_allclose(a, b, atol=2e-5)
    kernels = (state.params["critic"][0]["w"] for state in (ours, plain))
    assert (next(kernels) != next(kernels)).any()


# ---- closed forms: the reference is N(μ, σ²) with its exact velocity, and guided flows are linear ODEs ---


def guided(monkeypatch, q, velocity, w, a_0, method="qgf", schedule="constant", T=2000):
    """Samples from these rows of noise, where the critic is q and the flow has this velocity."""
    monkeypatch.setattr(qgf, "velocity", velocity)
    monkeypatch.setattr(qgf, "q_values", lambda critic, s, a: jnp.stack([q(a[:, 0]), q(a[:, 0]) + 1]))
    nets, a_0 = dict(policy=None, critic=None), jnp.asarray(a_0)[:, None, None]
    run = jax.jit(
        partial(qgf.sample_actions.__wrapped__, method=method, schedule=schedule, denoise_steps=T)
    )
    return np.asarray(run(nets, jnp.zeros((len(a_0), 1)), a_0, w))[:, 0]


def test_with_the_jacobian_and_the_score_schedule_guidance_is_exact_for_a_linear_critic(monkeypatch):
    """The tilted Gaussian is N(μ + w σ² g, σ²); QGF shifts by w σ ∫ dt / sqrt((1-t)² + t²σ²)."""
    mu, sigma, w, g, a_0 = 0.3, 0.7, 0.5, 1.0, np.array([-0.2, 0.0, 0.2])
    got = guided(
        monkeypatch, lambda a: g * a, gaussian_velocity(mu, sigma), w, a_0, "qgf-jacobian", "score"
    )
    np.testing.assert_allclose(
        got, mu + w * sigma**2 * g + sigma * a_0, atol=2e-3
    )  # mean .545, deviation σ
    got = guided(monkeypatch, lambda a: g * a, gaussian_velocity(mu, sigma), w, a_0)
    integral = (math.asinh(sigma) + math.asinh(1 / sigma)) / math.sqrt(1 + sigma**2)
    assert integral == pytest.approx(quad(lambda t: ((1 - t) ** 2 + (t * sigma) ** 2) ** -0.5, 0, 1)[0])
    np.testing.assert_allclose(got, mu + w * sigma * g * integral + sigma * a_0, atol=2e-3)
    assert mu + w * sigma * g * integral == pytest.approx(0.818, abs=1e-3)
    t = np.linspace(0, 0.5, 99)  # at σ = 1 the exact coefficient is close to QGF's, 1, until half-way
    exact = (1 - t) / ((1 - t) ** 2 + t**2)
    assert exact.min() >= 1 and exact.max() < 1.21


@pytest.mark.parametrize("method", ["qgf", "qgf-jacobian", "qgf-chain", "bptt", "qfql"])
def test_guided_samples_of_a_gaussian_land_where_each_methods_ode_says(monkeypatch, method):
    mu, sigma, w, k, aim, a_0 = 0.1, 0.2, 0.3, 2.0, 0.4, np.linspace(-2, 2, 9)

    def slope(t, a):
        d = (1 - t) ** 2 + (t * sigma) ** 2
        clean = mu + t * sigma**2 / d * (a - t * mu)  # the posterior mean E[a_1 | a_t], with J = t σ² / d
        end = mu + sigma / math.sqrt(d) * (a - t * mu)  # the flow's own end
        push = {
            "qgf": aim - clean,
            "qgf-jacobian": t * sigma**2 / d * (aim - clean),
            "qgf-chain": aim - end,
            "bptt": sigma / math.sqrt(d) * (aim - end),
            "qfql": aim - a,
        }
        return (clean - a) / (1 - t) + w * k * push[method]

    want = [solve_ivp(slope, (0, 1 - 1e-9), [a], rtol=1e-8, atol=1e-10).y[0, -1] for a in a_0]
    T = 300 if method in ("bptt", "qgf-chain") else 2000
    critic, flow = lambda a: -k / 2 * (a - aim) ** 2, gaussian_velocity(mu, sigma)
    got = guided(monkeypatch, critic, flow, w, a_0, method, T=T)
    np.testing.assert_allclose(got, want, atol=4 / T + 1e-3)
    assert abs(got - (mu + sigma * a_0)).max() > 0.01


def test_gradstep_climbs_from_the_flows_end(monkeypatch):
    mu, sigma, w, k, aim, a_0 = 0.1, 0.2, 0.1, 2.0, 0.4, np.linspace(-2, 2, 9)
    critic, flow = lambda a: -k / 2 * (a - aim) ** 2, gaussian_velocity(mu, sigma)
    got = guided(monkeypatch, critic, flow, w, a_0, "gradstep")
    np.testing.assert_allclose(got, aim + (1 - w * k) ** qgf.ASCENTS * (mu + sigma * a_0 - aim), atol=2e-3)


def test_on_two_modes_exact_guidance_moves_mass_and_dropping_the_jacobian_moves_the_modes(monkeypatch):
    """½ N(-m, σ²) + ½ N(m, σ²) tilted by exp(w a): the right mode gets 1/(1 + exp(-2wm)), and shifts by w σ².

    Where a_t lies between the modes J is large, and once it is decided J is small. With J := 1, QGF goes on
    pushing what is decided: the mode shifts by about w σ ∫ dt / sqrt((1-t)² + t²σ²), of order w σ, not w σ².
    """
    m, sigma, w, n = 0.5, 0.05, 0.3, 4001
    a_0 = norm.ppf((np.arange(n) + 0.5) / n)

    def two_modes(policy, s, a_t, t):
        right = jax.nn.sigmoid(2 * t * m * a_t / ((1 - t) ** 2 + (t * sigma) ** 2))  # P(right mode | a_t)
        velocities = [gaussian_velocity(mode, sigma)(policy, s, a_t, t) for mode in (m, -m)]
        return right * velocities[0] + (1 - right) * velocities[1]

    def moved(*how):
        got = guided(monkeypatch, lambda a: a, two_modes, how[0], a_0, *how[1:], T=1000)
        return (got > 0).mean(), np.median(got[got > 0]) - m

    mass, shift = moved(0.0, "bc")
    assert abs(mass - 0.5) < 1e-3 and abs(shift) < 1e-3
    mass, shift = moved(w, "qgf-jacobian", "score")
    assert mass == pytest.approx(1 / (1 + math.exp(-2 * w * m)), abs=1e-3) and 0 < shift < 2 * w * sigma**2
    integral = quad(lambda t: ((1 - t) ** 2 + (t * sigma) ** 2) ** -0.5, 0, 1)[0]
    mass, shift = moved(w, "qgf")
    assert shift == pytest.approx(w * sigma * integral, rel=0.2) and shift > 30 * w * sigma**2
    assert mass > 0.6  # more mass changes sides, too: for little w, less weight would do


# ---- names, tables, episodes -----------------------------------------------------------------------------


def test_names_of_tasks():
    want = ("cube-double", "cube-double", "cube-double-singletask-v0", "cube-double-play-v0", "")
    assert qgf.find_task("cube-double") == want
    for name in (
        "cube-double-task3",
        "cube-double-play-singletask-task3-v0",
        "cube-double-singletask-task3-v0",
    ):
        assert qgf.find_task(name)[1:3] == ("cube-double-task3", "cube-double-singletask-task3-v0")
    assert qgf.find_task("scene-noisy")[1:4] == ("scene-noisy", "scene-singletask-v0", "scene-noisy-v0")
    want = ("cube-double", "cube-double-goal", "cube-double-v0", "cube-double-play-v0", "oracle")
    assert qgf.find_task("cube-double-play-v0") == qgf.find_task("cube-double-play-oraclerep-v0") == want
    assert qgf.find_task("cube-double", "state") == (*want[:4], "state")
    assert qgf.find_task("antmaze-large")[3] == "antmaze-large-navigate-v0"


def episodes_of(method, weight, wins, n=50, run="cube-single-s0"):
    return [qgf.Episode(run, method, weight, i, i < wins, -10.0 * weight, 100) for i in range(n)]


def test_choice_of_the_weight():
    episodes = [e for w, n in [(0.3, 8), (0.1, 8), (0.03, 5)] for e in episodes_of("qgf", w, n)]
    assert qgf.best_weight(episodes) == 0.1  # as many successes as 0.3, and the larger return


def test_summary_and_table_have_wilsons_interval_and_the_paired_gain():
    bc, guided = episodes_of("bc", 0.0, 10), episodes_of("qgf", 0.1, 40)
    row = qgf.summary(bc + guided, dict(qgf=dict(ms_1=1.0, us_256=2.0, mflop=3.0)))[1]
    z, p, n = 1.959964, 0.8, 50
    centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert (row["low"], row["high"]) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-4
    )
    assert row["gain"] == pytest.approx(0.6)  # on 30 of 50 seeds it won where BC lost
    spread = z * math.sqrt(
        0.6 * 0.4 / 50
    )  # the bootstrap's is about the normal one of 30 ones and 20 zeros
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((0.6 - spread, 0.6 + spread), abs=0.03)
    assert qgf.verdict(row).startswith("yes, qgf by +0.60")
    for a, b, words in [(40, 3, "no, it harmed, qgf"), (20, 21, "not shown, qgf")]:
        rows = qgf.summary(episodes_of("bc", 0.0, a) + episodes_of("qgf", 0.1, b))
        assert qgf.verdict(rows[1]).startswith(words)
    lines = qgf.table(qgf.summary(bc + guided))
    assert lines[2].split()[:4] == ["qgf", "0.1", "50", "0.80"] and "+0.60 [+0." in lines[2]


def test_the_interval_over_several_runs_is_that_of_runs_and_episodes():
    runs = [episodes_of("bc", 0.0, w, 200, f"cube-single-s{i}") for i, w in enumerate((60, 90, 120, 140))]
    row = qgf.summary(sum(runs, []))[0]
    p = np.array([0.3, 0.45, 0.6, 0.7])  # the variance of a mean of four, in two stages
    half = 1.96 * math.sqrt(p.var() / 3 + (p * (1 - p)).mean() / 600)
    assert row["n"] == 800 and row["success"] == pytest.approx(p.mean())
    assert (row["low"], row["high"]) == pytest.approx((p.mean() - half, p.mean() + half), abs=0.015)
    uneven = episodes_of("bc", 0.0, 10, 10, "a-s0") + episodes_of("bc", 0.0, 0, 90, "b-s0")
    assert qgf.summary(uneven)[0]["success"] == 0.5  # runs count the same, as they do in the interval
    alike = sum((episodes_of("bc", 0.0, 0, 25, f"cube-single-s{i}") for i in range(4)), [])
    assert qgf.summary(alike)[0]["high"] > 0.03  # of 0 in 100, where a bootstrap would say 0


def test_the_pooled_table_is_that_of_its_episodes(tmp_path):
    wins = {"cube-triple-task1-s0": (3, 9), "cube-triple-task2-s4": (1, 7), "scene-s0": (0, 10)}
    for run, (bc, guided) in wins.items():
        (tmp_path / run).mkdir()
        episodes = episodes_of("bc", 0.0, bc, 10, run) + episodes_of("qgf", 0.1 * len(run), guided, 10, run)
        chosen = episodes_of("qgf", 0.5, 10, 10, run)  # is not in the table
        rows = [("choose", *e) for e in chosen] + [("report", *e) for e in episodes]
        qgf.write_csv(tmp_path / run / "episodes.csv", [("purpose", *qgf.Episode._fields), *rows])
        rows = [("method", "ms_1", "us_256", "mflop"), ("bc", 1, 2, 3), ("qgf", len(run), 5, 6)]
        qgf.write_csv(tmp_path / run / "table.csv", rows)
    lines = qgf.pooled(tmp_path)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-1]]
    assert table[0][:5] == ["method", "w", "cube-triple", "scene", "all"]
    bc, guided = table[2:]
    assert [cell.split()[0] for cell in bc[2:5]] == ["0.20", "0.00", "0.13"]
    assert [cell.split()[0] for cell in guided[2:6]] == ["0.80", "1.00", "0.87", "0.73"]
    assert guided[1] == "0.8 to 2" and guided[6:] == ["20", "5", "6", "0.53"]
    assert guided[2].endswith("paper 0.70") and guided[3].endswith("paper 0.87") and bc[1] == ""
    assert lines[-1] == "\nruns: 3; episodes per method: 30"
    (tmp_path / "more").mkdir()
    (tmp_path / "scene-s0").rename(tmp_path / "more/scene-s0")
    assert qgf.pooled(tmp_path)[0].startswith("| method | w | cube-triple | more/scene | all |")
    assert qgf.pooled(tmp_path / "more/scene-s0")[-1] == "\nruns: 1; episodes per method: 10"


def test_names_of_methods():
    assert qgf.method_of("bc") == (dict(method="bc", schedule="constant"), 1)
    assert qgf.method_of("qgf-jacobian+score@16") == (dict(method="qgf-jacobian", schedule="score"), 16)
    for wrong in ("best", "qgf@0", "qgf@", "qgf+linear", ""):
        with pytest.raises(qgf.UserError, match="unknown method"):
            qgf.method_of(wrong)


def test_operations_are_those_that_run():
    nets, s, a_0 = sampling(B=1)
    policy = 2 * sum(layer["w"].size for layer in nets["policy"])
    critic = 2 * sum(layer["w"].size for layer in nets["critic"])  # both

    def count(method, N=1):
        f = partial(qgf.sample_actions, method=method, denoise_steps=5)
        return qgf.operations(jax.make_jaxpr(f)(nets, s, jnp.repeat(a_0, N, axis=1), 0.1), 5)

    assert count("bc") == 5 * policy and count("bc", 4) == 4 * (5 * policy + critic)
    assert count("qgf") == count("qfql") == 5 * policy + 10 * critic  # forward, and back to the actions
    assert count("gradstep") == 5 * policy + 2 * qgf.ASCENTS * critic
    assert count("qgf-chain") == (5 + 5 + 4 + 3 + 2 + 1) * policy + 10 * critic
    # through the flow: forward and back, but for the first layer's products with state and time
    assert count("qgf") + 5 * 2 * policy >= count("qgf-jacobian") > count("qgf") + 5 * policy
    assert count("qgf-chain") + 15 * policy >= count("bptt") > count("qgf-chain")


def test_rollout_runs_every_job_once_and_pairs_rows_by_seed(monkeypatch):
    nets, noises, groups = sampling()[0], {}, []

    def fake_actions(nets, obs, noise, weights, method, schedule, denoise_steps):
        return noise[:, -1] + (method == "bc") + 2 * ("first" in nets)

    monkeypatch.setattr(qgf, "sample_actions", fake_actions)

    def group(now, commands):
        replies = {}
        for i, c in commands.items():
            if isinstance(c, int):
                now[i] = [c, 0]
                replies[i] = np.full(S, c), [], False, False
            else:
                seed, k = now[i]
                now[i][1] += 1
                noises.setdefault((seed, k), []).append(c.copy())
                done = k == seed % 3
                replies[i] = np.full(S, c[0, 0]), [-1.0] * (1 if done else 3), done, seed % 2 == 0
        future = Future()
        future.set_result(replies)
        return future

    groups = [partial(group, {}) for _ in range(3)]
    hows = (("a-s0", "qgf", 0.5), ("a-s0", "bc", 0.0), ("a-s1", "qgf", 1.0))
    jobs = [qgf.Job(*how, seed) for how in hows for seed in range(7)]
    episodes = qgf.rollout({"a-s0": nets, "a-s1": nets | dict(first=1)}, groups, jobs, CFG, "test")
    assert [e[:4] for e in episodes] == jobs  # each once, in order
    assert all(e.success == (e.seed % 2 == 0) for e in episodes)
    assert all(e.length == 3 * (e.seed % 3) + 1 and e.ret == -e.length for e in episodes)
    for v in noises.values():  # the same noise for each run and method, which are not mixed up
        low, high, other = sorted(v, key=lambda x: x[0, 0])
        assert np.allclose(high, low + 1) and np.allclose(other, low + 2)
    assert len({v[0].tobytes() for v in noises.values()}) == len(noises)  # and no noise is used twice


def test_a_row_of_actions_does_not_depend_on_its_place_in_the_batch():
    """What makes an evaluation repeatable, though its groups run at their own pace."""
    nets, s, a_0 = sampling(B=4)
    rows = sample(nets, s, a_0, 0.3)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(sample(nets, s[order], a_0[order], 0.3), rows[order])
    np.testing.assert_array_equal(sample(nets, s.at[1:].set(7.0), a_0, 0.3)[0], rows[0])


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


def test_slices_come_in_turn_and_at_most_two_are_in_memory():
    cfg = replace(CFG, swap=200, seed=3)
    alive, most, ready = weakref.WeakSet(), [], threading.Event()

    class Slice:
        def __init__(self, name):
            self.name = name

    def load(path):
        alive.add(data := Slice(path))
        most.append(len(alive))
        ready.set()
        return data

    def names(slices, n):
        return [path for path, _ in itertools.islice(slices, n)]

    slices = qgf.stream(["a", "b", "c", "d"], load, cfg, 0)
    path, now = next(slices)
    assert now.name == path and ready.wait(5)
    ready.clear()
    rest = []
    for _ in range(11):
        now = None
        path, now = next(slices)  # held, as by a training run
        rest.append(now.name)
        assert ready.wait(5)  # the next is read, though nobody has asked for it
        ready.clear()
    assert max(most) == 2
    order = names(qgf.stream(["a", "b", "c", "d"], load, cfg, 0), 12)
    assert order[1:] == rest  # the same again, each once in a pass, passes and seeds apart
    assert all(sorted(order[i : i + 4]) == ["a", "b", "c", "d"] for i in (0, 4, 8))
    assert len({*zip(*[iter(order)] * 4)}) > 1
    assert names(qgf.stream(["a", "b", "c", "d"], load, replace(cfg, seed=4), 0), 12) != order
    # a run goes on in the slice in which it stopped
    assert names(qgf.stream(["a", "b", "c", "d"], load, cfg, 5 * 200 + 70), 7) == order[5:]
    before = len(most)
    assert names(qgf.stream(["a"], load, cfg, 0), 9) == ["a"] * 9 and len(most) == before + 1


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
    [path], origin = qgf.find_dataset(qgf.Config(collect=2000), "cube-single", "cube-single-play-v0")
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


def test_a_real_run_from_the_command_line(home, capsys):
    p = start(
        home, "--updates", "300", "--out", "real", "--edp", "10", "--methods", "qgf", "qgf-jacobian+score@2"
    )
    out, err = p.communicate(timeout=170)
    assert p.returncode == 0, err
    for words in (
        "cube-single-singletask-v0, seed 0",
        "2,000 transitions in 2 trajectories",
        "rewards -1 to",
        "parameters",
        "fresh episodes",
        "did guidance help?",
        "saved in real/cube-single-s0",
    ):
        assert words in out, (words, out)
    assert [line.split()[0] for line in out.splitlines() if "░" in line] == [
        *("qgf", "qgf-jacobian+score@2"),  # to choose their weights
        *("bc", "qgf", "qgf-jacobian+score@2", "edp"),
    ]
    folder = home / "real/cube-single-s0"
    rows = [line.split(",") for line in (folder / "episodes.csv").read_text().splitlines()]
    assert rows[0] == "purpose,run,method,weight,seed,success,ret,length".split(",")
    seeds = [row[4] for row in rows[1:]]
    assert len(seeds) == 2 + 8 and all(seeds[i : i + 2] == seeds[2:4] for i in (4, 6, 8))  # paired
    assert not set(seeds[:2]) & set(seeds[2:])  # chosen on others
    table = np.genfromtxt(folder / "table.csv", delimiter=",", names=True, dtype=None, encoding=None)
    assert table["mflop"][2] > 5 * table["mflop"][0] > 0 and (table["ms_1"] > 0).all()
    assert qgf.main(["--table", str(home / "real")]) == 0
    pooled = capsys.readouterr().out
    assert (
        "| cube-single |" in pooled
        and "| `qgf-jacobian+score@2` |" in pooled
        and "runs: 1; episodes per method: 2" in pooled
    )
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["width"] == 16 and "jax" in record["versions"]
    assert "play policies" in record["data"]
    metrics = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    assert (
        metrics["step"].tolist() == [100, 200, 300] and metrics["flow_loss"][-1] < metrics["flow_loss"][0]
    )
    assert np.isfinite(metrics["q"]).all()


@pytest.fixture(scope="session")
def whole(home):
    """A finished run. Beside it is `stopped`, which went as far through a Ctrl-C and a kill -9."""
    stopped = start(home, "--updates", "1000000", "--out", "stopped")  # far more than it will live to see
    for line in stopped.stdout:  # the plan is printed when training begins
        if line.startswith("plan"):
            break
    time.sleep(3)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 1 and "stopped at update" in err and "Traceback" not in err
    first = int(checkpoint(home / "stopped")["step"][0])
    assert 100 <= first < 1000000
    again = start(home, "--updates", "1000000", "--out", "stopped")
    for line in again.stdout:
        if line.startswith("plan"):
            assert f"updates {first} to 1000000" in line
            break
    again.kill()  # kill -9, as a power cut would: the checkpoint is whole and the last one
    again.wait()
    assert int(checkpoint(home / "stopped")["step"][0]) == first
    for name in ("stopped", "whole"):
        p = start(home, "--updates", str(first + 200), "--out", name)
        _, err = p.communicate(timeout=170)
        assert p.returncode == 0, err
    return home / "whole"


def test_a_run_stopped_or_killed_goes_on_bitwise(home, whole):
    a, b = checkpoint(whole), checkpoint(home / "stopped")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a if k != "record")
    for name in ("metrics.csv", "episodes.csv"):
        a, b = (run / "cube-single-s0" / name for run in (whole, home / "stopped"))
        assert a.read_text() == b.read_text()


def test_a_run_on_slices_that_meets_a_broken_one_keeps_what_it_has_and_goes_on(home, capsys):
    with np.load(home / ".ogbench/data/cube-single-play-v0-collected-2000.npz") as file:
        data = dict(file)
    slices = home / "slices"
    slices.mkdir()
    for i in range(3):
        np.savez(slices / f"{i}.npz", **{k: v[300 * i : 300 * i + 280] for k, v in data.items()})
    (slices / "x-val.npz").touch()  # for validation, in OGBench's naming, and not trained on
    whole = (slices / "1.npz").read_bytes()
    (slices / "1.npz").write_bytes(whole[:999])
    args = ["--data", str(slices), "--swap", "50", "--out", str(home / "sliced"), "--seeds", "2"]
    args += ["--updates", "170", "--episodes", "1", "--methods", "bc@2"]
    assert main(home, *args) == 1
    assert "slices/1.npz is missing, truncated" in capsys.readouterr().err
    order = np.random.default_rng((0, 0)).permutation(3).tolist()
    stopped = 50 * order.index(1)
    if stopped:
        assert checkpoint(home / "sliced")["step"].tolist() == [stopped, stopped]
    (slices / "1.npz").write_bytes(whole)
    assert main(home, *args) == 0
    out = capsys.readouterr().out
    assert f"plan    updates {stopped} to 170" in out and "for each of 2 seed(s)" in out
    assert "to choose the weight" not in out  # bc@2 needs none
    folder = home / "sliced/cube-single-s0"
    assert json.loads((folder / "config.json").read_text())["seen"] == {f"{i}.npz": 280 for i in range(3)}
    metrics = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    assert metrics["step"].tolist() == [50, 50, 100, 100, 150, 150, 170, 170]
    assert metrics["seed"].tolist() == [0, 1] * 4
    runs = [e.run for e in qgf.read_episodes(folder)[1]]
    assert runs == ["cube-single-s0"] * 2 + ["cube-single-s1"] * 2  # bc and bc@2 of each


def test_the_papers_settings():
    single, goal = qgf.defaults("puzzle-4x4", "", "paper"), qgf.defaults("puzzle-4x5", "oracle", "paper")
    names = ("updates", "batch_size", "width", "depth", "lr", "discount", "expectile", "horizon")
    assert [single[k] for k in names] == [500_000, 1024, 1024, 4, 3e-4, 0.999, 0.9, 5]
    assert 0.01 in single["weights"]  # the peak of its sweep
    assert [goal[k] for k in names[:2]] == [1_000_000, 4096]
    assert goal["long_horizon"] == 25 and single["long_horizon"] == 0
    assert [qgf.defaults(f"puzzle-4x{i}", "oracle", "paper")["horizon"] for i in (5, 6)] == [5, 1]
    # Q = γ^k, k steps before the goal, and ours: -1 a step, discounted. Its gradient is 1-γ times as steep.
    k, discount = np.array([10.0, 50.0]), 0.999
    ours = -(1 - discount**k) / (1 - discount)
    assert np.diff(discount**k) / np.diff(ours) == pytest.approx(1 - discount)
    assert [w / (1 - discount) for w in goal["weights"]] == pytest.approx([1, 2, 5, 10])
    assert set(qgf.PAPER_WEIGHTS) == set(qgf.PAPER_FAMILIES[:4])


class Filmed(gymnasium.Env):
    """Gets brighter with each step, and ends after five."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (S,)), gymnasium.spaces.Box(-1, 1, (A,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return np.zeros(S, np.float32), {}

    def step(self, action):
        self.n += 1
        return np.zeros(S, np.float32), -1.0, self.n == 5, False, dict(success=self.n == 5)

    def render(self):
        return np.full((64, 200, 3), 40 * self.n, np.uint8)


def test_a_film_shows_both_methods_side_by_side(tmp_path, monkeypatch):
    bc, guided = episodes_of("bc", 0.0, 2, 5), episodes_of("qgf", 0.1, 4, 5)
    rows = [("report", *e) for e in bc + guided]
    qgf.write_csv(tmp_path / "episodes.csv", [("purpose", *qgf.Episode._fields), *rows])
    monkeypatch.setattr(qgf, "make_env", lambda env_id, goal, **size: Filmed())
    cfg = replace(CFG, gif=str(tmp_path / "film.gif"))
    nets = {"cube-single-s0": sampling()[0]}
    qgf.film(nets, tmp_path, "filmed", cfg)
    with Image.open(cfg.gif) as film:
        frames = [np.asarray(f.convert("L")) for f in ImageSequence.Iterator(film)]
    assert frames[0].shape == (64, 400)
    assert frames[0][9, 0] < frames[1][9, 0] == frames[1][9, 399]  # both go on, step by step
    assert (frames[0][44:, :200] != frames[0][44:, 200:]).any()  # other words below each

    def dark(self):
        raise RuntimeError("no display")

    monkeypatch.setattr(Filmed, "render", dark)
    with pytest.raises(qgf.UserError, match="cannot render here .*no display.*MUJOCO_GL=egl"):
        qgf.film(nets, tmp_path, "filmed", cfg)


STUB = """#!/usr/bin/env bash
echo "$*" >> calls
case "$*" in *--table*) echo "| table |"; exit;; esac
[ "$3" = broken ] && exit 1
[ "$3" = slow ] && [ ! -e fast ] && { touch fast; sleep 60; }
mkdir -p "$7/$3-s$5" && touch "$7/$3-s$5/episodes.csv"
"""


def test_run_all_goes_on_after_a_failure_or_a_kill_and_repeats_nothing(tmp_path):
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    env = os.environ | dict(PYTHON=str(tmp_path / "python"), OUT="runs")
    command = [Path(qgf.__file__).parent / "run_all.sh", "one broken slow two", "0 1"]
    p = subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "fast").exists():
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    p = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True)
    assert p.returncode == 1 and "failed: broken-s0 broken-s1" in p.stderr and "| table |" in p.stdout
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    calls = [f"{c[2]}-s{c[4]}" if len(c) > 3 else "table" for c in calls]
    first = ["one-s0", "one-s1", "broken-s0", "broken-s1", "slow-s0"]
    assert calls == first + ["broken-s0", "broken-s1", "slow-s0", "slow-s1", "two-s0", "two-s1", "table"]


def test_run_all_lists_its_runs_and_a_slurm_task_takes_one():
    here = Path(qgf.__file__).parent
    command = [here / "run_all.sh", "--dry-run", "cube-single scene", "0 7", "--width", "64"]
    env = os.environ | dict(OUT="some folder", SLURM_SUBMIT_DIR=str(here))
    lines = subprocess.run(command, env=env, text=True, capture_output=True).stdout.splitlines()
    want = [(e, s) for e in ("cube-single", "scene") for s in "07"]
    assert [tuple(line.split()[i] for i in (3, 5)) for line in lines] == want
    assert all(r"--out some\ folder --width 64" in line for line in lines)
    env["SLURM_ARRAY_TASK_ID"] = "2"
    one = subprocess.run(command, env=env, text=True, capture_output=True).stdout.splitlines()
    assert one == [lines[2]]
    for i, (benchmark, want) in enumerate([("paper", "scene-task5"), ("paper-goals", "cube-octuple")]):
        env["SLURM_ARRAY_TASK_ID"] = ["19", "4"][i]
        p = subprocess.run([*command[:2], benchmark], env=env, text=True, capture_output=True)
        assert f"--env {want} --seed 0 --out some\\ folder --preset paper" in p.stdout
        assert p.stdout.rstrip().endswith("--goal") == (i == 1) and p.stdout.count("\n") == 1


def main(whole, *args):
    return qgf.main(["--env", "cube-single", "--collect", "2000", "--out", str(whole), *SMALL, *args])


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env", "cube-duble"], "did you mean cube-double"),
        (["--env", "cube-single-task9"], "did you mean"),
        (["--lr", "-1"], "--lr -1.0 is out of range"),
        (["--table", ""], "--table '' is out of range"),
        (["--goal-flow", "--out", "other"], "there is none without --goal"),
        (["--goal-flow"], "holds a run with no --goal-flow"),
        (["--env", "cube-single-task2", "--goal"], "give --env cube-single"),
        (["--data", "nowhere.npz", "--out", "other"], "nowhere.npz: No such file"),
        (["--data", ".", "--out", "other"], "has no .npz in it"),
        (["--seeds", "2"], "holds a run with --seeds 1"),
        (["--long-horizon", "3", "--out", "other"], "--long-horizon 3 is shorter than the 5"),
        (["--gif", "film.gif"], "no episode that QGF solved"),
        (["--width", "32"], "holds a run with --width 16"),
        (["--eval", "--width", "32"], "holds a run with --width 16"),
        (["--eval", "--seed", "7"], "train first, without --eval"),
        (["--methods", "qgf", "best"], "unknown method 'best'"),
        (["--methods", "gradstep+score"], "unknown method 'gradstep+score'"),
        (["--methods", "edp@4"], "train one with --edp"),
        (["--table", "nowhere"], "no finished run in nowhere"),
        (
            ["--env", "antmaze-large-navigate-singletask-v0"],
            "no scripted policy makes antmaze-large-navigate-v0",
        ),
    ],
)
def test_a_users_mistake_gets_one_clear_line(home, whole, monkeypatch, capsys, args, words):
    monkeypatch.chdir(home)
    before = checkpoint(whole)
    assert main(whole, *args) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("qgf: ") and words in err and len(err) < 400
    assert all((v == before[k]).all() for k, v in checkpoint(whole).items())


def test_other_data_in_a_runs_way_is_refused(home, whole, capsys):
    collected = home / ".ogbench/data/cube-single-play-v0-collected-2000.npz"
    with np.load(collected) as file:
        np.savez(home / "other.npz", **{k: v[:1001] for k, v in file.items()})
    assert main(whole, "--updates", "500", "--data", str(home / "other.npz")) == 1
    assert "was trained on other data" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_and_kept(home, whole, capsys):
    path = home / "damaged/cube-single-s0/checkpoint.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes((whole / "cube-single-s0/checkpoint.npz").read_bytes()[:3000])
    assert main(whole, "--out", str(home / "damaged")) == 1
    assert "is no whole checkpoint" in capsys.readouterr().err and path.stat().st_size == 3000


def test_a_diverging_run_stops_with_its_step_and_keeps_the_last_good_checkpoint(whole, capsys, monkeypatch):
    before = checkpoint(whole)
    real = qgf.train_seeds

    def diverging(states, data, n, cfg):
        states, info = real(states, data, n, cfg)
        return states, info | dict(q=info["q"].at[0, 37].set(np.nan))

    monkeypatch.setattr(qgf, "train_seeds", diverging)
    step = int(before["step"][0])
    assert main(whole, "--updates", str(step + 100)) == 1
    assert f"NaN or Inf at update {step + 38};" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C is the caller's again
    assert all((v == before[k]).all() for k, v in checkpoint(whole).items())
    states, record = qgf.load_run(whole / "cube-single-s0", {})
    with pytest.raises(qgf.UserError, match="params/value/0/b is NaN"):
        states.params["value"][0]["b"][0, 0] = np.nan
        qgf.save_run(whole / "cube-single-s0", states, [], record)


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), qgf.gentle_stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        signal.raise_signal(signal.SIGINT)


def test_workers_leave_ctrl_c_to_their_parent_and_end_with_their_block():
    with qgf.workers(2, 1) as pools:
        for process in multiprocessing.active_children():  # they have only begun to start
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGTERM)
        assert [pool.submit(abs, -1).result(timeout=60) for pool in pools] == [1, 1]
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # and the parent gets it again


@pytest.mark.parametrize("files", range(5))
def test_a_kill_between_two_files_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch, files):
    states, record = qgf.load_run(whole / "cube-single-s0", {})
    write, written = qgf.atomic_write, []

    def killed(path, mode="wb"):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, mode)

    monkeypatch.setattr(qgf, "atomic_write", killed)
    monkeypatch.setattr(qgf, "evaluate", lambda *_: ([], [qgf.Episode("a-s0", "bc", 0.0, 1, True, 1.0, 9)]))
    monkeypatch.setattr(qgf, "cost", lambda *_: dict(ms_1=1, us_256=1, mflop=1))
    with pytest.raises(KeyboardInterrupt):
        qgf.save_run(tmp_path / "a-s0", states, [[300, 0, *"12345"]], record)
        qgf.report(tmp_path / "a-s0", "a", dict(nets=None), "env", qgf.Config())
    if "checkpoint.npz" in written:  # or else the run begins again
        assert "metrics.csv" in written
    if "episodes.csv" in written:  # or else it is not done, for run_all.sh and --table
        assert qgf.pooled(tmp_path)


def test_a_full_or_unwritable_disk_is_named_and_leaves_the_old_file(whole, tmp_path, capsys, monkeypatch):
    folder, before = whole / "cube-single-s0", checkpoint(whole)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        assert main(whole, "--updates", str(int(before["step"][0]) + 100)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert all((v == before[k]).all() for k, v in checkpoint(whole).items())
    assert not list(folder.glob("*.part"))
    (tmp_path / "file").touch()
    assert main(whole, "--out", str(tmp_path / "file")) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
