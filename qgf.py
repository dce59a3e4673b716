# SPDX-License-Identifier: MIT
"""Q-Guided Flow (QGF): a flow policy and a critic are trained separately, and Q steers the flow when it acts.

Zhou, Peng, Xu, Li, Springenberg, Frans, Levine, "Test-Time Gradient Guidance of Flow Policies in
Reinforcement Learning", arXiv 2606.11087. Here s is a state; r_i and s_i are the reward and the state i steps
later; a_1 is an action chunk (H consecutive actions, flattened); a_0 ~ N(0, I) is noise; t in [0, 1] is the
flow's time; a_t = (1-t) a_0 + t a_1; a bar marks a Polyak average. We want the policy π ∝ π_BC exp(Q/β).

    train  policy  v_θ(s, a_t, t)  towards  a_1 - a_0                     behaviour cloning (BC), by a flow
           critic  Q_k(s, a_1)     towards  Σ_{i<H} γ^i r_i + γ^H V(s_H)  implicit Q-learning (IQL), k = 1, 2
           value   V(s)            towards  the τ-expectile of min_k Q̄_k(s, a_1)
    act    from noise a_0, for t = 0, 1/T, ..., (T-1)/T:
               â_1 = clip(a_t + (1-t) v̄(s, a_t, t), -1, 1)                one-step clean estimate
               a_t += 1/T (v̄(s, a_t, t) + w ∇_{â_1} min_k Q̄_k(s, â_1))    w = 1/β; w = 0 is BC
           then execute the H actions of clip(a_1, -1, 1)
    w      = λ / rms(∇Q̄): the push is λ times as large as the flow's velocity, whose rms is about 1

Left out: RobustQ, CFGRL, pixels, online fine-tuning. FAMILY has other defaults for some tasks. Examples:

    python qgf.py --env cube-single                            train, evaluate; the same command resumes
    python qgf.py --env cube-single --methods bc@4 bptt qfql   add other methods to the table
    python qgf.py --env cube-single --guidance 0.03 0.1 0.3    add other strengths of guidance to it
"""
import argparse, difflib, json, math, os, re, shlex, shutil, signal, sys, time, warnings, zlib  # noqa: E401
import http.client, importlib.metadata, multiprocessing.forkserver, urllib.request  # noqa: E401
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple, get_args
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from scipy.stats import binomtest
from tqdm import tqdm

# ---- 1 Config ----------------------------------------------------------------------------------------------
def option(default, metavar, help, group=None):
    """A setting: its default, what --help says of it, and the heading of the group that it begins."""
    return field(default=default, metadata=dict(metavar=metavar, help=help, group=group))

@dataclass(frozen=True)
class Config:
    """The settings of a run; each is an option. Frozen, so that jit takes it as a static argument."""
    env: str = option("cube-single", "NAME", "as cube-double, cube-double-task3, cube-double-goal", "run")
    updates: int = option(10_000, "N", "gradient updates in all; with more, a finished run trains on")
    seed: int = option(0, "N", "seed of parameters, batches and noise")
    seeds: int = option(1, "N", "train N seeds in this run: SEED, SEED + 1, ...")
    out: str = option("runs", "PATH", "folder of runs; this one is OUT/NAME-sSEED")
    data: str = option("", "PATH", "your own data: an .npz in OGBench's format, or a folder of such slices")
    policy: str = option("", "RUN", "act with the flow of this finished run, a folder; train only the critic")
    collect: int = option(0, "N", "collect N transitions with OGBench's play policies instead of a download")
    methods: tuple[str, ...] = option(("qgf",), "NAME", "{methods}; NAME@4: best of 4 by Q", "evaluation")
    guidance: tuple[float, ...] = option((0.1,), "λ", "how hard Q pushes, relative to the flow; a row each")
    weights: tuple[float, ...] = option((), "W", "absolute weights w = 1/β, as in the paper; a row each")
    episodes: int = option(50, "N", "episodes in a row, for each seed; a row played again is replaced")
    batch_size: int = option(256, "N", "chunks in a batch", "networks")
    lr: float = option(1e-3, "X", "learning rate of Adam")
    width: int = option(256, "N", "units in a hidden layer")
    critic_width: int = option(0, "N", "the same for critic and value; 0: WIDTH")
    depth: int = option(3, "N", "hidden layers in a network")
    horizon: int = option(5, "H", "actions in a chunk, judged and executed as one", "algorithm")
    denoise_steps: int = option(10, "T", "Euler steps from noise to action")
    sparse: int = option(0, "0|1", "1: the reward is -1 until the task is solved, whatever the data say")
    discount: float = option(0.99, "γ", "discount per environment step")
    expectile: float = option(0.9, "τ", "expectile of V: .5 is the mean over the data's actions, 1 the best")
    long_horizon: int = option(0, "N", "h_c of DQC: above 0, a critic of chunks of N actions teaches Q")
    kappa: float = option(0.8, "κ", "DQC: Q is the κ-expectile of that critic over the actions after H")
    edp: float = option(0.0, "α", "above 0, also train EDP, QGF's train-time twin, with this weight of BC")

# ---- 2 Networks: parameters are plain pytrees, networks are pure functions ---------------------------------
# Layers: Dense -> LayerNorm -> GELU, as in the official code. Sizes: B batch, S state, A action, H*A chunk.
def init_mlp(key, sizes, actor=False):
    """Layers of an MLP with these sizes (input, hidden ..., output): a list of dicts of arrays."""
    keys, glorot = jax.random.split(key, len(sizes) - 1), jax.nn.initializers.glorot_uniform()
    layers = [dict(w=glorot(k, (m, n)), b=jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:])]
    if actor:  # another output layer and no LayerNorm before it, as in the official code
        layers[-1]["w"] = jax.nn.initializers.lecun_normal()(keys[-1], sizes[-2:])
    for layer in layers[: -2 if actor else -1]:
        layer |= dict(scale=jnp.ones_like(layer["b"]), shift=jnp.zeros_like(layer["b"]))
    return layers

def mlp(layers, x):
    """Apply the layers of `init_mlp`: x (B, in) -> (B, out)."""
    for layer in layers[:-1]:
        x = x @ layer["w"] + layer["b"]
        if "scale" in layer:
            x = jax.nn.standardize(x, epsilon=1e-6) * layer["scale"] + layer["shift"]  # LayerNorm
        x = jax.nn.gelu(x)
    return x @ layers[-1]["w"] + layers[-1]["b"]

