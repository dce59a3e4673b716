# SPDX-License-Identifier: MIT
"""Q-Guided Flow (QGF) in one file: a flow policy and a critic, trained apart; the critic steers when it acts.

Zhou, Peng, Xu, Li, Springenberg, Frans, Levine, "Test-Time Gradient Guidance of Flow Policies in
Reinforcement Learning", arXiv 2606.11087. Let s be a state, a_1 an action chunk (H consecutive actions,
flattened), a_0 ~ N(0, I) noise, and a_t = (1-t) a_0 + t a_1 in between.

    train  policy  v_θ(s, a_t, t)  towards  a_1 - a_0                          behaviour cloning (a flow)
           critic  Q_φ(s, a_1)  towards  Σ_{i<H} γ^i r_{t+i} + γ^H V(s_{t+H})  implicit Q-learning (IQL)
           value   V(s)  towards  the τ-expectile of min_k Q̄_k(s, a_1)         Q̄: Polyak average of Q
    act    for t = 0, 1/T, ..., (T-1)/T:
               â_1 = clip(a_t + (1-t) v_θ(s, a_t, t), -1, 1)                   one-step clean estimate
               a  += 1/T (v_θ(s, a_t, t) + w ∇_{â_1} min_k Q̄_k(s, â_1))        w = 0: behaviour cloning

    python qgf.py --env cube-single      from nothing to a table that answers "did guidance help?"
    python qgf.py --help                 all options; each is a field of Config

Sections 1 to 5 are the algorithm: pure functions on arrays and pytrees. Sections 6 to 9 feed it, test it and
keep it. Left out, because they would hide it: pixels, online fine-tuning, other backbones, trackers.
"""
import argparse, csv, difflib, errno, hashlib, http.client, json, math, os, platform, re  # noqa: E401
import shutil, signal, sys, threading, time, urllib.request, warnings  # noqa: E401
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, process
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
from scipy.stats import binomtest
from tqdm import tqdm

# ---- 1 Config ----------------------------------------------------------------------------------------------
def option(default, help):
    """A field of Config: its default and its line in --help."""
    return field(default=default, metadata=dict(help=help))

@dataclass(frozen=True)
class Config:
    """The settings of a run, one option each; frozen, so that jit takes it as a static argument."""

    # what to run
    env: str = option("cube-single", "OGBench task: cube-double, cube-double-task3, or a full OGBench name")
    seed: int = option(0, "seed of parameters, batches and noise")
    out: str = option("runs", "folder of runs; this one is OUT/<env>-s<seed>")
    eval: bool = option(False, "evaluate the saved run again, without training")
    data: str = option("", "an .npz in OGBench's format; its own `rewards` and `masks` are used if there")
    collect: int = option(0, "collect so many transitions with OGBench's play policies, do not download")
    # the algorithm
    horizon: int = option(5, "H, actions in a chunk, which is judged and executed as one")
    denoise_steps: int = option(10, "T, Euler steps from noise to action")
    discount: float = option(0.99, "γ, per environment step")
    expectile: float = option(0.9, "τ of V: .5 is the mean over the data's actions, 1 the maximum")
    target_rate: float = option(0.005, "rate of the critic's Polyak average, per update")
    # networks and optimiser
    width: int = option(256, "units in a hidden layer")
    depth: int = option(3, "hidden layers in a network")
    lr: float = option(1e-3, "learning rate of Adam")
    batch_size: int = option(256, "chunks in a batch")
    updates: int = option(10_000, "gradient updates in all; more than a finished run has continues it")
    # evaluation
    weights: tuple = option((0.01, 0.03, 0.06, 0.1), "guidance weights w to choose from")
    choose: int = option(20, "episodes per weight that choose it, and are not reported")
    episodes: int = option(50, "fresh episodes in a reported row")
    watch: float = option(10.0, "minutes of training between two looks at a few episodes")


# ---- 2 Networks: parameters are plain pytrees, networks pure functions of them -----------------------------
# Dense -> LayerNorm -> GELU, as in the official code. Sizes: B batch, S state, A action, H*A chunk.

glorot_uniform = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")

def init_mlp(key, sizes, norm_last=True, out_init=glorot_uniform):
    """Layers of an MLP with these sizes (input, hidden ..., output): a list of dicts of arrays.

    The official actor has no LayerNorm after its last hidden layer, and draws its output kernel otherwise.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    layers = [dict(w=glorot_uniform(k, (m, n)), b=jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:])]
    layers[-1]["w"] = out_init(keys[-1], sizes[-2:])
    for layer in layers[: -1 if norm_last else -2]:
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

def time_embedding(t):
    """Eight cosines, then eight sines, of the flow time: t (B, 1) in [0, 1] -> (B, 16)."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(8) / 8)
    angles = 10_000 * t * frequencies  # (B, 1) * (8,) -> (B, 8)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)

