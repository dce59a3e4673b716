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
               a_t += 1/T (v̄(s, a_t, t) + w d)               w = 1/β; w = 0 is BC
           then execute the H actions of clip(a_1, -1, 1)
    w      = λ / rms(d) of the median state: Q, whatever its scale, pushes λ times as hard as v

    python qgf.py --env cube-double                            train, evaluate; or resume
    python qgf.py --env cube-double --methods qgf@4 bptt       same networks, other methods
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


# ---- 1 Config
def option(default, text, of="all", low=0, high=1e9):
    """A setting: its default, its line in --help, the learners that it changes, and its range."""
    return field(default=default, metadata=dict(help=text, of=of, low=low, high=high))


@dataclass(frozen=True)
class Config:
    """The options of a run. Frozen, since jit takes it as static."""

    # run
    env: str = option("cube-double", "cube-double: any goal; cube-double-task2: one task", of="")
    seed: int = option(0, "of parameters, batches and noise")
    out: str = option("runs", "folder of runs", of="")
    data: str = option("", "your own .npz, or a folder of slices or of OGBench's sets", of="")
    collect: int = option(1_000_000, "rows to collect if no download works", of="", low=1)
    keep: bool = option(False, "use networks that other code has trained", of="")
    # playing
    methods: tuple[str, ...] = option(("qgf",), "rows of the table; NAME@4: best of 4 by Q", of="")
    guidance: tuple[float, ...] = option((0.1,), "λ: how hard Q pushes, relative to v", of="")
    weights: tuple[float, ...] = option((), "w = 1/β, instead of λ: as in the paper", of="")
    episodes: int = option(50, "episodes in a row of the table", of="", low=1)
    first_seed: int = option(2_000_000, "episode i has seed N + i; choose λ on others", of="")
    eval_every: int = option(0, "a table after every N updates of the critic; 0: at the end", of="")
    # training
    policy_updates: int = option(170_000, "updates of the policy", of="policy", low=1)
    critic_updates: int = option(225_000, "updates of the critic", of="critic", low=1)
    policy_width: int = option(512, "units of its hidden layers", of="policy", low=1)
    critic_width: int = option(256, "the same for critic and value", of="critic", low=1)
    depth: int = option(4, "hidden layers", low=1)
    batch_size: int = option(256, "chunks in a batch", low=1)
    lr: float = option(1e-3, "learning rate of Adam", low=1e-9)
    lr_decay: float = option(0.1, "lr falls to 0 in this last share of updates", high=1)
    # algorithm
    horizon: int = option(5, "H: actions in a chunk", low=1)
    denoise_steps: int = option(10, "T: Euler steps from noise to action", of="policy", low=1)
    discount: float = option(0.99, "γ, per environment step", of="critic", high=1)
    expectile: float = option(0.95, "τ: V is the mean (.5) to the best (1) Q", of="critic", high=1)
    sparse: bool = option(False, "a task's reward is -1 until it is solved", of="critic")


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
    # It knows the times 0, 1/T, ..., 1 of its training: between them, these angles mean nothing.
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
    inputs = S + cfg.horizon * A + 16  # 8 cosines and 8 sines of t
    hidden = [cfg.policy_width] * cfg.depth
    return dict(policy=init_mlp(key, [inputs, *hidden, cfg.horizon * A], actor=True))


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
    starts: jax.Array  # (N,) the rows where a whole chunk begins, with the state after it
    chunks: jax.Array  # () how many of `starts` count; the rest of each column is padding


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
    first = data.starts[jax.random.randint(key_first, (B,), 0, data.chunks)]  # (B,) of rows
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
    anywhere = jax.random.randint(key_any, first.shape, 0, data.ends[-1] + 1)
    goal_row = jnp.where(kind < 0.2, first, jnp.where(kind < 0.7, later, anywhere))
    goals = data.goals[goal_row]  # (B, G)
    distance = jnp.abs(data.goals[window] - goals[:, None]).max(axis=-1)  # (B, H, G) -> (B, H)
    masks = jnp.float32(distance > 0.4)
    return goals, -masks, masks


# ---- 4 Losses: (params, average, others, batch, key, cfg) -> loss, dict of what to log
# Gradients are by params alone. average is of params, others are averages of earlier learners.
def policy_loss(params, average, others, batch, key, cfg):
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


def critic_loss(params, average, others, batch, key, cfg):
    """Implicit Q-learning: Q towards the reward and V, V towards an upper expectile of Q̄."""
    s, g, a = batch.observations, batch.goals, batch.actions
    y = batch.returns + batch.discounts * value(params["value"], batch.next_observations, g)
    q = q_values(params["critic"], s, g, a)  # (2, B)
    q_loss = jnp.mean((q - jax.lax.stop_gradient(y)) ** 2)
    q_average = q_min(average["critic"], s, g, a)  # (B,)
    v_loss = expectile_loss(q_average - value(params["value"], s, g), cfg.expectile).mean()
    return q_loss + v_loss, dict(q_loss=q_loss, v_loss=v_loss, q=q_average.mean())


def expectile_loss(u, tau):
    """L2^τ(u) = |τ - 1[u<0]| u². For u = Q - V, its mean is least at the τ-expectile V of Q."""
    return jnp.abs(tau - (u < 0)) * u**2