def velocity(policy, s, a_t, t):
    """The flow v(s, a_t, t): s (B, S), a_t (B, H*A), t (B, 1) in [0, 1] -> (B, H*A)."""
    s = s[:, : len(policy[0]["w"]) - a_t.shape[1] - 16]  # drops the goal at s's end if the flow is blind
    angles = 10_000 * t * jnp.exp(-math.log(10_000) * jnp.arange(8) / 8)  # (B, 1) * (8,) -> (B, 8)
    return mlp(policy, jnp.concatenate([s, a_t, jnp.cos(angles), jnp.sin(angles)], axis=1))

def q_values(critic, s, a):
    """Both critics Q_k(s, a), their parameters stacked on axis 0: s (B, S), a (B, H*A) -> (2, B)."""
    return jax.vmap(mlp, in_axes=(0, None))(critic, jnp.concatenate([s, a], axis=1))[..., 0]

def q_min(critic, s, a):
    """min_k Q_k(s, a) (B,), as a choice: the gradient of a min tests floats for equality, and can be NaN."""
    first, second = q_values(critic, s, a)
    return jnp.where(first < second, first, second)

def value(layers, s):
    """V(s): s (B, S) -> (B,)."""
    return mlp(layers, s)[..., 0]

def init_params(key, sizes, cfg):
    """Fresh parameters for the sizes (state, goal or 0, action): dict(policy, critic, value, ...)."""
    (s_dim, g_dim, a_dim), keys = sizes, jax.random.split(key, 3)
    chunk, hidden = cfg.horizon * a_dim, [cfg.width] * cfg.depth
    critic_hidden = [cfg.critic_width or cfg.width] * cfg.depth
    def flow(s_dim):
        return init_mlp(keys[0], [s_dim + chunk + 16, *hidden, chunk], actor=True)
    def two_critics(key, chunk):
        layers = [s_dim + g_dim + chunk, *critic_hidden, 1]
        return jax.vmap(lambda k: init_mlp(k, layers))(jax.random.split(key, 2))
    params = dict(policy=flow(s_dim), critic=two_critics(keys[1], chunk))  # the flow is blind to goals
    params["value"] = init_mlp(keys[2], [s_dim + g_dim, *critic_hidden, 1])
    if cfg.long_horizon:
        params["long_critic"] = two_critics(jax.random.fold_in(keys[1], 0), cfg.long_horizon * a_dim)
    if cfg.edp:
        params["edp"] = flow(s_dim + g_dim)  # acts without guidance, so it must see the goal
    return params

# ---- 3 Losses, of a batch as `sample_batch` draws it -------------------------------------------------------
def noisy_actions(a_1, key, cfg):
    """Points on the way from noise to a_1 (B, H*A): -> a_0 (B, H*A), a_t (B, H*A), t (B, 1)."""
    key_noise, key_time = jax.random.split(key)
    a_0 = jax.random.normal(key_noise, a_1.shape)
    t = jax.random.randint(key_time, (len(a_1), 1), 0, cfg.denoise_steps + 1) / cfg.denoise_steps
    return a_0, (1 - t) * a_0 + t * a_1, t  # t on the grid {0, 1/T, ..., 1}: acting asks for no other

def flow_matching_loss(policy, batch, key, cfg):
    """Behaviour cloning: (v_θ(s, a_t, t) - (a_1 - a_0))², mean over B and H*A."""
    a_0, a_t, t = noisy_actions(batch["actions"], key, cfg)
    return jnp.mean((velocity(policy, batch["observations"], a_t, t) - (batch["actions"] - a_0)) ** 2)

def critic_loss(critic, value_layers, batch):
    """(Q_k(s, a) - y)², mean over k and B, with y = Σ_{i<H} γ^i r_i + γ^H mask V(s_H)."""
    v_next = jax.lax.stop_gradient(value(value_layers, batch["next_observations"]))  # (B,)
    y = batch["returns"] + batch["discounts"] * v_next  # (B,)
    return jnp.mean((q_values(critic, batch["observations"], batch["actions"]) - y) ** 2)

def expectile_loss(u, tau):
    """L2^τ(u) = |τ - 1[u<0]| u², elementwise. For u = Q - V, its mean is least at the τ-expectile V of Q."""
    return jnp.abs(tau - (u < 0)) * u**2

def value_loss(layers, target_critic, batch, cfg):
    """L2^τ(min_k Q̄_k(s, a) - V(s)), mean over B; no gradient reaches Q̄."""
    q = jax.lax.stop_gradient(q_min(target_critic, batch["observations"], batch["actions"]))  # (B,)
    return jnp.mean(expectile_loss(q - value(layers, batch["observations"]), cfg.expectile))

# ---- 4 Training --------------------------------------------------------------------------------------------
class State(NamedTuple):
    """All that training changes: from a State and the data, a run continues bit for bit."""
    params: dict  # policy, critic, value; long_critic and edp if asked for
    target: dict  # Polyak averages of policy, critic and edp, or a lent policy: the networks that act
    opt: tuple  # Adam's moments
    key: jax.Array  # the run's; update i uses fold_in(key, i), however updates are grouped into calls
    step: jax.Array  # updates made

def init_states(sizes, cfg):
    """The State before the first update, for each of cfg.seeds seeds: arrays are stacked on axis 0."""
    def init(key):
        key_params, key_run = jax.random.split(key)
        params = init_params(key_params, sizes, cfg)
        target = {k: params[k] for k in ("policy", "critic", "edp") if k in params}
        params = {k: x for k, x in params.items() if k != "policy" or not cfg.policy}  # a lent one stays
        return State(params, target, optax.adam(cfg.lr).init(params), key_run, jnp.int32(0))
    states = [init(jax.random.PRNGKey(cfg.seed + k)) for k in range(cfg.seeds)]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)

