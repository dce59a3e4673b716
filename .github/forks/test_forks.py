# SPDX-License-Identifier: MIT
"""Each fork in .github/forks applies to qgf.py, trains, and has the effect that its README says."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qgf

HERE = Path(__file__).parent
FOLDER = tempfile.TemporaryDirectory()  # of patched copies, and of compiled code, which is alike
jax.config.update("jax_compilation_cache_dir", f"{FOLDER.name}/compiled")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

PLACES = dict(  # at most; a place is a run of lines that begin with + or -
    midpoint=2, fade=2, placebo=2, loss=2, wandb=2, qc=4, edp=4, transformer=4, dqc=8
)
PLACES["goal-bc"] = 5
KEPT = {name: {"policy", "critic"} for name in PLACES}  # networks that a fork can take from a run
KEPT |= dict(loss={"policy"}, qc={"policy"}, transformer={"critic"}, dqc=set())
KEPT["goal-bc"] = set()
METHODS = dict(  # that a fork adds
    midpoint=["qgf-midpoint"],
    placebo=["placebo-shift", "placebo-reversal", "placebo-rotation"],
    edp=["edp"],
)
B, S, G, A, H, T, N = 16, 3, 2, 2, 3, 4, 90
SMALL = dict(batch_size=B, policy_width=8, critic_width=8, depth=1, horizon=H, denoise_steps=T)
KEY = jax.random.PRNGKey(0)
sigmoid = jax.nn.sigmoid
close = np.testing.assert_allclose


@lru_cache
def load(name):
    """qgf.py with a fork's diff applied, imported as fork_NAME."""
    path = Path(FOLDER.name, name, "qgf.py")
    path.parent.mkdir(exist_ok=True)
    shutil.copy(qgf.__file__, path)
    subprocess.run(["git", "apply", HERE / f"{name}.diff"], cwd=path.parent, check=True)
    spec = importlib.util.spec_from_file_location(f"fork_{name}", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


def make_data():
    """Three trajectories of 30 rows. Goals lie far apart, so that only its own row reaches one."""
    rng = np.random.default_rng(0)
    s, goals, a = (rng.normal(size=(N, n)).astype(np.float32) for n in (S, G, A))
    ends = np.repeat([29, 59, 89], 30).astype(np.int32)
    starts = np.flatnonzero(np.arange(N) + 25 <= ends).astype(np.int32)  # 25 is of dqc
    zeros = np.zeros(N, np.float32)
    return qgf.Data(s, a.clip(-1, 1), zeros, zeros + 1, 99 * goals, ends, starts, len(starts))


def train(fork, cfg):
    """Three updates of each learner -> the averages, in one dict; their States; their logs."""
    nets, states, logs = {}, {}, {}
    for name, (init, loss, _) in fork.LEARNERS.items():
        state = jax.jit(fork.init_state, static_argnums=(0, 1, 2))(init, (S, G, A), cfg)
        first = jax.device_get(state.params)  # `train` uses the State up
        states[name], logs[name] = fork.train(loss, 3, state, nets, make_data(), 3, cfg)
        for network, parameters in states[name].params.items():
            same = jax.tree.map(np.array_equal, first[network], parameters)
            assert not all(jax.tree.leaves(same)), f"{network} does not learn"
        nets = nets | states[name].average
    return nets, states, logs


@lru_cache
def trained(name):
    """A fork -> the module, its Config, averages, States, logs and a batch."""
    fork = load(name)
    cfg = fork.Config(**SMALL)
    batch = jax.jit(fork.sample_batch, static_argnums=2)(KEY, make_data(), cfg)
    return fork, cfg, *train(fork, cfg), batch


def codes(module):
    """Hashes of the code that decides what each network becomes, by learner."""
    learners = module.LEARNERS.items()
    return {
        (k, module.code_hash(module.load_data, module.init_state, module.train, init, loss))
        for k, (init, loss, _) in learners
    }


def noise(n=1):
    """a_0 (B, n, H*A)."""
    return np.random.default_rng(1).standard_normal((B, n, H * A)).astype(np.float32)


def euler(v, a):
    """a (B, H*A) after T steps of v(a, t), where t is a number: a plain loop."""
    for i in range(T):
        a = a + v(a, i / T) / T
    return a.clip(-1, 1)


def column(t):
    """The number t as (B, 1)."""
    return np.full((B, 1), t, np.float32)


def bce(logits, p):
    """Cross-entropy of σ(logits) to p, by its definition, in float64."""
    x = 1 / (1 + np.exp(-np.float64(logits)))
    return -p * np.log(x) - (1 - p) * np.log(1 - x)


@pytest.mark.parametrize("name", PLACES)
def test_diff(name):
    """It is short, it is laid out as the file is, and it leaves networks alone if it says so."""
    marks = "".join(x[:1] for x in (HERE / f"{name}.diff").read_text().splitlines()[2:])
    places = len(re.findall("[+-]+", marks))
    assert places <= PLACES[name]
    assert re.search(rf"\n\| `{name}` \| .* \| {places} \|\n", (HERE / "README.md").read_text())
    fork = load(name)
    assert {learner for learner, _ in codes(fork) & codes(qgf)} == KEPT[name]
    settings = ["--config", HERE.parents[1] / ".ruff.toml", fork.__file__]
    for command in (["format", "--check"], ["check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *settings], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_training(name):
    """Every learner trains to finite numbers, and every new method acts in its own way."""
    fork, cfg, nets, _, logs, batch = trained(name)
    assert [*logs] == [*fork.LEARNERS]
    for log in logs.values():
        assert all(x.shape == (3,) and np.isfinite(x).all() for x in log.values())
    actions = set()
    for method in ["bc", "qgf", *METHODS.get(name, [])]:
        more = noise(), 2.0, fork.ESTIMATORS[method], cfg
        a, _ = fork.sample_actions(nets, batch.observations, batch.goals, *more)
        actions.add(np.asarray(a).round(4).tobytes())
    assert len(actions) == 2 + len(METHODS.get(name, []))


@pytest.mark.slow
def test_midpoint():
    """The estimator, for a flow and a critic that are known, against numpy."""
    a, goal = noise()[:, 0], noise(2)[:, 1]

    def flow(a, t):
        return t - 0.2 * a

    def q(a):
        return -0.5 * jnp.sum((a - goal) ** 2, axis=1)

    for t, later in [(0, 0.5), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]:  # half-way, on the grid
        v = flow(a, t)
        d = load("midpoint").qgf_midpoint(q, flow, a, column(t), v, T)
        half = a + (later - t) * v
        close(d, goal - np.clip(half + (1 - later) * flow(half, later), -1, 1), atol=1e-5)


@pytest.mark.slow
def test_fade():
    """c(t) is exact where it claims to be, and sample_actions multiplies the push by it."""
    fork, cfg, nets, _, _, batch = trained("fade")
    t = np.linspace(0, 1, 10_001)
    c = fork.fade(t)
    assert c[0] == 1 and c[-1] == 0 and c.max().round(2) == 1.21 and t[c.argmax()].round(2) == 0.29
    a = 0.0  # the mean of a flow from N(0, 1) to N(0, 1), pushed by w ∇Q = 1: it must end at 1
    for now, push in zip(t[:-1], c[:-1], strict=True):
        a += ((2 * now - 1) / ((1 - now) ** 2 + now**2) * a + push) / 10_000
    assert abs(a - 1) < 1e-3

    s, g = batch.observations, batch.goals

    @jax.jit
    def pushed(a, t):
        v = fork.velocity(nets["policy"], s, a, t, cfg)
        clean = jnp.clip(a + (1 - t) * v, -1, 1)
        d = jax.grad(lambda x: fork.q_values(nets["critic"], s, g, x).min(axis=0).sum())(clean)
        return v + 5 * (1 - t) / ((1 - t) ** 2 + t**2) * d

    a, _ = fork.sample_actions(nets, s, g, noise(), 5.0, fork.qgf, cfg)
    close(a, euler(lambda a, t: pushed(a, column(t)), noise()[:, 0]), atol=1e-5)
    plain, _ = qgf.sample_actions(nets, s, g, noise(), 5.0, qgf.qgf, cfg)
    assert np.abs(a - plain).max() > 1e-3


@pytest.mark.slow
def test_placebo(capfd):
    """Three wrong directions, by numpy; their cosine is printed once, where w is measured."""
    fork, cfg, nets, _, _, batch = trained("placebo")
    wrong = dict(
        shift=lambda d: np.roll(d, 1, axis=1),
        reversal=lambda d: d[:, ::-1] * np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1], np.float32),
    )
    for rows in (64, 1024):
        d = np.random.default_rng(2).normal(size=(rows, 10)).astype(np.float32)
        zeros, t = np.zeros((rows, 10), np.float32), np.zeros((rows, 1), np.float32)
        for name in ("shift", "reversal", "rotation"):
            capfd.readouterr()
            estimator = fork.ESTIMATORS[f"placebo-{name}"]
            p = np.asarray(estimator(lambda a, d=d: (a * d).sum(axis=1), None, zeros, t, zeros, T))
            jax.effects_barrier()
            printed = capfd.readouterr().out
            if name == "rotation":
                close(np.linalg.norm(p, axis=1), np.linalg.norm(d, axis=1), rtol=1e-5)
                close(p @ p.T, d @ d.T, atol=1e-4)  # all angles are kept, so it is orthogonal
            else:
                assert (p == wrong[name](d)).all()
            if rows < 1024:
                assert printed == ""
                continue
            size = np.linalg.norm(p, axis=1) * np.linalg.norm(d, axis=1)
            cosine = float(re.fullmatch(r".*∇Q̄ (.*) at t = 0.00\n", printed)[1])
            assert abs(cosine - np.mean((p * d).sum(axis=1) / size)) < 1e-3

    big = jax.tree.map(lambda x: np.resize(x, (1024, *x.shape[1:])), batch)
    w = fork.relative_weight(0.3, nets, big, fork.placebo_rotation, cfg)
    jax.effects_barrier()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == T and all(x.startswith("placebo-rotation: cosine") for x in lines)
    close(w, fork.relative_weight(0.3, nets, big, fork.qgf, cfg), rtol=1e-4)  # as hard as qgf


@pytest.mark.slow
def test_loss():
    """The new term by numpy, and that it is added, times .01."""
    fork, cfg, _, states, logs, batch = trained("loss")
    assert (logs["critic"]["conservative_loss"] != 0).all()
    params, average = states["critic"].params, states["critic"].average
    args = params, average, {}, batch, KEY, cfg
    loss, log = jax.jit(fork.critic_loss, static_argnums=5)(*args)
    plain, _ = jax.jit(qgf.critic_loss, static_argnums=5)(*args)
    anything = jax.random.uniform(KEY, (B, H * A), minval=-1, maxval=1)
    q = jax.jit(lambda a: qgf.q_values(params["critic"], batch.observations, batch.goals, a))
    term = np.mean(q(anything)) - np.mean(q(batch.actions))
    close(log["conservative_loss"], term, atol=1e-5)
    close(loss - plain, 0.01 * term, atol=1e-5)


@pytest.mark.slow
def test_transformer():
    """Without positions, the order of a chunk's actions means nothing; with them, it does."""
    fork, cfg, nets, _, _, batch = trained("transformer")
    velocity = jax.jit(fork.velocity, static_argnums=4)
    a = np.asarray(batch.actions).reshape(B, H, A)
    for positions in (0, 1):
        net = nets["policy"] | dict(position=positions * nets["policy"]["position"])
        v, w = (
            velocity(net, batch.observations, x.reshape(B, -1), column(0.5), cfg).reshape(B, H, A)
            for x in (a, a[:, ::-1])
        )
        assert np.allclose(v, w[:, ::-1], atol=1e-5) != positions
    changed = a.copy()
    changed[:, 2] += 1  # the last action
    v, w = (
        velocity(nets["policy"], batch.observations, x.reshape(B, -1), column(0.5), cfg)
        for x in (a, changed)
    )
    assert (v[:, :A] != w[:, :A]).any()  # the first sees it


@pytest.mark.slow
def test_goal_bc():
    """Goals are those of later rows, and the flow has the goal as a part of the state."""
    fork, cfg, nets, _, _, batch = trained("goal-bc")
    data = make_data()
    numbered = data._replace(goals=np.float32(np.arange(N))[:, None])  # a goal is its row's number
    rows = np.arange(87)[np.arange(87) % 30 < 27]  # H more follow
    window = np.repeat(rows, 200)[:, None] + np.arange(H)
    goals, rewards, masks = fork.hindsight(KEY, numbered, window)
    goals = np.asarray(goals).reshape(len(rows), 200)
    for i, drawn in zip(rows, goals, strict=True):
        assert set(drawn) == set(range(i + 1, data.ends[i] + 1))
    assert (masks == (window != goals.reshape(-1, 1))).all() and (rewards == -masks).all()

    both = np.concatenate([batch.observations, batch.goals], axis=1)
    joined = batch._replace(observations=both)
    args = {}, {}, joined, KEY, cfg
    policy = dict(policy=nets["policy"])
    loss, _ = fork.policy_loss(policy, {}, {}, batch, KEY, cfg)
    close(loss, qgf.policy_loss(policy, *args)[0], rtol=1e-5)
    flow = jax.jit(lambda a, t: fork.velocity(nets["policy"], both, a, t, cfg))
    a, _ = fork.sample_actions(nets, batch.observations, batch.goals, noise(), 0.0, fork.bc, cfg)
    close(a, euler(lambda a, t: flow(a, column(t)), noise()[:, 0]), atol=1e-5)


@pytest.mark.slow
def test_edp():
    """The third learner: its loss, its gradient, how it acts; the others are those of qgf.py."""
    fork, cfg, nets, states, _, batch = trained("edp")
    _, plain, _ = train(qgf, qgf.Config(**SMALL))
    for learner in ("policy", "critic"):
        pair = jax.tree.leaves(states[learner]), jax.tree.leaves(plain[learner])
        assert all(np.array_equal(x, y) for x, y in zip(*pair, strict=True))  # bit for bit

    s, g, a = batch.observations, batch.goals, batch.actions
    both = jnp.concatenate([s, g], axis=1)
    key_noise, key_time = jax.random.split(KEY)
    a_0 = jax.random.normal(key_noise, a.shape)
    t = jax.random.randint(key_time, (B, 1), 0, T + 1) / T

    def loss(edp):
        a_t = a_0 + t * (a - a_0)
        v = fork.velocity(edp, both, a_t, t, cfg)
        q = fork.q_values(nets["critic"], s, g, (a_t + (1 - t) * v).clip(-1, 1))  # (2, B)
        return 30 * jnp.mean((v - a + a_0) ** 2) - jnp.mean(jnp.min(q, axis=0))

    def forked(edp):
        return fork.edp_loss(dict(edp=edp), None, nets, batch, KEY, cfg)[0]

    edp = states["edp"].params["edp"]
    both_losses = jax.jit(lambda x: (jax.value_and_grad(loss)(x), jax.value_and_grad(forked)(x)))
    jax.tree.map(lambda x, y: close(x, y, rtol=1e-3, atol=1e-5), *both_losses(edp))

    flow = jax.jit(lambda a, t: fork.velocity(nets["edp"], both, a, t, cfg))
    a, rms = fork.sample_actions(nets, s, g, noise(), 5.0, fork.edp, cfg)
    close(a, euler(lambda a, t: flow(a, column(t)), noise()[:, 0]), atol=1e-5)
    assert (rms == 0).all() and fork.relative_weight(0.3, nets, batch, fork.edp, cfg) == 0


@pytest.mark.slow
def test_qc():
    """Targets by a plain loop over N samples; the gradient is that of a fixed target."""
    fork, cfg, nets, states, logs, batch = trained("qc")
    assert "value" not in nets and set(logs["critic"]) == {"q_loss", "q"}
    params, average = states["critic"].params, states["critic"].average
    s, g, later = batch.observations, batch.goals, batch.next_observations
    flow = jax.jit(lambda a, t: fork.velocity(nets["policy"], later, a, t, cfg))
    q = jax.jit(lambda a: fork.q_values(average["critic"], later, g, a).min(axis=0))
    best = np.full(B, -np.inf)
    a_0 = np.asarray(jax.random.normal(KEY, (B, 4, H * A)))
    for n in range(4):
        best = np.maximum(best, q(euler(lambda a, t: flow(a, column(t)), a_0[:, n])))
    assert (best > q(euler(lambda a, t: flow(a, column(t)), a_0[:, 0])) + 1e-6).any()
    y = np.asarray(batch.returns) + np.asarray(batch.discounts) * best

    def loss(params):
        return jnp.mean((fork.q_values(params["critic"], s, g, batch.actions) - y) ** 2)

    def forked(params):
        return fork.critic_loss(params, average, nets, batch, KEY, cfg)[0]

    both_losses = jax.jit(lambda x: (jax.value_and_grad(loss)(x), jax.value_and_grad(forked)(x)))
    jax.tree.map(lambda x, y: close(x, y, rtol=1e-3, atol=1e-5), *both_losses(params))


@pytest.mark.slow
def test_dqc(tmp_path):
    """Long chunks and their returns, then each of the three losses by numpy, and its gradient."""
    fork, cfg, _, states, _, batch = trained("dqc")
    assert cfg.long_horizon == 25 and batch.long_actions.shape == (B, 25 * A)
    assert (batch.actions == batch.long_actions[:, : H * A]).all()
    big = fork.Config(**SMALL | dict(batch_size=500))
    many = jax.jit(fork.sample_batch, static_argnums=2)(KEY, make_data(), big)
    p = 1 + 0.01 * np.float64(many.returns)  # the value before γ^R V is added
    lost = np.asarray(many.discounts) > 0
    close(many.discounts[lost], 0.99**25, rtol=1e-5)
    close((p - many.discounts)[lost], 0, atol=1e-5)
    steps = np.log(p[~lost]) / np.log(0.99)  # until the goal
    close(steps, steps.round(), atol=1e-3)
    assert set(steps.round()) == {*range(25)}

    s, g, later = batch.observations, batch.goals, batch.next_observations
    params, average = states["critic"].params, states["critic"].average

    @jax.jit
    def forward(params):
        return (
            fork.q_values(params["long_critic"], s, g, batch.long_actions),
            fork.q_values(params["critic"], s, g, batch.actions),
            fork.value(params["value"], s, g),
        )

    q_long, q, v = (np.float64(x) for x in forward(params))
    q_average = np.min(sigmoid(forward(average)[1]), axis=0)
    v_next = np.asarray(sigmoid(jax.jit(fork.value)(params["value"], later, g)))
    y = 1 + 0.01 * np.asarray(batch.returns) + np.asarray(batch.discounts) * (v_next - 1)
    assert (y > -1e-6).all() and (y < 1 + 1e-6).all()
    taught = np.asarray(sigmoid(q_long))
    weight = np.where(taught >= sigmoid(q), 0.8, 0.2)
    v_weight = np.where(q_average >= sigmoid(v), 0.95, 0.05)
    loss, log = jax.jit(fork.dqc_loss, static_argnums=5)(params, average, {}, batch, KEY, cfg)
    close(log["long_loss"], bce(q_long, y).mean(), rtol=1e-4)
    close(log["q_loss"], (weight * bce(q, taught)).mean(), rtol=1e-4)
    close(log["v_loss"], (v_weight * bce(v, q_average)).mean(), rtol=1e-4)
    close(loss, log["long_loss"] + log["q_loss"] + log["v_loss"], rtol=1e-5)

    # The cross-entropy's gradient by a logit is σ(logit) - p; targets and weights get none.
    d_long = sigmoid(q_long) - y
    d_q = weight * (sigmoid(q) - taught)
    d_v = v_weight * (sigmoid(v) - q_average)

    def fixed(params):
        q_long, q, v = forward(params)
        return jnp.mean(d_long * q_long) + jnp.mean(d_q * q) + jnp.mean(d_v * v)

    def forked(params):
        return fork.dqc_loss(params, average, {}, batch, KEY, cfg)[0]

    both = jax.jit(lambda x: (jax.grad(fixed)(x), jax.grad(forked)(x)))(params)
    jax.tree.map(lambda x, y: close(x, y, rtol=1e-3, atol=1e-5), *both)

    data = make_data()
    raw = dict(observations=data.observations, actions=data.actions, rewards=data.rewards)
    terminals = np.zeros(N, np.float32)
    terminals[[29, 59, 89]] = 1
    np.savez(tmp_path / "own.npz", **raw, masks=data.masks, terminals=terminals)
    env = SimpleNamespace(sizes=(S, 0, A), low=np.full(A, -1), high=np.full(A, 1))
    own = fork.load_data(tmp_path / "own.npz", fork.Task("Own-v0", "Own-v0"), env, cfg)
    assert (own.starts[: own.chunks] == data.starts).all()  # 25 rows and the state after them


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch):
    """What a stub of wandb is given when a learner trains, and when its training is resumed."""
    fork = load("wandb")
    cfg = fork.Config(**SMALL, out=str(tmp_path / "runs"))
    runs = []

    class Run:
        def __init__(self, **given):
            self.given, self.rows, self.ended = given, [], False
            runs.append(self)

        def log(self, row, step):
            self.rows.append((step, row))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.ended = True

    stub = ModuleType("wandb")
    stub.init = Run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    np.savez(tmp_path / "own.npz", 0)
    files = [tmp_path / "own.npz"]
    task = fork.Task("cube", "cube-v0")
    source = fork.Run(task, (S, G, A), files, N, lambda path: make_data(), cfg)
    for updates in (100, 100, 300):  # the second finds nothing to do
        fork.fit("critic", updates, {}, source)
    assert [[step for step, _ in run.rows] for run in runs] == [[100], [200, 300]]
    for run in runs:
        assert run.ended and run.given["id"] == "runs-cube-s0" and run.given["resume"] == "allow"
        assert run.given["config"] == fork.settings_of("critic", source)
    rows = fork.read_csv(tmp_path / "runs/cube-s0/metrics.csv")
    rows = {int(row["updates"]): row for row in rows}
    for step, row in [x for run in runs for x in run.rows]:
        assert float(rows[step]["q_loss"]) == row["q_loss"]  # as in metrics.csv
