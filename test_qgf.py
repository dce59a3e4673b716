# SPDX-License-Identifier: MIT
"""Every loss, estimator and file of qgf.py against something independent: python -m pytest."""

import math
import os
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

import qgf

S, G, A, H = 4, 3, 2, 3
CFG = qgf.Config(
    policy_width=16, critic_width=16, depth=1, batch_size=32, horizon=H, denoise_steps=5
)
KEY = jax.random.PRNGKey(0)
sample_batch = jax.jit(qgf.sample_batch, static_argnums=2)
init_state = jax.jit(qgf.init_state, static_argnums=(0, 1, 2))


def random_data():
    """Trajectories of 7, 20, 4 and 29 rows; that of 20 ends with a success."""
    rng = np.random.default_rng(0)
    last = np.array([6, 26, 30, 59])
    ends = last[np.searchsorted(last, np.arange(60))]
    masks = np.float32(rng.random(60) > 0.2)
    masks[last] = [1, 0, 1, 1]
    starts = [i for i in range(60) if i + H <= ends[i] or (i + H - 1 == ends[i] == 26)]
    return qgf.Data(
        observations=np.float32(rng.normal(size=(60, S))),
        actions=np.float32(rng.uniform(-1, 1, (60, A))),
        rewards=np.float32(rng.normal(size=60)),
        masks=masks,
        goals=np.float32(rng.normal(size=(60, G))),
        ends=ends,
        starts=np.array(starts),
    )


DATA = random_data()
BATCH = jax.device_get(sample_batch(KEY, DATA, CFG))


def some_state(learner):
    """A State without zeros and ones, whose averages differ from its parameters."""
    state = jax.device_get(init_state(learner, (S, G, A), CFG))
    rng = np.random.default_rng(7)

    def noisy(x):
        return x + np.float32(0.1 * rng.normal(size=x.shape))

    params, average = (jax.tree.map(noisy, state.params) for _ in range(2))
    return state._replace(params=params, average=average)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# ---- the networks in float64 numpy
def numpy_mlp(layers, x):
    layers = jax.tree.map(np.float64, layers)
    out = []
    for row in np.float64(x):
        for layer in layers[:-1]:
            row = row @ layer["w"] + layer["b"]
            if "scale" in layer:
                row = (row - row.mean()) / np.sqrt(row.var() + 1e-6)
                row = row * layer["scale"] + layer["shift"]
            row = 0.5 * row * (1 + np.tanh(np.sqrt(2 / np.pi) * (row + 0.044715 * row**3)))
        out.append(row @ layers[-1]["w"] + layers[-1]["b"])
    return np.array(out)


def numpy_velocity(policy, s, a, t):
    angles = 1e4 * np.broadcast_to(t, (len(a), 1)) * 1e4 ** (-np.arange(8) / 8)
    return numpy_mlp(policy, np.concatenate([s, a, np.cos(angles), np.sin(angles)], axis=1))


def numpy_q(critic, s, g, a):
    x = np.concatenate([s, g, a], axis=1)
    return np.array([numpy_mlp(jax.tree.map(lambda p: p[k], critic), x)[:, 0] for k in range(2)])


def finite_differences(f, a):
    """∇f: f maps (B, D) to (B,), a row at a time."""
    steps = 1e-5 * np.eye(a.shape[1])
    return np.stack([(f(a + e) - f(a - e)) / 2e-5 for e in steps], axis=1)


# ---- networks
def test_networks_equal_numpy():
    cfg = replace(CFG, depth=2)
    policy = init_state("policy", (S, G, A), cfg).params["policy"]
    critic, v = init_state("critic", (S, G, A), cfg).params.values()
    assert ["scale" in layer for layer in policy] == [True, False, False]  # as in the official code
    assert ["scale" in layer for layer in critic] == [True, True, False]
    assert policy[0]["w"].shape == (S + H * A + 16, 16)  # blind to goals

    s, g, a = BATCH.observations, BATCH.goals, BATCH.actions
    t = np.full((32, 1), 0.4)
    got = jax.jit(
        lambda: (
            qgf.velocity(policy, s, a, t, cfg),
            qgf.q_values(critic, s, g, a),
            qgf.q_min(critic, s, g, a),
            qgf.value(v, s, g),
        )
    )()
    q = numpy_q(critic, s, g, a)
    assert {*np.argmin(q, axis=0)} == {0, 1}
    v = numpy_mlp(v, np.concatenate([s, g], axis=1))[:, 0]
    want = numpy_velocity(policy, s, a, t), q, q.min(axis=0), v
    assert_close(got, want, rtol=1e-3, atol=1e-3)


# ---- losses
def test_policy_loss_equals_numpy():
    params = some_state("policy").params
    a_1, T = BATCH.actions, CFG.denoise_steps
    key_noise, key_time = jax.random.split(KEY)
    a_0 = np.asarray(jax.random.normal(key_noise, a_1.shape))
    t = np.asarray(jax.random.randint(key_time, (32, 1), 0, T + 1)) / T
    assert {*t.ravel()} == {*np.arange(T + 1) / T}
    v = numpy_velocity(params["policy"], BATCH.observations, (1 - t) * a_0 + t * a_1, t)
    loss, log = qgf.policy_loss(params, None, BATCH, KEY, CFG)
    assert loss == pytest.approx(np.mean((v - (a_1 - a_0)) ** 2), rel=1e-4)
    assert log == dict(policy_loss=loss)


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
        return float(qgf.policy_loss(dict(policy=None), None, batch, KEY, CFG)[0])

    t = np.arange(T + 1) / T  # the least loss is the variance of a_1 - a_0 given a_t
    least = sigma**2 / ((1 - t) ** 2 + (t * sigma) ** 2)
    assert loss(0, 0) == pytest.approx(least.mean(), rel=0.01)
    for x in (-0.05, 0.05):
        assert min(loss(x, 0), loss(0, x)) > loss(0, 0)


