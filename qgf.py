# SPDX-License-Identifier: MIT
"""Q-Guided Flow (QGF): train a flow policy and a critic separately; the critic steers the flow.

Zhou et al., "Test-Time Gradient Guidance of Flow Policies in Reinforcement Learning", arXiv
2606.11087. The policy we want is π ∝ π_BC exp(Q/β).

s is a state, g a goal (empty if there is one task), a_1 an action chunk (H consecutive actions,
flattened); r_i and s_i are the reward and the state i steps later. a_0 ~ N(0, I) is noise, t in
[0, 1] the time of the flow, a_t = (1-t) a_0 + t a_1. A bar marks a Polyak average.

    train  policy  v_θ(s, a_t, t)  towards  a_1 - a_0                        behaviour cloning (BC)
           critic  Q_k(s, g, a_1)  towards  Σ_{i<H} γ^i r_i + γ^H V(s_H, g)  implicit Q-learning
           value   V(s, g)         towards  the τ-expectile of min_k Q̄_k(s, g, a_1)
    act    from noise a_0, for t = 0, 1/T, ..., (T-1)/T:
               â_1 = clip(a_t + (1-t) v̄(s, a_t, t), -1, 1)   one-step estimate of the clean action
               d   = ∇_{â_1} min_k Q̄_k(s, g, â_1)            the direction in which Q grows
               a_t += 1/T (v̄(s, a_t, t) + w c(t) d)          w = 1/β; w = 0 is BC
           then execute the H actions of clip(a_1, -1, 1)
    w      = λ / rms(d), since Q has no scale of its own: Q pushes λ times as hard as the flow
    c(t)   = (1-t) / ((1-t)² + t²), from 1 to 0: exact if π_BC is N(0, I) and Q is linear

    python qgf.py --env cube-double                            train, evaluate; or resume
    python qgf.py --env cube-double --methods qgf@4 bptt       same networks, other methods
"""

import argparse
import csv
import difflib
import itertools
import json
import math
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv
from scipy.stats import binomtest
from tqdm import tqdm


# ---- 1 Config
def option(default, text, low=0, high=1e9):
    """A setting: its default, what --help says of it, and its range."""
    return field(default=default, metadata=dict(help=text, low=low, high=high))


@dataclass(frozen=True)
class Config:
    """The options of a run. Frozen, since jit takes it as static."""

    # run
    env: str = option("cube-double", "cube-double: any goal; cube-double-task2: one task")
    seed: int = option(0, "of parameters, batches and noise")
    out: str = option("runs", "folder of runs")
    data: str = option("", "your own .npz, or a folder of slices")
    collect: int = option(1_000_000, "rows to collect if no download works", low=1)
    # evaluation
    methods: tuple[str, ...] = option(("qgf",), "rows of the table; NAME@4: best of 4 by Q")
    guidance: tuple[float, ...] = option((1.0,), "λ: how hard Q pushes, relative to the flow")
    weights: tuple[float, ...] = option((), "w = 1/β, instead of λ: as in the paper")
    episodes: int = option(50, "episodes in a row of the table", low=1)
    eval_every: int = option(0, "evaluate after every N of the critic; 0: at the end")
    # training
    policy_updates: int = option(170_000, "updates of the policy", low=1)
    critic_updates: int = option(225_000, "updates of the critic", low=1)
    policy_width: int = option(512, "units of its hidden layers", low=1)
    critic_width: int = option(256, "the same for critic and value", low=1)
    depth: int = option(4, "hidden layers", low=1)
    batch_size: int = option(256, "chunks in a batch", low=1)
    lr: float = option(1e-3, "learning rate of Adam", low=1e-9)
    lr_decay: float = option(0.1, "lr falls to 0 in this last share of updates", high=1)
    # algorithm
    horizon: int = option(5, "H: actions in a chunk", low=1)
    denoise_steps: int = option(10, "T: Euler steps from noise to action", low=1)
    discount: float = option(0.99, "γ, per environment step", high=1)
    expectile: float = option(0.95, "τ: V is from the mean (.5) to the best (1) of Q", high=1)
    fade: bool = option(True, "the push fades by c(t)")
    average_policy: bool = option(True, "act by the policy's Polyak average")
    sparse: bool = option(False, "a task's reward is -1 until it is solved")


# ---- 2 Networks: parameters are plain pytrees, networks are pure functions
# Layers are Dense -> LayerNorm -> GELU, as in the official code. In shapes, B is the batch, S the
# size of a state, G of a goal (0 without goals), A of an action, and H*A of a chunk.
def init_mlp(key, sizes, actor=False):
    """Parameters of an MLP of these sizes (input, ..., output): a list of dicts."""
    keys = jax.random.split(key, len(sizes) - 1)
    layers = []
    for key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True):
        w = jax.nn.initializers.glorot_uniform()(key, (fan_in, fan_out))
        b = jnp.zeros(fan_out)
        layers.append(dict(w=w, b=b, scale=jnp.ones(fan_out), shift=jnp.zeros(fan_out)))
    for layer in layers[-2 if actor else -1 :]:  # an actor's last hidden layer has no LayerNorm
        del layer["scale"], layer["shift"]
    if actor:
        layers[-1]["w"] = jax.nn.initializers.lecun_normal()(keys[-1], sizes[-2:])
    return layers