# ---- 5 Training: one learner after the other; a loss sees the networks of those before it
LEARNERS = dict(  # init(key, sizes, cfg) -> parameters, loss, the option with its number of updates
    policy=(init_policy, policy_loss, "policy_updates"),
    critic=(init_critic, critic_loss, "critic_updates"),
)
POLYAK = 0.005  # rate of the averages, which act


class State(NamedTuple):
    """All that a learner changes: from a State and the data, training continues bit for bit."""

    params: dict
    average: dict  # Polyak average of params
    opt: tuple  # Adam's moments
    key: jax.Array
    step: jax.Array  # updates made


def init_state(init, sizes, cfg):
    """The State before the first update. sizes are S, G, A."""
    key_params, key = jax.random.split(jax.random.PRNGKey(cfg.seed))
    params = init(key_params, sizes, cfg)
    average = jax.tree.map(jnp.copy, params)
    return State(params, average, optax.adam(cfg.lr).init(params), key, jnp.int32(0))


@partial(jax.jit, static_argnames=("loss", "total", "n", "cfg"), donate_argnames="state")
def train(loss, total, state, others, data, n, cfg):
    """n of a learner's `total` updates, in one compiled scan -> State, logs (n,).

    others: the averages of the learners before it, in one dict. The State that goes in is used up.
    """
    differentiate = jax.grad(loss, has_aux=True)
    fall = int(cfg.lr_decay * total)
    rate = optax.linear_schedule(cfg.lr, 0, fall, total - fall)

    def update(state, _):
        key_batch, key_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = sample_batch(key_batch, data, cfg)
        gradient, log = differentiate(state.params, state.average, others, batch, key_loss, cfg)
        change, opt = optax.adam(rate(state.step)).update(gradient, state.opt)
        params = optax.apply_updates(state.params, change)
        # The averages take in the old parameters, as in the official code.
        average = optax.incremental_update(state.params, state.average, POLYAK)
        return State(params, average, opt, state.key, state.step + 1), log

    return jax.lax.scan(update, state, length=n)


# ---- 6 Guidance: the critic nudges each step of the flow
# An estimator says where to push a_t (B, H*A) at t (B, 1), by q(a) -> (B,), the averaged critics'
# minimum, and flow(a, t) -> (B, H*A). v is flow(a_t, t), and T the number of steps.
def grad_q(q, a):
    """∇_a q(a): a (B, H*A) -> (B, H*A)."""
    return jax.grad(lambda a: q(a).sum())(a)  # each row of a has its own term of the sum


def clean_estimate(a_t, t, v):
    """â_1, where a_t would end at t = 1 if it kept its velocity v."""
    return jnp.clip(a_t + (1 - t) * v, -1, 1)


def integrate(flow, a_t, t, T):
    """Where the unguided flow takes a_t (B, H*A) from t (B, 1), equal in all rows -> (B, H*A)."""

    def euler(a, i):
        now = t + i / T  # (B, 1), and from 1 on, nothing moves
        return jax.lax.cond(now[0, 0] < 1 - 0.5 / T, lambda: a + flow(a, now) / T, lambda: a), None

    return jnp.clip(jax.lax.scan(euler, a_t, jnp.arange(T))[0], -1, 1)


def bc(q, flow, a_t, t, v, T):
    """No push: behaviour cloning."""
    return jnp.zeros_like(a_t)


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


def gradstep(q, flow, a_t, t, v, T):
    """No push on the way: `sample_actions` climbs Q when the flow has ended."""
    return jnp.zeros_like(a_t)


ESTIMATORS = dict(bc=bc, qgf=qgf, bptt=bptt, qfql=qfql, gradstep=gradstep)
ESTIMATORS["qgf-jacobian"] = qgf_jacobian
ASCENTS = 3  # steps of gradstep, which push by w d together, as the T steps of the others do


@partial(jax.jit, static_argnames=("method", "cfg"))
def sample_actions(nets, s, g, a_0, w, method, cfg):
    """From noise to actions: s (B, S), g (B, G), a_0 (B, N, H*A) -> a (B, H*A), rms of d (B*N,).

    nets is dict(policy, critic), w the weight, and method an estimator. Each state gets N samples;
    the one with the largest Q̄ is returned. The rms is over steps and dimensions.
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
        d = method(q, flow, a_t, t, v, T)
        return a_t + (v + w * d) / T, jnp.mean(d**2, axis=1)  # (B*N, D), (B*N,)

    def ascend(a, _):
        d = grad_q(q, a)
        return jnp.clip(a + w * d / ASCENTS, -1, 1), jnp.mean(d**2, axis=1)

    a, squares = jax.lax.scan(euler, a_0.reshape(B * N, D), jnp.arange(T))
    a = jnp.clip(a, -1, 1)
    if method is gradstep:
        a, squares = jax.lax.scan(ascend, a, length=ASCENTS)
    rms = jnp.sqrt(squares.mean(axis=0))  # (T, B*N) -> (B*N,)
    if N > 1:
        best = q(a).reshape(B, N).argmax(axis=1)  # (B*N,) -> (B, N) -> (B,)
        a = a.reshape(B, N, D)[jnp.arange(B), best]  # (B, D)
    return a, rms


def relative_weight(guidance, nets, batch, method, cfg):
    """w = λ / rms(d) of the median state, along the unguided flow, whose v has an rms near 1."""
    s, g, a = batch.observations, batch.goals, batch.actions
    a_0 = jax.random.normal(jax.random.PRNGKey(0), a[:, None].shape)  # (B, 1, H*A)
    _, rms = sample_actions(nets, s, g, a_0, 0.0, method, cfg)
    typical = float(jnp.median(rms))  # the tenth where Q is steepest would decide a mean
    return guidance / typical if typical > 0 else 0.0


# ==== The algorithm ends here.
import argparse
import ast
import csv
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import gymnasium
import numpy as np
import ogbench
from tqdm import tqdm

# ---- 7 Data
DATA = Path(os.path.expanduser("~/.ogbench/data"))
COLLECT = Path(__file__).parent / ".github/tools/collect.py"
COLUMNS = ["observations", "actions", "terminals", "rewards", "masks"]  # README explains them
COLUMNS += ["timeouts", "next_observations", "qpos", "button_states"]
ENDS = re.compile("trunc|termin|timeout|done|end|next|last|final")  # of ends and next states
NAMES = re.compile(  # cube-double-task3 or, in full, cube-double-play-singletask-task3-v0
    "(.*?)(-play|-noisy|-navigate|-stitch|-explore)?(-singletask)?(-task[1-5])?(-v0)?"
)


class UserError(Exception):
    """A user's mistake. On the command line, it ends the program with one line."""


