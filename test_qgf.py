# SPDX-License-Identifier: MIT
"""Every loss, estimator and file of qgf.py against something independent: python -m pytest."""
import csv, http.server, math, os, signal, subprocess, sys, threading, time, types  # noqa: E401
from dataclasses import replace
from functools import partial
from pathlib import Path
os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU rounds matrix products to TF32, and the tolerances are for float32
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest
from scipy.integrate import quad, solve_ivp
import qgf

S, A, KEY = 4, 2, jax.random.PRNGKey(0)
CFG = qgf.Config(width=16, depth=2, batch_size=32, horizon=3, denoise_steps=5)
HERE = Path(qgf.__file__).parent
jit = partial(jax.jit, static_argnames="cfg")
update, sample_batch, flow_matching_loss, value_loss, dqc_loss, edp_loss = map(jit, (
    qgf.update, qgf.sample_batch, qgf.flow_matching_loss, qgf.value_loss, qgf.dqc_loss, qgf.edp_loss))

def random_data(n=60, lengths=(7, 20, 4, 29), seed=0):
    """Trajectories of these lengths, with some successes in the middle, and one that ends with one."""
    rng, last = np.random.default_rng(seed), np.cumsum(lengths) - 1
    masks = np.float32(rng.random(n) > 0.2)
    masks[last] = np.arange(len(last)) != 1
    return dict(observations=np.float32(rng.normal(size=(n, S))), actions=np.float32(rng.uniform(-1, 1, (n, A))),
        rewards=np.float32(rng.normal(size=n)), masks=masks, ends=last[np.searchsorted(last, np.arange(n))])

def on_device(raw, R):
    """What `load_dataset` makes of random_data; its rule for `starts` is spelled out row by row."""
    n = len(raw["ends"])
    starts = [i for i in range(n) if i + R <= raw["ends"][i] + (raw["masks"][raw["ends"][i]] == 0)]
    return jax.device_put(raw | dict(starts=np.int32(np.resize(starts, n)), n_starts=np.int32(len(starts))))

DATA = on_device(random_data(), CFG.horizon)

def some_state(cfg=CFG, goals=0):
    """A State of one seed whose averages differ from its parameters."""
    state, rng = jax.tree.map(lambda x: x[0], qgf.init_states((S, goals, A), cfg)), np.random.default_rng(7)
    return state._replace(target=jax.tree.map(lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)), state.target))
def batch_of(cfg=CFG, data=DATA):
    return sample_batch(jax.random.PRNGKey(5), data, cfg)

def numpy_mlp(layers, x):
    """The network in float64 numpy, a row at a time."""
    layers, out = jax.tree.map(lambda p: np.asarray(p, np.float64), layers), []
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
def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
def changed(a, b):
    """The names in a dict of parameters that differ."""
    return {k for k in a if any((x != y).any() for x, y in zip(jax.tree.leaves(a[k]), jax.tree.leaves(b[k])))}

# ---- losses ------------------------------------------------------------------------------------------------
def test_flow_matching_loss_equals_a_numpy_loop():
    policy, batch, T = some_state().params["policy"], jax.device_get(batch_of()), CFG.denoise_steps
    key_noise, key_time = jax.random.split(KEY)
    a_0 = np.asarray(jax.random.normal(key_noise, batch["actions"].shape))
    steps = np.asarray(jax.random.randint(key_time, (CFG.batch_size, 1), 0, T + 1))
    assert steps.min() == 0 and steps.max() == T  # both ends of the grid are drawn
    total = 0.0
    for s, a_1, noise, i in zip(batch["observations"], batch["actions"], a_0, steps):
        v = numpy_velocity(policy, s[None], (noise + (a_1 - noise) * i / T)[None], i / T)[0]  # float32 angles cost digits
        total += np.mean((v - (a_1 - noise)) ** 2)
    assert flow_matching_loss(policy, batch, KEY, CFG) == pytest.approx(total / CFG.batch_size, rel=1e-4)

def gaussian_velocity(mu, sigma):
    """The exact flow to N(μ, σ²): E[a_1 - a_0 | a_t]."""
    def velocity(policy, s, a_t, t):
        d = (1 - t) ** 2 + (t * sigma) ** 2
        return mu + (t * sigma**2 - (1 - t)) * (a_t - t * mu) / d
    return velocity

def test_flow_matching_loss_is_least_at_the_gaussians_exact_velocity(monkeypatch):
    mu, sigma, n, T = 0.3, 0.5, 200_000, CFG.denoise_steps
    batch = dict(observations=None, actions=mu + sigma * jax.random.normal(jax.random.PRNGKey(1), (n, 1)))
    exact = gaussian_velocity(mu, sigma)
    def loss(shift, tilt):
        monkeypatch.setattr(qgf, "velocity", lambda p, s, a, t: exact(p, s, a, t) + shift + tilt * a)
        return float(qgf.flow_matching_loss(None, batch, KEY, CFG))
    t = np.arange(T + 1) / T  # the least loss is the variance of a_1 - a_0 given a_t
    least = np.mean(sigma**2 + 1 - (t * sigma**2 - (1 - t)) ** 2 / ((1 - t) ** 2 + (t * sigma) ** 2))
    assert loss(0, 0) == pytest.approx(least, rel=0.01)
    assert all(loss(*d) > loss(0, 0) for d in [(0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)])

def test_critic_and_value_loss_equal_a_numpy_loop():
    state, batch = some_state(), batch_of()
    q, q_target = (numpy_q(c, batch["observations"], batch["actions"])
                   for c in (state.params["critic"], state.target["critic"]))
    v, v_next = (numpy_mlp(state.params["value"], batch[k])[:, 0] for k in ("observations", "next_observations"))
    y = batch["returns"] + batch["discounts"] * v_next
    loss = jax.jit(qgf.critic_loss)(state.params["critic"], state.params["value"], batch)
    assert loss == pytest.approx(np.mean([(q[0] - y) ** 2, (q[1] - y) ** 2]), rel=1e-5)
    u = np.minimum(*q_target) - v
    want = np.mean([(CFG.expectile if x > 0 else 1 - CFG.expectile) * x * x for x in u])
    loss = value_loss(state.params["value"], state.target["critic"], batch, CFG)
    assert loss == pytest.approx(want, rel=1e-5)

def test_expectile_loss_is_least_at_the_expectile():
    sample = jnp.array([0.0, 1.0])
    for tau in (0.1, 0.5, 0.9, 0.999):  # there τ (1 - V) = (1 - τ) V, so V = τ
        slope = jax.grad(lambda v: qgf.expectile_loss(sample - v, tau).mean())  # noqa: B023
        assert abs(slope(tau)) < 1e-6 and slope(tau - 0.01) < 0 < slope(tau + 0.01)

def test_edp_loss_equals_a_numpy_loop_and_leaves_the_others_alone():
    cfg = replace(CFG, edp=3.0)
    state, batch = some_state(cfg), jax.device_get(batch_of())
    s, a_1, policy = batch["observations"], batch["actions"], state.params["edp"]
    a_0, a_t, t = (np.asarray(x, np.float64) for x in qgf.noisy_actions(a_1, KEY, cfg))
    v = numpy_velocity(policy, s, a_t, t)
    q = numpy_q(state.target["critic"], s, np.clip(a_t + (1 - t) * v, -1, 1)).min(axis=0)
    loss = lambda p: edp_loss(p, state.target["critic"], batch, KEY, cfg)
    assert loss(policy) == pytest.approx(3 * np.mean((v - (a_1 - a_0)) ** 2) - q.mean(), rel=1e-4)
    with_edp, without = update(state, batch, KEY, cfg)[0], update(some_state(), batch, KEY, CFG)[0]
    assert_close(*({k: x.params[k] for k in ("policy", "critic", "value")} for x in (with_edp, without)), atol=2e-5)
    alone = jax.tree.map(lambda p, g: p - CFG.lr * g / (abs(g) + 1e-8), policy, jax.grad(loss)(policy))
    assert_close(with_edp.params["edp"], alone, atol=2e-5)  # Adam's first step

