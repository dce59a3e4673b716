# SPDX-License-Identifier: MIT
"""run_all.sh, and the commands and numbers of the pages."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import race
from scipy.stats import binomtest

import qgf

HERE = Path(qgf.__file__).parent


def run_all(*args, **env):
    return subprocess.run(
        [HERE / "run_all.sh", *args], env=os.environ | env, text=True, capture_output=True
    )


def test_run_all_goes_on_after_a_failure_and_says_so(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n[ "$3" != broken ]\n')
    stub.chmod(0o755)
    env = dict(PYTHON=str(stub), CALLS=str(tmp_path / "calls"), OUT="o")
    p = run_all("one broken two", "0 1", "--lr", "1e-4", **env)
    assert p.returncode == 1 and "failed: broken-s0 broken-s1" in p.stderr
    *calls, last = [x.split() for x in (tmp_path / "calls").read_text().splitlines() if ".py" in x]
    assert [(c[2], c[4]) for c in calls] == [(e, s) for e in ("one", "broken", "two") for s in "01"]
    assert all(c[5:] == ["--out", "o", "--lr", "1e-4"] for c in calls) and "table.py" in last[0]


@pytest.mark.parametrize(
    "words, args, env",
    [
        ("no-such-python", ["cube-single"], dict(PYTHON="no-such-python")),
        ("/nowhere is no folder", ["cube-single"], dict(DATA="/nowhere")),
        ("2 match scene-play-*", ["scene-task2"], {}),
        ("0 match antmaze-large-navigate-*", ["antmaze-large"], {}),
        ("the list has 20 runs", ["paper"], dict(SLURM_ARRAY_TASK_ID="20", DATA="")),
    ],
)
def test_run_all_refuses_what_cannot_work(tmp_path, words, args, env):
    for name in ("scene-play-v0.npz", "scene-play-v0-val.npz", "scene-play-100m-v0"):
        (tmp_path / name).touch()
    p = run_all(*args, **dict(DATA=str(tmp_path), PYTHON=sys.executable) | env)
    assert p.returncode == 1 and words in p.stderr and p.stderr.count("\n") == 1


def test_run_all_lists_the_papers_runs():
    lines = run_all("--dry-run", "paper", "0").stdout.splitlines()
    assert len(lines) == 20 and all(
        "--discount 0.999 --expectile 0.9 --no-sparse" in x for x in lines
    )
    for line in lines:
        qgf.parse(line.split()[2:])
    one = run_all("--dry-run", "paper", "0", SLURM_ARRAY_TASK_ID="19").stdout.splitlines()
    assert one == lines[19:] and "--env scene-task5" in one[0]
    assert "./run_all.sh" in run_all("--help").stdout
    everything = run_all("--dry-run").stdout.splitlines()  # four families, three seeds
    assert len(everything) == 12 and "--env scene --seed 2" in everything[8]


def test_run_all_ends_its_run_when_it_is_ended(tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/usr/bin/env bash\n[ $1 = -c ] && exit\ntouch started\nexec sleep 60\n")
    stub.chmod(0o755)
    env = os.environ | dict(PYTHON=str(stub))
    p = subprocess.Popen([HERE / "run_all.sh", "one"], cwd=tmp_path, env=env, stderr=-1, text=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    p.terminate()
    assert "interrupted; the same command resumes" in p.communicate(timeout=20)[1]
    assert p.returncode == 1


def test_every_command_of_the_pages_is_understood():
    pages = [HERE / "README.md", HERE / ".github/results/README.md"]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    commands = [x.split("#")[0].split()[2:] for x in lines if x.startswith("python qgf.py ")]
    assert len(commands) >= 5
    for command in commands:
        if "qgf-midpoint" not in command:  # a fork's
            qgf.find_task(qgf.parse(command).env)


def intervals(folder):
    """{(method, λ): "mean [low, high]"} of a folder of results."""
    table = runpy.run_path(str(HERE / ".github/table.py"))
    found = {}
    for (_, _, method, guidance, _), by_seed in table["read"](HERE / folder).items():
        runs = [np.array(x) for x in by_seed.values()]
        mean, low, high = table["interval"](runs)
        found[method, guidance] = f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    return found


def test_the_table_of_methods_follows_from_its_episodes():
    readme = (HERE / "README.md").read_text()
    _, *families = re.search(r"^\| any goal of \|(.*)\|$", readme, re.MULTILINE)[0].split("|")[1:-1]
    found = {}
    for k, family in enumerate(families):
        env, _, strength = family.strip().partition(", λ ")
        assert float(strength) == default_strength(env)
        for (method, guidance), rate in intervals(f".github/results/{env}").items():
            if guidance in (0, float(strength)):
                found[method, k] = rate
    rows = re.findall(r"^\| `(\S*)` \|(.* \[.*)\|$", readme, re.MULTILINE)
    assert len(rows) == 9
    for method, cells in rows:
        for k, cell in enumerate(cells.split("|")):
            assert cell.strip() == found[method, k], (method, k)
    double = [found[method, 1].split()[0] for method in ("qgf", "bc")]
    assert "QGF then scores {}, and behaviour cloning {}.".format(*double) in readme
    single = intervals(".github/results/cube-single")
    text = " ".join(results_section("cube-single").split())
    assert f"At λ = 1, `gradstep` scores {single['gradstep', 1.0]}." in text


def successes(path, method, strength):
    """Of a method after the most updates, in the order of episodes: (n,)."""
    rows = qgf.read_csv(HERE / ".github/results" / path / "episodes.csv")
    most = max(int(row["updates"]) for row in rows)
    key = dict(updates=most, method=method, guidance=0.0 if "bc" in method else strength)
    return np.array([float(row["success"]) for row in rows if qgf.matches(row, key)])


def default_strength(folder):
    """λ of the family whose name the folder begins with."""
    return qgf.parse(["--env", folder]).guidance[0]


def test_times_to_success_name_what_the_defaults_score():
    page = (HERE / ".github/results/README.md").read_text()
    rows = re.findall(r"^\| (\S*) \| (0\.\d\d) .* \| (0\.\d\d) \| \w+ \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for env, level, score in rows:
        folder = HERE / ".github/results" / ("cube-single-quick" if env == "cube-single" else env)
        strength = default_strength(env)
        runs = [path.parent for path in folder.glob("**/episodes.csv")]
        rate = np.mean([successes(run, "qgf", strength).mean() for run in runs])
        assert score == f"{rate:.2f}" and level <= score


def test_quick_start_printed_its_table():
    rows = qgf.read_csv(HERE / ".github/results/cube-single-quick/episodes.csv")
    lines = qgf.table(rows, {}, qgf.find_task("cube-single"))
    assert "\n".join(lines) in (HERE / "README.md").read_text()


def test_single_tasks_follow_from_their_episodes():
    """Beside its own critic stands any goal's, on the goal which is the task."""
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", results_section("single-tasks"), re.MULTILINE)
    assert len(rows) == 1 + 9  # a header
    rates = {}
    for name, _ in [x for x in rows if "-task" in x[0]]:
        task, _, best = name.partition(", ")
        family, _, number = task.partition("-task")
        rates[name] = []
        for method in ("qgf", best.strip("`") or "bc@32"):
            strength = default_strength(family)
            own = successes(f"single-tasks/{task}", method, strength)
            any_goal = successes(f"{family}/s0", method, strength)[int(number) - 1 :: qgf.GOALS]
            rates[name] += [own.mean(), any_goal.mean()]
    five = [x for name, x in rates.items() if name.startswith("cube-single")]
    rates["mean of the five"] = np.mean(five, axis=0)
    for name, cells in rows[1:]:
        assert cells == " | ".join(f"{x:.2f}" for x in rates[name]), name
    double = "On cube-double, a task's own gives {:.2f}, not {:.2f} (one seed)."
    assert double.format(*rates["cube-double-task2"]) in (HERE / "README.md").read_text()
    weaker = [successes("single-tasks/cube-double-task2", "qgf", x).mean() for x in (0.3, 1.0)]
    text = " ".join(results_section("single-tasks").split())
    assert "`--guidance 0.3 1`, `qgf` scores {:.2f} and {:.2f}.".format(*weaker) in text