def mlp(layers, x):
    """Apply the layers of `init_mlp`: x (B, in) -> (B, out)."""
    for layer in layers[:-1]:
        x = x @ layer["w"] + layer["b"]
        if "scale" in layer:
            x = jax.nn.standardize(x, epsilon=1e-6) * layer["scale"] + layer["shift"]  # LayerNorm
        x = jax.nn.gelu(x)
    return x @ layers[-1]["w"] + layers[-1]["b"]


def velocity(policy, s, a_t, t, cfg):
    """The flow v(s, a_t, t): s (B, S), a_t (B, H*A), t (B, 1) in [0, 1] -> (B, H*A)."""
    angles = 10_000 * t * jnp.exp(-math.log(10_000) * jnp.arange(8) / 8)  # (B, 1) * (8,) -> (B, 8)
    return mlp(policy, jnp.concatenate([s, a_t, jnp.cos(angles), jnp.sin(angles)], axis=1))


def q_values(critic, s, g, a):
    """Q_1 and Q_2, whose parameters are stacked: s (B, S), g (B, G), a (B, H*A) -> (2, B)."""
    x = jnp.concatenate([s, g, a], axis=1)
    return jax.vmap(mlp, in_axes=(0, None))(critic, x)[..., 0]


def q_min(critic, s, g, a):
    """min_k Q_k(s, g, a) -> (B,). Not by jnp.min: its gradient compares floats, and can be NaN."""
    q_1, q_2 = q_values(critic, s, g, a)
    return jnp.where(q_1 < q_2, q_1, q_2)


def value(layers, s, g):
    """V(s, g): s (B, S), g (B, G) -> (B,)."""
    return mlp(layers, jnp.concatenate([s, g], axis=1))[..., 0]


def init_policy(key, sizes, cfg):
    """dict(policy); sizes are S, G, A. The policy never sees the goal: only Q steers towards it."""
    S, _, A = sizes
    chunk = cfg.horizon * A
    inputs = S + chunk + 16  # 8 cosines and 8 sines of t
    hidden = [cfg.policy_width] * cfg.depth
    return dict(policy=init_mlp(key, [inputs, *hidden, chunk], actor=True))


def init_critic(key, sizes, cfg):
    """dict(critic, value); sizes are S, G, A."""
    S, G, A = sizes
    hidden = [cfg.critic_width] * cfg.depth
    key_critic, key_value = jax.random.split(key)
    init_one = partial(init_mlp, sizes=[S + G + cfg.horizon * A, *hidden, 1])
    return dict(
        critic=jax.vmap(init_one)(jax.random.split(key_critic, 2)),
        value=init_mlp(key_value, [S + G, *hidden, 1]),
    )


# ---- 3 Batches
class Data(NamedTuple):
    """Transitions, one a row; the rows of a trajectory follow each other."""

    observations: jax.Array  # (N, S)
    actions: jax.Array  # (N, A) in [-1, 1]
    rewards: jax.Array  # (N,)
    masks: jax.Array  # (N,) 0 where the task is solved, else 1
    goals: jax.Array  # (N, G) the goal that a row has reached; G = 0 if there is one task
    ends: jax.Array  # (N,) the last row of the row's trajectory
    starts: jax.Array  # (M,) the rows where a whole chunk begins, with the state after it


class Batch(NamedTuple):
    """What a loss is computed from: B chunks of H actions."""

    observations: jax.Array  # (B, S)
    goals: jax.Array  # (B, G)
    actions: jax.Array  # (B, H*A)
    returns: jax.Array  # (B,) Σ_{i<H} γ^i r_i, up to the step that solves the task
    discounts: jax.Array  # (B,) γ^H, or 0 if the task is solved by then
    next_observations: jax.Array  # (B, S), H steps later


def sample_batch(key, data, cfg):
    """Draw chunks uniformly, and goals if there are any."""
    B, H = cfg.batch_size, cfg.horizon
    key_first, key_goal = jax.random.split(key)
    first = data.starts[jax.random.randint(key_first, (B,), 0, len(data.starts))]  # (B,) of rows
    window = first[:, None] + jnp.arange(H)  # (B, 1) + (H,) -> (B, H)
    if data.goals.shape[1] > 0:
        goals, rewards, masks = hindsight(key_goal, data, window)
    else:
        goals, rewards, masks = data.goals[first], data.rewards[window], data.masks[window]
    alive = jnp.cumprod(masks, axis=1)  # (B, H) 0 from the first success on
    counted = jnp.pad(alive[:, :-1], ((0, 0), (1, 0)), constant_values=1)  # (B, H) 0 after it
    return Batch(
        observations=data.observations[first],
        goals=goals,
        actions=data.actions[window].reshape(B, -1),  # (B, H, A) -> (B, H*A)
        returns=jnp.sum(counted * rewards * cfg.discount ** jnp.arange(H), axis=1),
        discounts=cfg.discount**H * alive[:, -1],
        next_observations=data.observations[first + H],
    )