def sample_batch(key, data, cfg):
    """Draw B chunks from dict(observations (N, S), actions (N, A), rewards, masks, starts (N,), n_starts ()).
    A mask is 0 where the task is solved: rewards count up to that row, and nothing is bootstrapped beyond it.
    The first n_starts of `starts` are the rows whose whole chunk lies in one trajectory, with the state after
    it unless the task is solved by then. With goals in the data, states are (s, g): see `hindsight`."""
    R = cfg.long_horizon or cfg.horizon  # steps to the state that the critic's target is bootstrapped from
    i = data["starts"][jax.random.randint(key, (cfg.batch_size,), 0, data["n_starts"])]  # (B,)
    window = i[:, None] + jnp.arange(R)  # (B, 1) + (R,) -> (B, R)
    s, s_next, actions = data["observations"][i], data["observations"][i + R], data["actions"][window]
    if "goals" in data:
        g, rewards, masks = hindsight(key, data, window)
        s, s_next = jnp.concatenate([s, g], axis=1), jnp.concatenate([s_next, g], axis=1)  # (B, S+G)
    else:
        rewards, masks = data["rewards"][window], data["masks"][window]  # (B, R)
    alive = jnp.cumprod(masks, axis=1)  # (B, R), 0 from the first success on
    counts = jnp.pad(alive[:, :-1], ((0, 0), (1, 0)), constant_values=1)  # (B, R), 0 after the first success
    return dict(
        observations=s,
        actions=actions[:, : cfg.horizon].reshape(cfg.batch_size, -1),  # (B, R, A) -> (B, H*A)
        long_actions=actions.reshape(cfg.batch_size, -1),  # (B, R, A) -> (B, R*A), for DQC's long critic
        returns=(counts * rewards) @ cfg.discount ** jnp.arange(R),  # (B,)
        discounts=cfg.discount**R * alive[:, -1],  # (B,), γ^R mask
        next_observations=s_next,
    )

def update(state, batch, key, cfg):
    """One update of policy, critic, value and averages from a `sample_batch`. -> State, dict of scalars
    The losses are added only to take one gradient: each reaches its own network alone. Gradients are taken at
    the old parameters, and the averages take in the old parameters, as in the official code."""
    s, a, target = batch["observations"], batch["actions"], state.target
    def loss(p):
        losses = dict(
            flow_loss=0.0 if cfg.policy else flow_matching_loss(p["policy"], batch, key, cfg),
            critic_loss=dqc_loss(p, batch, cfg) if cfg.long_horizon
            else critic_loss(p["critic"], p["value"], batch),
            value_loss=value_loss(p["value"], target["critic"], batch, cfg),
            edp_loss=edp_loss(p["edp"], target["critic"], batch, key, cfg) if cfg.edp else 0.0,
        )
        return sum(losses.values()), losses
    grads, losses = jax.grad(loss, has_aux=True)(state.params)
    info = losses | dict(q=q_min(target["critic"], s, a).mean())  # XLA computes this once, with value_loss
    steps, opt = optax.adam(cfg.lr).update(grads, state.opt)
    averaged = {k: x for k, x in state.params.items() if k in target}
    target = target | optax.incremental_update(averaged, {k: target[k] for k in averaged}, 0.005)
    return State(optax.apply_updates(state.params, steps), target, opt, state.key, state.step + 1), info

@partial(jax.jit, static_argnames=("n", "cfg"), donate_argnames="states")
def train(states, data, n, cfg):
    """`n` updates of each seed (axis 0 of all arrays) in one compiled scan. -> States, dict of (seeds, n)"""
    def one(state, _):
        key_batch, key_update = jax.random.split(jax.random.fold_in(state.key, state.step))
        return update(state, sample_batch(key_batch, data, cfg), key_update, cfg)
    together = None if jax.default_backend() == "cpu" else cfg.seeds  # one seed keeps a CPU busy: take turns
    return jax.lax.map(lambda state: jax.lax.scan(one, state, length=n), states, batch_size=together)

# ---- 5 Guidance: each step of the flow is nudged by the critic ---------------------------------------------
# An estimator says where to push a_t (B, H*A) at t (B, 1). It may ask q(a) -> (B,), the min_k Q̄_k(s, a), and
# flow(a, t) -> (B, H*A); v is flow(a_t, t), and T the number of Euler steps. A new one is a line in GUIDANCE.
def grad_q(q, a):
    """∇_a q(a): a (B, H*A) -> (B, H*A)."""
    return jax.grad(lambda a: q(a).sum())(a)  # each row of a has its own term of the sum

def clean_estimate(a_t, t, v):
    """â_1, where a_t (B, H*A) ends at t = 1 if it keeps its velocity v (B, H*A) -> (B, H*A)."""
    return jnp.clip(a_t + (1 - t) * v, -1, 1)

def integrate(flow, a_t, t, T):
    """ODE(a_t): where the unguided flow takes a_t (B, H*A) from t (B, 1), equal in all rows -> (B, H*A)."""
    def euler(a, i):
        now = t + i / T  # (B, 1)
        return jax.lax.cond(now[0, 0] < 1 - 0.5 / T, lambda: a + flow(a, now) / T, lambda: a), None
    return jnp.clip(jax.lax.scan(euler, a_t, jnp.arange(T))[0], -1, 1)

GUIDANCE = {  # they differ in the action at which the critic is asked, and in what is differentiated
    # ∇Q̄ at the clean estimate â_1, with the Jacobian J = ∂â_1/∂a_t replaced by 1
    "qgf": lambda q, flow, a_t, t, v, T: grad_q(q, clean_estimate(a_t, t, v)),
    # Jᵀ ∇Q̄(s, â_1), which is the gradient of Q̄(s, â_1(a_t))
    "qgf-jacobian": lambda q, flow, a_t, t, v, T: grad_q(lambda a: q(clean_estimate(a, t, flow(a, t))), a_t),
    # ∇Q̄ at the flow's own end, with J := 1; bptt goes back through every Euler step that remains
    "qgf-chain": lambda q, flow, a_t, t, v, T: grad_q(q, integrate(flow, a_t, t, T)),
    "bptt": lambda q, flow, a_t, t, v, T: grad_q(lambda a: q(integrate(flow, a, t, T)), a_t),
    "qfql": lambda q, flow, a_t, t, v, T: grad_q(q, a_t),  # at the noisy action, where Q̄ was never trained
}
OTHERS = ("gradstep", "edp", "bc")  # ascent on Q after the flow; a flow trained towards Q; the plain flow
ASCENTS = 3  # steps of gradstep; the paper takes 3 to 5

@partial(jax.jit, static_argnames=("method", "T"))
def sample_actions(nets, s, a_0, w, method, T):
    """From noise to actions: s (B, S), a_0 (B, N, H*A), w () -> a (B, H*A), rms of the gradients ().
    `nets` is a State's target. Each state gets N samples, one for each row of noise; that with the largest Q̄
    is returned. A new w compiles nothing new. `gradstep` climbs Q̄ after the flow, in steps of size w."""
    B, N, D = a_0.shape
    s = jnp.repeat(s, N, axis=0)  # (B*N, S)
    flow = partial(velocity, nets["edp" if method == "edp" else "policy"], s)
    q = partial(q_min, nets["critic"], s)
    def euler(a_t, i):
        t = jnp.full((B * N, 1), i / T)
        v = flow(a_t, t)
        g = GUIDANCE[method](q, flow, a_t, t, v, T) if method in GUIDANCE else jnp.zeros_like(v)
        return a_t + (v + w * g) / T, jnp.mean(g**2)
    def ascend(a, _):
        g = grad_q(q, a)
        return jnp.clip(a + w * g, -1, 1), jnp.mean(g**2)
    a, squares = jax.lax.scan(euler, a_0.reshape(B * N, D), jnp.arange(T))
    a = jnp.clip(a, -1, 1)
    if method == "gradstep":
        a, squares = jax.lax.scan(ascend, a, length=ASCENTS)
    best = q(a).reshape(B, N).argmax(axis=1) if N > 1 else 0  # (B*N,) -> (B, N) -> (B,)
    return a.reshape(B, N, D)[jnp.arange(B), best], jnp.sqrt(squares.mean())