def results_section(folder):
    page = (HERE / ".github/results/README.md").read_text()
    return page.partition(f"## {folder}: ")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    "folder, strength, count",
    [("cube-double", 3.0, 6), ("scene", 1.0, 2), ("puzzle-3x3", 1.0, 3)],
)
def test_paired_gains_follow_from_their_episodes(folder, strength, count):
    found = re.findall(r"(0\.\d\d ± 0\.\d\d) (over|to)\s+`(.*?)`", results_section(folder))
    assert len(found) == count
    for text, word, method in found:
        sign = 1 if word == "over" else -1  # "gains over" or "loses to"
        runs = [f"{folder}/s{k}" for k in range(3)]
        gains = [
            sign * (successes(run, "qgf", strength) - successes(run, method, strength))
            for run in runs
        ]
        assert all(x.mean() > 0 for x in gains)  # in each seed, as the page says
        assert text == mean_and_interval(np.concatenate(gains))


def mean_and_interval(gain):
    return f"{gain.mean():.2f} ± {1.96 * gain.std() / len(gain) ** 0.5:.2f}"


def test_scores_of_the_seeds_follow_from_their_episodes():
    readme = (HERE / "README.md").read_text()
    for folder in ("cube-single", "cube-double", "cube-double-constant", "scene", "puzzle-3x3"):
        strength = default_strength(folder)
        rates = [successes(f"{folder}/s{k}", "qgf", strength).mean() for k in range(3)]
        text = "{:.2f}, {:.2f} and {:.2f}".format(*rates)
        assert text in " ".join(results_section(folder).split())
        assert text in readme or folder != "cube-double"