def hindsight(key, data, window):
    """Goals that were reached: window (B, H) of rows -> goals (B, G), rewards and masks (B, H).

    A goal is that of the first row (probability .2), of a later one in its trajectory (.5), or of
    any row (.3), as in DQC. Rewards are -1, and masks 1, until each number is within .4 of it.
    """
    first = window[:, 0]
    key_kind, key_later, key_any = jax.random.split(key, 3)
    kind = jax.random.uniform(key_kind, first.shape)
    later = jax.random.randint(key_later, first.shape, first + 1, data.ends[first] + 1)
    anywhere = jax.random.randint(key_any, first.shape, 0, len(data.goals))
    goal_row = jnp.where(kind < 0.2, first, jnp.where(kind < 0.7, later, anywhere))
    goals = data.goals[goal_row]  # (B, G)
    distance = jnp.abs(data.goals[window] - goals[:, None]).max(axis=-1)  # (B, H, G) -> (B, H)
    masks = jnp.float32(distance > 0.4)
    return goals, -masks, masks


# ---- 4 Losses: (a learner's parameters, their averages, batch, key, cfg) -> loss, what to log
def policy_loss(params, average, batch, key, cfg):
    """Behaviour cloning by flow matching: (v_θ(s, a_t, t) - (a_1 - a_0))², mean over B and H*A."""
    key_noise, key_time = jax.random.split(key)
    a_1 = batch.actions
    a_0 = jax.random.normal(key_noise, a_1.shape)
    T = cfg.denoise_steps
    t = jax.random.randint(key_time, (len(a_1), 1), 0, T + 1) / T  # (B, 1): 0, 1/T, ..., or 1
    a_t = (1 - t) * a_0 + t * a_1
    v = velocity(params["policy"], batch.observations, a_t, t, cfg)
    loss = jnp.mean((v - (a_1 - a_0)) ** 2)
    return loss, dict(policy_loss=loss)


def critic_loss(params, average, batch, key, cfg):
    """Implicit Q-learning: Q towards the reward and V, V towards an upper expectile of Q̄."""
    s, g, a = batch.observations, batch.goals, batch.actions
    y = batch.returns + batch.discounts * value(params["value"], batch.next_observations, g)
    q = q_values(params["critic"], s, g, a)  # (2, B)
    q_loss = jnp.mean((q - jax.lax.stop_gradient(y)) ** 2)
    q_average = q_min(average["critic"], s, g, a)  # (B,); `train` differentiates params alone
    v_loss = expectile_loss(q_average - value(params["value"], s, g), cfg.expectile).mean()
    return q_loss + v_loss, dict(q_loss=q_loss, v_loss=v_loss, q=q_average.mean())


def expectile_loss(u, tau):
    """L2^τ(u) = |τ - 1[u<0]| u². For u = Q - V, its mean is least at the τ-expectile V of Q."""
    return jnp.abs(tau - (u < 0)) * u**2


# ---- 5 Training: policy and critic are two learners, which share nothing but the data
LEARNERS = dict(policy=(init_policy, policy_loss), critic=(init_critic, critic_loss))
POLYAK = 0.005  # rate of the averages, which act


class State(NamedTuple):
    """All that a learner changes: from a State and the data, training continues bit for bit."""

    params: dict
    average: dict  # Polyak average of params
    opt: tuple  # Adam's moments
    key: jax.Array
    step: jax.Array  # updates made


def init_state(learner, sizes, cfg):
    """The State before the first update."""
    init, _ = LEARNERS[learner]
    key_params, key = jax.random.split(jax.random.PRNGKey(cfg.seed))
    params = init(key_params, sizes, cfg)
    average = jax.tree.map(jnp.copy, params)
    return State(params, average, optax.adam(cfg.lr).init(params), key, jnp.int32(0))


@partial(jax.jit, static_argnames=("learner", "n", "cfg"), donate_argnames="state")
def train(learner, state, data, n, cfg):
    """n updates in one compiled scan -> State, logs (n,). The State that goes in is used up."""
    differentiate = jax.grad(LEARNERS[learner][1], has_aux=True)
    updates = getattr(cfg, f"{learner}_updates")
    fall = int(cfg.lr_decay * updates)
    rate = optax.linear_schedule(cfg.lr, 0, fall, updates - fall)

    def update(state, _):
        key_batch, key_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = sample_batch(key_batch, data, cfg)
        gradient, log = differentiate(state.params, state.average, batch, key_loss, cfg)
        change, opt = optax.adam(rate(state.step)).update(gradient, state.opt)
        params = optax.apply_updates(state.params, change)
        # The averages take in the old parameters, as in the official code.
        average = optax.incremental_update(state.params, state.average, POLYAK)
        return State(params, average, opt, state.key, state.step + 1), log

    return jax.lax.scan(update, state, length=n)


# ---- 6 Guidance: the critic nudges each step of the flow
# An estimator says where to push a_t (B, H*A) at t (B, 1). It may ask q(a) -> (B,), the averaged
# critics' minimum, and flow(a, t) -> (B, H*A); v is flow(a_t, t), and T the number of Euler steps.
def grad_q(q, a):
    """∇_a q(a): a (B, H*A) -> (B, H*A)."""
    return jax.grad(lambda a: q(a).sum())(a)  # each row of a has its own term of the sum


def clean_estimate(a_t, t, v):
    """â_1, where a_t would end at t = 1 if it kept its velocity v."""
    return jnp.clip(a_t + (1 - t) * v, -1, 1)


def integrate(flow, a_t, t, T):
    """Where the unguided flow takes a_t (B, H*A) from t (B, 1), equal in all rows -> (B, H*A)."""

    def euler(a, i):
        now = t + i / T  # (B, 1)
        return jax.lax.cond(now[0, 0] < 1 - 0.5 / T, lambda: a + flow(a, now) / T, lambda: a), None

    return jnp.clip(jax.lax.scan(euler, a_t, jnp.arange(T))[0], -1, 1)