class Task(NamedTuple):
    """Any goal or one task of OGBench, or your own environment."""

    name: str  # cube-double-task2, or the id of your own
    env_id: str  # cube-double-singletask-task2-v0; for any goal, cube-double-v0
    dataset: str = ""  # cube-double-play-v0; yours has none
    has_goals: bool = False


def find_task(name):
    """OGBench's name of a task, short or full, or a gymnasium id -> Task."""
    base, kind, single, number, _ = NAMES.fullmatch(name).groups("")
    if f"{base}-singletask-v0" not in gymnasium.registry:
        return Task(name, name)  # Chunks says it if there is none
    if base.startswith("visual"):
        raise UserError(f"--env {name}: states must be vectors, not pixels")
    usual = "-navigate" if re.search("maze|soccer", base) else "-play"
    dataset = f"{base}{kind or usual}-v0"
    short = base + kind.removeprefix(usual)  # all names of a task are one run
    if single or number:
        return Task(short + (number or single), f"{base}-singletask{number}-v0", dataset)
    return Task(short, f"{base}-v0", dataset, has_goals=True)


@contextmanager
def refusing(what, *errors):
    """Turn these errors, which a user can cause, into a UserError about `what`."""
    try:
        yield
    except errors as e:
        raise UserError(f"{what}: {' '.join(str(e).split())}") from None


def find_files(task, cfg):
    """The .npz files to learn from: yours, or OGBench's, downloaded or else collected."""
    official = DATA / f"{task.dataset}.npz"
    collected = DATA / f"{task.dataset}-collected-{cfg.collect}.npz"
    if cfg.data:
        path = Path(cfg.data).expanduser()
        prefix = task.dataset.removesuffix("v0")  # cube-double-play-
        found = [x for x in sorted(path.rglob("[!.]*.npz")) if not x.stem.endswith("-val")]
        ours = [x for x in found if prefix and x.name.startswith(prefix)]
        sets = [x for x in found if re.search("-(play|noisy|navigate|stitch|explore)-", x.name)]
        files = ours or [x for x in found if x.parent == path and x not in sets] or [path]
        if len({x.parent for x in files}) > 1:
            raise UserError(f"--data {path}: {task.dataset} is in more than one of its folders")
        return files
    if not task.dataset:
        raise UserError(f"--env {task.name} is not OGBench's: give transitions as --data PATH")
    if not zipfile.is_zipfile(official) and not collected.exists():
        official.unlink(missing_ok=True)  # a download was cut off, or was the page of a portal
        try:
            ogbench.download_datasets([task.dataset], DATA)
        except Exception as e:  # whatever it is, there is another way
            print(f"data    no download of {task.dataset} ({e!r}): collecting", flush=True)
    if zipfile.is_zipfile(official):
        return [official]
    if not collected.exists():
        command = [sys.executable, COLLECT, task.dataset, str(cfg.collect), collected]
        if subprocess.run(command, check=False).returncode:
            ways = f"add {official}, clone the whole repository to collect, or give --data PATH"
            raise UserError(f"no data for {task.name}: {ways}")
    return [collected]