def velocity(policy, s, a_t, t):
    """The flow v_θ(s, a_t, t): s (B, S), a_t (B, H*A), t (B, 1) -> (B, H*A)."""
    return mlp(policy, jnp.concatenate([s, a_t, time_embedding(t)], axis=-1))

def q_values(critic, s, a):
    """Both critics Q_k(s, a), their parameters stacked on axis 0: s (B, S), a (B, H*A) -> (2, B)."""
    return jax.vmap(mlp, in_axes=(0, None))(critic, jnp.concatenate([s, a], axis=-1))[..., 0]

def value(layers, s):
    """V(s): s (B, S) -> (B,)."""
    return mlp(layers, s)[..., 0]

def init_params(key, s_dim, a_dim, cfg):
    """Fresh parameters for states of size s_dim and actions of size a_dim: dict(policy, critic, value)."""
    key_policy, key_critic, key_value = jax.random.split(key, 3)
    hidden, chunk = [cfg.width] * cfg.depth, cfg.horizon * a_dim
    lecun = jax.nn.initializers.lecun_normal()
    return dict(
        policy=init_mlp(key_policy, [s_dim + chunk + 16, *hidden, chunk], norm_last=False, out_init=lecun),
        critic=jax.vmap(lambda k: init_mlp(k, [s_dim + chunk, *hidden, 1]))(jax.random.split(key_critic, 2)),
        value=init_mlp(key_value, [s_dim, *hidden, 1]),
    )


# ---- 3 Losses ----------------------------------------------------------------------------------------------
def flow_matching_loss(policy, s, a_1, key, cfg):
    """Behaviour cloning: E (v_θ(s, a_t, t) - (a_1 - a_0))², a mean over all of s (B, S), a_1 (B, H*A).

    t is drawn from the grid {0, 1/T, ..., 1}, as in the official code: acting asks for no other.
    """
    key_noise, key_time = jax.random.split(key)
    a_0 = jax.random.normal(key_noise, a_1.shape)
    t = jax.random.randint(key_time, (len(a_1), 1), 0, cfg.denoise_steps + 1) / cfg.denoise_steps  # (B, 1)
    a_t = (1 - t) * a_0 + t * a_1
    return jnp.mean((velocity(policy, s, a_t, t) - (a_1 - a_0)) ** 2)

def critic_loss(critic, value_layers, batch, cfg):
    """E (Q_k(s, a) - y)² of both, y = Σ_{i<H} γ^i r_{t+i} + γ^H mask V(s_{t+H}). -> loss, Q (2, B)"""
    v_next = jax.lax.stop_gradient(value(value_layers, batch["next_observations"]))  # (B,)
    y = batch["returns"] + cfg.discount**cfg.horizon * batch["masks"] * v_next
    q = q_values(critic, batch["observations"], batch["actions"])
    return jnp.mean((q - y) ** 2), q

def expectile_loss(u, tau):
    """|τ - 1[u<0]| u², elementwise. With u = Q - V, its mean is least where V is the τ-expectile of Q."""
    return jnp.abs(tau - (u < 0)) * u**2

def value_loss(layers, target_critic, batch, cfg):
    """E L2^τ(min_k Q̄_k(s, a) - V(s)); the target critic gets no gradient. -> loss, V (B,)"""
    q = q_values(target_critic, batch["observations"], batch["actions"]).min(axis=0)  # (2, B) -> (B,)
    v = value(layers, batch["observations"])
    return jnp.mean(expectile_loss(q - v, cfg.expectile)), v


# ---- 4 Training --------------------------------------------------------------------------------------------
class State(NamedTuple):
    """All that training changes: from it and the data, a run continues bit for bit."""

    params: dict  # policy, critic, value
    target: list  # Q̄, the Polyak average of the critic
    opt: tuple  # Adam's moments
    key: jax.Array  # the run's; update i uses fold_in(key, i), however updates are grouped into calls
    step: jax.Array  # updates made

@partial(jax.jit, static_argnames=("s_dim", "a_dim", "cfg"))
def init_state(key, s_dim, a_dim, cfg):
    """The State before the first update."""
    key_params, key_run = jax.random.split(key)
    params = init_params(key_params, s_dim, a_dim, cfg)
    target = jax.tree.map(jnp.copy, params["critic"])  # a copy, since `train` gives away its input's memory
    return State(params, target, optax.adam(cfg.lr).init(params), key_run, jnp.int32(0))