def qgf(q, flow, a_t, t, v, T):
    """∇Q̄ at the clean estimate â_1; its Jacobian ∂â_1/∂a_t is replaced by 1."""
    return grad_q(q, clean_estimate(a_t, t, v))


def qgf_jacobian(q, flow, a_t, t, v, T):
    """The same with the Jacobian: the gradient of Q̄(s, g, â_1(a_t)) by a_t."""
    return grad_q(lambda a: q(clean_estimate(a, t, flow(a, t))), a_t)


def bptt(q, flow, a_t, t, v, T):
    """Back-propagation through all remaining Euler steps."""
    return grad_q(lambda a: q(integrate(flow, a, t, T)), a_t)


def qfql(q, flow, a_t, t, v, T):
    """∇Q̄ at the noisy action itself, where Q was never trained."""
    return grad_q(q, a_t)


GUIDANCE = {f.__name__.replace("_", "-"): f for f in (qgf, qgf_jacobian, bptt, qfql)}
METHODS = (*GUIDANCE, "gradstep", "bc")  # gradstep: the flow, then uphill on Q; bc: the flow only
ASCENTS = 3  # steps of gradstep


def fade(t):
    """c(t), from 1 at t = 0 to 0 at t = 1, where no flow corrects a push any more.

    If π_BC is N(0, I) and Q is linear, v + w c(t) ∇Q leads exactly to π_BC exp(w Q).
    """
    return (1 - t) / ((1 - t) ** 2 + t**2)


@partial(jax.jit, static_argnames=("method", "cfg"))
def sample_actions(nets, s, g, a_0, w, method, cfg):
    """From noise to actions: s (B, S), g (B, G), a_0 (B, N, H*A) -> a (B, H*A), the rms of d.

    nets is dict(policy, critic). Each state gets N samples; that with the largest Q̄ is returned.
    """
    B, N, D = a_0.shape  # D is H*A
    T = cfg.denoise_steps
    s, g = jnp.repeat(s, N, axis=0), jnp.repeat(g, N, axis=0)  # (B*N, S), (B*N, G)

    def flow(a, t):
        return velocity(nets["policy"], s, a, t, cfg)

    def q(a):
        return q_min(nets["critic"], s, g, a)

    def euler(a_t, i):
        t = jnp.full((B * N, 1), i / T)
        v = flow(a_t, t)
        d = jnp.zeros_like(v)
        if method in GUIDANCE:
            d = GUIDANCE[method](q, flow, a_t, t, v, T)
        c = fade(t) if cfg.fade else 1.0
        return a_t + (v + w * c * d) / T, jnp.mean(d**2)

    def ascend(a, _):
        d = grad_q(q, a)
        return jnp.clip(a + w * d, -1, 1), jnp.mean(d**2)

    a, squares = jax.lax.scan(euler, a_0.reshape(B * N, D), jnp.arange(T))
    a = jnp.clip(a, -1, 1)
    if method == "gradstep":
        a, squares = jax.lax.scan(ascend, a, length=ASCENTS)
    rms = jnp.sqrt(squares.mean())
    best = q(a).reshape(B, N).argmax(axis=1)  # (B*N,) -> (B, N) -> (B,)
    return a.reshape(B, N, D)[jnp.arange(B), best], rms


def relative_weight(guidance, nets, batch, method, cfg):
    """w = λ / rms(d) along the unguided flow, whose velocity has an rms of about 1.

    No flow corrects the steps of gradstep: together they get a tenth.
    """
    s, g, a = batch.observations, batch.goals, batch.actions
    a_0 = jax.random.normal(jax.random.PRNGKey(0), a[:, None].shape)  # (B, 1, H*A)
    _, rms = sample_actions(nets, s, g, a_0, 0.0, method, cfg)
    share = 0.1 / ASCENTS if method == "gradstep" else 1.0
    return share * guidance / max(float(rms), 1e-12)


# ==== The algorithm ends here.
# ---- 7 Data
DATA_DIR = Path.home() / ".ogbench/data"
COLLECT = Path(__file__).parent / ".github" / "collect.py"
NAMES = re.compile(  # cube-double-task3 or, in full, cube-double-play-singletask-task3-v0
    "(.*?)(-play|-noisy|-navigate|-stitch|-explore)?(-singletask)?(-task[1-5])?(-v0)?"
)


class UserError(SystemExit):
    """A user's mistake: it ends the program with one line."""


class Task(NamedTuple):
    """Any goal or one task of OGBench, or your own environment."""

    name: str  # cube-double-task2
    env_id: str  # cube-double-singletask-task2-v0; for any goal, cube-double-v0
    dataset: str = ""  # cube-double-play-v0; yours has none
    has_goals: bool = False


def find_task(name):
    """OGBench's name of a task, short or full, or a gymnasium id -> Task."""
    base, kind, single, number, _ = NAMES.fullmatch(name).groups("")
    if f"{base}-singletask-v0" not in gymnasium.registry or "visual" in name:
        if name in gymnasium.registry and "visual" not in name:
            return Task(name, name)
        near = difflib.get_close_matches(f"{base}-v0", gymnasium.registry)
        raise UserError(f"--env {name}: no environment with vectors as states; near are {near}")
    usual = "-navigate" if re.search("maze|soccer", base) else "-play"
    dataset = f"{base}{kind or usual}-v0"
    short = base + kind.removeprefix(usual)  # all names of a task are one run
    if single or number:
        return Task(short + (number or single), f"{base}-singletask{number}-v0", dataset)
    return Task(short, f"{base}-v0", dataset, has_goals=True)