@refusing("the data lack a column", KeyError)
def load_data(path, task, env, cfg):
    """A file in OGBench's or D4RL's format -> Data. UserError if it does not fit."""

    def need(condition, words):
        if not condition:
            raise UserError(f"{path}: {words}")

    with refusing(f"{path} is no whole .npz of numbers", *UNREADABLE), np.load(path) as file:
        raw = {x: file[x] for x in file if x in COLUMNS or ENDS.search(x)}
    N = len(np.atleast_1d(raw["actions"]))
    for name in raw.keys() - {*COLUMNS}:  # ends under another name must not be ignored
        known = "give terminals (1 in a trajectory's last row), or D4RL's with timeouts"
        need(raw.pop(name).shape[:1] != (N,), f"{name} is not understood: {known}")
    S, _, A = env.sizes
    shapes = dict(observations=(N, S), actions=(N, A), rewards=(N,), masks=(N,))
    shapes |= dict(terminals=(N,), timeouts=(N,))
    for name, x in raw.items():
        shape = shapes.get(name, (N, *x.shape[1:]))
        need(x.shape in (shape, (*shape, 1)), f"{name} has the shape {x.shape}, not {shape}")
        need(x.dtype.kind in "biuf", f"{name} holds no numbers, but {x.dtype}")
        raw[name] = x.reshape(shape)
        if name in ("terminals", "timeouts", "masks"):
            need(np.isin(x, (0, 1)).all(), f"{name} must be 0 or 1")

    if "timeouts" in raw:  # D4RL, whose terminals are ends of tasks, not of trajectories
        raw["masks"] = 1.0 - raw["terminals"]
        raw["terminals"] = raw["terminals"] + raw["timeouts"]
    last = np.append(np.flatnonzero(raw["terminals"][:-1]), N - 1)  # of each trajectory
    ends = last[np.searchsorted(last, np.arange(N))]  # (N,)
    solved = np.zeros(N, bool)  # does the row's trajectory end with a success?
    raw["goals"] = np.zeros((N, 0))
    if task.has_goals:
        ogbench.relabel_utils.add_oracle_reps(task.env_id, env.unwrapped, raw)
        raw["goals"] = raw["oracle_reps"]
        raw |= dict(rewards=np.zeros(N), masks=np.ones(N))  # unused: `hindsight` makes its own
    elif task.dataset and "rewards" not in raw:
        ogbench.relabel_utils.relabel_dataset(task.env_id, env.unwrapped, raw)
    else:
        need("masks" in raw or not cfg.sparse, "--sparse needs a column masks; or give --no-sparse")
        raw.setdefault("masks", np.ones(N))
        solved = raw["masks"][ends] == 0
    if cfg.sparse and not task.has_goals:
        raw["rewards"] = -np.float32(raw["masks"])
    if not task.dataset:
        raw["actions"] = 2 * (raw["actions"] - env.low) / (env.high - env.low) - 1

    after = np.arange(N) + cfg.horizon  # the row after a chunk; if solved, it need not exist
    starts = np.flatnonzero(after <= ends + solved)
    need(len(starts) > 0, "all trajectories are shorter than a chunk: lower --horizon")
    columns = dict(ends=np.int32(ends), starts=np.int32(starts))
    for name in ("observations", "actions", "rewards", "masks", "goals"):
        columns[name] = np.float32(raw[name])
        need(np.isfinite(columns[name]).all(), f"{name} has NaN or Inf")
    inside = np.abs(columns["actions"]).max() < 1.001
    need(inside, f"actions leave the range {env.low} to {env.high}")
    length = 2 ** math.ceil(math.log2(N))  # files of about one length are compiled once
    for name, x in columns.items():
        columns[name] = np.concatenate([x, np.repeat(x[-1:], length - len(x), axis=0)])
    return jax.device_put(Data(**columns, chunks=np.int32(len(starts))))


# ---- 8 Episodes
GOALS = 5  # of an environment in OGBench
CORES = os.cpu_count()
if hasattr(os, "sched_getaffinity"):  # those that this job may use
    CORES = len(os.sched_getaffinity(0))


class Chunks(gymnasium.Wrapper):
    """An environment whose step is a chunk (H, A) in [-1, 1]. It shows states, then goals.

    `sizes` are S, G, A. UserError if there is no such environment, or if it has other spaces.
    """

    def __init__(self, task, horizon, **options):
        if task.has_goals:
            options["use_oracle_rep"] = True
        warnings.filterwarnings("ignore", message=".*DISPLAY|.*precision lowered")
        hint = "OGBench's are as cube-double-task2, yours as package:Id-v0"
        with refusing(f"--env {task.name} ({hint})", gymnasium.error.Error, ImportError):
            env = gymnasium.make(task.env_id, disable_env_checker=True, **options)
        box = env.action_space
        for space in (env.observation_space, box):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise UserError(f"--env {task.name}: {space} is no vector of numbers")
        width = np.float64(box.high) - box.low
        if box.dtype.kind != "f" or not ((width > 0) & (width < 1e9)).all():
            raise UserError(f"--env {task.name}: actions must be floats in finite ranges: {box}")
        if env.spec.max_episode_steps is None:
            raise UserError(f"--env {task.name} may never end: register it with max_episode_steps")
        if task.dataset:  # OGBench makes an action space at each use, which loses its seed
            type(env.unwrapped).action_space = box
        super().__init__(gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
        self.task = task
        self.low = box.low
        self.high = box.high
        self.reset(seed=0)
        self.sizes = len(self.obs) - len(self.goal), len(self.goal), len(box.low)
        self.action_space = gymnasium.spaces.Box(-1, 1, (horizon, len(box.low)))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self.obs.shape)

    def reset(self, *, seed=None, options=None):
        """Begin the episode of this seed, or any. With seeds, OGBench's goals take turns."""
        if seed is not None:
            np.random.seed(seed)  # OGBench's reset draws from here, and from the action space
            self.env.unwrapped.action_space.seed(seed)
            if self.task.dataset:
                options = dict(task_id=1 + seed % GOALS)
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
            success = float(np.squeeze(info.get("success", math.nan)))
            self.obs = np.float32([*state, *self.goal])
            self.over = bool(terminated or truncated)
            self.episode[0] = np.fmax(self.episode[0], success)
            self.episode[1:] += float(np.squeeze(reward)), 1
        return self.obs, 0.0, self.over, False, dict(episode=self.episode)