def sample_batch(key, data, cfg):
    """Draw B chunks from dict(observations (N, S), actions (N, A), rewards (N,), masks (N,), starts (M,)).

    `starts` has the rows from which a whole chunk, and the state after it, lie in one trajectory. `masks` is
    0 where the task is solved: rewards count up to that row, and nothing is bootstrapped beyond it.
    """
    i = jax.random.choice(key, data["starts"], (cfg.batch_size,))  # (B,)
    window = i[:, None] + jnp.arange(cfg.horizon)  # (B, 1) + (H,) -> (B, H)
    alive = jnp.cumprod(data["masks"][window], axis=1)  # (B, H), 0 from the first success on
    counts = jnp.pad(alive[:, :-1], ((0, 0), (1, 0)), constant_values=1)  # (B, H), 0 after the first success
    return dict(
        observations=data["observations"][i],  # (B, S)
        actions=data["actions"][window].reshape(cfg.batch_size, -1),  # (B, H, A) -> (B, H*A)
        returns=(counts * data["rewards"][window]) @ cfg.discount ** jnp.arange(cfg.horizon),  # (B,)
        masks=alive[:, -1],  # (B,)
        next_observations=data["observations"][i + cfg.horizon],  # (B, S)
    )

def update(state, batch, key, cfg):
    """One update of policy, critic, value and target from a `sample_batch`. -> State, dict of scalars

    The losses are added only to take one gradient: each reaches its own network alone. All gradients are
    taken at the old parameters, and the target averages the old critic.
    """

    def loss(params):
        flow = flow_matching_loss(params["policy"], batch["observations"], batch["actions"], key, cfg)
        critic, q = critic_loss(params["critic"], params["value"], batch, cfg)
        val, v = value_loss(params["value"], state.target, batch, cfg)
        info = dict(flow_loss=flow, critic_loss=critic, value_loss=val, q=q.mean(), v=v.mean())
        return flow + critic + val, info

    grads, info = jax.grad(loss, has_aux=True)(state.params)
    steps, opt = optax.adam(cfg.lr).update(grads, state.opt)
    target = optax.incremental_update(state.params["critic"], state.target, cfg.target_rate)
    return State(optax.apply_updates(state.params, steps), target, opt, state.key, state.step + 1), info

@partial(jax.jit, static_argnames=("n", "cfg"), donate_argnames="state")
def train(state, data, n, cfg):
    """`n` updates in one compiled scan that draws its batches itself. -> State, dict of (n,) arrays

    Many seeds at once: `jax.vmap(lambda state: train(state, data, n, cfg))(states)`.
    """

    def one(state, _):
        key_batch, key_update = jax.random.split(jax.random.fold_in(state.key, state.step))
        return update(state, sample_batch(key_batch, data, cfg), key_update, cfg)

    return jax.lax.scan(one, state, length=n)


# ---- 5 Guidance: each step of the flow is nudged by the critic ---------------------------------------------
# An estimator says where to push: (nets, s (B, S), a_t (B, H*A), t (B, 1), v (B, H*A)) -> (B, H*A), with
# nets = dict(policy, critic) and v = v_θ(s, a_t, t). A new one is a function and its name in GUIDANCE.

def acting_nets(state):
    """The networks that act: the policy, and the target critic as its guide."""
    return dict(policy=state.params["policy"], critic=state.target)

def q_min(nets, s, a):
    """min_k Q̄_k(s, a): s (B, S), a (B, H*A) -> (B,)."""
    return q_values(nets["critic"], s, a).min(axis=0)

def bc(nets, s, a_t, t, v):
    """No guidance: plain behaviour cloning."""
    return jnp.zeros_like(a_t)

def qgf(nets, s, a_t, t, v):
    """∇_{â_1} min_k Q̄_k(s, â_1) at the clean estimate â_1, with the Jacobian ∂â_1/∂a_t replaced by 1."""
    a_1 = jnp.clip(a_t + (1 - t) * v, -1, 1)
    return jax.grad(lambda a: q_min(nets, s, a).sum())(a_1)  # of the sum: each row depends on its own Q alone

GUIDANCE = dict(bc=bc, qgf=qgf)

@partial(jax.jit, static_argnames=("method", "denoise_steps"))
def sample_actions(nets, s, a_0, w, method="qgf", denoise_steps=10):
    """Integrate the guided flow from noise to actions: s (B, S), a_0 (B, N, H*A), w () or (B,) -> (B, H*A).

    Best of N: a state has N candidates, one for each row of noise; the one with the largest Q̄ is returned.
    The weight is traced, so that another one, or one for each row, compiles nothing new.
    """
    B, N, D = a_0.shape
    s = jnp.repeat(s, N, axis=0)  # (B, S) -> (B*N, S)
    w = jnp.repeat(jnp.broadcast_to(w, B), N)[:, None]  # (B,) -> (B*N, 1)

    def euler(a_t, i):
        t = jnp.full((B * N, 1), i / denoise_steps)
        v = velocity(nets["policy"], s, a_t, t)
        return a_t + (v + w * GUIDANCE[method](nets, s, a_t, t, v)) / denoise_steps, None

    a, _ = jax.lax.scan(euler, a_0.reshape(B * N, D), jnp.arange(denoise_steps))
    a = jnp.clip(a, -1, 1)
    if N == 1:
        return a
    best = q_min(nets, s, a).reshape(B, N).argmax(axis=1)  # (B*N,) -> (B, N) -> (B,)
    return a.reshape(B, N, D)[jnp.arange(B), best]