def find_files(task, cfg):
    """The .npz files to learn from, downloaded or collected if need be."""
    if cfg.data:
        path = Path(cfg.data).expanduser()
        files = sorted(path.glob("[!.]*.npz")) if path.is_dir() else [path]
        files = [x for x in files if x.exists() and not x.stem.endswith("-val")]
        if not files:
            raise UserError(f"--data {cfg.data}: no .npz there")
        return files
    if not task.dataset:
        raise UserError(f"{task.name} is not OGBench's: give transitions as --data PATH")
    official = DATA_DIR / f"{task.dataset}.npz"
    collected = DATA_DIR / f"{task.dataset}-collected-{cfg.collect}.npz"
    if not official.exists() and not collected.exists():
        socket.setdefaulttimeout(20)  # seconds; OGBench sets none
        try:
            ogbench.download_datasets([task.dataset], DATA_DIR)
        except OSError as e:
            print(f"data    no download of {task.dataset} ({e}): collecting", flush=True)
        if not official.exists():
            command = [sys.executable, COLLECT, task.dataset, str(cfg.collect), collected]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"no data: try again, add {official}, or give --data")
    return [official if official.exists() else collected]


def read_npz(path, what=dict):
    """A file's arrays, or their names if `what` is sorted. UserError if it is not whole."""
    try:
        with np.load(path) as file:
            return what(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is cut off, or no .npz: delete it ({e})") from None


def load_data(path, task, env, cfg):
    """A file in OGBench's or D4RL's format -> Data; UserError if it does not fit."""
    raw = read_npz(path)
    try:
        data = read_transitions(raw, task, env, cfg)
    except (KeyError, ValueError, TypeError, IndexError) as e:
        raise UserError(f"{path} with {[*raw]} does not fit {task.env_id}: {e!r}") from None
    N = len(data.actions)
    S, G, A = env.sizes
    shapes = dict(observations=(N, S), actions=(N, A), rewards=(N,), masks=(N,), goals=(N, G))
    for name, shape in shapes.items():
        x = getattr(data, name)
        if x.shape != shape:
            raise UserError(f"{path}: {name} has the shape {x.shape}; {task.env_id} needs {shape}")
        if not np.isfinite(x).all():
            raise UserError(f"{path}: {name} has NaN or Inf")
    if not np.isin(data.masks, (0, 1)).all():
        raise UserError(f"{path}: masks must be 0 (solved) or 1")
    if len(data.starts) == 0:
        raise UserError(f"{path}: no trajectory is as long as a chunk: lower --horizon")
    if np.abs(data.actions).max() > 1.001:
        raise UserError(f"{path}: actions leave the range {env.low} to {env.high}")
    return jax.device_put(data)


def read_transitions(raw, task, env, cfg):
    """A file's arrays -> Data, with the rewards, masks and goals that the file lacks."""
    N = len(raw["actions"])
    if "timeouts" in raw:  # D4RL, whose terminals are ends of tasks, not of trajectories
        raw["masks"] = 1.0 - raw["terminals"]
        raw["terminals"] = raw["terminals"] + raw["timeouts"]
    last = np.append(np.flatnonzero(raw["terminals"].reshape(N)[:-1]), N - 1)  # of each trajectory
    ends = last[np.searchsorted(last, np.arange(N))]  # (N,)
    actions, goals = raw["actions"], np.zeros((N, 0))
    solved = np.zeros(N, bool)  # does the row's trajectory end with a success?
    if task.has_goals:
        ogbench.relabel_utils.add_oracle_reps(task.env_id, env.unwrapped, raw)
        goals = raw["oracle_reps"]
        raw |= dict(rewards=np.zeros(N), masks=np.ones(N))  # unused: `hindsight` makes its own
    elif task.dataset and "rewards" not in raw:
        ogbench.relabel_utils.relabel_dataset(task.env_id, env.unwrapped, raw)
        if cfg.sparse:
            raw["rewards"] = -raw["masks"]
    else:
        raw.setdefault("masks", np.ones(N))
        solved = np.ravel(raw["masks"])[ends] == 0
    if not task.dataset:
        actions = 2 * (actions - env.low) / (env.high - env.low) - 1
    after = np.arange(N) + cfg.horizon  # the row after a chunk; if solved, it need not exist
    return Data(
        observations=np.float32(raw["observations"]),
        actions=np.float32(actions),
        rewards=np.float32(raw["rewards"]),
        masks=np.float32(raw["masks"]),
        goals=np.float32(goals),
        ends=np.int32(ends),
        starts=np.int32(np.flatnonzero(after <= ends + solved)),
    )


# ---- 8 Episodes
GOALS = 5  # of an environment in OGBench
FIRST_SEED = 2_000_000  # of episode 0


class Chunks(gymnasium.Wrapper):
    """An environment whose step is a chunk (H, A). It shows states, then goals."""

    def __init__(self, task, horizon, **options):
        if task.has_goals:
            options["use_oracle_rep"] = True
        env = gymnasium.make(task.env_id, disable_env_checker=True, **options)
        box = env.action_space
        if len(env.observation_space.shape or ()) != 1 or len(box.shape or ()) != 1:
            raise UserError(f"{task.name}: states and actions are no vectors")
        if task.dataset:  # OGBench makes an action space at each use, which loses its seed
            type(env.unwrapped).action_space = box
        super().__init__(gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
        self.task, self.low, self.high = task, box.low, box.high
        self.reset(seed=0)
        self.sizes = len(self.obs) - len(self.goal), len(self.goal), len(box.low)  # S, G, A
        self.action_space = Box(-1, 1, (horizon, len(box.low)))
        self.observation_space = Box(-np.inf, np.inf, self.obs.shape)

    def reset(self, *, seed, options=None):
        """Begin the episode of this seed. OGBench's goals take turns."""
        np.random.seed(seed)  # OGBench's reset draws from here, and from the action space
        self.env.unwrapped.action_space.seed(seed)
        options = dict(task_id=1 + seed % GOALS) if self.task.dataset else None
        state, info = self.env.reset(seed=seed, options=options)
        self.goal = info["goal"] if self.task.has_goals else []
        self.obs = np.float32([*state, *self.goal])
        self.over = False
        self.episode = np.array([math.nan, 0, 0])  # success (NaN: unknown), return, length
        return self.obs, {}

    def step(self, actions):
        """Execute the chunk, as far as the episode goes, which `info` sums up."""
        for action in actions:
            if self.over:
                break
            state, reward, terminated, truncated, info = self.env.step(action)
            self.obs = np.float32([*state, *self.goal])
            self.over = bool(terminated or truncated)
            self.episode[0] = np.fmax(self.episode[0], info.get("success", math.nan))
            self.episode[1:] += reward, 1
        return self.obs, 0.0, self.over, False, dict(episode=self.episode)


def make_envs(task, cfg):
    """Two processes a core, an environment each. They ignore Ctrl-C."""
    multiprocessing.set_forkserver_preload(["ogbench.manipspace", "optax", "scipy.stats"])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    make = partial(Chunks, task, cfg.horizon)
    n = min(2 * os.cpu_count(), 32, cfg.episodes)
    return AsyncVectorEnv([make] * n, context="forkserver", autoreset_mode="Disabled")


def rollout(envs, nets, w, method, sizes, cfg):
    """Play cfg.episodes episodes -> (episodes, 3): success, return, length.

    Start, goal and noise of an episode depend on its number alone, so rows are paired.
    """
    S, _, A = sizes
    name, samples = parse_method(method)
    playing = np.arange(envs.num_envs)  # the number of each environment's episode
    noise = [np.random.default_rng(i) for i in range(cfg.episodes + envs.num_envs)]
    results = np.zeros((cfg.episodes, 3))
    obs, _ = envs.reset(seed=(FIRST_SEED + playing).tolist())
    bar = progress(total=cfg.episodes, desc=f"playing {method}", unit=" episodes")
    while (playing < cfg.episodes).any():
        a_0 = [noise[i].standard_normal((samples, cfg.horizon * A)) for i in playing]
        s, g = obs[:, :S], obs[:, S:]
        actions, _ = sample_actions(nets, s, g, np.float32(a_0), w, name, cfg)
        actions = np.asarray(actions).reshape(-1, cfg.horizon, A)  # (B, H*A) -> (B, H, A)
        obs, _, over, _, info = envs.step(actions)
        ended = over & (playing < cfg.episodes)
        for k in np.flatnonzero(ended):
            results[playing[k]] = info["episode"][k]
            playing[k] = playing.max() + 1
            bar.update()
        ended &= playing < cfg.episodes  # the others idle
        if ended.any():
            seeds = (FIRST_SEED + playing).tolist()
            obs, _ = envs.reset(seed=seeds, options=dict(reset_mask=ended))
    bar.close()
    return results


def parse_method(text):
    """qgf@4 -> qgf, 4."""
    name, _, samples = text.partition("@")
    return name, int(samples or 1)


progress = partial(tqdm, miniters=1, mininterval=0.2 if sys.stderr.isatty() else 30)  # seconds


# ---- 9 Runs: config.json, checkpoint.npz, metrics.csv and, of a critic, episodes.csv
CALL = 100  # updates in a call of train
SWAP = 1000  # updates on a slice of the data
BOTH = "seed depth batch_size lr lr_decay horizon"
SETTINGS = dict(  # of a learner; a run that resumes must have the same
    policy=f"{BOTH} policy_updates policy_width denoise_steps",
    critic=f"{BOTH} critic_updates critic_width discount expectile sparse",
)


@contextmanager
def atomic_write(path, mode="w"):
    """Open a file that takes its name once it is whole, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, mode) as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_csv(path):
    """The rows as dicts of text; none without a file."""
    text = path.read_text() if path.exists() else ""
    return list(csv.DictReader(text.splitlines()))


def write_csv(path, rows):
    """Write dicts, a row each."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def named_leaves(state):
    """A State's arrays by path, as params/policy/0/w, and their structure."""
    leaves, structure = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}, structure


def save(folder, state, metrics, settings):
    """Write settings, metrics and State. UserError if there is NaN or Inf."""
    leaves = {name: np.asarray(x) for name, x in named_leaves(state)[0].items()}
    if not all(np.isfinite(x).all() for x in leaves.values()):
        raise UserError(f"NaN or Inf after {state.step} updates: lower --lr, in another --out")
    with atomic_write(folder / "config.json") as file:
        json.dump(settings, file, indent=1)
    write_csv(folder / "metrics.csv", metrics)
    with atomic_write(folder / "checkpoint.npz", "wb") as file:
        np.savez(file, **leaves)


def load(folder, state, settings):
    """The State saved in a folder, or else `state`. UserError if it does not fit."""
    path = folder / "checkpoint.npz"
    if not path.exists():
        return state
    arrays = read_npz(path)
    saved = json.loads((folder / "config.json").read_text())
    leaves, structure = named_leaves(state)
    differ = [f"{k} {saved.get(k)}, not {x}" for k, x in settings.items() if saved.get(k) != x]
    both = leaves | arrays
    differ += [k for k in both if np.shape(leaves.get(k)) != np.shape(arrays.get(k))]
    if differ:
        raise UserError(f"{folder} was trained with another {differ[0]}: give another --out")
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[k]) for k in leaves])