def make_envs(task, cfg):
    """Two processes for each core, with an environment each. They import this file."""
    if Path(__file__).read_text("utf-8") != SOURCE:
        raise UserError(f"{__file__} was edited during the run: give the same command again")
    make = partial(make_env, task, cfg.horizon)
    n = min(2 * CORES, 32, cfg.episodes)
    return gymnasium.vector.AsyncVectorEnv([make] * n, context="spawn", autoreset_mode="Disabled")


@lru_cache(1)  # AsyncVectorEnv asks for one in this process as well
def make_env(task, horizon):
    """An environment. A process of its own leaves Ctrl-C to the program."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Chunks(task, horizon)


def rollout(envs, nets, w, method, sizes, cfg):
    """Play cfg.episodes episodes -> (episodes, 3): success, return, length.

    Start, goal and noise of an episode depend on its seed alone, so methods are paired.
    """
    S, _, A = sizes
    name, samples = parse_method(method)
    playing = np.arange(envs.num_envs)  # the number of each environment's episode
    seeds = cfg.first_seed + np.arange(cfg.episodes + envs.num_envs)
    noise = [np.random.default_rng(seed) for seed in seeds]
    results = np.zeros((cfg.episodes, 3))
    obs, _ = envs.reset(seed=seeds[playing].tolist())
    bar = progress(total=cfg.episodes, desc=f"playing {method}", unit=" episodes")
    while (playing < cfg.episodes).any():
        a_0 = [noise[i].standard_normal((samples, cfg.horizon * A)) for i in playing]
        s, g = obs[:, :S], obs[:, S:]
        actions, _ = sample_actions(nets, s, g, np.float32(a_0), w, ESTIMATORS[name], cfg)
        actions = np.asarray(actions).reshape(-1, cfg.horizon, A)  # (B, H*A) -> (B, H, A)
        obs, _, over, _, info = envs.step(actions)
        ended = over & (playing < cfg.episodes)
        for k in np.flatnonzero(ended):
            results[playing[k]] = info["episode"][k]
            playing[k] = playing.max() + 1
            bar.update()
        ended &= playing < cfg.episodes  # the others idle
        if ended.any():
            obs, _ = envs.reset(seed=seeds[playing].tolist(), options=dict(reset_mask=ended))
    bar.close()
    return results


def parse_method(text):
    """qgf@4 -> qgf, 4."""
    name, _, samples = text.partition("@")
    return name, int(samples or 1)


progress = partial(tqdm, miniters=1, mininterval=0.2 if sys.stderr.isatty() else 30)  # seconds


# ---- 9 Runs: folders with config.json, metrics.csv, checkpoint.npz and episodes.csv
CALL = 100  # updates in a call of train
SWAP = 1000  # updates on a file of the data
SAVE = 20  # seconds between checkpoints
SOURCE = Path(__file__).read_text("utf-8")  # as it runs here: the file may be edited meanwhile
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def code_hash(*functions):
    """Hash of the syntax of functions and of all that they use in this file, without comments.

    One that this file does not define counts with all of this file and the text of its own. What
    is set or imported from elsewhere does not count.
    """
    statements = {}  # by the names that they define
    for node in ast.parse(SOURCE).body:
        defined = [getattr(node, "name", "")]  # of a def or class; else, what is assigned to
        if not defined[0]:
            inside = [x for x in ast.walk(node) if isinstance(x, ast.Name)]
            defined = [x.id for x in inside if isinstance(x.ctx, ast.Store)]
        for name in defined:
            statements.setdefault(name, []).append(node)
    names = {id(x): name for name, x in globals().items() if name in statements}
    elsewhere = [f for f in functions if id(f) not in names]
    used = [*statements] if elsewhere else [names[id(f)] for f in functions]
    for name in used:  # which grows on the way
        parts = [x for node in statements[name] for x in ast.walk(node)]
        uses = dict.fromkeys(x.id for x in parts if isinstance(x, ast.Name))
        used += [x for x in uses if x in statements and x not in used]
    code = [ast.unparse(node) for name in sorted(used) for node in statements[name]]
    for function in elsewhere:
        path = Path(getattr(getattr(function, "__code__", None), "co_filename", ""))
        code.append(path.read_text("utf-8") if path.is_file() else repr(function))
    return digest(code)


def digest(values):
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


class Run(NamedTuple):
    """What a command trains and plays, on which data, and how."""

    task: Task
    sizes: tuple[int, int, int]  # S, G, A
    files: list[Path]  # of data, which take turns
    rows: int  # of the first file
    load_file: Callable  # path -> Data
    cfg: Config


def folder_of(name, task, cfg):
    """A learner's: OUT/DATASET-policy-s0, which all tasks of the data share, or OUT/TASK-s0."""
    owners = dict(policy=f"{task.dataset or task.name}-policy", critic=task.name)
    owner = owners.get(name, f"{task.name}-{name}")
    return Path(cfg.out).expanduser() / re.sub("[:/]", "-", f"{owner}-s{cfg.seed}")


def options_of(name):
    """Names of the options that change a learner."""
    return [f.name for f in fields(Config) if {"all", name} & {*f.metadata["of"].split()}]


