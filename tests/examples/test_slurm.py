"""The examples in Slurm: a small cluster on this machine, with real jobs, limits and failures."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.examples import slurm_cluster
from tests.examples.clone import REPOSITORY, make_clone, run
from tests.examples.slurm_cluster import KILL_WAIT, NODE_TIMEOUT, Cluster
from tests.examples.slurm_runs import (
    LAST,
    Job,
    kill_a_rank,
    lose_a_node,
    reach_the_time_limit,
    undisturbed,
)

DOCS = (REPOSITORY / "docs/slurm.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
# Every command of the documentation: each is run below.
(SINGLE, SEVERAL), CONTAINERS, (DEPTH,) = (block.strip().splitlines() for block in BLOCKS)
TWO_NODES = SEVERAL.replace("-N 4", "-N 2")
SCRIPT = SEVERAL.partition(".sbatch ")[2]

LOADED = 60.0
"""Seconds that a busy machine may add to what the documentation states."""

ONE_RANK = {"PP": "1", "TRAIN_ITERS": "4", "EVAL_INTERVAL": "4"}

# What a job does about endings that training does not have at the wish of a test.
SCRIPTS = {
    "saves.sh": "trap 'exit 75' TERM USR1; sleep 600 & wait",
    "deaf.sh": "trap '' USR1; sleep 600",
    "fails.sh": "exit 1",
    # Node 0 ends first, but the reason is node 1's.
    "wrong_on_one_node.sh": """
        if [[ $SLURM_NODEID == 0 ]]; then touch scenes/ended; exit 1; fi
        until [[ -e scenes/ended ]]; do sleep 0.1; done
        sleep 2
        exit 2
    """,
    "fails_with_checkpoints.sh": """
        echo " successfully saved checkpoint from iteration 5 to somewhere"
        exit $((${SLURM_RESTART_COUNT:-0} < 2))
    """,
    # The task that has the number of the whole array is queued again, while the other one runs.
    "array.sh": """
        if [[ $SLURM_JOB_ID == "$SLURM_ARRAY_JOB_ID" ]]; then
          exit $((${SLURM_RESTART_COUNT:-0} == 0 ? 75 : 0))
        fi
        sleep 10
    """,
}
FILE = "sbatch examples/slurm/pretrain.sbatch"

needs_slurm = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=str(slurm_cluster.missing()))
pytestmark = pytest.mark.timeout(900)


class Scenes:
    """What happens in the cluster, most of it at the same time; tests look at what came out."""

    def __init__(self, cluster: Cluster, clone: Path, pool: ThreadPoolExecutor) -> None:
        self.cluster, self.clone = cluster, clone

        def begin(scene: Callable[[], Any]) -> Future[Any]:
            return pool.submit(scene)

        def limited() -> tuple[Job, str, float]:
            job = self.submit(TWO_NODES, "limited")
            reach_the_time_limit(job)
            job.wait_for_iteration(35, start=1)
            node, seconds = lose_a_node(job, cluster.freeze)
            job.finish()
            return job, node, seconds

        def broken() -> tuple[Job, float, str, float]:
            job = self.submit(TWO_NODES, "broken")
            rank_seconds = kill_a_rank(job)
            job.wait_for_iteration(35, start=1)
            node, node_seconds = lose_a_node(job, cluster.kill)
            job.finish()
            return job, rank_seconds, node, node_seconds

        def finished(command: str, name: str, **variables: str) -> Callable[[], Job]:
            def scene() -> Job:
                job = self.submit(command, name, **variables)
                job.finish()
                return job

            return scene

        def cancelled() -> Job:
            job = self.submit(f"{FILE} scenes/saves.sh", "cancelled")
            job.wait_for("^slurm: start 0")
            job.cluster.command("scancel", job.number)
            job.finish()
            return job

        def array(command: str, *tasks: int, **variables: str) -> Callable[[], list[Job]]:
            def scene() -> list[Job]:
                whole = self.submit(command, f"array-{tasks[0]}", **variables)
                jobs = [whole.task(number) for number in tasks]
                for job in jobs:
                    job.finish()
                return jobs

            return scene

        self.limited = begin(limited)
        self.undisturbed = begin(lambda: undisturbed(cluster, clone, SCRIPT))
        self.cancelled = begin(cancelled)
        self.deaf = begin(
            finished(
                f"{FILE} scenes/deaf.sh",
                "deaf",
                SBATCH_TIMELIMIT="1",
                SBATCH_SIGNAL="B:USR1@60",
                MAX_RESTARTS="0",
            )
        )
        self.failing = begin(finished(f"{FILE} scenes/fails.sh", "failing", MAX_RESTARTS="1"))
        self.wrong_on_one_node = begin(
            finished(
                f"sbatch -N 2 {FILE.removeprefix('sbatch ')} scenes/wrong_on_one_node.sh", "one"
            )
        )
        self.progressing = begin(
            finished(f"{FILE} scenes/fails_with_checkpoints.sh", "progressing", MAX_RESTARTS="0")
        )
        array_command = "sbatch --array=0-1 examples/slurm/sweep.sbatch scenes/array.sh"
        self.array = begin(array(array_command, 0, 1))
        self.broken = begin(broken)
        self.wrong = begin(finished(f"{TWO_NODES} --prores-warmup-iters -1", "wrong"))
        self.single = begin(finished(SINGLE, "single", **ONE_RANK))
        self.depth = begin(array(DEPTH.replace("0-47%4", "0,6"), 0, 6, **ONE_RANK))
        self.containers = [
            begin(finished(command.replace("-N 4", "-N 2"), "container", DRY_RUN="1"))
            for command in CONTAINERS
        ]

    def submit(self, command: str, name: str, **variables: str) -> Job:
        return Job.submit(self.cluster, self.clone, command, name, **variables)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenes]:
    clone = make_clone(tmp_path_factory.mktemp("clone"))
    (clone / "scenes").mkdir()
    for name, text in SCRIPTS.items():
        (clone / "scenes" / name).write_text(f"set -u\n{text}\n")
    # The cluster goes first: then nobody waits for its jobs any longer.
    with ThreadPoolExecutor(20) as pool, Cluster(nodes=16) as cluster:
        yield Scenes(cluster, clone, pool)


@needs_slurm
def test_the_time_limit_comes_and_the_job_goes_on_by_itself(scenes: Scenes) -> None:
    job: Job = scenes.limited.result()[0]
    output = job.output()
    assert job.finish()["JobState"] == "COMPLETED", output[-5000:]
    assert job.finish()["Restarts"] == "2"  # the second is the silent node's, below
    warned = re.search(r"interrupted by SIGUSR1: iteration (\d+) is saved", output)
    assert warned, output[-5000:]
    assert 10 <= int(warned[1]) < LAST
    assert "slurm: ended with code 75 (saved), queued again" in output
    assert f"resuming at iteration {warned[1]} of {LAST}" in output
    assert job.losses() == scenes.undisturbed.result()
    assert sorted(job.losses()["lm loss"]) == list(range(1, LAST + 1))


@needs_slurm
def test_every_rank_has_a_log_of_each_start(scenes: Scenes) -> None:
    job: Job = scenes.limited.result()[0]
    folders = sorted(set(re.findall(r"logs of its ranks in (\S+)", job.output())))
    first, second = folders[:2]
    assert (first, second) == (f"{job.run}/logs/{job.number}", f"{job.run}/logs/{job.number}.1")
    for rank in (0, 1):
        assert Path(first, f"rank{rank}.log").stat().st_size > 0
        assert Path(second, f"rank{rank}.log").exists()
    # Rank 0's is in the job's output.
    line = re.search(r"successfully saved checkpoint .*", job.output())
    assert line
    assert line[0] in (job.run / f"logs/{job.number}/rank0.log").read_text()


@needs_slurm
def test_a_killed_rank_and_a_dead_node_end_the_job_and_it_goes_on(scenes: Scenes) -> None:
    job, rank_seconds, node, node_seconds = scenes.broken.result()
    output = job.output()
    assert job.finish()["JobState"] == "COMPLETED", output[-5000:]
    # docs/slurm.md states these times.
    assert rank_seconds < KILL_WAIT + 20 + LOADED
    assert node_seconds < 2 * NODE_TIMEOUT + KILL_WAIT + 10 + LOADED
    print(f"rank: {rank_seconds:.1f} s, node: {node_seconds:.1f} s")
    # The rank was killed, and the other node's rank failed of that: its launcher may be gone first.
    assert re.search(r"^slurm: node 1 \(\S+\) ended with code 137$", output, flags=re.MULTILINE)
    assert re.search(
        r"^slurm: ended with code (137|1) \(failed\), queued again", output, re.MULTILINE
    )
    assert "slurm: restarts in a row without a new checkpoint: 0" in output
    last_nodes = re.findall(r"^slurm: start 2 of job \d+ on (\S+),", output, flags=re.MULTILINE)
    assert node not in job.cluster.command("scontrol", "show", "hostnames", *last_nodes).split()
    assert job.losses() == scenes.undisturbed.result()


@needs_slurm
def test_a_node_that_goes_silent_ends_the_job_and_it_goes_on(scenes: Scenes) -> None:
    job, node, seconds = scenes.limited.result()
    output = job.output()
    assert job.finish()["JobState"] == "COMPLETED", output[-5000:]
    assert seconds < 2 * NODE_TIMEOUT + KILL_WAIT + 10 + LOADED
    print(f"silent node: {seconds:.1f} s")
    assert f"Node failure on {node}" in output
    assert "DUE TO NODE FAILURE" in output
    last_nodes = re.findall(r"^slurm: start 2 of job \d+ on (\S+),", output, flags=re.MULTILINE)
    assert node not in job.cluster.command("scontrol", "show", "hostnames", *last_nodes).split()
    assert job.losses() == scenes.undisturbed.result()


@needs_slurm
def test_a_wrong_flag_fails_the_job_with_its_line(scenes: Scenes) -> None:
    job: Job = scenes.wrong.result()
    job_info = job.finish()
    assert (job_info["JobState"], job_info["ExitCode"], job_info["Restarts"]) == (
        "FAILED",
        "2:0",
        "0",
    ), job.output()[-5000:]
    assert re.search(r"^error: --prores-warmup-iters", job.output(), flags=re.MULTILINE)
    assert "slurm: failed with code 2, not queued again" in job.output()


@needs_slurm
def test_a_wrong_input_on_one_node_counts_before_what_it_does_to_the_others(scenes: Scenes) -> None:
    job: Job = scenes.wrong_on_one_node.result()
    output = job.output()
    codes = re.findall(r"^slurm: node (\d) \(\S+\) ended with code (\d+)$", output, re.MULTILINE)
    assert codes == [("0", "1"), ("1", "2")], output
    assert "slurm: failed with code 2, not queued again" in output
    assert (job.finish()["JobState"], job.finish()["Restarts"]) == ("FAILED", "0")


@needs_slurm
def test_a_run_on_one_node(scenes: Scenes) -> None:
    job: Job = scenes.single.result()
    assert job.finish()["JobState"] == "COMPLETED", job.output()[-5000:]
    assert sorted(job.losses()["lm loss"]) == [1, 2, 3, 4]


@needs_slurm
def test_each_task_of_a_sweep_is_a_run_of_its_own(scenes: Scenes) -> None:
    jobs: list[Job] = scenes.depth.result()
    for job in jobs:
        assert job.finish()["JobState"] == "COMPLETED", job.output()[-5000:]
        assert job.run.name == job.number.partition("_")[2]
    plain, with_prores = jobs
    assert "depth_12 pre-prores-linear:" in with_prores.output()
    assert "depth_12 pre-plain:" in plain.output()
    assert with_prores.losses() != plain.losses()


@needs_slurm
def test_queueing_a_task_again_leaves_the_other_tasks_alone(scenes: Scenes) -> None:
    jobs: list[Job] = scenes.array.result()
    assert [job.finish()["JobState"] for job in jobs] == ["COMPLETED"] * 2
    assert sorted(job.finish()["Restarts"] for job in jobs) == ["0", "1"]


@needs_slurm
def test_a_cancelled_job_stays_cancelled(scenes: Scenes) -> None:
    job: Job = scenes.cancelled.result()
    assert job.finish()["JobState"] == "CANCELLED", job.output()
    assert job.finish()["Restarts"] == "0"


@needs_slurm
def test_a_run_that_does_not_save_in_time_is_ended_before_the_limit_does(scenes: Scenes) -> None:
    job: Job = scenes.deaf.result()
    output = job.output()
    assert re.search(r"slurm: not saved within \d+ s: killed", output), output
    # By the job itself: else it would be TIMEOUT, and could not be queued again.
    assert job.finish()["JobState"] == "FAILED", output
    assert "not queued again: 0 restarts brought no new checkpoint (MAX_RESTARTS=0)" in output


@needs_slurm
def test_restarts_end_when_they_bring_nothing(scenes: Scenes) -> None:
    job: Job = scenes.failing.result()
    assert job.finish()["JobState"] == "FAILED", job.output()
    assert (job.finish()["Restarts"], job.finish()["ExitCode"]) == ("1", "1:0")
    assert "slurm: restarts in a row without a new checkpoint: 1" in job.output()


@needs_slurm
def test_restarts_that_bring_checkpoints_do_not_count(scenes: Scenes) -> None:
    job: Job = scenes.progressing.result()
    assert job.finish()["JobState"] == "COMPLETED", job.output()
    assert job.finish()["Restarts"] == "2"


@needs_slurm
def test_commands_of_containers(scenes: Scenes) -> None:
    """What srun would be given; neither pyxis nor apptainer is there to run it."""
    clone = scenes.clone
    outputs = []
    for future in scenes.containers:
        job: Job = future.result()
        assert job.finish()["JobState"] == "COMPLETED", job.output()
        outputs.append(job.output())
    pyxis, apptainer = outputs
    node = f"bash {clone}/examples/slurm/node.sh"
    script = f"bash {clone}/examples/pretrain_7b.sh post prores"
    for output in outputs:
        assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1" in output
        assert script in output
    assert f"--container-image={clone}/prores.sqsh" in pyxis
    assert f"--container-mounts={clone}:{clone} " in pyxis
    assert f"{node} {script}" in pyxis
    assert f"{node} apptainer exec --nv --bind {clone}:{clone} --pwd {clone} " in apptainer
    assert f"{clone}/prores.sif {script}" in apptainer


def finish(code: int, before: str, state: str, directory: Path) -> str:
    """Ends a job whose output says what was before; gives what is said after that."""
    scontrol = directory / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$1" = show ] && echo "JobId=7 JobState={state} A=b"\n')
    scontrol.chmod(0o755)
    log = directory / "log"
    log.write_text(before)
    with log.open("a") as output:
        subprocess.run(
            ["bash", "-c", f"source examples/slurm/job.sh; MAX_RESTARTS=3; finish {code}"],
            cwd=REPOSITORY,
            env={
                "PATH": f"{directory}:{os.environ['PATH']}",
                "PRORES_HOME": ".",
                "SLURM_JOB_ID": "7",
            },
            stdout=output,
            stderr=output,
            timeout=30,
        )
    return log.read_text().removeprefix(before)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("RUNNING", "slurm: ended with code 75 (saved), queued again"),
        # The job has answered the signal before Slurm has delivered it everywhere.
        ("SIGNALING", "slurm: ended with code 75 (saved), queued again"),
        ("CANCELLED", "slurm: ended with code 75, as Slurm ends the job"),
    ],
)
def test_a_saved_job_is_queued_again_unless_slurm_ends_it(
    state: str, words: str, tmp_path: Path
) -> None:
    assert words in finish(75, "", state, tmp_path)


def test_lines_that_a_program_has_left_open_hide_nothing(tmp_path: Path) -> None:
    opened = "\n".join(
        [
            "slurm: start 0 of job 7 on n[1-2], now",
            "half a lineslurm: node 1 (n2) ended with code 2",
            "half a lineslurm: restarts in a row without a new checkpoint: 2",
            "half a lineslurm: start 1 of job 7 on n[1-2], now",
        ]
    )
    # Of the first start nothing counts but the restarts; of the second all does.
    assert "slurm: finished" in finish(0, f"{opened}\n", "RUNNING", tmp_path)
    saved = f"{opened}\nhalf a lineslurm: node 0 (n1) ended with code 75\n"
    said = finish(0, saved, "RUNNING", tmp_path)
    assert "slurm: ended with code 75 (saved), queued again" in said
    assert "slurm: restarts in a row without a new checkpoint: 3" in said


def test_a_node_tells_its_end_on_a_line_of_its_own() -> None:
    command = ["bash", "examples/slurm/node.sh", "bash", "-c", "printf 'half a line'; exit 75"]
    result = run(command, REPOSITORY, SLURM_NODEID="3", SLURMD_NODENAME="n4")
    assert result.returncode == 0
    assert result.stdout.splitlines() == ["half a line", "slurm: node 3 (n4) ended with code 75"]


@pytest.mark.parametrize(
    ("file", "arguments", "settings", "words"),
    [
        ("pretrain", ["examples/pretrain_130m.sh"], {}, "not in a Slurm job"),
        ("pretrain", ["examples/pretrain_130m.sh"], {"SLURM_JOB_ID": "1"}, "sbatch --output"),
        ("pretrain", [], {"DRY_RUN": "1"}, "no script to run"),
        ("pretrain", ["examples/no.sh"], {"DRY_RUN": "1"}, "examples/no.sh: no such script"),
        ("pretrain", ["examples/no.sh"], {"PRORES_HOME": "/tmp"}, "PRORES_HOME=/tmp"),
        ("pretrain", ["examples/pretrain_7b.sh"], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1"),
        ("pretrain-pyxis", ["examples/pretrain_7b.sh"], {"DRY_RUN": "1"}, "CONTAINER_IMAGE"),
        ("pretrain-apptainer", ["examples/pretrain_7b.sh"], {}, "CONTAINER_IMAGE"),
        (
            "pretrain-apptainer",
            ["examples/pretrain_7b.sh"],
            {"CONTAINER_IMAGE": "a.sif", "CONTAINER_COMMAND": "no-such-command"},
            "no-such-command: no such command",
        ),
        (
            "pretrain-pyxis",
            ["examples/pretrain_7b.sh"],
            {"CONTAINER_IMAGE": "a.sqsh", "DATA_DIR": "/no/data", "DRY_RUN": "1"},
            "DATA_DIR=/no/data",
        ),
        ("sweep", ["examples/depth_study.sh"], {"DRY_RUN": "1"}, "no job array"),
    ],
)
def test_wrong_settings_are_named_at_once(
    file: str, arguments: list[str], settings: dict[str, str], words: str
) -> None:
    command = ["bash", f"examples/slurm/{file}.sbatch", *arguments]
    result = run(command, REPOSITORY, timeout=240, **settings)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_what_the_container_has_to_see(tmp_path: Path) -> None:
    result = run(
        ["bash", "examples/slurm/pretrain-pyxis.sbatch", "examples/pretrain_130m.sh"],
        REPOSITORY,
        DRY_RUN="1",
        CONTAINER_IMAGE="prores.sqsh",
        CONTAINER_MOUNTS="/datasets:/data:ro",
        RUN_DIR=str(tmp_path / "run"),
        DATA_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    (mounts,) = re.findall(r"--container-mounts=(\S+)", result.stdout)
    assert mounts.replace("\\", "").split(",") == [
        f"{REPOSITORY}:{REPOSITORY}",
        f"{tmp_path}/run:{tmp_path}/run",
        f"{tmp_path}:{tmp_path}",
        "/datasets:/data:ro",
    ]
    assert not (tmp_path / "run").exists()