def test_critic_loss_equals_numpy():
    params, average, *_ = some_state("critic")
    assert {*(BATCH.discounts > 0)} == {True, False}
    s, g, a = BATCH.observations, BATCH.goals, BATCH.actions
    q = numpy_q(params["critic"], s, g, a)
    q_average = numpy_q(average["critic"], s, g, a).min(axis=0)
    v, v_next = (
        numpy_mlp(params["value"], np.concatenate([x, g], axis=1))[:, 0]
        for x in (s, BATCH.next_observations)
    )
    q_loss = np.mean((q - BATCH.returns - BATCH.discounts * v_next) ** 2)
    u = q_average - v
    assert {*(u < 0)} == {True, False}
    v_loss = np.mean(np.where(u < 0, 0.05, 0.95) * u**2)

    def terms(params):
        loss, log = qgf.critic_loss(params, average, BATCH, KEY, CFG)
        return log, (loss, log)

    slopes, (loss, log) = jax.jit(jax.jacrev(terms, has_aux=True))(params)
    assert loss == pytest.approx(q_loss + v_loss, rel=1e-4)
    assert_close(log, dict(q_loss=q_loss, v_loss=v_loss, q=q_average.mean()), rtol=1e-4)
    reached = []
    for term, tree in slopes.items():
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
    states = np.arange(60.0)[:, None]  # a state is its row's number
    data = DATA._replace(observations=states, goals=np.zeros((60, 0)))
    batch = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=500)))
    assert batch.goals.shape == (500, 0)
    for k in range(500):
        i = int(batch.observations[k, 0])
        assert_discounted(batch, k, data.rewards[i:], data.masks[i:])
        assert_same(batch.actions[k], data.actions[i : i + H].ravel())
        if batch.discounts[k]:
            assert batch.next_observations[k] == i + H
    assert {*batch.observations[:, 0]} == {*data.starts}