def test_the_gain_of_the_falling_rate_follows_from_its_episodes():
    gains = [
        successes(f"cube-double/s{k}", "qgf", 3.0)
        - successes(f"cube-double-constant/s{k}", "qgf", 3.0)
        for k in range(3)
    ]
    gain = mean_and_interval(np.concatenate(gains))
    text = " ".join(results_section("cube-double-constant").split())
    assert f"the falling rate gains {gain}" in text


def test_the_papers_variant_follows_from_its_episodes():
    text = " ".join(results_section("cube-double-paper").split())
    folders = [f"cube-double-paper/s{k}" for k in range(3)]
    runs = [successes(folder, "qgf", 0.0) for folder in folders]
    table = runpy.run_path(str(HERE / ".github/table.py"))
    rate = "{:.2f} [{:.2f}, {:.2f}]".format(*table["interval"](runs))
    by_seed = "{:.2f}, {:.2f} and {:.2f}".format(*(run.mean() for run in runs))
    assert f"`qgf` scores {by_seed} with seeds 0, 1 and 2, together {rate}" in text
    assert f"it scores {rate} with" in " ".join((HERE / "README.md").read_text().split())
    rows = qgf.read_csv(HERE / ".github/results/selection-paper/episodes.csv")
    by_weight = {row["weight"]: [] for row in rows}
    for row in rows:
        by_weight[row["weight"]].append(float(row["success"]))
    rates = "{:.2f}, {:.2f}, {:.2f} and {:.2f}".format(*map(np.mean, by_weight.values()))
    assert [*by_weight] == ["0.5", "1.0", "1.5", "2.5"]
    assert f"w = 0.5, 1, 1.5 and 2.5 score {rates}" in text
    same = [successes(f"cube-double-constant/s{k}", "qgf", 3.0) for k in range(3)]
    assert f"gain {mean_and_interval(np.concatenate(same) - np.concatenate(runs))}" in text


def test_sizes_follow_from_their_episodes():
    page = results_section("cube-double-sizes")
    folders = {
        "64, 64": "cube-double-sizes/64-units",
        "256, 256": "cube-double-sizes/256-units",
        "512, 256 (the defaults)": "cube-double/s0",
    }
    for units, folder in folders.items():
        rates = [successes(folder, m, 3.0).mean() for m in ("bc@4", "bc@32", "qgf")]
        assert "| {} | {:.2f} | {:.2f} | {:.2f} |".format(units, *rates) in page
    small = successes("cube-double-sizes/64-units", "qgf", 3.0).mean()
    assert f"With 64 units, one seed scores {small:.2f}." in (HERE / "README.md").read_text()


def test_bullets_on_scene_follow_from_their_episodes():
    section = results_section("scene")
    on_goal_3 = re.findall(r"`(.*?)` (?:scores )?(0\.\d\d)", section.partition("Goal 3")[2])[:4]
    assert [method for method, _ in on_goal_3] == ["bc@4", "qgf", "bc@32", "qgf@4"]
    for method, rate in on_goal_3:
        runs = [successes(f"scene/s{k}", method, 1.0) for k in range(3)]
        assert rate == f"{np.mean([run[2 :: qgf.GOALS].mean() for run in runs]):.2f}"


def test_bullets_on_strength_follow_from_their_episodes():
    text = " ".join(results_section("selection").split())

    def rates(folder, method="qgf", fade="True"):
        """{λ: success}."""
        rows = qgf.read_csv(HERE / ".github/results" / folder / "episodes.csv")
        found = {}
        for row in rows:
            if row["method"] == method and row["fade"] == fade:
                found.setdefault(float(row["guidance"]), []).append(float(row["success"]))
        return {strength: np.mean(x) for strength, x in sorted(found.items())}

    def words(numbers):
        *first, last = (f"{x:.2f}" for x in numbers)
        return f"{', '.join(first)} and {last}"

    runs = [rates(x) for x in ("selection/cube-double", "selection-seeds/s1", "selection-seeds/s2")]
    seeds = [np.mean([run[strength] for run in runs]) for strength in (1, 2, 3, 4)]
    assert f"λ = 1, 2, 3 and 4 score {words(seeds)} over three seeds" in text
    single = rates("selection/cube-single")
    assert len(single) == 4 and max(single, key=single.get) == 0.3  # as cube-single's section says
    for env in ("cube-single", "cube-double", "scene", "puzzle-3x3"):
        best = [max(rates(f"selection/{env}", fade=x).values()) for x in ("False", "True")]
        assert f"{words(best)} on {env}" in text
    jacobian = rates("selection/cube-double", "qgf-jacobian").values()
    uphill = rates("selection/cube-double", "gradstep").values()
    assert f"scores {words(jacobian)} at λ = 1, 2, 3 and 6" in text
    assert f"`gradstep` {words(uphill)} at 1 and 2" in text