# ============================================================================================================
# The algorithm ends here; the rest feeds it, tests it and keeps it.
# ---- 6 Data: a file of one's own, OGBench's download, or OGBench's scripted play policies ------------------
DATA_DIR = Path("~/.ogbench/data").expanduser()
MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"
KINDS = ("play", "noisy", "navigate", "stitch", "explore")  # of OGBench datasets
COLLECT = {"cube-single": 200_000}  # transitions to collect if there is no download; elsewhere 1M
STACKING = dict(single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
progress = partial(tqdm, mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)
warnings.filterwarnings("ignore", message=".*DISPLAY|.*precision lowered")  # no window is wanted

class UserError(Exception):
    """What a user can mend, in one line that says what is wrong and what to do."""

def find_task(name):
    """-> its names: cube-double, cube-double-task3, cube-double-singletask-task3-v0, cube-double-play-v0."""
    words = name.removesuffix("-v0").split("-")
    usual = "navigate" if "maze" in name or "soccer" in name else "play"
    kind = next((w for w in words if w in KINDS), usual)
    task = next((w for w in words if re.fullmatch(r"task\d", w)), "")
    base = "-".join(w for w in words if w not in (kind, task, "singletask"))
    known = [i for i in gymnasium.registry if "-singletask" in i and not i.startswith("visual")]
    env_id = "-".join(filter(None, (base, "singletask", task, "v0")))
    if env_id not in known:
        names = sorted(i.replace("-singletask", "").removesuffix("-v0") for i in known)
        near = difflib.get_close_matches(name, names, cutoff=0.4) or [i for i in names if "-task" not in i]
        raise UserError(f"unknown environment {name!r}; did you mean {', '.join(near)}?")
    short = "-".join(filter(None, (base, kind if kind != usual else "", task)))
    return base, short, env_id, f"{base}-{kind}-v0"

@contextmanager
def atomic_write(path, mode="wb"):
    """Open a file beside `path` that takes its name once it is whole and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        e.filename = str(path)  # a full disk does not say where
        raise
    finally:
        part.unlink(missing_ok=True)

def download(dataset, path):
    """Fetch OGBench's file from the first host that has it, whole. -> whether one had; says why not."""
    for url in (f"{host}/{dataset}.npz" for host in (ogbench.utils.DATASET_URL, MIRROR)):
        try:
            with urllib.request.urlopen(url, timeout=20) as response, atomic_write(path) as file:
                with tqdm.wrapattr(response, "read", total=response.length, desc=url) as blocks:
                    shutil.copyfileobj(blocks, file, 1 << 20)
                if response.length:  # what is still to come
                    raise ConnectionError("the connection broke off")
            return True
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR):
                raise
            print(f"cannot download {url}: {getattr(e, 'reason', e)}")
    return False

def start_worker():
    """In a worker process: leave Ctrl-C to the parent, and end when the parent has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()

@cache
def playground(base):
    """In a worker process: OGBench's environment and oracles to collect data with, set as it sets them."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan
    collecting = dict(terminate_at_goal=False, mode="data_collection", max_episode_steps=1001)
    env = gymnasium.make(f"{base}-v0", **collecting)
    settings = dict(env=env, noise=0.1, noise_smoothing=0.5)
    closed = dict(gripper_always_closed=True) if "puzzle" in base else {}
    return env, dict(
        cube=cube_plan.CubePlanOracle(**settings),
        button=button_plan.ButtonPlanOracle(**settings, **closed),
        drawer=drawer_plan.DrawerPlanOracle(**settings),
        window=window_plan.WindowPlanOracle(**settings),
    )

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
        return play(base, episode, attempt + 1)  # the cube left the reachable area: OGBench tries again, too
    return data