def test_dqc_loss_equals_a_numpy_loop_and_reaches_both_critics_alone():
    cfg = replace(CFG, long_horizon=4, kappa=0.8)
    data = on_device(random_data(), 4)
    state, batch = some_state(cfg), jax.device_get(batch_of(cfg, data))
    np.testing.assert_array_equal(batch["long_actions"][:, : 3 * A], batch["actions"])
    s, p = batch["observations"], state.params
    q_long, q = numpy_q(p["long_critic"], s, batch["long_actions"]), numpy_q(p["critic"], s, batch["actions"])
    v_next = numpy_mlp(p["value"], batch["next_observations"])[:, 0]
    gap, y = q_long - q, batch["returns"] + batch["discounts"] * v_next
    want = np.mean((q_long - y) ** 2) + np.mean(np.where(gap > 0, 0.8, 0.2) * gap**2)
    assert dqc_loss(p, batch, cfg) == pytest.approx(want, rel=1e-5)
    g = jax.grad(lambda p: dqc_loss(p, batch, cfg))(p)
    assert {k for k, v in g.items() if any(x.any() for x in jax.tree.leaves(v))} == {"critic", "long_critic"}
    long = batch | dict(actions=batch["long_actions"])
    alone = jax.grad(qgf.critic_loss)(p["long_critic"], p["value"], long)
    assert_close(g["long_critic"], alone, rtol=1e-4, atol=1e-6)
    updated, info = update(state, batch, KEY, cfg)
    assert info["critic_loss"] == pytest.approx(want, rel=1e-5)
    assert changed(updated.params, p) == {"policy", "critic", "long_critic", "value"}

def test_each_loss_reaches_its_own_network_and_the_averages_take_in_the_old_ones():
    state, batch = some_state(), batch_of()
    together, info = update(state, batch, KEY, CFG)
    losses = dict(policy=lambda p: qgf.flow_matching_loss(p, batch, KEY, CFG),
        critic=lambda p: qgf.critic_loss(p, state.params["value"], batch),
        value=lambda p: qgf.value_loss(p, state.target["critic"], batch, CFG))
    for name, loss in losses.items():
        p = state.params[name]
        alone = jax.tree.map(lambda p, g: p - CFG.lr * g / (abs(g) + 1e-8), p, jax.jit(jax.grad(loss))(p))
        assert_close(together.params[name], alone, atol=2e-5)  # Adam's first step
        key = "flow" if name == "policy" else name
        assert info[f"{key}_loss"] == pytest.approx(float(loss(p)), rel=1e-5)
    q = qgf.q_min(state.target["critic"], batch["observations"], batch["actions"])
    assert info["q"] == pytest.approx(float(q.mean()), rel=1e-5)
    old = {k: state.params[k] for k in ("policy", "critic")}
    averaged = jax.tree.map(lambda new, average: 0.005 * new + 0.995 * average, old, state.target)
    assert_close(together.target, averaged, rtol=1e-5, atol=1e-7)
    fresh = qgf.init_states((S, 0, A), replace(CFG, edp=1.0))
    assert_same(fresh.target, {k: fresh.params[k] for k in ("policy", "critic", "edp")})

# ---- batches and goals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("sparse, H", [(False, CFG.horizon), (True, 4)])  # 4 are DQC's long chunks
def test_chunks_stay_in_one_trajectory_and_returns_stop_at_success(tmp_path, monkeypatch, sparse, H):
    raw = random_data()
    monkeypatch.setattr(FakeEnv, "sparse", sparse)
    data = qgf.load_dataset(write(tmp_path / "d.npz"), FakeEnv, H)
    starts = [i for i in range(60) if i + H < 60 and raw["ends"][i] == raw["ends"][i + H]]
    starts = sorted([*starts, 27 - H])  # rows 7 to 26 end with a success, and need no state after that
    assert data["starts"][: data["n_starts"]].tolist() == starts
    batch, drawn = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=500, long_horizon=H))), set()
    for k in range(500):
        i = int(np.flatnonzero((raw["observations"] == batch["observations"][k]).all(axis=1))[0])
        drawn.add(i)
        ret, discount = 0.0, CFG.discount**H
        for j in range(H):
            ret += CFG.discount**j * (-raw["masks"] if sparse else raw["rewards"])[i + j]
            if raw["masks"][i + j] == 0:
                discount = 0.0
                break
        assert batch["returns"][k] == pytest.approx(ret, abs=1e-5)
        assert batch["discounts"][k] == pytest.approx(discount)
        np.testing.assert_array_equal(batch["long_actions"][k], raw["actions"][i : i + H].ravel())
        if discount:
            np.testing.assert_array_equal(batch["next_observations"][k], raw["observations"][i + H])
    assert drawn == set(starts)  # 500 draws of 49 starts