def test_hindsight_equals_a_brute_force_loop():
    n, i = 6000, np.arange(60)
    pairs = np.float32([i // 2 * 0.8 + i % 2 * 0.39, i % 2 * 0.39]).T  # .39 within, .41 between
    data = DATA._replace(goals=pairs, observations=np.arange(60.0)[:, None])
    batch = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=n)))
    counts, ends = [0, 0, 0, 0], data.ends
    for k in range(n):
        i = int(batch.observations[k, 0])
        goal = int(np.flatnonzero((pairs == batch.goals[k]).all(axis=1))[0])
        masks = [(i + j) // 2 != goal // 2 for j in range(H)]
        assert_discounted(batch, k, [-x for x in masks], masks)
        counts[0 if goal == i else 3 if goal == ends[i] else 1 if i < goal < ends[i] else 2] += 1
    left = ends[data.starts] - data.starts  # rows to come, the last of which is one
    later, last = (np.mean(0.5 * x + 0.3 * x * left / 60) for x in (1, 1 / left))
    want = [0.2 + 0.3 / 60, later - last, 0.8 - 0.3 / 60 - later, last]
    assert_close(np.array(counts) / n, want, atol=0.012)


# ---- training
@pytest.mark.slow
@pytest.mark.parametrize("learner", qgf.LEARNERS)
def test_training_is_single_updates(learner):
    fresh, other = (init_state(learner, (S, G, A), replace(CFG, seed=i)) for i in (0, 1))
    assert_same(fresh.params, fresh.average)
    assert (jax.tree.leaves(fresh.params)[-1] != jax.tree.leaves(other.params)[-1]).all()

    scanned, log = qgf.train(learner, some_state(learner), DATA, 4, CFG)
    two = jax.device_get(qgf.train(learner, some_state(learner), DATA, 2, CFG)[0])
    assert_same(scanned, qgf.train(learner, two, DATA, 2, CFG)[0])

    gradient = jax.jit(jax.grad(qgf.LEARNERS[learner][1], has_aux=True), static_argnums=4)
    state = some_state(learner)
    for i in range(2):
        params, average, _, key, _ = state
        key_batch, key_loss = jax.random.split(jax.random.fold_in(key, i))
        batch = sample_batch(key_batch, DATA, CFG)
        g, info = jax.device_get(gradient(params, average, batch, key_loss, CFG))
        assert_close({name: x[i] for name, x in log.items()}, info, rtol=1e-4)
        state = jax.device_get(qgf.train(learner, state, DATA, 1, CFG)[0])
        average = jax.tree.map(lambda x, p: 0.995 * x + 0.005 * p, average, params)  # the old ones
        assert_close(state.average, average, atol=3e-7)
        if i == 0:  # Adam's first step
            params = jax.tree.map(lambda p, g: p - 1e-3 * g / (abs(g) + 1e-8), params, g)
            assert_close(state.params, params, atol=1e-5)
    assert_close(two, state, rtol=1e-4, atol=1e-5)


# ---- a bandit whose actions are near (-.6, 0) or, one time in five, (.6, 0), which is better
@pytest.fixture(scope="session")
def toy():
    rng = np.random.default_rng(0)
    good = rng.random((4000, 1)) < 0.2
    a = np.float32(np.where(good, [0.6, 0], [-0.6, 0]) + rng.normal(0, 0.1, (4000, 2)))
    zeros, rows = np.zeros((4000, 1), np.float32), np.arange(4000)
    data = qgf.Data(zeros, a, a[:, 0], zeros[:, 0], zeros[:, :0], ends=rows, starts=rows)
    cfg = qgf.Config(policy_width=32, critic_width=32, depth=2, batch_size=128, horizon=1)
    nets = {}
    for learner in qgf.LEARNERS:
        state = init_state(learner, (1, 0, 2), cfg)
        nets |= qgf.train(learner, state, data, 1200, cfg)[0].average
    return nets, cfg


@pytest.mark.slow
def test_a_toy_bandit_is_solved(toy):
    nets, cfg = toy

    def good(samples, w, method):
        a_0 = jax.random.normal(KEY, (500, samples, 2))
        s, g = jnp.zeros((500, 1)), jnp.zeros((500, 0))
        return (qgf.sample_actions(nets, s, g, a_0, w, method, cfg)[0][:, 0] > 0).mean()

    assert 0.1 < good(1, 0.0, "bc") < 0.35  # a fifth, as in the data
    assert good(1, 10.0, "qgf") > 0.9
    assert good(32, 0.0, "bc") > 0.95


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
        found = {name: f(q, flow, a, t, flow(a, t), T) for name, f in qgf.GUIDANCE.items()}
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


def test_estimators_equal_finite_differences():
    nets, s, g, a_0 = sampling(6)
    q, flow = closures(nets, s, g)
    a = 0.5 * a_0[:, 0]
    t = np.full((6, 1), 0.4)

    def judge(a):
        return numpy_q(nets["critic"], s, g, a).min(axis=0)

    def clean(a):
        return np.clip(a + 0.6 * numpy_velocity(nets["policy"], s, a, 0.4), -1, 1)

    def end(a):
        for now in (0.4, 0.6, 0.8):
            a = a + numpy_velocity(nets["policy"], s, a, now) / 5
        return np.clip(a, -1, 1)

    for f in (clean, end):
        assert (abs(f(a)) == 1).any() and (abs(f(a)) < 1).mean() > 0.5
    want = {
        "qgf": finite_differences(judge, clean(a)),
        "qgf-jacobian": finite_differences(lambda a: judge(clean(a)), a),
        "bptt": finite_differences(lambda a: judge(end(a)), a),
        "qfql": finite_differences(judge, a),
    }

    @jax.jit
    def estimate(a, t):
        estimates = {name: f(q, flow, a, t, flow(a, t), 5) for name, f in qgf.GUIDANCE.items()}
        return estimates, qgf.integrate(flow, a, t, 5)

    got, got_end = estimate(a, t)
    assert_close(got, want, rtol=2e-2, atol=1e-3)
    assert_close(got_end, end(a), atol=1e-4)


def test_no_weight_is_bc_and_another_weight_compiles_nothing():
    nets, *rest = sampling(6)
    bc, _ = qgf.sample_actions(nets, *rest, 1.0, "bc", CFG)
    assert_same(qgf.sample_actions(nets, *rest, 0.0, "qgf", CFG)[0], bc)
    compiled = qgf.sample_actions._cache_size()
    assert (qgf.sample_actions(nets, *rest, 0.123, "qgf", CFG)[0] != bc).any()
    assert qgf.sample_actions._cache_size() == compiled


@pytest.mark.parametrize("method", qgf.METHODS)
def test_every_method_is_its_plain_loop_and_best_of_2(method):
    """Without fade, qgf is the paper's update."""
    nets, s, g, a_0 = sampling(6, N=2)
    q, flow = closures(nets, s, g)
    uphill = jax.jit(jax.grad(lambda a: q(a).sum()))
    estimate = qgf.GUIDANCE.get(method, lambda q, flow, a_t, t, v, T: 0)
    estimate = jax.jit(partial(estimate, q, flow, T=5))
    for fade in (True, False):
        candidates = []
        for n in range(2):
            a = a_0[:, n]
            for i in range(5):
                t = np.full((6, 1), i / 5)
                c = (1 - t) / ((1 - t) ** 2 + t**2) if fade else 1
                v = flow(a, t)
                a = a + np.array(v + 0.1 * c * estimate(a, t, v)) / 5
            a = np.clip(a, -1, 1)
            for _ in range(qgf.ASCENTS if method == "gradstep" else 0):
                a = np.clip(a + 0.1 * np.array(uphill(a)), -1, 1)
            candidates.append(a)
        best = np.argmax([q(a) for a in candidates], axis=0)
        assert 0 < best.sum() < 6  # either is the better one somewhere
        got, _ = qgf.sample_actions(nets, s, g, a_0, 0.1, method, replace(CFG, fade=fade))
        assert_close(got, np.array(candidates)[best, np.arange(6)], atol=1e-4)


@pytest.mark.parametrize("method", [*qgf.GUIDANCE, "gradstep"])
def test_relative_weight_of_a_linear_critic(monkeypatch, method):
    """∇Q is x everywhere: all pushes together have the rms λ, whatever the size of x."""
    x = np.float32([1, -2, 0.5, 3, 0, 1])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))  # no clipping
    policy = [dict(w=jnp.zeros((S + 6 + 16, 6)), b=jnp.zeros(6))]  # stays there
    for size in (1.0, 10.0, 1e-4):
        w = np.concatenate([np.ones(S + G), size * x]).astype(np.float32)
        nets = dict(policy=policy, critic=[dict(w=np.stack([w, w])[..., None], b=np.zeros((2, 1)))])
        got = qgf.relative_weight(0.5, nets, BATCH, method, CFG)
        push = got * size * np.sqrt(np.mean(x**2))
        if method == "gradstep":
            push *= 10 * qgf.ASCENTS
        assert push == pytest.approx(0.5, rel=1e-4)