def find_dataset(cfg, base, dataset):
    """-> path of the dataset and words on where it comes from; it is downloaded or collected if need be."""
    official, amount = DATA_DIR / f"{dataset}.npz", cfg.collect or COLLECT.get(base, 1_000_000)
    collected, n = DATA_DIR / f"{dataset}-collected-{amount}.npz", math.ceil(amount / 1000)
    if cfg.data:
        return Path(cfg.data), "given with --data"
    if not cfg.collect and (official.exists() or not collected.exists() and download(dataset, official)):
        return official, "OGBench's own"
    if not collected.exists():
        if not (dataset.endswith("-play-v0") and base.startswith(("cube", "scene", "puzzle"))):
            raise UserError(f"no scripted policy makes {dataset}: give --data FILE, or put it at {official}")
        print(f"collecting {n} episodes of 1000 transitions with OGBench's play policies", flush=True)
        pool = ProcessPoolExecutor(CORES, get_context("spawn"), start_worker)
        try:
            episodes = list(progress(pool.map(partial(play, base), range(n)), "collecting", n, unit="k"))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        with atomic_write(collected) as file:
            np.savez(file, **{k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]})
    return collected, "collected with OGBench's play policies"

def load_dataset(path, env):
    """Read a dataset for `env`. -> dict of numpy arrays: observations, actions, rewards, masks, ends

    `ends` (N,) is the last row of each row's trajectory. Where the file has no rewards, OGBench computes them
    (and the masks) for the task of `env`. UserError where training on the file would fail or mislead.
    """
    wanted = ("observations", "actions", "terminals", "qpos", "button_states", "rewards", "masks")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in file.files if k in wanted}
    except Exception as e:  # whatever numpy, zipfile or zlib say of a file that is not what it should be
        raise UserError(f"{path} is missing, truncated or no .npz dataset ({e}): give another") from None
    n, s_dim, a_dim = len(data.get("actions", ())), env.observation_space.shape[0], env.action_space.shape[0]
    if "rewards" not in data and len(data.get("qpos", ())) == n:
        ogbench.relabel_utils.relabel_dataset(env.spec.id, env, data)
    data.setdefault("masks", np.ones(n))
    shapes = dict(observations=(n, s_dim), actions=(n, a_dim), terminals=(n,), rewards=(n,), masks=(n,))
    for key, shape in shapes.items():
        found = data[key].shape if key in data else "missing"
        if n == 0 or found != shape:
            raise UserError(f"{path} is no dataset of {env.spec.id}: `{key}` is {found}, expected {shape}")
        data[key] = np.asarray(data[key], np.float32)
        finite = np.isfinite(data[key].reshape(n, -1)).all(axis=1)
        if not finite.all():
            raise UserError(f"{path}: `{key}` has NaN or Inf in row {finite.argmin()}: drop its trajectory")
    if abs(data["actions"]).max() > 1.001:
        raise UserError(f"{path}: actions reach {abs(data['actions']).max():.3g}: scale them into [-1, 1]")
    last = np.append(np.flatnonzero(data["terminals"][:-1]), n - 1)  # the file's end is a trajectory's end
    data["ends"] = last[np.searchsorted(last, np.arange(n))]
    return {k: data[k] for k in ("observations", "actions", "rewards", "masks", "ends")}

def to_device(data, horizon):
    """What `load_dataset` gives -> what `sample_batch` takes, on the device."""
    starts = np.flatnonzero(np.arange(len(data["ends"])) + horizon <= data["ends"])
    if len(starts) == 0:
        raise UserError(f"no trajectory is longer than the {horizon} actions of a chunk: lower --horizon")
    return {k: jnp.asarray(v) for k, v in data.items() if k != "ends"} | dict(starts=jnp.int32(starts))


# ---- 7 Evaluation: many environments in lock step, and one policy call for all of them ---------------------
SLOTS = 8  # environments in a worker process
CHOOSE, REPORT, LOOK = 1_000_000, 2_000_000, 3_000_000  # the first episode seed for each purpose

@cache
def slot(env_id, i):
    """In a worker process: its i-th environment."""
    return gymnasium.make(env_id, disable_env_checker=True)

def act(env_id, commands):
    """In a worker process: one command a slot, None, a seed to reset with, or a chunk (H, A) to execute.

    -> for each None or (observation, rewards, done, success); a chunk stops where its episode ends
    """
    replies = [None] * len(commands)
    for i, command in enumerate(commands):
        if isinstance(command, int):
            np.random.seed(command)
            replies[i] = slot(env_id, i).reset(seed=command)[0], [], False, False
        elif command is not None:
            rewards, done = [], False
            while len(rewards) < len(command) and not done:
                ob, reward, terminated, truncated, info = slot(env_id, i).step(command[len(rewards)])
                rewards, done = [*rewards, float(reward)], terminated or truncated
            replies[i] = ob, rewards, done, bool(info.get("success"))
    return replies