def relative_weight(guidance, nets, s, a_0, method, T):
    """w = λ / rms(g), so that the pushes w g have the rms λ. The mean is over states s (B, S), noise a_0
    (B, 1, H*A), all T steps of the unguided flow, and all H*A dimensions.
    No flow corrects the steps of gradstep: together, they get the rms λ / 2."""
    rms = float(sample_actions(nets, s, a_0, 0.0, method, T)[1])
    return guidance / max(rms, 1e-12) / (2 * ASCENTS if method == "gradstep" else 1)

# ---- 6 Variants: a reader of QGF may skip these ------------------------------------------------------------
def hindsight(key, data, window):
    """Goals that were reached: window (B, R) of rows -> goals (B, G), rewards (B, R), masks (B, R).
    A goal is that of some row, in data["goals"] (N, G): the present row (probability .2), a later one of the
    same trajectory (.5), or any (.3), as in DQC. Reward -1 and mask 1 last until each number is within .4 of
    the goal's: for a cube, 4 cm along each axis (OGBench: 4 cm in all); for a button, the same state."""
    i, (key_kind, key_later, key_any) = window[:, 0], jax.random.split(jax.random.fold_in(key, 1), 3)
    later = jax.random.randint(key_later, i.shape, i + 1, data["ends"][i] + 1)
    anywhere = jax.random.randint(key_any, i.shape, 0, len(data["goals"]))
    kind = jax.random.uniform(key_kind, i.shape)
    g = data["goals"][jnp.where(kind < 0.2, i, jnp.where(kind < 0.7, later, anywhere))]  # (B, G)
    masks = jnp.float32(abs(data["goals"][window] - g[:, None]).max(axis=-1) > 0.4)  # (B, R, G) -> (B, R)
    return g, -masks, masks

def dqc_loss(params, batch, cfg):
    """DQC (decoupled Q-chunking): Q_c, of h_c actions, learns by `critic_loss`; Q, of the first H, from Q_c.
    L2^κ(Q_c(s, a_c) - Q(s, a)): values travel h_c steps in one update, and Q expects good actions after a."""
    long = batch | dict(actions=batch["long_actions"])
    q_long = jax.lax.stop_gradient(q_values(params["long_critic"], long["observations"], long["actions"]))
    q = q_values(params["critic"], batch["observations"], batch["actions"])  # (2, B), as q_long
    distilled = jnp.mean(expectile_loss(q_long - q, cfg.kappa))
    return critic_loss(params["long_critic"], params["value"], long) + distilled

def edp_loss(policy, target_critic, batch, key, cfg):
    """EDP: α (flow matching) - min_k Q̄_k(s, â_1), mean over B, differentiated through â_1."""
    s, (a_0, a_t, t) = batch["observations"], noisy_actions(batch["actions"], key, cfg)
    v = velocity(policy, s, a_t, t)  # one velocity serves both terms
    q = q_min(target_critic, s, clean_estimate(a_t, t, v))  # (B,)
    return cfg.edp * jnp.mean((v - (batch["actions"] - a_0)) ** 2) - q.mean()

# ==== The algorithm ends here. ==== 7 Data: your own file, OGBench's download, or its play policies =========
DATA_DIR = Path("~/.ogbench/data").expanduser()
MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"
STACKING = dict(single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35))
CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 16)
progress = partial(tqdm, miniters=1, mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)

class UserError(SystemExit):
    """What a user can mend: ends the program with one line that says what is wrong and what to do."""

def find_task(name):
    """cube-double-task3, or OGBench's full name of it -> its short name, environment and dataset."""
    name = re.sub("-(play|navigate|singletask|v0)(?=-|$)", "", name)
    base, which = re.fullmatch(r"(.*?)(-task\d|-goal)?", name, re.DOTALL).groups(default="")
    env_id = f"{base}-singletask{which}-v0".replace("-singletask-goal", "")
    known = [m[1] for i in gymnasium.registry if (m := re.fullmatch("((?!visual).*)-singletask-v0", i))]
    if base not in known or env_id not in gymnasium.registry:
        near = ", ".join(difflib.get_close_matches(base, known) or known)
        raise UserError(f"{name!r} is no state-based OGBench task; these are (also -task3, -goal): {near}")
    return name, env_id, f"{base}-{'navigate' if re.search('maze|soccer', base) else 'play'}-v0"

@contextmanager
def atomic_write(path):
    """Open a binary file that takes its name once it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

def download(dataset, path):
    """Fetch OGBench's file from the first host that sends all of it. -> whether one did; prints why not"""
    for url in (f"{host}/{dataset}.npz" for host in (ogbench.utils.DATASET_URL, MIRROR)):
        try:
            with urllib.request.urlopen(url, timeout=20) as response, atomic_write(path) as file:
                with tqdm.wrapattr(response, "read", total=response.length, desc=url) as blocks:
                    shutil.copyfileobj(blocks, file)
                if response.length:  # bytes still to come
                    raise ConnectionError("the connection broke off")
            return True
        except (OSError, http.client.HTTPException) as e:
            print(f"cannot download {url}: {e}", flush=True)
    return False