def test_relative_weight_is_lambda_over_the_rms():
    nets = sampling(1)[0]
    q, flow = closures(nets, BATCH.observations, BATCH.goals)
    a = jax.random.normal(KEY, BATCH.actions.shape)
    squares = []
    for i in range(5):
        t = np.full((32, 1), i / 5)
        v = flow(a, t)
        squares.append(np.square(qgf.qgf(q, flow, a, t, v, 5)).mean())
        a = a + v / 5
    w = qgf.relative_weight(0.1, nets, BATCH, "qgf", CFG)
    assert w == pytest.approx(0.1 / np.sqrt(np.mean(squares)), rel=1e-4)


# ---- closed forms: π_BC is a Gaussian with its exact velocity, and guided flows are linear ODEs
def guided(monkeypatch, q, velocity, w, a_0, method, **changes):
    """Where these rows of noise (B, D) go, if the critic is q."""
    monkeypatch.setattr(qgf, "velocity", velocity)
    monkeypatch.setattr(qgf, "q_values", lambda critic, s, g, a: jnp.stack([q(a), q(a) + 1]))
    nets = dict(policy=0, critic=0)
    s = jnp.zeros((len(a_0), 0))
    run = jax.jit(qgf.sample_actions.__wrapped__, static_argnames=("method", "cfg"))
    return run(nets, s, s, a_0[:, None], w, method, replace(CFG, **changes))[0]


@pytest.mark.parametrize("w", [0.3, 1.0, 2.0])
def test_qgf_is_exact_for_a_linear_critic(monkeypatch, w):
    """N(0, I) tilted by w Q is N(w g, I): each sample moves by w g, so the variance stays."""
    g = np.float32([0.3, -0.2])
    a_0 = np.float32(np.random.default_rng(0).uniform(-0.35, 0.35, (20, 2)))
    flow = gaussian_velocity(0, 1)
    a = guided(monkeypatch, lambda a: a @ g, flow, w, a_0, "qgf", denoise_steps=2000)
    assert_close(a, a_0 + w * g, atol=2e-3)


@pytest.mark.parametrize("method", qgf.GUIDANCE)
def test_without_fade_a_gaussian_goes_where_each_methods_ode_says(monkeypatch, method):
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
    got = guided(monkeypatch, q, flow, w, noise, method, denoise_steps=T, fade=False)
    assert_close(got[:, 0], want, atol=4 / T)


SIZES = (4, 0, 2)
TINY = qgf.Config(policy_width=8, critic_width=8, depth=1, batch_size=8, horizon=3)
TINY = replace(TINY, policy_updates=1300, critic_updates=1300)
ENV = SimpleNamespace(sizes=SIZES, low=np.full(2, -1.0), high=np.ones(2), unwrapped=None)
TASK, GOAL, OWN = map(qgf.find_task, ("cube-single-task1", "cube-single", "Pendulum-v1"))
COLLECTED = ".ogbench/data/cube-single-play-v0-collected-2000.npz"


# ---- data
def raw_data(**changes):
    """A file's arrays: trajectories of 7, 2 and 20 rows; the last one ends with a success."""
    rng = np.random.default_rng(0)
    raw = dict(observations=rng.normal(size=(29, 4)), actions=rng.uniform(-1, 1, (29, 2)))
    raw |= dict(rewards=rng.normal(size=29), masks=np.ones(29), terminals=np.zeros(29))
    raw["terminals"][[6, 8, 28]] = 1
    raw["masks"][[3, 28]] = 0
    return {name: x for name, x in (raw | changes).items() if x is not None}


def write(folder, **changes):
    np.savez(folder / "d.npz", **raw_data(**changes))
    return folder / "d.npz"


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


def test_other_names_are_refused():
    names = "cube-duble", "visual-cube-single-play-v0", "halfcheetah-medium-v2", "cube-single-task9"
    for name in names:
        with pytest.raises(qgf.UserError, match=name) as e:
            qgf.find_task(name)
        assert name != "cube-duble" or "cube-double-v0" in str(e.value)


def test_chunks_stay_in_a_trajectory_and_need_no_state_after_a_success(tmp_path):
    data = qgf.load_data(write(tmp_path), TASK, ENV, TINY)
    assert data.ends.tolist() == [6] * 7 + [8] * 2 + [28] * 20
    assert data.starts.tolist() == [0, 1, 2, 3, *range(9, 27)]  # 26: the chunk ends with the task
    data = qgf.load_data(write(tmp_path, masks=None), TASK, ENV, replace(TINY, sparse=True))
    assert data.starts[-1] == 25 and data.masks.all()
    np.testing.assert_array_equal(data.rewards, np.float32(raw_data()["rewards"]))  # your own


def test_d4rls_terminals_are_successes_and_its_timeouts_ends(tmp_path):
    timeouts, terminals = np.zeros((2, 29), bool)
    timeouts[6] = terminals[8] = True
    path = write(tmp_path, terminals=terminals, timeouts=timeouts, masks=None)
    data = qgf.load_data(path, TASK, ENV, replace(TINY, horizon=2))
    assert np.unique(data.ends).tolist() == [6, 8, 28]
    assert np.flatnonzero(data.masks == 0).tolist() == [8]
    assert data.starts.tolist() == [0, 1, 2, 3, 4, 7, *range(9, 27)]


def test_actions_of_your_own_environment_are_rescaled(tmp_path):
    env = SimpleNamespace(sizes=SIZES, low=np.float32([-2, 0]), high=np.float32([2, 4]))
    actions = np.resize(np.float32([[-2, 0], [2, 4], [1, 2]]), (29, 2))
    data = qgf.load_data(write(tmp_path, actions=actions), OWN, env, TINY)
    np.testing.assert_allclose(data.actions[:3], [[-1, -1], [1, 1], [0.5, 0]])