def fit(learner, updates, folder, files, load_slice, sizes, cfg):
    """Train a learner, from its checkpoint, to this number of updates -> State."""
    settings = {name: getattr(cfg, name) for name in SETTINGS[learner].split()}
    settings["data"] = files[0].name
    state = load(folder, init_state(learner, sizes, cfg), settings)
    step = int(state.step)
    metrics = [row for row in read_csv(folder / "metrics.csv") if int(row["updates"]) <= step]
    if step >= updates:
        return state

    saved = time.monotonic()
    bar = progress(total=updates, initial=step, desc=f"training {learner}", unit=" updates")
    with bar, ThreadPoolExecutor(1) as loader:
        while step < updates:
            if step == bar.initial or step % SWAP == 0:
                data = load_slice(files[step // SWAP % len(files)])
                loader.submit(load_slice, files[(step // SWAP + 1) % len(files)])  # meanwhile
            n = min(CALL - step % CALL, updates - step)
            state, log = train(learner, state, data, n, cfg)
            log = {name: float(np.mean(x)) for name, x in log.items()}  # waits for the device
            step += n
            metrics.append(dict(updates=step, **log))
            bar.set_postfix(log, refresh=False)
            bar.update(n)
            if step == updates or time.monotonic() - saved > 20:  # seconds
                save(folder, state, metrics, settings)
                saved = time.monotonic()
    return state


def evaluate(envs, nets, batch, actor, path, sizes, cfg):
    """Play the rows that episodes.csv lacks of an actor, a dict -> all rows."""
    strengths = [(x, 0.0) for x in cfg.guidance] + [(0.0, x) for x in cfg.weights]
    for method, strength in itertools.product(["bc", *cfg.methods], strengths):
        name, _ = parse_method(method)
        guidance, weight = (0.0, 0.0) if name == "bc" else strength
        key = actor | dict(method=method, guidance=guidance, weight=weight)
        if sum(matches(row, key) for row in read_csv(path)) >= cfg.episodes:
            continue
        w = relative_weight(guidance, nets, batch, name, cfg) if guidance else weight
        results = rollout(envs, nets, w, method, sizes, cfg).tolist()
        rows = [row for row in read_csv(path) if not matches(row, key)]
        row = dict(env=cfg.env, seed=cfg.seed) | key | dict(w=f"{w:.6g}")
        for i, (success, total, length) in enumerate(results):
            episode = {"episode": i, "success": success, "return": total, "length": length}
            rows.append(row | episode)
        write_csv(path, rows)
    return read_csv(path)


def matches(row, key):
    """Has this row of text all values of `key`?"""
    return all(row[name] == str(x) for name, x in key.items())


def table(rows, actor, task):
    """Rows of episodes.csv -> lines of text. Gains are paired by episode."""
    played = {}
    for row in rows:
        if matches(row, actor):
            key = row["method"], float(row["guidance"]), float(row["weight"])
            played.setdefault(key, []).append((float(row["success"]), float(row["return"])))
    played = {key: np.array(episodes).T for key, episodes in played.items()}  # (2, n) each
    base = played["bc", 0.0, 0.0]
    score = int(np.isnan(base[0]).any())  # 0: success; 1: return, where success is unknown
    last = "success by goal" if task.has_goals else "return"
    lines = [f"{'method':14}{'strength':10}{'n':>4}  {'success':19}{'gain over bc':17}{last}"]
    answer = []
    for (method, guidance, weight), episodes in played.items():
        success, total = episodes
        n = len(total)
        strength = f"w {weight:g}" if weight else f"λ {guidance:g}" if guidance else ""
        rate, gain, end = "", "", f"{total.mean():.1f}"
        if score == 0:
            low, high = binomtest(int(success.sum()), n).proportion_ci(method="wilson")
            rate = f"{success.mean():.2f} [{low:.2f}, {high:.2f}]"
        if method != "bc":
            gains = episodes[score] - base[score, :n]
            mean, half = gains.mean(), 1.96 * gains.std() / n**0.5
            gain = f"{mean:+.2f} ± {half:.2f}"
            how = "helped" if mean > half else "did not help"
            answer.append(f"Guidance {how}: {method} gains {gain} over bc (95% interval).")
        if task.has_goals:
            end = " ".join(f"{success[k::GOALS].mean():.2f}" for k in range(min(n, GOALS)))
        lines.append(f"{method:14}{strength:10}{n:4}  {rate:19}{gain:17}{end}")
    return [*lines, *answer[:1]]


# ---- 10 main
FAMILY = {  # defaults by a name's start
    "cube-single": dict(
        policy_updates=20_000,
        critic_updates=20_000,
        policy_width=256,
        depth=3,
        expectile=0.9,
        collect=200_000,
        guidance=(0.3,),
    ),
    "cube-double": dict(guidance=(3.0,)),
    ("scene", "puzzle-3x3"): dict(sparse=True, policy_updates=60_000, critic_updates=120_000),
}


def parse(argv):
    """The command line -> Config: what is given, else FAMILY's, else Config's defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is absent
        allow_abbrev=False,
    )

    def fail(message):
        raise UserError(f"{message} (--help lists all options)")

    parser.error = fail
    flags = {f"--{f.name.replace('_', '-')}": f for f in fields(Config)}
    for flag, f in flags.items():
        kind = type(f.default)
        how = dict(type=kind, metavar="X")
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            how = dict(nargs="+", type=str if f.name == "methods" else float, metavar="X")
        text = f"{f.metadata['help']} [{' '.join(map(str, np.ravel(f.default)))}]"
        parser.add_argument(flag, help=text, **how)
    given, unknown = parser.parse_known_args(argv)
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in vars(given).items()}
    for word in unknown:
        fail(f"unknown option {word}; near is {difflib.get_close_matches(word, flags, 1, 0.5)}")
    for flag, f in flags.items():
        low, high = f.metadata["low"], f.metadata["high"]
        for x in np.ravel(given.get(f.name, f.default)):
            if not isinstance(x, str) and not low <= x <= high:
                fail(f"{flag} {x}: give a number from {low} to {high}")
    for method in given.get("methods", ()):
        if not re.fullmatch(rf"({'|'.join(METHODS)})(@[1-9]\d*)?", method):
            fail(f"--methods {method}: there are {', '.join(METHODS)}, and NAME@4")
    if "weights" in given:
        given.setdefault("guidance", ())
    for name, defaults in FAMILY.items():
        if given.get("env", Config.env).startswith(name):
            given = defaults | given
    return Config(**given)


def main(argv=None):
    """From the command line to the table."""
    cfg = parse(argv)
    task = find_task(cfg.env)
    out = Path(cfg.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"{out} is read-only: give another --out")
    shared = out / f"{task.dataset or task.name}-policy-s{cfg.seed}"
    folder = out / f"{task.name}-s{cfg.seed}"
    changed = [f"{k} {x}" for k, x in vars(cfg).items() if x != getattr(Config, k)]
    print(f"run     {task.env_id}, seed {cfg.seed}\noptions {', '.join(changed)}")
    try:
        device = jax.devices()[0].device_kind
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"JAX_PLATFORMS: no such device {e}") from None
    print(f"device  {device}, {os.cpu_count()} CPU cores, jax {jax.__version__}", flush=True)

    env = Chunks(task, cfg.horizon)
    files = find_files(task, cfg)
    for path in files:
        read_npz(path, sorted)  # is it whole?
    load_slice = lru_cache(2)(partial(load_data, task=task, env=env, cfg=cfg))
    data = load_slice(files[0])
    words = "any goal" if task.has_goals else f"{np.mean(data.masks == 0):.2%} solved"
    words = f"{len(data.ends):,} rows, {len(np.unique(data.ends)):,} trajectories, {words}"
    print(f"data    {files[0]}, first of {len(files)}: {words}", flush=True)
    batch = sample_batch(jax.random.PRNGKey(0), data, replace(cfg, batch_size=1024))
    envs = make_envs(task, cfg)  # now: this file may be edited while it trains

    more = files, load_slice, env.sizes, cfg
    policy = fit("policy", cfg.policy_updates, shared, *more)
    every = cfg.eval_every or cfg.critic_updates
    for updates in [*range(every, cfg.critic_updates, every), cfg.critic_updates]:
        critic = fit("critic", updates, folder, *more)
        if critic.step > updates:
            continue  # trained further
        nets = (policy.average if cfg.average_policy else policy.params) | critic.average
        actor = dict(updates=updates, policy_updates=int(policy.step))
        actor |= dict(average_policy=cfg.average_policy, fade=cfg.fade)
        rows = evaluate(envs, nets, batch, actor, folder / "episodes.csv", env.sizes, cfg)
        print(f"\n{task.name} after {updates} updates", *table(rows, actor, task), sep="\n")
    print(f"saved in {folder} and {shared}")
    envs.close(terminate=True)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    jax.config.update("jax_compilation_cache_dir", f"{Path.home()}/.cache/qgf")
    jax.config.update("jax_enable_x64", False)
    warnings.filterwarnings("ignore", message=".*DISPLAY|.*precision lowered")
    os.environ["PYTHONWARNINGS"] = "ignore"  # in processes
    os.environ.pop("MUJOCO_GL", None)  # a wrong one stops MuJoCo
    tempfile.tempdir = "/tmp"  # a socket's name must be short
    tqdm.monitor_interval = 0
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes from the last checkpoint")
    except (OSError, EOFError, gymnasium.error.Error) as e:
        sys.exit(f"{str(e) or repr(e)} (did a process die?); what was complete is kept")