@contextmanager
def simulators(env_id):
    """Start a process a core; yields a function that takes a command for each slot and gives the replies."""
    pools = [ProcessPoolExecutor(1, get_context("spawn"), start_worker) for _ in range(CORES)]
    def run(commands):
        jobs = [pool.submit(act, env_id, commands[i::CORES]) for i, pool in enumerate(pools)]
        return [reply for row in zip(*(job.result() for job in jobs)) for reply in row]
    try:
        yield run
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)

Episode = namedtuple("Episode", "method weight seed success ret length")  # ret: sum of rewards, length: steps

def rollout(nets, run, jobs, cfg, label, method="qgf"):
    """Run an episode for each job (weight, seed) with `run` of `simulators`. -> Episodes in that order

    A free slot takes the next job at once. An episode's start and noise depend on its seed alone, so that
    rows of a table with the same seeds are paired.
    """
    n, chunk = CORES * SLOTS, nets["policy"][-1]["b"].size  # slots, H*A
    queue, results, running = list(enumerate(jobs))[::-1], [None] * len(jobs), [None] * n
    obs = np.zeros((n, nets["critic"][0]["w"].shape[1] - chunk), np.float32)
    noise, weights = np.zeros((n, 1, chunk), np.float32), np.zeros(n, np.float32)
    with progress(total=len(jobs), desc=label, unit=" episodes") as bar:
        while queue or any(running):
            for i in range(n):
                if running[i]:
                    noise[i] = running[i][1].standard_normal((1, chunk))
            actions = sample_actions(nets, obs, noise, weights, method, cfg.denoise_steps)  # (n, H*A)
            commands = list(np.asarray(actions).reshape(n, cfg.horizon, -1))  # (n, H, A)
            for i in range(n):
                if not running[i]:
                    commands[i] = None
                    if queue:
                        job, (weights[i], commands[i]) = queue.pop()
                        running[i] = job, np.random.default_rng(commands[i]), []
            for i, reply in enumerate(run(commands)):
                if reply:
                    obs[i], rewards, done, success = reply
                    job, _, so_far = running[i]
                    so_far += rewards
                    if done:
                        name, running[i] = method if jobs[job][0] else "bc", None
                        results[job] = Episode(name, *jobs[job], success, sum(so_far), len(so_far))
                        bar.update()
    return results

def table(episodes):
    """Lines of a table, a row for each method and weight: success with its Wilson interval, means, a bar."""
    lines = ["method    weight    n  success  95 % interval     return   length"]
    for row in dict.fromkeys(e[:2] for e in episodes):
        ours = [(1, e.success, e.ret, e.length) for e in episodes if e[:2] == row]
        n, wins, ret, length = np.sum(ours, axis=0)
        low, high = binomtest(int(wins), int(n)).proportion_ci(method="wilson")
        numbers = f"{n:4.0f} {wins / n:8.2f}  [{low:.2f}, {high:.2f}]   {ret / n:8.1f} {length / n:8.1f}"
        lines.append(f"{row[0]:8} {row[1]:7g} {numbers}  {'█' * round(20 * wins / n):░<20}")
    return lines

def verdict(episodes):
    """Yes, no or not shown: whether the success of the guided rows of `table` is beyond that of BC."""
    wins = [[e.success for e in episodes if bool(e.weight) == guided] for guided in (False, True)]
    bc, guided = (binomtest(sum(w), len(w)).proportion_ci(method="wilson") for w in wins)
    if max(bc.low, guided.low) <= min(bc.high, guided.high):
        return "not shown: the intervals touch"
    return "yes, beyond both intervals" if guided.low > bc.high else "no, it harmed"

def best_weight(episodes):
    """The weight with the most successes; among equals that with the largest return, then the smallest."""
    def score(w):
        return np.sum([(e.success, e.ret) for e in episodes if e.weight == w], axis=0).tolist()
    return max(sorted({e.weight for e in episodes}), key=score)

def evaluate(nets, env_id, cfg):
    """Choose w on episodes of its own, then compare it with BC on fresh ones. -> the Episodes of both"""
    with simulators(env_id) as run:
        jobs = [(w, CHOOSE + i) for w in cfg.weights for i in range(cfg.choose)]
        choice = rollout(nets, run, jobs, cfg, "choosing w")
        jobs = [(w, REPORT + i) for w in (0.0, best_weight(choice)) for i in range(cfg.episodes)]
        return choice, rollout(nets, run, jobs, cfg, "reporting")


# ---- 8 Runs: a folder with config.json, checkpoint.npz, metrics.csv and episodes.csv -----------------------
CHUNK = 100  # updates in a compiled call
LOSSES = ("flow_loss", "critic_loss", "value_loss", "q", "v")
FREE = ("out", "eval", "data", "collect", "updates", "weights", "choose", "episodes", "watch")  # may change