@cache
def playground(base):
    """In a worker process: OGBench's environment and oracles to collect data with, set as it sets them."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan
    env = gymnasium.make(f"{base}-v0", 1001, mode="data_collection", terminate_at_goal=False)  # 1001 rows
    settings = dict(env=env, noise=0.1, noise_smoothing=0.5)
    return env, dict(
        cube=cube_plan.CubePlanOracle(**settings), drawer=drawer_plan.DrawerPlanOracle(**settings),
        button=button_plan.ButtonPlanOracle(**settings, gripper_always_closed="puzzle" in base),
        window=window_plan.WindowPlanOracle(**settings))

def play(base, episode, attempt=0):
    """In a worker process: a play episode of 1001 rows in OGBench's format, determined by the arguments."""
    env, oracles = playground(base)
    seed_oracle, seed_env = np.random.SeedSequence((0, episode, attempt)).generate_state(2)
    np.random.seed(seed_oracle)  # the oracles draw from numpy's global generator
    ob, info = env.reset(seed=int(seed_env))
    p_stack = np.random.uniform(*STACKING.get(base.split("-")[-1], (0.5, 0.5)))
    oracle, rows, done = oracles[info["privileged/target_task"]], [], False
    oracle.reset(ob, info)
    while not done:
        action = np.clip(oracle.select_action(ob, info), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        row = dict(observations=ob, actions=action, terminals=done, qpos=info["prev_qpos"])
        rows.append(row | {k: info[f"prev_{k}"] for k in ["button_states"] if f"prev_{k}" in info})
        if oracle.done:
            target_ob, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_ob, target_info)
        ob = next_ob
    types = dict(terminals=bool, button_states=np.int64)
    data = {k: np.array([row[k] for row in rows], types.get(k, np.float32)) for k in rows[0]}
    y, z = data["qpos"][:, 15:17].T  # of the first cube
    if base == "scene" and ((y >= 0.29) | (y <= -0.3) & ((z < 0.06) | (z > 0.08))).any():
        return play(base, episode, attempt + 1)  # the cube left the reachable area: OGBench tries again too
    return data

def find_dataset(cfg, dataset):
    """-> paths of the dataset, one file or many slices; downloads or collects it if need be."""
    base, data = dataset.removesuffix("-play-v0"), Path(cfg.data)
    amount = cfg.collect or (200_000 if base == "cube-single" else 1_000_000)  # OGBench's have 1M
    official, collected = DATA_DIR / f"{dataset}.npz", DATA_DIR / f"{dataset}-collected-{amount}.npz"
    if cfg.data:
        return sorted(path for path in data.glob("*.npz") if not path.stem.endswith("-val")) or [data]
    if not cfg.collect and (official.exists() or not collected.exists() and download(dataset, official)):
        return [official]
    if not collected.exists():
        if base == dataset or not base.startswith(("cube", "scene", "puzzle")):
            raise UserError(f"no scripted policy makes {dataset}: give --data PATH, or put it at {official}")
        with multiprocessing.get_context("forkserver").Pool(CORES) as pool:
            episodes = pool.imap(partial(play, base), range(math.ceil(amount / 1000)))
            episodes = list(progress(episodes, "collecting", math.ceil(amount / 1000), unit="k transitions"))
        with atomic_write(collected) as file:
            np.savez(file, **{k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]})
    return [collected]

def load_dataset(path, env, R):
    """A file's data for `env`, a Chunks. -> what `sample_batch` takes for chunks of R actions, on the device;
    ends (N,) is the last row of each row's trajectory. Without rewards and masks, OGBench computes both."""
    env_id, (s_dim, g_dim, a_dim) = env.envs[0].spec.id, env.sizes
    shapes = dict(observations=(s_dim,), actions=(a_dim,), terminals=(), rewards=(), masks=())
    shapes |= dict(goals=(g_dim,)) if g_dim else {}
    try:
        with np.load(path) as file:
            data = {k: file[k] for k in file.files if k in (*shapes, "qpos", "button_states")}
        n = len(data["actions"])
        if g_dim:
            ogbench.relabel_utils.add_oracle_reps(env_id, env.envs[0].unwrapped, data)
            data |= dict(rewards=np.zeros(n), masks=np.ones(n), goals=data["oracle_reps"])
        elif not data.keys() & {"rewards", "masks"}:
            ogbench.relabel_utils.relabel_dataset(env_id, env.envs[0].unwrapped, data)
        data = dict(masks=np.ones(n)) | data
        data |= dict(rewards=-np.float32(data["masks"])) if env.sparse else {}
        data = {k: np.asarray(data[k], np.float32) for k in shapes}
    except Exception as e:  # whatever numpy, zipfile or OGBench say of a file that is not theirs
        raise UserError(f"{path} is missing, cut off, or no dataset of {env_id} ({e!r:.70})") from None
    for k, shape in shapes.items():
        if n == 0 or data[k].shape != (n, *shape) or not np.isfinite(data[k]).all():
            bad = f"shape {data[k].shape} and {(~np.isfinite(data[k])).sum()} NaN or Inf"
            raise UserError(f"{path}: `{k}` has {bad}; {env_id} needs shape {('N', *shape)} and none")
    if abs(data["actions"]).max() > 1.001:
        raise UserError(f"{path}: actions reach {abs(data['actions']).max():.3g}: scale them into [-1, 1]")
    last = np.append(np.flatnonzero(data.pop("terminals")[:-1]), n - 1)  # the file's end ends a trajectory
    ends = np.int32(last[np.searchsorted(last, np.arange(n))])
    solved = data["masks"][ends] == 0  # at the trajectory's last row: no state need follow
    starts = np.flatnonzero(np.arange(n) + R <= ends + solved)
    if len(starts) == 0:
        raise UserError(f"{path}: no trajectory has {R} actions: lower --horizon or --long-horizon")
    room = np.int32(np.resize(starts, n))  # of one size for all slices, so that none compiles anew
    return jax.device_put(data | dict(ends=ends, starts=room, n_starts=np.int32(len(starts))))

# ---- 8 Evaluation: one process for each core, several environments in each, one policy call for all --------
SLOTS, FIRST_EPISODE = 4, 2_000_000  # environments in a process; the seed of a row's first episode

