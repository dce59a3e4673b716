# SPDX-License-Identifier: MIT
"""Each fork in .github/forks applies to qgf.py, trains, and has the effect that its README says."""

import importlib
import re
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import qgf

PLACES = dict(midpoint=2, placebo=2, loss=2, transformer=4, edp=99, dqc=99)  # at most
B, S, G, A, H, N = 16, 3, 2, 2, 3, 90
CACHE = tempfile.TemporaryDirectory()  # forks compile much alike
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
KEY = jax.random.PRNGKey(0)
close = np.testing.assert_array_almost_equal  # to 6 decimals


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_fork(name, tmp_path, monkeypatch):
    """Small networks."""
    diff = Path(__file__).with_name(f"{name}.diff")
    marks = "".join(line[:1] for line in diff.read_text().splitlines()[2:])
    assert len(re.findall("[+-]+", marks)) <= PLACES[name]
    (tmp_path / "qgf.py").write_text(Path(qgf.__file__).read_text())
    subprocess.run(["git", "apply", diff], cwd=tmp_path, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "qgf.py").rename(tmp_path / f"{name}.py")
    fork = importlib.import_module(name)

    small = dict(batch_size=B, policy_width=8, critic_width=8, depth=1, horizon=H, denoise_steps=4)
    cfg, states = fork.Config(**small), {}
    rng = np.random.default_rng(0)
    s, goals, a, noise = (np.float32(rng.normal(size=(N, n))) for n in (S, G, A, H * A))
    ends = np.int32(np.repeat([29, 59, 89], 30))  # three trajectories
    starts = np.flatnonzero(np.arange(N) + 25 <= ends)
    data = qgf.Data(s, a.clip(-1, 1), ends * 0.0, ends * 0.0, 9 * goals, ends, starts)
    init = jax.jit(fork.init_state, static_argnums=(0, 1, 2))
    for learner in fork.LEARNERS:
        state = init(learner, (S, G, A), cfg)
        states[learner], log = fork.train(learner, state, data, 3, cfg)
        assert all(np.isfinite(x).all() for x in log.values())
    params, average, *_ = states["critic"]
    nets = states["policy"].average | average
    batch = jax.device_get(jax.jit(fork.sample_batch, static_argnums=2)(KEY, data, cfg))
    s, g, a, *_ = batch
    half = np.full((B, 1), 0.5, np.float32)

    def act(method):
        a, _ = fork.sample_actions(nets, s, g, noise[:B, None], 2.0, method, cfg)
        return np.asarray(a).round(4).tobytes()

    new = dict(midpoint=["qgf-midpoint"], placebo=["placebo"], edp=["edp"]).get(name, [])
    assert len({act(method) for method in ["bc", "qgf", *new]}) == 2 + len(new)
    if name == "placebo":
        more = lambda x: fork.q_min(nets["critic"], s, g, x), None, a, half, a, 4
        d, wrong = jax.jit(lambda: (fork.qgf(*more), fork.placebo(*more)))()
        assert (np.roll(d, 1, axis=1) == wrong).all()
    if name == "loss":
        assert (log["conservative_loss"] != 0).all()
    if name == "transformer":
        velocity = jax.jit(fork.velocity, static_argnums=4)
        for order in (0, 1):  # 0: the order of actions means nothing
            net = nets["policy"] | dict(position=order * nets["policy"]["position"])
            chunks = a.reshape(B, H, A), a.reshape(B, H, A)[:, ::-1]
            v, w = (velocity(net, s, x.reshape(B, -1), half, cfg).reshape(B, H, A) for x in chunks)
            assert np.allclose(v, w[:, ::-1], atol=1e-5) != order
    if name == "edp":
        state = qgf.init_state("critic", (S, G, A), cfg)
        plain = qgf.train("critic", state, data, 3, cfg)[0].params
        jax.tree.map(close, plain, {net: params[net] for net in plain})  # as without edp

        @jax.jit
        def losses():
            key_noise, key_time = jax.random.split(KEY)
            a_0 = jax.random.normal(key_noise, a.shape)
            t = jax.random.randint(key_time, (B, 1), 0, 5) / 4
            a_t = a_0 + t * (a - a_0)
            v = fork.velocity(params["edp"], np.hstack([s, g]), a_t, t, cfg)
            q = fork.q_values(average["critic"], s, g, (a_t + (1 - t) * v).clip(-1, 1))
            loss = 100 * ((v - a + a_0) ** 2).mean() - q.min(axis=0).mean()
            return loss, fork.critic_loss(params, average, batch, KEY, cfg)[1]["edp_loss"]

        close(*losses(), 4)
    if name == "dqc":
        lost = batch.discounts > 0
        assert lost.any() and (a == batch.long_actions[:, : H * A]).all() and "long_loss" in log
        close(batch.discounts[lost], 0.99**25)
        close(batch.returns[lost], 100 * 0.99**25 - 100, 4)