@pytest.mark.parametrize("alike", [1, 4])
def test_hindsight_goals_rewards_and_masks_equal_a_brute_force_loop(alike):
    raw, n, i = random_data() | dict(masks=np.ones(60, np.float32)), 6000, np.arange(60)
    rows = np.float32([i // alike + 0.1 * (i % alike), 0.1 * (i % 2)]).T  # `alike` successive rows are near each other
    data = on_device(raw | dict(goals=rows), CFG.horizon)
    batch, kinds = jax.device_get(sample_batch(KEY, data, replace(CFG, batch_size=n))), [0, 0, 0, 0]
    for k in range(n):
        s, goal = batch["observations"][k, :S], int(np.flatnonzero(rows[:, 0] == batch["observations"][k, S])[0])
        i = int(np.flatnonzero((raw["observations"] == s).all(axis=1))[0])
        ret, discount = 0.0, CFG.discount**CFG.horizon
        for j in range(CFG.horizon):
            if (i + j) // alike == goal // alike:
                discount = 0.0
                break
            ret -= CFG.discount**j
        assert batch["returns"][k] == pytest.approx(ret, abs=1e-5)
        assert batch["discounts"][k] == pytest.approx(discount)
        want = [*raw["observations"][i + CFG.horizon], *rows[goal]]  # the same goal after the chunk
        np.testing.assert_array_equal(batch["next_observations"][k], np.float32(want))
        kinds[0 if goal == i else 3 if goal == raw["ends"][i] else 1 if i < goal < raw["ends"][i] else 2] += 1
    starts = np.asarray(data["starts"][: data["n_starts"]])
    left = raw["ends"][starts] - starts  # later rows of the trajectory; the last of them is one
    present, later, last = 0.2 + 0.3 / 60, *(np.mean(0.5 * x + 0.3 * x * left / 60) for x in (1, 1 / left))
    np.testing.assert_allclose(np.array(kinds) / n, [present, later - last, 1 - present - later, last], atol=0.01)

def test_the_flow_is_blind_to_goals_while_that_of_edp_and_the_critic_see_them():
    params = qgf.init_params(KEY, (S, 2, A), replace(CFG, edp=1.0, critic_width=8))
    assert ["scale" in layer for layer in params["policy"]] == [True, False, False]  # as in the official code
    assert params["critic"][0]["w"].shape == (2, S + 2 + CFG.horizon * A, 8)
    a, t = jnp.zeros((2, CFG.horizon * A)), jnp.zeros((2, 1))
    s = jnp.zeros((2, S + 2)).at[1, S:].set(1.0)  # two goals in the same state
    blind, seeing = (qgf.velocity(params[k], s, a, t) for k in ("policy", "edp"))
    assert (blind[0] == blind[1]).all() and (seeing[0] != seeing[1]).any()
    assert (qgf.q_values(params["critic"], s, a)[:, 0] != qgf.q_values(params["critic"], s, a)[:, 1]).all()

# ---- training ----------------------------------------------------------------------------------------------
def test_scanned_updates_equal_single_updates_however_they_are_grouped():
    scanned, info = qgf.train(qgf.init_states((S, 0, A), CFG), DATA, 6, CFG)
    grouped = qgf.init_states((S, 0, A), CFG)
    for n in (3, 3):
        grouped, last = qgf.train(grouped, DATA, n, CFG)
    assert_same(scanned, grouped)
    assert_same({k: v[:, 3:] for k, v in info.items()}, last)
    single = jax.tree.map(lambda x: x[0], qgf.init_states((S, 0, A), CFG))  # compiled apart: equal but for rounding
    for _ in range(6):
        key_batch, key_update = jax.random.split(jax.random.fold_in(single.key, single.step))
        single, _ = update(single, sample_batch(key_batch, DATA, CFG), key_update, CFG)
    assert_close(jax.tree.map(lambda x: x[0], scanned), single, rtol=1e-4, atol=1e-6)

def test_seeds_trained_at_once_differ_and_are_those_of_single_runs(monkeypatch):
    cfg = replace(CFG, depth=1, seed=5, seeds=2)
    states, info = qgf.train(qgf.init_states((S, 0, A), cfg), DATA, 3, cfg)
    assert len({float(x) for x in info["flow_loss"][:, 0]}) == 2  # other batches, other noise
    for i in range(2):
        one = replace(cfg, seed=5 + i, seeds=1)
        alone, _ = qgf.train(qgf.init_states((S, 0, A), one), DATA, 3, one)
        assert_same(jax.tree.map(lambda x: x[i : i + 1], states), alone)  # noqa: B023
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where the seeds are trained together
    together = jax.jit(qgf.train.__wrapped__, static_argnames=("n", "cfg"))(qgf.init_states((S, 0, A), cfg), DATA, 3, cfg)
    assert_close(together[0], states, atol=2e-5)

@pytest.fixture(scope="session")
def toy():
    """Nets for a bandit: actions near (-.6, 0) or, one time in five, the better (.6, 0); Q is the first."""
    rng, n = np.random.default_rng(0), 4000
    good = rng.random(n) < 0.2
    actions = np.float32(np.where(good[:, None], [0.6, 0], [-0.6, 0]) + rng.normal(0, 0.1, (n, 2)))
    data = dict(observations=np.zeros((n, 1), np.float32), actions=actions, rewards=actions[:, 0])
    data |= dict(masks=np.zeros(n, np.float32), ends=np.arange(n) | 1)
    cfg = qgf.Config(width=64, depth=2, horizon=1, edp=0.2)
    states, _ = qgf.train(qgf.init_states((1, 0, 2), cfg), on_device(data, 1), 1500, cfg)
    return jax.tree.map(lambda x: x[0], states.target)

def test_a_toy_bandit_is_solved(toy):
    def good(N, w, method):
        a_0 = jax.random.normal(KEY, (500, N, 2))
        return (qgf.sample_actions(toy, jnp.zeros((500, 1)), a_0, w, method, 10)[0][:, 0] > 0).mean()
    assert 0.1 < good(1, 0.0, "bc") < 0.35  # a fifth, as in the data
    assert good(1, 10.0, "qgf") > 0.9 and good(32, 0.0, "bc") > 0.95  # QGF; best of 32
    assert good(1, 0.0, "edp") > 0.9  # trained towards Q

def test_the_gradients_point_the_right_way(toy):
    """Along the unguided flow: agreement with BPTT's gradient, steadiness under a little noise, and effect."""
    s, a_t, T, found = jnp.zeros((200, 1)), jax.random.normal(KEY, (200, 2)), 10, {}
    q = jax.jit(partial(qgf.q_min, toy["critic"], s))
    flow = jax.jit(lambda a, t: qgf.velocity(toy["policy"], s, a, t))
    end = jax.jit(lambda a, t: qgf.integrate(flow, a, t, T))
    gradient = {m: jax.jit(lambda a, t, m=m: qgf.GUIDANCE[m](q, flow, a, t, flow(a, t), T)) for m in qgf.GUIDANCE}
    for i in range(T):
        t = jnp.full((200, 1), i / T)
        true = gradient["bptt"](a_t, t)
        for m in gradient if i in (0, 5, 9) else ():
            g, moved = gradient[m](a_t, t), gradient[m](a_t + 0.01 * jax.random.normal(KEY, a_t.shape), t)
            size, size_true, change = (jnp.linalg.norm(x, axis=1, keepdims=True) for x in (g, true, moved - g))
            better = q(end(a_t + 0.1 * g / size, t)) > q(end(a_t, t))
            found[m, i] = ((g * true / size / size_true).sum(axis=1).mean(), jnp.median(change / size), better.mean())
        a_t = a_t + flow(a_t, t) / T
    for i in (0, 5, 9):
        for m in ("bptt", "qgf", "qgf-chain", "qfql"):
            assert found[m, i][0] > 0.5 and found[m, i][2] > 0.75, (m, i)
        assert found["qgf", i][1] < found["qgf-jacobian", i][1]  # steadier without J (the paper's Figure 3)
    assert found["qgf-jacobian", 0][0] < found["qgf", 0][0]  # from pure noise J says nothing
    assert found["qgf-jacobian", 9][0] > 0.999  # with one step left, it is BPTT

# ---- guidance ----------------------------------------------------------------------------------------------
def sampling(B=6, N=1):
    rng = np.random.default_rng(3)
    s, a_0 = (jnp.float32(rng.normal(size=size)) for size in ((B, S), (B, N, CFG.horizon * A)))
    return some_state().target, s, a_0
def sample(nets, s, a_0, w, method="qgf"):
    return qgf.sample_actions(nets, s, a_0, w, method, 5)[0]
def closures(nets, s):
    return partial(qgf.q_min, nets["critic"], s), partial(qgf.velocity, nets["policy"], s)
def numpy_end(nets, s, a, t, T=5):
    """The unguided flow from a at t, in float64 numpy."""
    for i in range(round(t * T), T):
        a = a + numpy_velocity(nets["policy"], s, a, np.full(len(a), i / T)) / T
    return np.clip(a, -1, 1)

def test_estimators_equal_finite_differences_of_what_they_are_the_gradient_of():
    nets, s, a_0 = sampling()
    (q_s, flow), a_t, t = closures(nets, s), 0.5 * a_0[:, 0], 0.4  # some clean actions are clipped, most are not
    tt, a = jnp.full((6, 1), t), np.asarray(a_t, np.float64)
    q = lambda a: numpy_q(nets["critic"], s, a).min(axis=0)
    clean = lambda a: np.clip(a + (1 - t) * numpy_velocity(nets["policy"], s, a, np.full(6, t)), -1, 1)
    end = numpy_end(nets, s, a, t)
    assert (abs(end) == 1).any() and (abs(end) < 1).mean() > 0.5 and (abs(clean(a)) == 1).any()
    np.testing.assert_allclose(qgf.integrate(flow, a_t, tt, 5), end, atol=1e-4)
    references = {
        "qfql": (a, q), "qgf": (clean(a), q), "qgf-jacobian": (a, lambda a: q(clean(a))), "qgf-chain": (end, q),
        "bptt": (a, lambda a: q(numpy_end(nets, s, a, t)))}
    assert references.keys() == qgf.GUIDANCE.keys()
    for name, (at, f) in references.items():
        g = qgf.GUIDANCE[name](q_s, flow, a_t, tt, flow(a_t, tt), 5)
        for d in range(a.shape[1]):
            e = 1e-5 * np.eye(a.shape[1])[d]
            np.testing.assert_allclose(g[:, d], (f(at + e) - f(at - e)) / 2e-5, rtol=2e-2, atol=1e-3, err_msg=name)

def test_no_weight_is_bc_exactly_and_another_weight_compiles_nothing():
    nets, s, a_0 = sampling()
    np.testing.assert_array_equal(sample(nets, s, a_0, 0.0), sample(nets, s, a_0, 1.0, "bc"))
    compiled = qgf.sample_actions._cache_size()
    sample(nets, s, a_0, 0.123)
    assert qgf.sample_actions._cache_size() == compiled

@pytest.mark.parametrize("method", [*qgf.GUIDANCE, "gradstep", "bc"])
def test_every_method_is_its_plain_loop_and_best_of_2(method):
    nets, s, a_0 = sampling(N=2)
    (q, flow), candidates = closures(nets, s), []
    estimate = jax.jit(lambda a, t: qgf.GUIDANCE[method](q, flow, a, t, flow(a, t), 5) if method in qgf.GUIDANCE else 0 * a)
    for n in range(2):
        a = a_0[:, n]
        for i in range(5):
            t = jnp.full((6, 1), i / 5)
            a = a + (flow(a, t) + 0.1 * estimate(a, t)) / 5
        a = np.clip(a, -1, 1)
        for _ in range(qgf.ASCENTS if method == "gradstep" else 0):
            a = np.clip(a + 0.1 * qgf.grad_q(q, a), -1, 1)
        candidates.append(a)
    best = np.argmax([q(a) for a in candidates], axis=0)
    assert 0 < best.sum() < 6  # either candidate is the better one somewhere
    got = sample(nets, s, a_0, 0.1, method)
    np.testing.assert_allclose(got, np.array(candidates)[best, np.arange(6)], atol=1e-4)
    assert method == "bc" or (abs(got - sample(nets, s, a_0, 0.0)).max(axis=1) > 1e-3).all()

@pytest.mark.parametrize("method", [*qgf.GUIDANCE, "gradstep"])
def test_relative_weight_for_a_linear_critic_is_a_closed_form(monkeypatch, method):
    """Q = c·a has the gradient c everywhere: w ‖c‖ / sqrt(HA) = λ, whatever the size of c."""
    c, (nets, s, a_0) = np.float32([1, -2, 0.5, 3, 0, 1]), sampling(B=50)
    weights = []
    monkeypatch.setattr(qgf, "velocity", lambda policy, s, a, t: 0 * a)  # so that J is the clip's: 0 or 1
    monkeypatch.setattr(qgf, "sample_actions", qgf.sample_actions.__wrapped__)
    for size in (1.0, 10.0, 1e-4):
        monkeypatch.setattr(qgf, "q_values", lambda critic, s, a: jnp.stack([a @ (size * c)] * 2))  # noqa: B023
        weights.append(size * qgf.relative_weight(0.1, nets, s, 0.1 * a_0, method, 5))
    want = 0.1 * math.sqrt(6) / np.linalg.norm(c) / (2 * qgf.ASCENTS if method == "gradstep" else 1)
    np.testing.assert_allclose(weights, want, rtol=1e-4)

def test_relative_weight_is_lambda_over_the_rms_along_the_unguided_flow():
    nets, s, a_0 = sampling(B=20)
    (q, flow), a, squares = closures(nets, s), a_0[:, 0], []
    for i in range(5):
        t = jnp.full((20, 1), i / 5)
        squares.append(np.mean(np.square(qgf.GUIDANCE["qgf"](q, flow, a, t, flow(a, t), 5))))
        a = a + flow(a, t) / 5
    w = qgf.relative_weight(0.1, nets, s, a_0, "qgf", 5)
    assert w == pytest.approx(0.1 / np.sqrt(np.mean(squares)), rel=1e-5)

# ---- closed forms: the reference is N(μ, σ²) with its exact velocity, and guided flows are linear ODEs ------
def guided(monkeypatch, q, velocity, w, a_0, method="qgf", T=2000):
    """Samples from these rows of noise, where the critic is q and the flow has this velocity."""
    monkeypatch.setattr(qgf, "velocity", velocity)
    monkeypatch.setattr(qgf, "q_values", lambda critic, s, a: jnp.stack([q(a[:, 0]), q(a[:, 0]) + 1]))
    nets, a_0 = dict(policy=None, critic=None), jnp.asarray(a_0)[:, None, None]
    run = jax.jit(partial(qgf.sample_actions.__wrapped__, method=method, T=T))
    return np.asarray(run(nets, jnp.zeros((len(a_0), 1)), a_0, w)[0])[:, 0]

def exact(q, flow, a_t, t, v, T):
    """The gradient with the Jacobian, times (1-t)/t (in the middle of a step, where it is finite)."""
    middle = t + 0.5 / T
    return (1 - middle) / middle * qgf.GUIDANCE["qgf-jacobian"](q, flow, a_t, t, v, T)

def test_with_the_jacobian_and_the_score_schedule_guidance_is_exact_for_a_linear_critic(monkeypatch):
    """The tilted Gaussian is N(μ + w σ² g, σ²); QGF shifts by w σ ∫ dt / sqrt((1-t)² + t²σ²)."""
    mu, sigma, w, g, a_0 = 0.3, 0.7, 0.5, 1.0, np.array([-0.2, 0.0, 0.2])
    monkeypatch.setitem(qgf.GUIDANCE, "exact", exact)
    got = guided(monkeypatch, lambda a: g * a, gaussian_velocity(mu, sigma), w, a_0, "exact")
    np.testing.assert_allclose(got, mu + w * sigma**2 * g + sigma * a_0, atol=2e-3)  # mean .545, deviation σ
    got = guided(monkeypatch, lambda a: g * a, gaussian_velocity(mu, sigma), w, a_0)
    integral = quad(lambda t: ((1 - t) ** 2 + (t * sigma) ** 2) ** -0.5, 0, 1)[0]
    np.testing.assert_allclose(got, mu + w * sigma * g * integral + sigma * a_0, atol=2e-3)

@pytest.mark.parametrize("method", qgf.GUIDANCE)
def test_guided_samples_of_a_gaussian_land_where_each_methods_ode_says(monkeypatch, method):
    mu, sigma, w, k, aim, a_0 = 0.1, 0.2, 0.3, 2.0, 0.4, np.linspace(-2, 2, 9)
    def slope(t, a):
        d = (1 - t) ** 2 + (t * sigma) ** 2
        clean = mu + t * sigma**2 / d * (a - t * mu)  # the posterior mean E[a_1 | a_t], with J = t σ² / d
        end = mu + sigma / math.sqrt(d) * (a - t * mu)  # the flow's own end
        push = {"qgf": aim - clean, "qgf-jacobian": t * sigma**2 / d * (aim - clean), "qgf-chain": aim - end,
                "bptt": sigma / math.sqrt(d) * (aim - end), "qfql": aim - a}
        return (clean - a) / (1 - t) + w * k * push[method]
    want = [solve_ivp(slope, (0, 1 - 1e-9), [a], rtol=1e-8, atol=1e-10).y[0, -1] for a in a_0]
    T = 300 if method in ("bptt", "qgf-chain") else 2000
    critic, flow = lambda a: -k / 2 * (a - aim) ** 2, gaussian_velocity(mu, sigma)
    got = guided(monkeypatch, critic, flow, w, a_0, method, T=T)
    np.testing.assert_allclose(got, want, atol=4 / T + 1e-3)
    assert abs(got - (mu + sigma * a_0)).max() > 0.01

# ---- names, data, tables -----------------------------------------------------------------------------------
def test_names_of_tasks_and_methods():
    for name in ("cube-double-task3", "cube-double-play-singletask-task3-v0", "cube-double-singletask-task3-v0"):
        assert qgf.find_task(name) == ("cube-double-task3", "cube-double-singletask-task3-v0", "cube-double-play-v0")
    assert qgf.find_task("cube-double-goal") == ("cube-double-goal", "cube-double-v0", "cube-double-play-v0")
    assert qgf.find_task("antmaze-large")[2] == "antmaze-large-navigate-v0"
    assert qgf.parse_method("bc") == ("bc", 1) and qgf.parse_method("qgf-jacobian@16") == ("qgf-jacobian", 16)

class FakeEnv:
    """Enough of a Chunks for load_dataset."""
    sparse = False
    sizes, envs = (S, 0, A), [types.SimpleNamespace(spec=gymnasium.spec("cube-single-singletask-v0"), unwrapped=None)]
def write(path, **changes):
    raw = random_data()
    raw |= dict(terminals=np.arange(60) == raw.pop("ends")) | changes
    np.savez(path, **{k: v for k, v in raw.items() if v is not None})
    return path

def test_a_sparse_return_counts_the_steps_until_the_task_is_solved(monkeypatch):
    for sparse, want in ((False, -21), (True, -2)):  # two steps that fail, and one that solves the task
        env = qgf.Chunks("cube-single-singletask-v0", 5, sparse)
        env.reset(seed=0)
        steps = iter([(np.zeros(28), -7.0, i == 2, False, dict(success=i == 2)) for i in range(3)])
        monkeypatch.setattr(env.envs[0].unwrapped, "step", lambda action: next(steps))  # noqa: B023
        assert env.step(np.zeros((1, 5, 5)))[1].tolist() == [[1, want, 3]]

@pytest.mark.parametrize("changes, words", [
    (dict(actions=np.zeros((60, 3))), "`actions` has shape (60, 3)"),
    (dict(observations=np.zeros((60, 9))), "`observations` has shape (60, 9)"),
    (dict(terminals=np.zeros(5)), "`terminals` has shape (5,)"), (dict(rewards=None), "no dataset of cube-single"),
    (dict(rewards=np.full(60, np.nan)), "`rewards` has shape (60,) and 60 NaN or Inf"),
    (dict(observations=np.full((60, S), np.inf)), "240 NaN or Inf"),
    (dict(actions=np.full((60, A), 3.0)), "actions reach 3"),
])
def test_a_foreign_dataset_is_refused(tmp_path, changes, words):
    with pytest.raises(qgf.UserError) as e:
        qgf.load_dataset(write(tmp_path / "d.npz", **changes), FakeEnv, CFG.horizon)
    assert words in str(e.value) and "\n" not in str(e.value)

def test_missing_truncated_and_unreadable_datasets_are_refused(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("<html>not found</html>")
    np.savez(tmp_path / "pickle.npz", actions=np.array([dict(a=1)], object))
    for name in ("none", "cut", "text", "pickle"):
        with pytest.raises(qgf.UserError, match="missing, cut off, or no dataset"):
            qgf.load_dataset(tmp_path / f"{name}.npz", FakeEnv, 3)
    with pytest.raises(qgf.UserError, match="--horizon"):
        qgf.load_dataset(tmp_path / "whole.npz", FakeEnv, 40)
    assert (qgf.load_dataset(write(tmp_path / "d.npz", masks=None), FakeEnv, 3)["masks"] == 1).all()
    monkeypatch.setattr(FakeEnv, "sparse", True)
    path = write(tmp_path / "d.npz", rewards=None, masks=random_data()["masks"] > 0)  # they say it all, as bools too
    assert (qgf.load_dataset(path, FakeEnv, 3)["rewards"] == -random_data()["masks"]).all()

def test_download_takes_the_second_host_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "/first/" in self.path and "cut" not in self.path else 200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * (500 if "cut" in self.path else 1000))
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

def test_data_at_hand_come_before_a_download_and_collected_ones_come_first_where_asked_for(tmp_path, monkeypatch):
    official, collected = (tmp_path / f"cube-single-play-v0{x}.npz" for x in ("", "-collected-200000"))
    fetched, find = [], lambda **options: qgf.find_dataset(qgf.Config(**options), "cube-single-play-v0")
    monkeypatch.setattr(qgf, "DATA_DIR", tmp_path)
    monkeypatch.setattr(qgf, "download", lambda dataset, path: not fetched.append(path))
    assert find() == [official] == fetched
    collected.touch()
    assert find() == find(collect=200_000) == [collected]
    official.touch()
    assert find() == [official] == fetched and find(collect=200_000) == [collected]

def row(w, *runs):
    """Results of runs that won so many of their episodes, the first ones: (runs, episodes, 4)."""
    return np.array([[(w, i < wins, -10.0, 100) for i in range(n)] for wins, n in runs], float)

def test_table_has_wilsons_interval_the_paired_gain_and_an_answer():
    rows = {("bc", 0.0, 0.0): row(0, (10, 50)), ("qgf", 0.1, 0.0): row(0.03, (40, 50))}
    lines, z, p, n = qgf.table(rows), 1.959964, 0.8, 50
    centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    assert f"0.80 [{low:.2f}, " in lines[2] and lines[2].split()[:4] == ["qgf", "0.1", "0.03", "50"]
    bootstrap = qgf.interval(rows["qgf", 0.1, 0.0][..., 1])  # reaches further at one end
    assert f"{max(high, bootstrap[1]):.2f}]" in lines[2]
    ends = qgf.interval(1.0 * (np.arange(50)[None] < 40) - (np.arange(50)[None] < 10))
    spread = z * math.sqrt(0.6 * 0.4 / 50)  # of 30 ones and 20 zeros
    np.testing.assert_allclose(ends, (0.6 - spread, 0.6 + spread), atol=0.03)
    assert "+0.60 [+0." in lines[2] and lines[-1].startswith("Guidance helped: qgf gains +0.60")
    assert max(map(len, lines)) <= 90
    for a, b, words in [(40, 3, "harmed"), (20, 21, "made no significant difference")]:
        rows = {("bc", 0.0, 0.0): row(0, (a, 50)), ("qgf", 0.1, 0.0): row(0.03, (b, 50))}
        assert qgf.table(rows)[-1].startswith(f"Guidance {words}: qgf")
    few = {("bc", 0.0, 0.0): row(0, (0, 2)), ("qgf", 0.1, 0.0): row(0.03, (2, 2))}
    assert "Guidance" not in qgf.table(few)[-1]  # two episodes show nothing
    rows = {("bc", 0.0, 0.0): row(0, (5, 50)), ("bc@4", 0.0, 0.0): row(0, (20, 40)), ("qgf@4", 0.1, 0.0): row(1, (30, 50))}
    lines = qgf.table(rows)  # best of 4 gains over best of 4, on the 40 episodes that both have
    assert "+0.25 [" in lines[3] and lines[3].endswith("*")
    assert not lines[2].endswith("*") and lines[-1].startswith("Guidance helped: qgf@4 gains +0.25")

def test_the_interval_over_several_runs_is_that_of_runs_and_episodes():
    x = row(0, (60, 200), (90, 200), (120, 200), (140, 200))[..., 1]
    p = np.array([0.3, 0.45, 0.6, 0.7])  # the variance of a mean of four, in two stages
    half = 1.96 * math.sqrt(p.var() / 3 + (p * (1 - p)).mean() / 600)
    np.testing.assert_allclose(qgf.interval(x), (p.mean() - half, p.mean() + half), atol=0.02)

# ---- episodes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", ["cube-double-v0", "scene-v0"])
def test_goals_in_data_are_those_that_the_environment_gives(env_id, tmp_path):
    env = qgf.Chunks(env_id, 5)
    inner, seen = env.envs[0].unwrapped, {}
    oracle = inner.compute_oracle_observation
    def spy():  # called inside reset, when the environment is in its goal state
        buttons = np.copy(getattr(inner, "_cur_button_states", 0))  # the scene has some
        seen.update(qpos=inner._data.qpos.copy(), ob=inner.compute_observation(), button_states=buttons)
        return oracle()
    inner.compute_oracle_observation = spy
    env.reset(seed=2)
    goal, hidden = env.goals[0], inner._data.qacc_warmstart.copy()  # OGBench's reset leaves this to chance
    two = {k: np.float32([v, v]) for k, v in seen.items() if k != "ob"}
    np.savez(tmp_path / "two.npz", observations=[seen["ob"]] * 2, actions=np.zeros((2, 5)), terminals=[0, 1], **two)
    np.testing.assert_allclose(qgf.load_dataset(tmp_path / "two.npz", env, 1)["goals"], [goal] * 2, atol=1e-5)
    env.reset(seed=2)
    np.testing.assert_array_equal(inner._data.qacc_warmstart, hidden)  # so an episode is the same to the bit

def test_rollout_plays_every_episode_once_and_as_if_it_were_alone(monkeypatch):
    """Two processes (here in one) of two environments each; actions are noise and state, rewards tell them apart."""
    monkeypatch.setattr(qgf, "sample_actions", lambda nets, s, a, w, m, T: (jnp.add(nets[m] * w * T * a[:, -1], s[:, -1:]), 0))
    pair, one = [qgf.Chunks("cube-single-v0", 5, M=2) for _ in range(2)], qgf.Chunks("cube-single-v0", 5)
    monkeypatch.setattr(type(one.envs[0].unwrapped), "compute_reward", lambda self: self._data.qpos.sum())
    both = lambda results: jax.tree.map(lambda *x: np.stack(x), *results)
    envs = types.SimpleNamespace(action_space=gymnasium.spaces.Box(-1, 1, (2, 2, 5, 5)),
        reset=lambda seed, options: both([c.reset(seed=s, options=options) for c, s in zip(pair, seed)]),
        step=lambda a: type(a) is np.ndarray and both([c.step(x) for c, x in zip(pair, a)]))  # JAX's would claim a GPU
    x, goals = qgf.rollout(envs, dict(qgf=2.0), 0.05, "qgf@2", replace(CFG, episodes=5)), []
    for i in range(5):
        obs, info = one.reset(seed=qgf.FIRST_EPISODE + i)
        rng, total = np.random.default_rng(qgf.FIRST_EPISODE + i), np.zeros(3)
        goals.append((one.envs[0].unwrapped.cur_task_id, obs[0, 28:].tobytes()))  # a goal is at the end
        while info["seed"][0] == qgf.FIRST_EPISODE + i:
            chunk = 0.5 * np.float32(rng.standard_normal((2, 25)))[-1] + obs[0, -1]
            obs, new, _, _, info = one.step(chunk.reshape(1, 5, 5))
            total += new[0]
        np.testing.assert_array_equal(x[i], total)
    assert one.sizes == (28, 3, 5) and (x[:, 2] == 200).all() and len(set(x[:, 1])) == 5
    assert [g[0] for g in goals] == [1, 2, 3, 4, 5] and len(set(goals)) == 5  # as OGBench has

def test_evaluate_acts_by_the_averages_of_each_seed_with_its_own_weight(monkeypatch, tmp_path):
    cfg, seen = replace(CFG, seeds=2, methods=("qgf@2",)), []
    states, probe = qgf.init_states((S, 0, A), cfg), np.float32(np.random.default_rng(0).normal(size=(9, S)))
    monkeypatch.setattr(qgf, "AsyncVectorEnv", lambda *_, **__: types.SimpleNamespace(close=lambda terminate: None))
    def rollout(envs, *x):
        seen.append(x)
        if x[2] == "bptt":  # meanwhile, another process saves a row
            with open(tmp_path / "e.csv", "a") as file:
                file.write("cube-single,0,0,0,other,0,0.5,1,1,1\n")
        return np.zeros((x[-1].episodes, 3))
    monkeypatch.setattr(qgf, "rollout", rollout)
    qgf.evaluate(states._replace(params=None), probe, "cube-single-v0", tmp_path / "e.csv", cfg)
    nets = [jax.tree.map(lambda x: x[k], states.target) for k in range(2)]  # noqa: B023
    a_0 = jax.random.normal(KEY, (9, 1, CFG.horizon * A))
    weights = [0, 0, *(qgf.relative_weight(0.1, net, probe, a_0, "qgf", CFG.denoise_steps) for net in nets)]
    for (net, w, method, _), k, want in zip(seen, (0, 1, 0, 1), weights, strict=True):
        assert_same(net, nets[k])
        assert w == want and method == ("qgf@2" if w else "bc")
    for episodes, played in (40, {"bptt"}), (60, {"bptt", "bc"}), (50, set()):  # bc only where it is too short
        seen.clear()
        cfg = replace(cfg, methods=("bptt",) if played else (), episodes=episodes)
        results = qgf.evaluate(states, probe, "cube-single-v0", tmp_path / "e.csv", cfg)
        assert {method for _, _, method, _ in seen} == played
    assert (0, "other", 0.0, 0.5) in results

# ---- runs: the command line, on collected data, in the real simulator ----------------------------------------
SMALL = "--collect 2000 --width 16 --depth 2 --batch-size 32 --episodes 2".split()

@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder with two collected episodes of cube-single."""
    home, mp = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    mp.setattr(qgf, "DATA_DIR", home / ".ogbench/data")
    qgf.find_dataset(qgf.Config(collect=2000), "cube-single-play-v0")
    yield home
    mp.undo()

def start(home, *args):
    """The command line in a process of its own."""
    command = [sys.executable, qgf.__file__, *SMALL, *map(str, args)]
    env = os.environ | dict(HOME=str(home))
    return subprocess.Popen(command, env=env, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
def finish(home, *args):
    p = start(home, *args)
    out, err = p.communicate(timeout=200)
    assert p.returncode == 0, err
    return out
def checkpoint(folder):
    return dict(np.load(folder / "cube-single-s0/checkpoint.npz"))
def episodes(folder):
    return list(csv.DictReader((folder / "episodes.csv").read_text().splitlines()))

def test_collected_data_has_the_form_of_ogbenchs(home):
    data = dict(np.load(home / ".ogbench/data/cube-single-play-v0-collected-2000.npz"))
    assert {k: (v.shape, v.dtype.name) for k, v in data.items()} == dict(
        observations=((2002, 28), "float32"), actions=((2002, 5), "float32"), terminals=((2002,), "bool"),
        qpos=((2002, 21), "float32"))
    assert np.flatnonzero(data["terminals"]).tolist() == [1000, 2001]
    assert abs(data["actions"]).max() <= 1 and 0.05 < data["actions"].std() < 0.6
    cube = data["qpos"][:, 14:17]
    assert cube[:, 2].max() > 0.08 and np.ptp(cube[:1001, 1]) > 0.1  # the cube is lifted, and carried about
    np.testing.assert_allclose((cube - [0.425, 0, 0]) * 10, data["observations"][:, 19:22], atol=1e-4)  # same row

@pytest.fixture(scope="session")
def whole(home):
    """A finished run. Beside it is `stopped`, which went as far through a Ctrl-C and a kill -9."""
    def until_training(p):
        text = ""
        while "training:" not in text and p.poll() is None:  # its progress bar, on however busy a machine
            text += p.stderr.read(1)
        return p
    stopped = until_training(start(home, "--updates", 10**6, "--out", "stopped"))
    time.sleep(5)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 1 and "stopped at update" in err and "Traceback" not in err
    first = int(checkpoint(home / "stopped")["metrics"][-1, 0])
    assert 100 <= first < 10**6
    again = until_training(start(home, "--updates", 10**6, "--out", "stopped"))
    again.kill()  # kill -9, as a power cut would: the checkpoint is whole and the last one
    again.wait()
    assert checkpoint(home / "stopped")["metrics"][-1, 0] == first
    for name in ("stopped", "whole"):
        out = finish(home, "--updates", first + 200, "--out", name)
    assert "solved in" in out and f"cube-single after {first + 200} updates" in out and "saved in whole" in out
    return home / "whole"

def test_a_run_stopped_or_killed_goes_on_bitwise(home, whole):
    a, b = checkpoint(whole), checkpoint(home / "stopped")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a if k != "record")
    for name in ("metrics.csv", "episodes.csv"):
        assert (whole / "cube-single-s0" / name).read_text() == (home / "stopped/cube-single-s0" / name).read_text()

def test_a_second_evaluation_adds_or_replaces_rows_and_needs_no_data(home, whole):
    folder, updates, w = whole / "cube-single-s0", int(checkpoint(whole)["metrics"][-1, 0]), "0.5123456789012"
    before = episodes(folder)
    assert [(r["method"], r["guidance"]) for r in before] == [("bc", "0.0")] * 2 + [("qgf", "0.1")] * 2
    data = home / ".ogbench/data/cube-single-play-v0-collected-2000.npz"
    data.rename(data.with_suffix(".away"))
    out = finish(home, "--out", "whole", "--methods", "qgf@2,bc@2", "qfql", "--weights", w, "--episodes", "3")
    data.with_suffix(".away").rename(data)
    after = episodes(folder)
    names = [(r["method"], r["guidance"], r["weight"]) for r in after]
    assert [r for r in after if r["method"] == "qgf"] == [r for r in before if r["method"] == "qgf"]
    assert names.count(("qfql", "0.0", w)) == 3 and names.count(("bc", "0.0", "0.0")) == 3
    assert {r["updates"] for r in after} == {str(updates)} and len(after) == 2 + 3 + 3 * 3
    assert all(name in out for name in ("qgf ", "qgf@2", "bc@2", "qfql"))  # the table has them all
    starts = {r["episode"]: (r["return"], r["length"]) for r in before if r["method"] == "bc"}
    assert all((r["return"], r["length"]) == starts[r["episode"]] for r in after
               if r["method"] == "bc" and r["episode"] in starts)
    w = [float(r["weight"]) for r in before if r["method"] == "qgf"]
    assert w[0] == w[1] > 0  # λ over the rms, the same in all episodes of a seed

def test_a_real_run_of_two_seeds_with_edp_goals_and_slices(home):
    data = dict(np.load(home / ".ogbench/data/cube-single-play-v0-collected-2000.npz"))
    (home / "slices").mkdir()
    for i in range(3):
        np.savez(home / f"slices/{i}.npz", **{k: v[600 * i :][:500] for k, v in data.items()})
    (home / "slices/x-val.npz").touch()  # for validation, in OGBench's naming, and not trained on
    args = "--env cube-single-goal --data slices --seeds 2 --edp 10 --long-horizon 25 --methods edp gradstep".split()
    out = finish(home, *args, "--collect", 0, "--updates", 2150)
    assert "first of 3: 500 rows" in out and "any goal" in out
    folder = home / "runs/cube-single-goal-s0"
    rows = [(r["seed"], r["method"]) for r in episodes(folder)]
    assert rows == [(s, m) for m in ("bc", "edp", "gradstep") for s in "01" for _ in range(2)]
    assert len({r["weight"] for r in episodes(folder) if r["method"] == "gradstep"}) == 2  # each seed has its own
    metrics = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    assert metrics["step"][-2:].tolist() == [2150, 2150] and metrics["seed"][-2:].tolist() == [0, 1]
    assert np.isfinite(metrics["q"]).all() and metrics["flow_loss"][-1] < metrics["flow_loss"][0]
def test_a_run_with_the_flow_of_another_trains_the_critic_alone(home, whole):
    args = ["--env", "cube-single-goal", "--out", "lent", "--updates", 120]  # blind to goals, a flow serves them all
    finish(home, *args, "--policy", whole / "cube-single-s0", "--long-horizon", 25)
    folders = whole / "cube-single-s0", home / "lent/cube-single-goal-s0"
    theirs, ours = (qgf.load(folder / "checkpoint.npz")[0] for folder in folders)
    assert_same(theirs.target["policy"], ours.target["policy"])  # to the bit, after 120 averages
    assert ours.params.keys() == {"critic", "long_critic", "value"}
    inputs = [x.params["critic"][0]["w"].shape[2] for x in (theirs, ours)]
    assert inputs[1] == inputs[0] + 3  # it sees the goal

def main(whole, *args):
    return qgf.main(["--out", str(whole), *SMALL, *map(str, args)])

@pytest.mark.parametrize("args, words", [
    (["--env", "cube-duble"], "these are .*: cube-double"), (["--env", "cube-single-task9"], "these are"),
    (["--env", "visual-cube-single-play-v0"], "no state-based OGBench task"),
    (["--lr", "-1"], "--lr -1: give a number above 0"), (["--updates", "1.5"], "--updates 1.5: give a whole number"),
    (["--discount", "1.5"], "--discount 1.5: give a number above 0, at most 1"),
    (["--epochs", "5"], "unknown option --epochs: did you mean --updates?"), (["--xyz", "5"], "unknown option --xyz "),
    (["--env"], "expected one argument"), (["--updates", "50"], "updates already"),
    (["--data", "nowhere.npz", "--out", "other"], "nowhere.npz does not exist"),
    (["--data", "nowhere.npz"], "holds a run with --data '':"), (["--data", ".", "--out", "other"], "--collect is given"),
    (["--sparse", "2"], "--sparse 2: give a whole number from 0, at most 1"),
    (["--env", "scene", "--policy", "whole/cube-single-s0", "--out", "other"], "update .* in cube-single; give .* of scene"),
    (["--env", "cube-single-task3", "--policy", "unfinished", "--out", "other"], "update .* finished run"),
    (["--env", "cube-single-goal", "--policy", "whole/cube-single-s0", "--out", "other", "--horizon", "1"], "with --horizon 5"),
    (["--env", "cube-single-task3", "--policy", "gone", "--out", "other"], "gone/checkpoint.npz is no whole"),
    (["--seeds", "2"], "holds a run with --seeds 1"), (["--width", "32"], "holds a run with --width 16"),
    (["--long-horizon", "3", "--out", "other"], "--long-horizon 3 is shorter than --horizon 5"),
    (["--methods", "qgf", "best"], "unknown method 'best'"), (["--methods", "qgf@0"], "unknown method 'qgf@0'"),
    (["--methods", "edp@4"], "train one with --edp"), (["--methods", "qgf@"], "unknown method 'qgf@'"),
    (["--long-horizon", "2000", "--out", "other"], "no trajectory has 2000 actions"),
    (["--env", "antmaze-large", "--collect", "1000"], "no scripted policy makes antmaze-large-navigate-v0"),
])
def test_a_users_mistake_gets_one_clear_line(home, whole, monkeypatch, args, words):
    monkeypatch.chdir(home)
    before = checkpoint(whole)
    (home / "unfinished").mkdir(exist_ok=True)
    more = dict(record=str(before["record"]).replace('"updates": ', '"updates": 1'))
    np.savez(home / "unfinished/checkpoint.npz", **before | more)
    with pytest.raises(qgf.UserError, match=words) as e:
        main(whole, *args)
    assert len(str(e.value)) < 600 and "\n" not in str(e.value) and not (home / "other").exists()
    assert all((v == before[k]).all() for k, v in checkpoint(whole).items())

def test_words_are_read_kindly_and_a_family_has_its_defaults():
    given = qgf.parse("--updates 1e5 --guidance 0.03,0.1 0.3 --methods qgf,bptt --seed 0 --sparse".split())
    assert given == dict(updates=100_000, guidance=(0.03, 0.1, 0.3), methods=("qgf", "bptt"), seed=0, sparse=1)
    for name, family in {"cube-double-goal": "cube-double", "scene-task2": "scene", "puzzle-3x3-goal": "puzzle-3x3-goal"}.items():
        assert qgf.settings({}, name, "", {}, 0) == qgf.Config(env=name, **qgf.FAMILY[family])
    assert pytest.raises(SystemExit, qgf.parse, ["--help"]).value.code == 0

def test_other_data_a_damaged_and_an_older_checkpoint_are_refused_and_kept(home, whole, monkeypatch, tmp_path):
    name = "cube-single-play-v0-collected-2000.npz"
    with np.load(home / ".ogbench/data" / name) as file:
        np.savez(tmp_path / name, **{k: v[:1001] for k, v in file.items()})
    monkeypatch.setattr(qgf, "DATA_DIR", tmp_path)
    with pytest.raises(qgf.UserError, match="was trained on other data"):
        main(whole, "--updates", 10**6)
    path = tmp_path / "cube-single-s0/checkpoint.npz"
    path.parent.mkdir()
    path.write_bytes((whole / "cube-single-s0/checkpoint.npz").read_bytes()[:3000])
    with pytest.raises(qgf.UserError, match="is no whole checkpoint"):
        main(tmp_path)
    assert path.stat().st_size == 3000
    path.rename(tmp_path / "away")
    (path.parent / "episodes.csv").touch()  # of a network that is gone: another's rows must not join them
    with pytest.raises(qgf.UserError, match="move its folder"):
        main(tmp_path)
    arrays = checkpoint(whole)
    for change in dict(record=str(arrays["record"]).replace('"lr"', '"choose"')), dict(metrics=arrays["metrics"][:, 1:]):
        np.savez(path, **arrays | change)
        with pytest.raises(qgf.UserError, match="choose|reshape"):
            main(tmp_path)

def test_a_resumed_run_goes_on_with_its_slice_and_saves_each_minute(monkeypatch, tmp_path):
    seen, clock = [], iter(range(0, 10**6, 4))  # each look at the clock takes 4 s
    def train(states, data, n, cfg):
        seen.append(data * (n // 50))
        return states, {k: np.zeros((1, n)) for k in qgf.LOSSES}
    monkeypatch.setattr(qgf, "train", train)
    monkeypatch.setattr(qgf, "save", lambda *_: seen.append("."))
    monkeypatch.setattr(qgf, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    qgf.learn(types.SimpleNamespace(step=[950]), {}, [], "abc", str, tmp_path, replace(CFG, updates=3250))
    assert "".join(seen).replace(".", "") == "a" + 20 * "b" + 20 * "c" + 5 * "a" and seen.count(".") == 2

def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(whole, monkeypatch):
    before, real = checkpoint(whole), qgf.train
    def diverging(states, data, n, cfg):
        states, info = real(states, data, n, cfg)
        params = jax.tree.map(lambda x: x * np.nan, states.params)
        return states._replace(params=params), info | dict(q=info["q"] * np.nan)
    monkeypatch.setattr(qgf, "train", diverging)
    with pytest.raises(qgf.UserError, match="NaN or Inf at update .*smaller --lr"):
        main(whole, "--updates", int(before["metrics"][-1, 0]) + 100)
    assert all((v == before[k]).all() for k, v in checkpoint(whole).items())
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ---- the files around it -----------------------------------------------------------------------------------
def run_all(*args, **env):
    return subprocess.run([HERE / "run_all.sh", *args], env=os.environ | env, text=True, capture_output=True)

def test_run_all_goes_on_after_a_failure_and_says_so(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n[ "$3" != broken ]\n')
    stub.chmod(0o755)
    p = run_all("one broken two", "0 1", "--width", "64", PYTHON=str(stub), CALLS=str(tmp_path / "calls"), OUT="o")
    assert p.returncode == 1 and "failed: broken-s0 broken-s1" in p.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines() if ".py" in line]
    assert [(c[2], c[4]) for c in calls[:-1]] == [(e, s) for e in ("one", "broken", "two") for s in "01"]
    assert all(c[5:] == ["--out", "o", "--width", "64"] for c in calls[:-1]) and "table.py" in calls[-1][0]

def test_run_all_explains_itself_and_refuses_what_cannot_work(tmp_path):
    assert "./run_all.sh" in run_all("--help").stdout
    p = run_all("cube-single", PYTHON="no-such-python")
    assert p.returncode == 1 and "no-such-python" in p.stderr and p.stderr.count("\n") == 1
    (tmp_path / "scene-play-v0-val.npz").touch()  # for validation, and not to be trained on
    for folder, words in {"/nowhere": "DATA=/nowhere is no folder", str(tmp_path): "no scene-play-* in"}.items():
        p = run_all("scene-task2", DATA=folder)
        assert p.returncode == 1 and words in p.stderr and p.stderr.count("\n") == 1

def test_tasks_2_to_5_use_the_flow_of_task_1_and_a_slurm_task_takes_one_run_of_the_papers_list():
    calls = [line.split() for line in run_all("--dry-run", "", "3", OUT="o").stdout.splitlines()]
    assert len(calls) == 20
    for call in calls:
        env = call[call.index("--env") + 1]
        lender = None if env.endswith("task1") else f"o/{env[:-1]}1-s3"
        assert lender == (call[call.index("--policy") + 1] if "--policy" in call else None)
    lines = run_all("--dry-run", "paper", "0").stdout.splitlines()
    assert len(lines) == 20 and all("--discount 0.999 --expectile 0.9 --sparse 0" in x for x in lines)
    one = run_all("--dry-run", "paper", "0", SLURM_ARRAY_TASK_ID="19").stdout.splitlines()
    assert one == lines[19:] and "--env scene-task5" in one[0]

def test_the_table_of_a_folder_pools_tasks_and_seeds_and_counts_none_twice(tmp_path):
    header = "env,seed,episode,updates,method,guidance,weight,success,return,length"
    def save(folder, env, seeds, wins):
        (tmp_path / folder).mkdir(parents=True)
        lines = [f"{env},{s},{i},{u},{m},{g},{0.5 * g},{float(i < w)},-1.0,9.0" for s in seeds for i in range(10)
                 for u, m, g, w in ((50, "qgf", 0.1, 10), (100, "bc", 0.0, 0), (100, "qgf", 0.1, wins), (100, "new@2", 0.1, 9))]
        (tmp_path / folder / "episodes.csv").write_text("\n".join([header, *lines, ""]))
    save("cube-triple-task1-s0", "cube-triple-task1", (0, 1), 9)
    save("cube-triple-task2-s0", "cube-triple-task2", (0,), 3)
    save("cube-triple-task1-s1", "cube-triple-task1", (1,), 0)  # that seed again: the later one counts
    save("more/scene-s0", "scene", (0,), 10)
    command = [sys.executable, HERE / ".github/table.py", tmp_path]
    out = subprocess.run(command, env=os.environ | dict(PYTHONPATH=str(HERE)), text=True, capture_output=True).stdout
    assert all(x in out for x in ("cube-triple: 3 runs", "more/scene: 1 run", "\n| `qgf` | 0.45 | 0.30 | 0.38 |\n| `new@2` | 0.90"))
    assert [line.split()[3:5] for line in out.splitlines() if line.startswith("qgf ")][0] == ["30", "0.40"]

def forked(page):
    """qgf.py with the diff of that page: its + lines go behind the unchanged one before them."""
    source = (HERE / "qgf.py").read_text()
    lines = (HERE / page).read_text().split("```diff\n")[1].split("```")[0].splitlines()
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
    fork = forked("README.md")
    (name,) = fork.GUIDANCE.keys() - qgf.GUIDANCE.keys()
    nets, s, a_0 = sampling()
    ours, bc, plain = (fork.sample_actions(nets, s, a_0, 0.5, m, 5)[0] for m in (name, "bc", "qgf"))
    assert np.isfinite(ours).all() and (ours != bc).any() and (ours != plain).any()

def test_the_new_loss_for_forks_runs_and_reaches_the_critic_alone():
    fork, state, batch = forked(".github/forking.md"), some_state(), batch_of()
    ours, info = jit(fork.update)(state, batch, KEY, CFG)
    plain, without = update(state, batch, KEY, CFG)
    assert info.pop("conservative_loss") != 0
    assert_close(info, without, rtol=1e-5)
    assert_close(*({k: x.params[k] for k in ("policy", "value")} for x in (ours, plain)), atol=2e-5)
    assert "critic" in changed(ours.params, plain.params)