class Chunks(gymnasium.Env):
    """M of OGBench's environments in chunks: actions are (M, H, A); observations (M, S+G) end with goals.
    An episode's start, and which of OGBench's five goals it has, depend on its seed alone."""
    def __init__(self, env_id, horizon, sparse=False, M=1, **options):
        self.has_goal, self.sparse = "-singletask" not in env_id, sparse
        self.make = partial(gymnasium.make, env_id, disable_env_checker=True, use_oracle_rep=True, **options)
        self.envs, self.obs, self.goals = [self.make()], [None] * M, [None] * M  # `reset` makes the others
        space = self.envs[0].action_space
        type(self.envs[0].unwrapped).action_space = space  # OGBench makes one at each use, without a seed
        self.seeds, self.waiting, self.end = np.zeros(M, int), iter([0]), 1
        self.start(0)
        self.obs, g_dim, a_dim = self.obs[:1] * M, len(self.goals[0]), space.shape[0]
        self.sizes = len(self.obs[0]) - g_dim, g_dim, a_dim  # S, G, A
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (M, len(self.obs[0])))
        self.action_space = gymnasium.spaces.Box(-1, 1, (M, horizon, a_dim))
    def start(self, i):
        """Start the next episode in environment i; once there is none, its seed is `end`."""
        self.seeds[i] = seed = next(self.waiting, self.end)
        if seed < self.end:
            np.random.seed(seed)
            self.envs[i].unwrapped.action_space.seed(seed)  # OGBench's reset draws from these two as well
            ob, info = self.envs[i].reset(seed=seed, options=dict(task_id=1 + seed % 5))
            self.goals[i] = info["goal"] if self.has_goal else []
            self.obs[i] = [*ob, *self.goals[i]]
    def reset(self, *, seed, options=None):
        """Play episodes seed, seed + step, ... < end: start the first M, and the others as those end."""
        options = dict(step=1, end=seed + 1) | (options or {})
        self.end, self.waiting = options["end"], iter(range(seed, options["end"], options["step"]))
        self.envs += [self.make() for _ in self.obs[len(self.envs) :]]
        for i in range(len(self.envs)):
            self.start(i)
        return np.float32(self.obs), dict(seed=self.seeds.copy())
    def step(self, chunks):
        """Execute a chunk in each environment. Its reward is (M, 3): what success, return and length gain."""
        results = np.zeros((len(self.envs), 3))
        for i in np.flatnonzero(self.seeds < self.end):
            for action in chunks[i]:
                ob, reward, ended, cut, info = self.envs[i].step(action)  # it ends where the task is solved
                results[i] += info["success"], info["success"] - 1 if self.sparse else reward, 1
                if ended or cut:
                    break
            self.obs[i] = [*ob, *self.goals[i]]
            if ended or cut:
                self.start(i)
        return np.float32(self.obs), results, False, False, dict(seed=self.seeds.copy())

def parse_method(text):
    """qgf@4 -> qgf, 4."""
    name, N = re.fullmatch(r"(.*?)(?:@([1-9]\d*))?", text, re.DOTALL).groups(default="1")
    return name, int(N)

def rollout(envs, nets, w, method, cfg):
    """Play cfg.episodes episodes. -> (episodes, 3): success, return, length. Start and noise of each depend
    on its seed alone, so the rows of a table are paired, episode by episode."""
    (name, N), (P, M, H, A) = parse_method(method), envs.action_space.shape  # P processes
    first, end = FIRST_EPISODE, FIRST_EPISODE + cfg.episodes
    rngs = [np.random.default_rng(seed) for seed in range(first, end + 1)]  # the last for those that wait
    results = np.zeros((len(rngs), 3))
    obs, info = envs.reset(seed=[first + p for p in range(P)], options=dict(step=P, end=end))
    while (info["seed"] < end).any():
        which = info["seed"].ravel() - first  # (P*M,)
        noise = np.float32([rngs[i].standard_normal((N, H * A)) for i in which])  # (P*M, N, H*A)
        actions, _ = sample_actions(nets, obs.reshape(P * M, -1), noise, w, name, cfg.denoise_steps)
        obs, new, _, _, info = envs.step(np.asarray(actions).reshape(P, M, H, A))  # JAX's would claim a GPU
        np.add.at(results, which, new.reshape(P * M, 3))
    return results[:-1]

def read_results(path, seeds):
    """episodes.csv -> {(updates, method, λ, w if λ is 0): (seeds, episodes, (w, success, return, length))}"""
    rows = {}
    for line in path.read_text().split()[1:] if path.exists() else ():
        _, _, _, updates, method, guidance, *numbers = line.split(",")
        key = int(updates), method, float(guidance), 0.0 if float(guidance) else float(numbers[0])
        rows.setdefault(key, []).append([float(x) for x in numbers])
    return {key: np.reshape(row, (seeds, -1, 4)) for key, row in rows.items()}

def evaluate(states, probe, env_id, path, cfg):
    """Play bc once, and what cfg asks for; save each row beside others'. -> what `read_results` gives"""
    nets = [jax.tree.map(lambda x: x[k], states.target) for k in range(cfg.seeds)]  # noqa: B023
    a_0 = jax.random.normal(jax.random.PRNGKey(0), (len(probe), 1, nets[0]["policy"][-1]["b"].size))
    strengths = [(g, 0.0) for g in cfg.guidance] + [(0.0, w) for w in cfg.weights]
    results, step = read_results(path, cfg.seeds), int(states.step[0])
    bc = results.get((step, "bc", 0.0, 0.0), [()])[0]
    rows = [(m, *x) for m in dict.fromkeys(cfg.methods if len(bc) >= cfg.episodes else ("bc", *cfg.methods))
            for x in ([(0.0, 0.0)] if parse_method(m)[0] in ("bc", "edp") else strengths)]
    make = partial(Chunks, env_id, cfg.horizon, cfg.sparse, SLOTS)
    envs = AsyncVectorEnv([make] * CORES, context="forkserver", autoreset_mode=AutoresetMode.DISABLED)
    for method, guidance, weight in progress(rows, "evaluating", unit=" rows"):
        row, (name, _) = [], parse_method(method)
        for net in nets:  # each seed of training has its own w
            w = relative_weight(guidance, net, probe, a_0, name, cfg.denoise_steps) if guidance else weight
            row.append([(w, *episode) for episode in rollout(envs, net, w, method, cfg).tolist()])
        results = read_results(path, cfg.seeds) | {(step, method, guidance, weight): np.array(row)}
        lines = ["env,seed,episode,updates,method,guidance,weight,success,return,length".split(",")]
        lines += [(cfg.env, cfg.seed + k, i, *key[:3], *x[k, i].tolist())
                  for key, x in results.items() for k, i in np.ndindex(x.shape[:2])]
        with atomic_write(path) as file:
            file.writelines(f"{','.join(map(str, line))}\n".encode() for line in lines)
    envs.close(terminate=True)  # at once
    return results

def interval(x):
    """95% interval of the mean of x (runs, episodes): draws runs, then episodes of each, with replacement."""
    (K, n), rng, m = x.shape, np.random.default_rng(0), max(len(x) - 1, 1)  # K runs would vary too little
    run, episode = rng.integers(K, size=(2000, m, 1)), rng.integers(n, size=(2000, m, n))
    return np.percentile(x[run, episode].mean(axis=(1, 2)), (2.5, 97.5))