def named_leaves(state):
    """The arrays of a State by names such as params/critic/0/w."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

def write_csv(path, rows):
    """Write a whole CSV file, atomically."""
    with atomic_write(path, "w") as file:
        csv.writer(file).writerows(rows)

def save_run(folder, state, metrics, record):
    """Write checkpoint.npz (state and record, no pickle) and metrics.csv, atomically; refuses NaN and Inf."""
    arrays = {k: np.asarray(v) for k, v in named_leaves(state).items()}
    for k, v in arrays.items():
        if not np.isfinite(v).all():
            raise UserError(f"{k} is NaN at update {state.step}; {folder} keeps the last good checkpoint")
    with atomic_write(folder / "checkpoint.npz") as file:
        np.savez(file, record=json.dumps(record), **arrays)
    write_csv(folder / "metrics.csv", [("step", *LOSSES), *metrics])

def load_run(folder, given):
    """-> State (numpy arrays), record; UserError if they are not whole, or not of the settings `given`."""
    path = folder / "checkpoint.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        record = json.loads(str(arrays["record"]))
        cfg = Config(**record["config"] | dict(weights=()))  # a list in JSON
        sizes = record["s_dim"], record["a_dim"]
        state = jax.eval_shape(lambda: init_state(jax.random.PRNGKey(0), *sizes, cfg))
        for name, leaf in named_leaves(state).items():
            if arrays[name].shape != leaf.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, expected {leaf.shape}")
    except FileNotFoundError:
        raise UserError(f"there is no {path} to evaluate: train first, without --eval") from None
    except Exception as e:
        raise UserError(f"{path} is no whole checkpoint ({e!r}): move it away to start again") from None
    fixed = {k: v for k, v in record["config"].items() if k not in FREE}
    differ = [f"--{k.replace('_', '-')} {v}" for k, v in fixed.items() if v != given.get(k, v)]
    if differ:
        raise UserError(f"{folder} holds a run with {' '.join(differ)}: ask for that, or another --out")
    return jax.tree.unflatten(jax.tree.structure(state), [arrays[k] for k in named_leaves(state)]), record

@contextmanager
def gentle_stop():
    """Yields a list that the first Ctrl-C (or SIGTERM) fills, for a loop to end at; the second interrupts."""
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)
    def stopping(*_):
        return signal.default_int_handler() if stop else stop.append(1)
    old = [signal.signal(s, stopping) for s in signals]
    try:
        yield stop
    finally:
        for s, handler in zip(signals, old):
            signal.signal(s, handler)

def fit(state, data, folder, record, cfg, env_id):
    """Train to cfg.updates; save each minute and at the end, look at a few episodes now and then. -> State

    The first Ctrl-C (or SIGTERM) ends the run after the chunk in hand, and saves; the second ends it at once.
    """
    metrics, step = [], int(state.step)
    if step:  # after a kill, metrics.csv can be ahead of the checkpoint
        with open(folder / "metrics.csv") as file:
            metrics = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]
    saved = looked = time.monotonic()
    bar = progress(total=cfg.updates, initial=step, desc="training", unit=" updates")
    with gentle_stop() as stop, bar:
        while step < cfg.updates and not stop:
            state, info = train(state, data, min(CHUNK, cfg.updates - step), cfg)
            losses = np.array([info[k] for k in LOSSES])  # (5, CHUNK): the one wait for the device
            finite = np.isfinite(losses).all(axis=0)
            if not finite.all():
                where = f"at update {step + 1 + finite.argmin()}; {folder} keeps the last good checkpoint"
                raise UserError(f"a loss is NaN or Inf {where}. Start again with a smaller --lr")
            if step == bar.initial:
                bar.start_t = bar.last_print_t = time.time()  # the first chunk compiled: time from its end
            step += losses.shape[1]
            metrics.append([step, *(f"{x:.6g}" for x in losses.mean(axis=1))])
            bar.update(step - bar.n)
            if time.monotonic() - saved > 60:
                save_run(folder, state, metrics, record)
                saved = time.monotonic()
            if time.monotonic() - looked > 60 * cfg.watch:
                with simulators(env_id) as run:
                    jobs = [(w, LOOK + i) for w in (0.0, *cfg.weights) for i in range(5)]
                    look = rollout(acting_nets(state), run, jobs, cfg, "a look")
                bar.write("\n".join([f"after {step} updates", *table(look)]))
                looked = time.monotonic()
        save_run(folder, state, metrics, record)
    if stop:
        raise UserError(f"stopped at update {step}, saved in {folder}; the same command goes on")
    return state


# ---- 9 main ------------------------------------------------------------------------------------------------
FAMILY = {"cube-double": dict(updates=150_000, lr=5e-4)}  # where the defaults of Config do not serve
MINUTES = {"cube-single": 6, "cube-double": 50}  # from nothing to the table, on two CPU cores, by default

def parse(argv):
    """The options given on the command line, by field of Config."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    special = {bool: dict(action="store_true"), tuple: dict(type=float, nargs="+", metavar="W")}
    for f in fields(Config):
        kind = special.get(f.type, dict(type=f.type, metavar="X"))
        help = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help, **kind)
    given = vars(parser.parse_args(argv))
    for name, v in given.items():
        low = 0 if name in ("seed", "collect") else 1e-9
        high = 1 if name in ("discount", "expectile", "target_rate") else math.inf
        if not isinstance(v, str) and not low <= np.min(v) <= np.max(v) <= high:
            raise UserError(f"--{name.replace('_', '-')} {v} is out of range")
    return given