def test_the_placebos_follow_from_their_episodes():
    """In the page of forks."""
    text = " ".join((HERE / ".github/forks/README.md").read_text().split())

    def rates(method):
        folders = ("cube-single/s0", "cube-double/s0", "scene/s0", "puzzle-3x3/s0")
        return [successes(x, method, default_strength(x)).mean() for x in folders]

    a, b, c, d = rates("placebo")
    words = f"the placebo scores {a:.2f} on cube-single, {b:.2f} on cube-double, {c:.2f} on scene"
    assert f"{words} and {d:.2f} on puzzle-3x3" in text
    for method in ("qgf", "bc"):
        assert "{:.2f}, {:.2f}, {:.2f} and {:.2f}".format(*rates(method)) in text


def test_scores_of_the_forks_follow_from_their_episodes():
    page = (HERE / ".github/forks/README.md").read_text()
    lines = re.findall(r"^\| (\S+) \| `(\S+)` \| (0\..*) \|$", page, re.MULTILINE)
    assert len(lines) >= 4
    for diff, method, text in lines:
        run = successes(f"../forks/scores/{diff.strip('`')}", method, 0.3)
        low, high = binomtest(int(run.sum()), len(run)).proportion_ci(method="wilson")
        assert text == f"{run.mean():.2f} [{low:.2f}, {high:.2f}]"


def test_edp_follows_from_its_episodes():
    """In the page of forks."""
    text = " ".join((HERE / ".github/forks/README.md").read_text().split())
    edp = successes("../forks/edp/cube-single", "edp", 0.0)
    qgf_ = successes("cube-single/s0", "qgf", 0.3)
    assert (
        f"`edp` scores {edp.mean():.2f}, and `qgf` with the same critic {qgf_.mean():.2f}" in text
    )
    assert f"QGF gains {mean_and_interval(qgf_ - edp)}" in text
    edp = successes("../forks/edp/scene", "edp", 0.0)
    qgf_ = successes("scene/s0", "qgf", 1.0)
    assert f"On scene, `edp` scores {edp.mean():.2f} with α = 30" in text
    gain = f"a gain of {mean_and_interval(qgf_ - edp)}, which is not significant"
    assert f"`qgf` with the same critic {qgf_.mean():.2f}: {gain}" in text
    assert (
        f"{edp.mean():.2f} on cube-single and scene ([one seed]" in (HERE / "README.md").read_text()
    )
    alphas = 10, 30, 100, 300
    other = [successes(f"../forks/edp/other-episodes/alpha-{x}", "edp", 0.0) for x in alphas]
    assert "score {:.2f}, {:.2f}, {:.2f} and {:.2f}".format(*(x.mean() for x in other)) in text
    assert max(other, key=np.mean) is other[1]


def test_the_race_follows_from_its_file():
    rows = qgf.read_csv(race.FOLDER / "race.csv")
    *points, mine, official = race.table(rows)
    section = results_section("race")
    assert "\n".join([*points, mine, official]) in section
    minutes = re.findall(r"0.80 after (\d\.\d) minutes", f"{mine} {official}")
    readme = " ".join((HERE / "README.md").read_text().split())
    words = "one task: {} minutes, and {} with the official code"
    assert words.format(*minutes) in readme
    page = (HERE / ".github/results/README.md").read_text()
    assert "| 0.80 | {}; official code {} |".format(*minutes) in page
    curves = race.curves.by_minutes(rows).values()
    early = [next(x for x, y in points.items() if y.mean() >= 0.78) for points in curves]
    assert "a level of 0.78 is reached after {:.1f} and {:.1f} minutes".format(*early) in section
    last = {(row["program"], row["seed"]): float(row["seconds"]) for row in rows}
    slower = sorted(last[race.OFFICIAL, seed] / last[race.OURS, seed] for seed in "012")
    assert f"{slower[0]:.2f} to {slower[-1]:.2f} times as long" in section


def test_the_pictures_follow_from_the_episodes(tmp_path):
    page = (HERE / ".github/results/README.md").read_text()
    commands = re.findall(r"^python .github/curves.py (.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    curves = runpy.run_path(str(HERE / ".github/curves.py"))
    curves["main"].__globals__["HERE"] = tmp_path
    for command in commands:
        kind, *folders = command.split()
        curves["main"](kind, *(HERE / folder for folder in folders))
        drawn = (tmp_path / f"{kind}.svg").read_text()
        assert drawn == (HERE / f".github/{kind}.svg").read_text()