def table(rows):
    """{(method, λ, w): (runs, episodes, 4)} -> lines of text. Gains are paired; one marked * is over bc@N."""
    lines, verdict = [f"{'method':18}{'λ':>6}{'w':>9}{'n':>6}  {'success':18}{'return':>7}  gain over bc"], []
    for (method, guidance, _), row in rows.items():
        (name, N), (w, won, ret, _) = parse_method(method), np.moveaxis(row, 2, 0)  # each (runs, episodes)
        wilson = binomtest(int(won.sum()), won.size).proportion_ci(method="wilson")
        low, high = np.transpose([wilson, interval(won)])  # the latter is empty if all end alike
        line = f"{method:18}{guidance or '':>6}{w.mean():9.3g}{won.size:6}  "
        line += f"{won.mean():.2f} [{low.min():.2f}, {high.max():.2f}] {ret.mean():8.1f}"
        peer = f"bc@{N}" if name != "bc" and (f"bc@{N}", 0.0, 0.0) in rows else "bc"
        base = rows.get((peer, 0.0, 0.0), row[:0])[..., 1]
        if method != "bc" and len(base) == len(won):
            n = min(won.shape[1], base.shape[1])  # all rows begin with the same episodes
            gain = won[:, :n] - base[:, :n]
            low, high = interval(gain)
            words = f"{gain.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
            line += f"  {words}{'*' * (peer != 'bc')}"
            if name not in ("bc", "edp") and gain.size >= 10:  # fewer show nothing
                how = "helped" if low > 0 else "harmed" if high < 0 else "made no significant difference"
                verdict += [f"Guidance {how}: {method} gains {words} over {peer} (95% interval)."]
        lines.append(line)
    return lines + verdict[:1]

# ---- 9 Runs: a folder with checkpoint.npz, config.json, metrics.csv and episodes.csv -----------------------
CALL, SWAP, PROBE = 100, 1000, 1024  # updates in a call, updates on a slice, states for `relative_weight`
LOSSES = ("flow_loss", "critic_loss", "value_loss", "edp_loss", "q")

def save(folder, states, record, metrics):
    """Write checkpoint.npz (all of it, no pickle), and two files to read; refuses NaN and Inf."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(states)]
    if not all(np.isfinite(x).all() for x in leaves):
        raise UserError(f"NaN or Inf at update {states.step[0]}: try a smaller --lr, and another --out")
    with atomic_write(folder / "metrics.csv") as file:
        np.savetxt(file, metrics, "%.10g", ",", header=",".join(("step", "seed", *LOSSES)), comments="")
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps({k: v for k, v in record.items() if k != "probe"}, indent=1).encode())
    with atomic_write(folder / "checkpoint.npz") as file:
        np.savez(file, *leaves, record=json.dumps(record), metrics=metrics)

def load(path):
    """checkpoint.npz -> States, record, metrics; UserError if it is not whole, or of another version."""
    try:
        arrays = dict(np.load(path))
        record = json.loads(str(arrays["record"]))
        states = jax.eval_shape(lambda: init_states(record["sizes"], Config(**record["config"])))
        leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(jax.tree.leaves(states)))]
        metrics = arrays["metrics"].reshape(len(arrays["metrics"]), 2 + len(LOSSES)).tolist()
        return jax.tree.unflatten(jax.tree.structure(states), leaves), record, metrics
    except Exception as e:
        raise UserError(f"{path} is no whole checkpoint ({e}): move its folder, or give another") from None

def lend(run, dataset):
    """The flow of a finished run that acts in the same environment. -> dict of that policy, what it fixes"""
    states, record, _ = load(Path(run) / "checkpoint.npz")
    config, step = record["config"], states.step[0]
    if find_task(config["env"])[2] != dataset or step < config["updates"]:
        raise UserError(f"--policy {run}: update {step} in {config['env']}; give a finished run of {dataset}")
    fixed = {k: config[k] for k in ("seeds", "width", "depth", "horizon", "denoise_steps")}
    return dict(policy=states.target["policy"]), fixed

def learn(states, record, metrics, paths, load_slice, folder, cfg):
    """Train to cfg.updates, or to the first Ctrl-C (a second kills). Saves each minute. -> States"""
    step, saved, stop, coming = int(states.step[0]), time.monotonic(), [], None
    old = signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, old)))
    bar = progress(total=cfg.updates, initial=step, desc="training", unit=" updates")
    with bar, ThreadPoolExecutor(1) as thread:  # it loads the next slice, while this one trains SWAP updates
        while step < cfg.updates and not stop:
            if coming is None or step % SWAP == 0:
                data = coming.result() if coming else load_slice(paths[step // SWAP % len(paths)])
                coming = thread.submit(load_slice, paths[(step // SWAP + 1) % len(paths)])
            n = min(CALL, cfg.updates - step, SWAP - step % SWAP)
            states, info = train(states, data, n, cfg)
            means = np.mean([info[k] for k in LOSSES], axis=2)  # (5, K, n) -> (5, K); waits for the device
            step += n
            metrics += [[step, cfg.seed + k, *means[:, k].tolist()] for k in range(cfg.seeds)]
            bar.update(n)
            if time.monotonic() - saved > 60 or not np.isfinite(means).all():
                save(folder, states, record, metrics)
                saved = time.monotonic()
    save(folder, states, record, metrics)
    signal.signal(signal.SIGINT, old)
    if step < cfg.updates:
        raise UserError(f"stopped at update {step}, saved in {folder}: the same command resumes")
    return states

# ---- 10 main -----------------------------------------------------------------------------------------------
LARGE = dict(updates=100_000, width=512, depth=4, critic_width=256, expectile=0.95)
FAMILY = {  # where Config's defaults fail: by family, unless a task or goal is named
    "cube-double": LARGE, "scene": dict(LARGE, sparse=1), "puzzle-3x3-goal": dict(LARGE, sparse=1),
    "puzzle-3x3": dict(LARGE, sparse=1, updates=150_000),
    "cube-single-goal": dict(updates=20_000, episodes=100),
}
ALIASES = dict(epochs="updates", steps="updates", gamma="discount", tau="expectile", task="env")

def read_option(f, words):
    """Words typed for a field -> its value, at least 0: 1e5 -> 100000; 0.03,0.1 0.3 -> (0.03, 0.1, 0.3)."""
    low, high = 1e-9 * (f.default != 0), 1 if f.name in ("sparse", "discount", "expectile", "kappa") else 2e9
    many, kind = get_args(f.type), (*get_args(f.type), f.type)[0]
    words = [x for word in words for x in word.split(",") if x] if many else [words]
    with suppress(ValueError, OverflowError):
        values = tuple(dict.fromkeys(x if kind is str else kind(float(x)) for x in words))
        if kind is str or all(low <= float(x) <= high and float(x) == kind(float(x)) for x in words):
            return values if many else values[0]
    what = f"a {'whole ' * (kind is int)}number {'from' if low == 0 else 'above'} 0, at most {high:g}"
    raise UserError(f"{flags({f.name: tuple(words)})}: give {what}")

def parse(argv):
    """The options given on the command line, by field of Config."""
    def error(message):
        raise UserError(f"{message} (python qgf.py --help lists all options)")
    summary, *_, note, examples = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        "qgf.py", "python qgf.py [--option value ...]", summary, f"{note}\n{examples}", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, names = error, {f"--{f.name.replace('_', '-')}": f for f in fields(Config)}
    for name, f in names.items():
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group  # noqa: F821
        many, help = get_args(f.type), f.metadata["help"].format(methods=", ".join((*GUIDANCE, *OTHERS)))
        default = " ".join(map(str, f.default)) if many else f.default
        help += f" [{default}]" * (default not in ("", 0))
        how = dict(nargs="+") if many else dict(nargs="?", const="1") if f.name == "sparse" else {}
        group.add_argument(name, metavar=f.metadata["metavar"], help=help, **how)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(f"--{ALIASES.get(word[2:], word[2:])}", names, 1)
        error(f"unknown option {word}" + "".join(f": did you mean {name}?" for name in near))
    return {f.name: read_option(f, getattr(given, f.name)) for f in names.values() if hasattr(given, f.name)}

def flags(chosen):
    """Settings as they are typed."""
    return " ".join(f"--{k.replace('_', '-')} {shlex.join(map(str, np.ravel(v)))}" for k, v in chosen.items())

def settings(given, name, source, saved, step):
    """The Config of a run: what is given, else what the saved run has, else its family's defaults."""
    saved = {k: v for k, v in saved.items() if k not in ("methods", "guidance", "weights", "episodes")}
    differ = {k: v for k, v in saved.items() if k not in ("env", "out", "updates") and given.get(k, v) != v}
    if differ:
        raise UserError(f"{source} holds a run with {flags(differ)}: keep that, or give another folder")
    strength = dict(guidance=()) if "weights" in given else {}
    family = FAMILY.get(name) or FAMILY.get(re.sub(r"-(task\d|goal)$", "", name), {})
    cfg = Config(**family | saved | strength | given | dict(env=name))
    if cfg.updates < step:
        raise UserError(f"{source} has {step} updates already: give as many or more, or another --out")
    names, known = [parse_method(m)[0] for m in cfg.methods], (*GUIDANCE, *OTHERS)
    if wrong := [x for x in names if x not in known]:
        raise UserError(f"unknown method {wrong[0]!r}: give NAME or NAME@4, NAME one of {', '.join(known)}")
    if "edp" in names and not cfg.edp:
        raise UserError("edp is a policy of its own, which this run does not train: train one with --edp 100")
    if 0 < cfg.long_horizon < cfg.horizon:
        raise UserError(f"--long-horizon {cfg.long_horizon} is shorter than --horizon {cfg.horizon}")
    if "data" in given and (cfg.collect or not (cfg.data and Path(cfg.data).exists())):
        raise UserError(f"--data {cfg.data} does not exist, or --collect is given as well")
    return cfg