def settings_of(name, run):
    """All that decides what a learner becomes, for its config.json."""
    checksums = []
    for path in run.files:
        with zipfile.ZipFile(path) as file:
            checksums += [[x.filename, x.CRC] for x in file.infolist()]
    init, loss, _ = LEARNERS[name]
    S, G, A = run.sizes
    whose = dict(env=run.task.name, sizes=[S, G, A])
    if name == "policy":  # it is blind to goals and rewards: all tasks of the data share it
        whose = dict(env=run.task.dataset or run.task.name, sizes=[S, 0, A])
    return {option: getattr(run.cfg, option) for option in options_of(name)} | dict(
        **whose,
        data=f"{run.files[0].name}, {run.rows:,} rows, hash {digest(checksums)}",
        code=code_hash(load_data, init_state, train, init, loss),
    )


def check_settings(folder, settings, keep):
    """UserError if a folder's config.json says otherwise. `keep` allows other code."""
    saved = read_json(folder / "config.json")
    if not saved and not (folder / "checkpoint.npz").exists():
        return
    for name in settings | saved:
        if saved.get(name) == settings.get(name) or (name == "code" and keep):
            continue
        words = f"with {name} {saved.get(name)}, not {settings.get(name)}: give another --out"
        if name == "code":
            words = "by other code: give --out NEW, or --keep to use its networks as they are"
        raise UserError(f"{folder} was trained {words}")


def read_json(path):
    """What config.json says; without it, {}."""
    with refusing(f"{path} is damaged, without it, its networks fit no run", *UNREADABLE):
        return json.loads(path.read_text()) if path.exists() else {}


def read_csv(path):
    """The rows as dicts of text; without the file, none."""
    with refusing(f"{path} is damaged, without it, its rows are lost", *UNREADABLE):
        header, *rows = csv.reader(path.read_text().splitlines() if path.exists() else [""])
        return [dict(zip(header, row, strict=True)) for row in rows]