def run(given):
    """A whole run, from the given options to the table."""
    base, given["env"], env_id, dataset = find_task(given.get("env", Config.env))
    folder = Path(given.get("out", Config.out)) / f"{given['env']}-s{given.get('seed', Config.seed)}"
    settings, saved = asdict(Config()) | FAMILY.get(base, {}), (folder / "checkpoint.npz").exists()
    if given.get("eval"):
        state, record = load_run(folder, given)
        settings = record["config"]
    elif saved:
        state, record = load_run(folder, settings | given)
    cfg = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in (settings | given).items()})
    print(f"qgf     {env_id}, seed {cfg.seed} -> {folder}")
    print(f"device  {jax.devices()[0].device_kind}, {CORES} CPU cores, jax {jax.__version__}")
    if not cfg.eval:
        folder.mkdir(parents=True, exist_ok=True)  # if it cannot be written, now is the time to know
        known = f"about {MINUTES[base]} minutes" if base in MINUTES else "not known for this family"
        print(f"time    {known}, from nothing on two CPU cores by default", flush=True)
        env = gymnasium.make(env_id)
        path, origin = find_dataset(cfg, base, dataset)
        data = load_dataset(path, env)
        s_dim, a_dim = data["observations"].shape[1], data["actions"].shape[1]
        solved, ends, r = data["masks"] == 0, np.unique(data["ends"]), data["rewards"]
        mark = hashlib.sha256()
        for k in sorted(data):
            mark.update(data[k])
        print(f"data    {path}: {origin}")
        print(f"        {len(r) - len(ends):,} transitions in {len(ends):,} trajectories; states {s_dim}"
              f", actions {a_dim};\n        rewards {r.min():g} to {r.max():g}; solved in {solved.mean():.2%}"
              f" of the states, {len(set(data['ends'][solved]))} of the trajectories")
        if not saved:
            state = init_state(jax.random.PRNGKey(cfg.seed), s_dim, a_dim, cfg)
            packages = ("jax", "jaxlib", "optax", "numpy", "ogbench", "gymnasium", "mujoco")
            versions = {p: version(p) for p in packages} | dict(python=platform.python_version())
            record = dict(s_dim=s_dim, a_dim=a_dim, data=f"{path}: {origin}", fingerprint=mark.hexdigest())
            record |= dict(versions=versions)
        elif mark.hexdigest() != record["fingerprint"]:
            raise UserError(f"{folder} was trained on other data, {record['data']}: choose another --out")
        record["config"] = asdict(cfg)
        with atomic_write(folder / "config.json", "w") as file:
            json.dump(record, file, indent=1)
        sizes = ", ".join(f"{k} {sum(x.size for x in jax.tree.leaves(v)):,}" for k, v in state.params.items())
        print(f"nets    {sizes} parameters\nplan    updates {state.step} to {cfg.updates}", flush=True)
        state = fit(state, to_device(data, cfg.horizon), folder, record, cfg, env_id)
    choice, report = evaluate(acting_nets(state), env_id, cfg)
    rows = [("choose", *e) for e in choice] + [("report", *e) for e in report]
    write_csv(folder / "episodes.csv", [("purpose", *Episode._fields), *rows])
    print(f"\nto choose the weight, {cfg.choose} episodes each", *table(choice), sep="\n")
    print(f"\n{cfg.env} after {state.step} updates, fresh episodes", *table(report), sep="\n")
    print(f"did guidance help? {verdict(report)}\nsaved in {folder}")

def main(argv=None):
    """The command line. -> exit status"""
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qgf"
    jax.config.update("jax_compilation_cache_dir", str(cached))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        run(parse(argv))
        return 0
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from what was saved"
    except process.BrokenProcessPool:
        message = "a simulator process died, out of memory? The same command goes on from what was saved"
    except OSError as e:
        message = f"cannot read or write {e.filename}: {e.strerror}; what was saved before is kept"
    print(f"qgf: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