def main(argv=None):
    """A whole run, from the command line to the table: new, stopped and finished runs take the same way."""
    jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/qgf").expanduser()))
    warnings.filterwarnings("ignore", message=".*DISPLAY|.*precision lowered|.*Calling .close")  # expected
    os.environ["PYTHONWARNINGS"] = "ignore"  # the same, for worker processes
    given, states, record, metrics, step = parse(argv), None, {}, [], 0
    name, env_id, dataset = find_task(given.get("env", Config.env))
    folder = Path(given.get("out", Config.out)) / f"{name}-s{given.get('seed', Config.seed)}"
    if any((folder / file).exists() for file in ("checkpoint.npz", "episodes.csv")):  # both, or it is refused
        states, record, metrics = load(folder / "checkpoint.npz")
        step = int(states.step[0])
    lent, fixed = lend(given["policy"], dataset) if "policy" in given and not record else ({}, {})
    cfg = settings(given, name, folder if record else given.get("policy"), record.get("config", fixed), step)
    changed = {k: v for k, v in asdict(cfg).items() if v != () and (k == "env" or v != getattr(Config, k))}
    print(f"run     {env_id}, seed {cfg.seed}, in {folder}\noptions {flags(changed)}\n"
          f"device  {jax.devices()[0].device_kind}, {CORES} CPU cores, jax {jax.__version__}", flush=True)
    multiprocessing.set_forkserver_preload(["ogbench.manipspace", "optax", "scipy.stats"])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # worker processes inherit it
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    if step < cfg.updates:
        paths, env = find_dataset(cfg, dataset), Chunks(env_id, cfg.horizon, cfg.sparse)
        load_slice = lru_cache(maxsize=1)(partial(load_dataset, env=env, R=cfg.long_horizon or cfg.horizon))
        data = load_slice(paths[0])
        mark = [zlib.crc32(np.asarray(data[k])) for k in ("observations", "actions", "rewards", "masks")]
        if record.get("data_crc", mark) != mark:
            raise UserError(f"{folder} was trained on other data than {paths[0]}: choose another --out")
        words = "any goal" if env.has_goal else f"solved in {np.mean(data['masks'] == 0):.2%} of the rows"
        words += ". WARNING: never solved, Q learns nothing" * bool(not env.has_goal and data["masks"].all())
        print(f"data    {paths[0]}, first of {len(paths)}: {len(data['ends']):,} rows, {words}", flush=True)
        if not record:
            states = init_states(env.sizes, cfg)
            states.target.update(lent)
            batch = sample_batch(jax.random.PRNGKey(cfg.seed), data, replace(cfg, batch_size=PROBE))
            record = dict(sizes=env.sizes, data_crc=mark, probe=batch["observations"].tolist())
            packages = ("jax", "optax", "numpy", "ogbench", "gymnasium", "mujoco")
            record["versions"] = {p: importlib.metadata.version(p) for p in packages}
        record["config"] = asdict(cfg)
        del data  # a slice has to go when the next one comes
        states = learn(states, record, metrics, paths, load_slice, folder, cfg)
    results = evaluate(states, np.float32(record["probe"]), env_id, folder / "episodes.csv", cfg)
    rows = {key[1:]: row for key, row in results.items() if key[0] == states.step[0]}
    print(f"\n{name} after {states.step[0]} updates", *table(rows), f"saved in {folder}", sep="\n")

if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError, EOFError) as e:
        sys.exit(f"{str(e) or type(e).__name__}; checkpoints, data and rows that were complete are kept")