def write_csv(path, rows):
    """Write dicts, a row each. What a row lacks stays empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def atomic_write(path, mode="w"):
    """Open a file that takes its name once it is whole and on the disk, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with refusing(f"cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def save(folder, state, metrics, settings, keep):
    """Write settings, metrics and State. UserError if there is NaN or Inf, or another run."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    if not all(np.isfinite(x).all() for x in leaves):
        raise UserError(f"NaN or Inf after {state.step} updates: lower --lr, in another --out")
    check_settings(folder, settings, keep)
    with atomic_write(folder / "config.json") as file:
        json.dump(settings, file, indent=1)
    write_csv(folder / "metrics.csv", metrics)
    with atomic_write(folder / "checkpoint.npz", "wb") as file:
        np.savez(file, *leaves)


def load(folder, state):
    """The State and the metrics saved in a folder; without a checkpoint, `state` and none."""
    path = folder / "checkpoint.npz"
    if not path.exists():
        return state, []
    without = "without it, training begins again"
    with refusing(f"{path} is damaged, {without}", *UNREADABLE), np.load(path) as file:
        leaves = [jnp.asarray(x) for x in file.values()]
    if [x.shape for x in leaves] != [np.shape(x) for x in jax.tree.leaves(state)]:
        raise UserError(f"{path} has networks of other shapes: give another --out")
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    metrics = read_csv(folder / "metrics.csv")
    return state, [row for row in metrics if int(row["updates"]) <= state.step]


def fit(name, updates, others, run):
    """Train a learner of a Run, from its checkpoint, to this number of updates -> State."""
    init, loss, option_name = LEARNERS[name]
    cfg = run.cfg
    folder = folder_of(name, run.task, cfg)
    state, metrics = load(folder, init_state(init, run.sizes, cfg))
    step = int(state.step)
    if step >= updates:
        return state
    settings = settings_of(name, run)
    save(folder, state, metrics, settings, cfg.keep)
    saved = time.monotonic()
    bar = progress(total=updates, initial=step, desc=f"training {name}", unit=" updates")
    with bar, ThreadPoolExecutor(1) as loader:
        next_data = loader.submit(run.load_file, run.files[step // SWAP % len(run.files)])
        while step < updates:
            if step == bar.initial or step % SWAP == 0:
                data = next_data.result()
                path = run.files[(step // SWAP + 1) % len(run.files)]
                next_data = loader.submit(run.load_file, path)
            n = min(CALL - step % CALL, updates - step)
            state, log = train(loss, getattr(cfg, option_name), state, others, data, n, cfg)
            log = {key: float(np.mean(x)) for key, x in log.items()}  # waits for the device
            step += n
            metrics.append(dict(updates=step, **log))
            bar.set_postfix(log, refresh=False)
            bar.update(n)
            if step == updates or time.monotonic() - saved > SAVE:
                if load(folder, state)[0].step > step:  # another run trains the same, and is ahead
                    break
                save(folder, state, metrics, settings, cfg.keep)
                saved = time.monotonic()
    return fit(name, updates, others, run)  # read back: another run may have been ahead


def evaluate(nets, updates, batch, run):
    """Play the rows of a Run's table that episodes.csv lacks; batch measures w.

    -> {(method, strength): success and return of its episodes (2, n)}
    """
    cfg = run.cfg
    path = folder_of("critic", run.task, cfg) / "episodes.csv"
    networks = digest([settings_of(name, run) for name in LEARNERS])
    strengths = [(f"λ {x:g}", x, 0.0) for x in cfg.guidance]
    strengths += [(f"w {x:g}", 0.0, x) for x in cfg.weights]
    wanted = [("bc", "", 0.0, 0.0)]
    for method in cfg.methods:
        unguided = parse_method(method)[0] == "bc"
        wanted += [(method, *x) for x in ([("", 0.0, 0.0)] if unguided else strengths)]
    played = {}
    envs = None
    for method, strength, guidance, weight in dict.fromkeys(wanted):
        estimator = ESTIMATORS[parse_method(method)[0]]
        code = code_hash(Chunks, sample_actions, relative_weight, estimator)
        key = dict(env=run.task.name, seed=cfg.seed, first_seed=cfg.first_seed, networks=networks)
        key |= dict(code=code, updates=updates, method=method, guidance=guidance, weight=weight)
        key = {name: str(x) for name, x in key.items()}  # as in a file
        rows = [row for row in read_csv(path) if key.items() <= row.items()]
        if len(rows) >= cfg.episodes:
            print(f"{method:8}{len(rows)} episodes found in {path}")
        else:
            envs = envs or make_envs(run.task, cfg)
            w = weight
            if guidance > 0:
                w = relative_weight(guidance, nets, batch, estimator, cfg)
            with refusing("the process of an environment has ended", EOFError, ConnectionError):
                results = rollout(envs, nets, w, method, run.sizes, cfg)
            kept = [row for row in read_csv(path) if not key.items() <= row.items()]
            rows = []
            for i, (success, total, length) in enumerate(results.tolist()):
                result = {"success": success, "return": total, "length": length}
                rows.append(key | dict(w=f"{w:.6g}", episode=i) | result)
            write_csv(path, kept + rows)
        results = [(float(row["success"]), float(row["return"])) for row in rows[: cfg.episodes]]
        played[method, strength] = np.array(results).T  # (2, n)
    if envs:
        envs.close(terminate=True)
    return played


def table(played, task):
    """What `evaluate` returns -> lines. Methods are compared with bc, episode by episode.

    won:lost counts the episodes in which a method or bc is better; p is McNemar's, exact.
    """
    from scipy.stats import binomtest  # here, since its import takes half a second

    score = int(np.isnan(played["bc", ""][0]).any())  # 0: success; 1: return, if that is unknown
    base = played["bc", ""][score]
    last = "success by goal" if task.has_goals else "return"
    lines = [f"{'method':17}{'strength':8}{'n':>4}  success  won:lost        p  {last}"]
    answers = []
    for (method, strength), episodes in played.items():
        success, total = episodes
        n = len(total)
        won = np.sum(episodes[score] > base)
        lost = np.sum(episodes[score] < base)
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        rate = "" if score else f"{success.mean():.2f}"
        pairs = "" if method == "bc" else f"{won}:{lost}"
        chance = "" if method == "bc" else f"{p:.2g}"
        end = f"{total.mean():.1f}"
        if task.has_goals:
            end = " ".join(f"{success[k::GOALS].mean():.2f}" for k in range(min(n, GOALS)))
        line = f"{method:17}{strength:8}{n:4}{rate:>9}{pairs:>10}{chance:>9}  {end}"
        lines.append(line.rstrip())
        if strength:
            verdict = "Guidance helped" if won > lost else "Guidance did harm"
            verdict = verdict if p < 0.05 else "No significant difference"
            words = f"{method} wins {won} and loses {lost} of {n} episodes against bc"
            answers.append(f"{verdict}: {words} (p = {p:.2g}).")
    return [*lines, *answers[:1]]


def load_run(folder):
    """A run's folder, as runs/cube-double-s0 -> networks that act, their Config, their Task."""
    folder = Path(folder).expanduser()
    saved = read_json(folder / "config.json")
    if "env" not in saved:
        raise UserError(f"{folder} is no run: it has no config.json of a critic")
    task = find_task(saved["env"])
    cfg = config(env=task.name, out=str(folder.parent), seed=saved["seed"])
    nets = {}
    for learner, (init, _, _) in LEARNERS.items():
        path = folder_of(learner, task, cfg)
        settings = read_json(path / "config.json")
        cfg = replace(cfg, **{name: settings[name] for name in options_of(learner)})
        state, metrics = load(path, init_state(init, saved["sizes"], cfg))
        if not metrics:
            raise UserError(f"{path} has no trained {learner}")
        nets |= state.average
    return nets, cfg, task


# ---- 10 main
FAMILY = {  # defaults by a name's start
    "cube-single": dict(
        policy_updates=20_000,
        critic_updates=20_000,
        policy_width=256,
        depth=3,
        expectile=0.9,
        collect=200_000,
        guidance=(0.03,),
    ),
    "cube-double": dict(
        policy_updates=200_000,
        critic_updates=170_000,
        batch_size=512,
        lr_decay=1.0,
        guidance=(0.25,),
    ),
    "scene": dict(
        sparse=True,
        policy_updates=90_000,
        critic_updates=90_000,
        batch_size=512,
        lr_decay=1.0,
        expectile=0.9,
    ),
    "puzzle-3x3": dict(sparse=True, policy_updates=60_000, critic_updates=120_000),
}


def config(**given):
    """A Config: what is given, else FAMILY's defaults, else Config's. UserError if out of range."""
    for f in fields(Config):
        x = given.get(f.name, f.default)
        if isinstance(x, list):
            given[f.name] = tuple(x)
        low, high = f.metadata["low"], f.metadata["high"]
        for number in np.ravel(x):
            if not isinstance(number, str) and not low <= number <= high:
                flag = f"--{f.name.replace('_', '-')} {number}"
                raise UserError(f"{flag}: give a number from {low:g} to {high:g}")
    for method in given.get("methods", ()):
        if not re.fullmatch(rf"({'|'.join(ESTIMATORS)})(@[1-9]\d*)?", method):
            raise UserError(f"--methods {method}: there are {', '.join(ESTIMATORS)}, and NAME@4")
    env = given.get("env", Config.env)
    if "collect" in given and given.get("data"):
        raise UserError("--collect and --data: the data come from one of them")
    if "sparse" in given and find_task(env).has_goals:
        raise UserError("--sparse is for a task: a goal always gives -1 until it is reached")
    if "weights" in given:
        given.setdefault("guidance", ())
    for name, defaults in FAMILY.items():
        if env.startswith(name):
            given = defaults | given
    return Config(**given)


def parse(argv):
    """The command line -> Config."""
    parser = argparse.ArgumentParser(
        usage="python qgf.py [options]",
        description=__doc__,
        epilog="\n".join(f"{name}: {defaults}" for name, defaults in FAMILY.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is absent
        allow_abbrev=False,
    )
    for f in fields(Config):
        kind = type(f.default)
        how = dict(type=kind, metavar={int: "N", float: "X"}.get(kind, "TEXT"))
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            how = dict(nargs="+", type=str if f.name == "methods" else float, metavar="X")
        text = f"{f.metadata['help']} [{' '.join(map(str, np.ravel(f.default)))}]"
        if f.name == "methods":
            text = f"{text}; {', '.join(ESTIMATORS)}"
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, **how)
    return config(**vars(parser.parse_args(argv)))


def main(argv=None):
    """From the command line to the table."""
    cfg = parse(argv)
    task = find_task(cfg.env)
    changed = [
        f"{k} {' '.join(map(str, np.ravel(x)))}"
        for k, x in vars(cfg).items()
        if x != getattr(Config, k)
    ]
    print(f"run     {task.env_id}, seed {cfg.seed}\noptions {', '.join(changed)}")
    with refusing("JAX finds no device, see JAX_PLATFORMS", RuntimeError, AssertionError):
        device = jax.devices()[0].device_kind
    print(f"device  {device}, {CORES} CPU cores, jax {jax.__version__}", flush=True)
    env = make_env(task, cfg.horizon)
    env.step(np.zeros(env.action_space.shape, np.float32))  # what fails, fails before training

    files = find_files(task, cfg)
    load_file = lru_cache(1)(partial(load_data, task=task, env=env, cfg=cfg))
    data = load_file(files[0])
    last = np.unique(data.ends)  # row of each trajectory
    N = int(last[-1]) + 1
    words = f"{N:,} rows, {len(last):,} trajectories"
    if len(last) == 1:
        words = f"{N:,} rows, one trajectory (does terminals name all ends?)"
    words += ", any goal" if task.has_goals else f", {np.mean(data.masks[:N] == 0):.2%} solved"
    unseen = np.sum((data.rewards[last] != 0) & (data.masks[last] == 1))
    if cfg.data and unseen:
        words += f"; rewards of {unseen:,} last rows are not used (no next state, no mask of 0)"
    print(f"data    {files[0]}, first of {len(files)}: {words}", flush=True)
    batch = jax.jit(sample_batch, static_argnums=2)(
        jax.random.PRNGKey(0), data, replace(cfg, batch_size=1024)
    )
    del data  # its place is for the next files

    run = Run(task, env.sizes, files, N, load_file, cfg)
    for name, (_, _, option_name) in LEARNERS.items():
        folder = folder_of(name, task, cfg)
        check_settings(folder, settings_of(name, run), cfg.keep)
        found = [0] + [int(row["updates"]) for row in read_csv(folder / "metrics.csv")]
        total = getattr(cfg, option_name)
        print(f"{name:8}{found[-1]:,} of {total:,} updates found in {folder}", flush=True)

    nets = {}
    *earlier, final = LEARNERS
    for name in earlier:
        nets |= fit(name, getattr(cfg, LEARNERS[name][2]), nets, run).average
    total = getattr(cfg, LEARNERS[final][2])
    every = cfg.eval_every or total
    for updates in [*range(every, total, every), total]:
        state = fit(final, updates, nets, run)
        if state.step == updates:  # else the folder has more of them already
            played = evaluate(nets | state.average, updates, batch, run)
            print(f"\n{task.name} after {updates} updates", *table(played, task), sep="\n")
    print("saved in", *[folder_of(name, task, cfg) for name in LEARNERS])


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack Greek letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/qgf"))
    try:
        main()
    except UserError as e:
        sys.exit(f"qgf.py: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes from the last checkpoint")

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.10.2", "optax>=0.2.8", "numpy>=2.4", "ogbench>=1.2.2", "gymnasium>=1.4", "tqdm>=4.70"
# ]
# [tool.uv]
# override-dependencies = ["labmaze ; python_version < '3.13'"]
# ///