@pytest.mark.parametrize(
    "words, changes",
    [
        ("masks", dict(masks=np.full(29, 0.5))),
        (r"observations .*\(30, 4\).*\(29, 4\)", dict(observations=np.zeros((30, 4)))),
        ("observations has", dict(observations=np.full((29, 4), np.nan))),
        (r"actions .*\(29, 3\).*\(29, 2\)", dict(actions=np.zeros((29, 3)))),
        ("actions .*range", dict(actions=np.full((29, 2), 1.1))),
        ("terminals", dict(terminals=np.zeros(5))),
        ("KeyError", dict(terminals=None)),
        ("--horizon", dict(terminals=np.ones(29))),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, words, changes):
    with pytest.raises(qgf.UserError, match=rf"d\.npz.*{words}"):
        qgf.load_data(write(tmp_path, **changes), TASK, ENV, TINY)


def test_files_that_are_not_whole_are_refused(tmp_path):
    path = write(tmp_path)
    for content in (path.read_bytes()[:2000], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(qgf.UserError, match=r"d\.npz is cut off"):
            qgf.load_data(path, TASK, ENV, TINY)


def test_rewards_of_a_task_are_those_of_ogbench(home, monkeypatch):
    env = qgf.Chunks(qgf.find_task("cube-single-task2"), 5)
    env.reset(seed=1)
    raw = qgf.read_npz(home / COLLECTED)
    raw["qpos"][10:20, 14:17] = env.unwrapped._data.mocap_pos  # where the cube shall go
    data = qgf.read_transitions(raw, env.task, env, replace(TINY, horizon=5))
    assert np.flatnonzero(data.rewards == 0).tolist() == list(range(10, 20))
    np.testing.assert_array_equal(data.masks, -data.rewards)

    def relabel(env_id, env, raw):
        raw |= dict(rewards=raw["masks"] - 3)

    monkeypatch.setattr(ogbench.relabel_utils, "relabel_dataset", relabel)
    for sparse, want in (False, raw_data()["masks"] - 3), (True, -raw_data()["masks"]):
        cfg = replace(TINY, sparse=sparse)
        data = qgf.read_transitions(raw_data(rewards=None), TASK, ENV, cfg)
        np.testing.assert_array_equal(data.rewards, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cube-double", "scene"])
def test_goals_in_data_are_those_that_the_environment_gives(name):
    env = qgf.Chunks(qgf.find_task(name), 1)
    inner, oracle, raw = env.unwrapped, env.unwrapped.compute_oracle_observation, {}

    def spy():  # called inside reset, when the environment is in its goal state
        row = dict(qpos=inner._data.qpos.copy(), observations=inner.compute_observation())
        row |= dict(button_states=np.copy(getattr(inner, "_cur_button_states", 0)))
        row |= dict(actions=np.zeros(5), terminals=0)
        raw.update({k: np.array([x] * 3) for k, x in row.items()})
        return oracle()

    inner.compute_oracle_observation = spy
    env.reset(seed=2)
    data = qgf.read_transitions(raw, env.task, env, replace(TINY, horizon=1))
    np.testing.assert_allclose(data.goals, [env.goal] * 3, atol=1e-5)


def test_where_data_come_from(tmp_path, monkeypatch, capsys):
    official = tmp_path / "cube-single-play-v0.npz"
    collected = tmp_path / "cube-single-play-v0-collected-7.npz"
    calls, online, status = [], True, 0

    def download(names, folder):
        calls.append(names)
        if not online:
            raise OSError("no route to host")
        official.touch()

    def run(command, check):
        calls.append([str(x) for x in command[1:]])
        return SimpleNamespace(returncode=status)

    def find():
        calls.clear()
        return qgf.find_files(TASK, replace(TINY, collect=7))

    monkeypatch.setattr(qgf, "DATA_DIR", tmp_path)
    monkeypatch.setattr(ogbench, "download_datasets", download)
    monkeypatch.setattr(subprocess, "run", run)
    names = ["cube-single-play-v0"]
    assert find() == [official] and calls == [names]
    collected.touch()
    assert find() == [official] and not calls
    official.unlink()
    assert find() == [collected] and not calls
    collected.unlink()
    online = False
    assert find() == [collected]
    assert calls == [names, [str(qgf.COLLECT), *names, "7", str(collected)]]
    assert "no route to host" in capsys.readouterr().out
    status = 1
    with pytest.raises(qgf.UserError, match="--data"):
        find()


def test_your_own_files(tmp_path):
    def find(path, task=TASK):
        return [x.name for x in qgf.find_files(task, replace(TINY, data=str(path)))]

    for name in ("b.npz", "a.npz", ".a.npz", "a-val.npz", "a.txt"):
        (tmp_path / name).touch()
    assert find(tmp_path) == ["a.npz", "b.npz"] and find(tmp_path / "b.npz") == ["b.npz"]
    with pytest.raises(qgf.UserError, match=r"c\.npz"):
        find(tmp_path / "c.npz")
    with pytest.raises(qgf.UserError, match="--data"):
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
        return jnp.array(nets[method] * w * a_0[:, -1] + s[:, -1:] - g[:, :1]), 0.0

    monkeypatch.setattr(qgf, "sample_actions", act)
    *three, one = [qgf.Chunks(GOAL, 5, max_episode_steps=22) for _ in range(4)]  # 4 chunks and 2/5
    monkeypatch.setattr(type(one.unwrapped), "compute_reward", lambda self: self._data.qpos.sum())
    cfg = replace(TINY, episodes=7, horizon=5)
    results = qgf.rollout(Envs(three), dict(qgf=2.0), 0.05, "qgf@2", one.sizes, cfg)
    goals = []
    for i in range(7):
        x, _ = one.reset(seed=qgf.FIRST_SEED + i)
        goals.append((one.unwrapped.cur_task_id, *one.goal))
        rng, over = np.random.default_rng(i), False
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


# ---- rows and the table
def fake_rollout(monkeypatch):
    """Each call of rollout and its nets, from now on; all episodes are won."""
    played = []

    def rollout(envs, nets, w, method, sizes, cfg):
        played.append((method, w, nets))
        return np.ones((cfg.episodes, 3))

    monkeypatch.setattr(qgf, "rollout", rollout)
    monkeypatch.setattr(qgf, "relative_weight", lambda guidance, *_: 10 * guidance)
    return played


def test_only_rows_that_lack_are_played(tmp_path, monkeypatch):
    played, path = fake_rollout(monkeypatch), tmp_path / "episodes.csv"

    def evaluate(updates=300, episodes=4, **changes):
        played.clear()
        cfg = replace(TINY, episodes=episodes, **changes)
        actor = dict(updates=updates, policy_updates=jnp.int32(100), fade=cfg.fade)
        rows = qgf.evaluate(None, None, None, actor, path, SIZES, cfg)
        return len(rows), [f"{method} {w}" for method, w, _ in played]

    both = ["bc 0.0", "qgf 10.0"]
    assert evaluate() == (8, both) and evaluate() == evaluate(episodes=3) == (8, [])
    new = ["qgf 0.5", "bptt 10.0", "bptt 0.5", "bc@2 0.0"]
    assert evaluate(methods=("qgf", "bptt", "bc@2"), weights=(0.5,)) == (24, new)
    assert evaluate(fade=False) == (32, both) and evaluate(400) == (40, both)
    assert evaluate(400, episodes=6) == (44, both)


def rows_of(method, wins, n, guidance=0.0, weight=0.0, updates=300, more=0.0):
    """Rows of n episodes; the first ones are won."""
    key = dict(updates=updates, method=method, guidance=guidance, weight=weight)
    won = [math.nan if wins is None else float(i < wins) for i in range(n)]
    rows = [key | {"success": x, "return": more - i} for i, x in enumerate(won)]
    return [{k: str(x) for k, x in row.items()} for row in rows]


def test_the_table_has_wilsons_interval_and_the_paired_gain():
    rows = rows_of("bc", 10, 50) + rows_of("bc", 50, 50, updates=200)
    rows += rows_of("qgf", 40, 50, 0.5) + rows_of("qgf", 8, 20, weight=0.25)
    lines = qgf.table(rows, dict(updates=300), GOAL)
    z, p, n = 1.959964, 0.8, 50
    centre = p + z * z / 2 / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = (x / (1 + z * z / n) for x in (centre - half, centre + half))
    assert f"qgf λ 0.5 50 0.80 [{low:.2f}, {high:.2f}]" in " ".join(lines[2].split())
    assert f"+0.60 ± {z * math.sqrt(0.6 * 0.4 / 50):.2f} " in lines[2]  # of 30 ones, 20 zeros
    assert lines[1].split()[:3] == ["bc", "50", "0.20"] and "+" not in lines[1]
    assert "w 0.25" in lines[3] and "-0.10 ± " in lines[3]  # over the first 20 episodes of bc
    assert lines[3].endswith(" 0.50 0.50 0.50 0.25 0.25")  # by goal
    assert "Guidance helped: qgf" in lines[4] and "+0.60" in lines[4]
    assert len(lines) == 5 and max(map(len, lines)) <= 90
    for wins in (20, 21, 3):
        rows = rows_of("bc", 20, 50) + rows_of("qgf", wins, 50, 1.0)
        assert "did not help: qgf" in qgf.table(rows, dict(updates=300), TASK)[-1]


def test_without_success_the_return_is_compared():
    rows = rows_of("bc", None, 6) + rows_of("qgf", None, 4, 1.0, more=2.5)
    lines = qgf.table(rows, dict(updates=300), OWN)
    assert lines[1].split() == ["bc", "6", "-2.5"] and "nan" not in "".join(lines)
    assert "+2.50 ± 0.00" in lines[2] and lines[2].endswith(" 1.0") and "helped" in lines[3]


# ---- runs
def some_data(path):
    return qgf.read_transitions(raw_data(rewards=np.full(29, ord(path.name))), OWN, ENV, TINY)


def fit(folder, updates, learner="policy", sizes=SIZES, files="ab", load=some_data, **changes):
    cfg = replace(TINY, **changes)
    return qgf.fit(learner, updates, folder, [*map(Path, files)], load, sizes, cfg)


def files_of(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["policy", "critic"])
def test_a_run_that_stops_goes_on_bitwise_or_says_what_differs(tmp_path, learner):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = fit(one, 1300, learner)
    for updates in (100, 1100, 1300):
        state = fit(two, updates, learner)
    before = files_of(one)
    assert_same(whole, state)
    assert before == files_of(two) and len(before) == 3
    metrics = qgf.read_csv(one / "metrics.csv")
    assert [int(row["updates"]) for row in metrics] == [*range(100, 1301, 100)]
    other = dict(policy=dict(critic_width=9, episodes=3), critic=dict(policy_width=9, fade=False))
    assert_same(fit(one, 1200, learner, **other[learner]), whole)  # of no concern to this learner
    changes = dict(lr=dict(lr=2e-3), data=dict(files="b"), horizon=dict(horizon=2))
    changes[f"{learner}_updates 1300"] = {f"{learner}_updates": 1400}  # lr falls at their end
    changes[f"params/{learner}/0/w"] = dict(sizes=(5, 0, 2))
    if learner == "critic":
        changes["discount"] = dict(discount=0.9)
    for name, change in changes.items():
        with pytest.raises(qgf.UserError, match=f"another {name}.*--out"):
            fit(one, 1400, learner, **change)
    assert files_of(one) == before
    (one / "checkpoint.npz").write_bytes(before["checkpoint.npz"][:999])
    with pytest.raises(qgf.UserError, match=r"checkpoint\.npz is cut off"):
        fit(one, 1400, learner)


def test_two_runs_that_train_one_policy_at_once_write_the_same(tmp_path, monkeypatch):
    alone, calls, train = fit(tmp_path / "alone", 500), [], qgf.train

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            fit(tmp_path / "both", 500)  # another process, which is faster
        return train(*args)

    monkeypatch.setattr(qgf, "train", interrupted)
    assert_same(fit(tmp_path / "both", 500), alone)
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")


def test_slices_take_turns_and_each_20_seconds_are_saved(tmp_path, monkeypatch):
    seen, saved, save = [], [], qgf.save
    clock = iter(range(0, 10**6, 4))  # each look at the clock takes 4 s

    def train(learner, state, data, n, cfg):
        seen.extend(data.name * (n // 50))
        return state._replace(step=state.step + n), dict(x=np.zeros(n))

    def watched_save(folder, state, metrics, settings):
        saved.append(int(state.step))
        save(folder, state, metrics, settings)

    monkeypatch.setattr(qgf, "train", train)
    monkeypatch.setattr(qgf, "save", watched_save)
    monkeypatch.setattr(qgf, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for updates in (950, 3250):
        fit(tmp_path, updates, files="abc", load=lambda path: path)
    assert "".join(seen) == 20 * "a" + 20 * "b" + 20 * "c" + 5 * "a"
    assert saved == [600, 950, 1500, 2100, 2700, 3250]


def test_nan_is_refused_and_the_last_checkpoint_kept(tmp_path, monkeypatch):
    fit(tmp_path, 100)
    before = files_of(tmp_path)

    def train(learner, state, data, n, cfg):
        params = jax.tree.map(lambda x: x * np.nan, state.params)
        return state._replace(params=params, step=state.step + n), dict(policy_loss=np.zeros(n))

    monkeypatch.setattr(qgf, "train", train)
    with pytest.raises(qgf.UserError, match=r"NaN.* 200 updates"):
        fit(tmp_path, 200)
    assert files_of(tmp_path) == before


def test_a_third_learner_logs_and_its_rate_falls(tmp_path, monkeypatch):
    def loss(params, average, batch, key, cfg):
        return params.sum(), dict(mine=params[0])  # gradient 1: Adam's step is the rate

    monkeypatch.setitem(qgf.LEARNERS, "line", (lambda key, sizes, cfg: jnp.zeros(1), loss))
    monkeypatch.setitem(qgf.SETTINGS, "line", qgf.SETTINGS["policy"])
    monkeypatch.setattr(qgf.Config, "line_updates", 100, raising=False)
    for decay, last in (0.25, 1 - np.arange(25) / 25), (0.0, np.ones(25)):
        state = fit(tmp_path / str(decay), 100, "line", lr_decay=decay)
        (row,) = qgf.read_csv(tmp_path / str(decay) / "metrics.csv")
        path = -1e-3 * np.cumsum([0, *np.ones(75), *last])
        assert row.keys() == {"updates", "mine"}
        assert_close([float(row["mine"]), state.params[0]], [path[:-1].mean(), path[-1]], rtol=1e-4)


# ---- the command line
def parse(text):
    return qgf.parse(text.split())


def test_words_of_the_command_line():
    given = dict(guidance=(0.3, 1.0), methods=("qgf@4", "bptt"), fade=False, lr=1e-4)
    line = "--guidance 0.3 1 --methods qgf@4 bptt --no-fade --lr 1e-4"
    assert parse(line) == qgf.Config(**given)
    assert parse("--weights 0.1") == qgf.Config(weights=(0.1,), guidance=())
    assert parse("--weights 0.1 --guidance 2").guidance == (2.0,)
    for names, defaults in qgf.FAMILY.items():
        for name in np.ravel(names):
            want = defaults | dict(env=f"{name}-task2", depth=2)
            assert parse(f"--env {name}-task2 --depth 2") == qgf.Config(**want)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--lr nan", "--lr nan"),
        ("--lr -1", "--lr -1"),
        ("--discount 1.5", "--discount 1.5"),
        ("--seed 1.5", "--seed.*1.5"),
        ("--policy-update 5", "--policy-update;.*--policy-updates"),  # no abbreviations
        ("--batchsize 5", "--batchsize;.*--batch-size"),
        ("cube-double", "cube-double"),
        ("--methods qgf best", "best.*qgf-jacobian"),
        ("--methods qgf@0", "qgf@0"),
    ],
)
def test_a_wrong_word_gets_one_line(line, words):
    with pytest.raises(qgf.UserError, match=rf"^.*{words}.*--help.*\Z"):
        parse(line)


SMALL = "--policy-width 8 --critic-width 8 --depth 1 --batch-size 8 --collect 2000 --episodes 2"
SMALL += " --policy-updates 100 --critic-updates 600 --eval-every 300"


@pytest.mark.slow
def test_main_trains_once_and_plays_what_lacks(home, tmp_path, monkeypatch, capsys):
    played = fake_rollout(monkeypatch)
    envs = SimpleNamespace(close=lambda terminate: None)
    monkeypatch.setattr(qgf, "make_envs", lambda task, cfg: envs)
    monkeypatch.setattr(qgf, "DATA_DIR", (home / COLLECTED).parent)
    monkeypatch.setenv("HOME", str(tmp_path))

    def main(line=""):
        played.clear()
        qgf.main([*SMALL.split(), "--out=~/x", "--env", "cube-single", *line.split()])
        return [method for method, _, _ in played]

    assert main() == 2 * ["bc", "qgf"]
    out = capsys.readouterr().out
    assert "400 rows, 2 trajectories" in out and "after 600 updates" in out
    folders = tmp_path / "x/cube-single-play-v0-policy-s0", tmp_path / "x/cube-single-s0"
    policy, critic = (qgf.read_npz(folder / "checkpoint.npz") for folder in folders)
    acts, _ = qgf.named_leaves(played[-1][2])
    assert {name.split("/")[0] for name in acts} == {"policy", "critic", "value"}
    assert_same(acts, {k: (policy | critic)[f"average/{k}"] for k in acts})
    before = files_of(folders[0])
    assert main() == [] and main("--methods bptt") == ["bptt"]
    assert main("--env cube-single-task2") == 2 * ["bc", "qgf"]
    assert files_of(folders[0]) == before  # all tasks share the policy
    whole = (home / COLLECTED).read_bytes()
    (tmp_path / "1.npz").write_bytes(whole)
    (tmp_path / "2.npz").write_bytes(whole[:-999])
    with pytest.raises(qgf.UserError, match=r"2\.npz is cut off"):
        main(f"--data {tmp_path} --out ~/y")
    assert [*(tmp_path / "y").iterdir()] == []


# ---- real runs, in processes of their own
def start(home, *args, flags=(), **env):
    command = [sys.executable, *flags, qgf.__file__, *map(str, args)]
    env = os.environ | dict(HOME=str(home)) | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="latin-1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of the background ignores it
    return subprocess.Popen(command, env=env, cwd=home, start_new_session=True, **pipes)


def finish(p, status=0):
    """What a run prints, or its error, which is a line."""
    out, err = p.communicate(timeout=200)
    assert p.returncode == status, err
    assert "Traceback" not in err or status == -signal.SIGKILL
    return out if status == 0 else err


def family(p):
    """The processes of a run, but for the first: (id, command)."""
    ids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    found = []
    for i in ids:
        try:
            if i != p.pid and os.getsid(i) == p.pid:
                found.append((i, Path(f"/proc/{i}/cmdline").read_text()))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_run_stopped_in_four_ways_equals_an_uninterrupted_one(home):
    args = [*SMALL.split(), "--critic-updates", 4000, "--eval-every", 2000]  # seconds each
    args += ["--env", "cube-single", "--methods", "qgf@2", "--seed", 1, "--out"]
    whole = start(home, *args, "whole")
    stops = [("playing bc", 0), ("playing qgf", signal.SIGINT)]
    stops += [("critic:  50%", signal.SIGTERM), ("critic:  50%", signal.SIGKILL)]
    for words, number in stops:
        p, text = start(home, *args, "stopped"), ""
        while words not in text:  # of progress bars
            text += p.stderr.read(1)
            assert p.poll() is None, text
        if number == 0:
            os.kill(max(i for i, command in family(p) if "forkserver" in command), signal.SIGKILL)
            assert "did a process die" in finish(p, 1)
        elif number == signal.SIGKILL:
            p.kill()
            finish(p, -number)
        else:
            os.killpg(p.pid, number) if number == signal.SIGINT else p.terminate()
            assert "stopped: the same command" in finish(p, 1)
        limit = time.monotonic() + 60
        while family(p):
            assert time.monotonic() < limit
            time.sleep(0.1)
    faults = dict(MUJOCO_GL="nonsense", JAX_ENABLE_X64="1", TMPDIR=f"/tmp/{'x' * 99}")
    finish(start(home, *args, "stopped", **faults))
    assert "cube-single after 4000 updates" in finish(whole)
    for folder in ("cube-single-play-v0-policy-s1", "cube-single-s1"):
        assert files_of(home / "whole" / folder) == files_of(home / "stopped" / folder)


@pytest.mark.slow
def test_your_own_environment(home):
    env, rows = gymnasium.make("Pendulum-v1"), []
    for seed in range(3):
        state, _ = env.reset(seed=seed)
        for i in range(200):
            action = np.random.default_rng(i).uniform(-2, 2, 1)
            after, reward, *_ = env.step(action)
            rows.append((state, action, reward, i == 199))
            state = after
    save_rows(home / "p.npz", "observations actions rewards terminals", rows)
    out = finish(start(home, *SMALL.split(), "--env", "Pendulum-v1", "--data", "p.npz"))
    assert "600 rows, 3 trajectories" in out and "Guidance" in out
    rows = qgf.read_csv(home / "runs/Pendulum-v1-s0/episodes.csv")
    assert len(rows) == 8 and {row["success"] for row in rows} == {"nan"}
    assert all(-2000 < float(row["return"]) < 0 for row in rows)


@pytest.mark.slow
def test_odd_machines(home):
    """A terminal without Greek letters, no docstrings, no GPU, a folder that cannot be."""
    text = finish(start(home, "--help", flags=["-OO"], PYTHONIOENCODING="latin-1"))
    assert all(f"--{name.replace('_', '-')} " in text for name in qgf.Config.__annotations__)
    err = finish(start(home, "--out", "/proc/x"), 1)
    assert err.count("\n") == 1 and "/proc/x" in err
    assert finish(start(home, JAX_PLATFORMS="cuda"), 1).count("\n") == 1
