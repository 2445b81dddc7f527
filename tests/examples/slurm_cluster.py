"""Slurm itself on this machine: munged, slurmctld and a slurmd for each of several nodes.

All nodes are this host, on ports of their own; each claims eight GPUs, which nobody looks at. The
daemons live in one directory and know of no other cluster. A reaper ends them and all that their
jobs have left, also when the process that made them is killed: it is this module as a program.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

KILL_WAIT = 5
"""Seconds from SIGTERM to SIGKILL; Slurm's default is 30."""

NODE_TIMEOUT = 10
"""Seconds without an answer until a node is given up, SlurmdTimeout; Slurm's default is 300."""

REQUEUE_DELAY = 11
"""Seconds until a job that was queued again may start: cred_expire and one; by default 121."""

GOES_ON = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")
"""The states of a job that has not ended for good; SIGNALING while a signal is on its way to it."""

DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIGURATION = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire={cred_expire}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
MinJobAge=86400
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Says why no cluster can be brought up here; None where one can."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if _find(name) is None]
    if not absent:
        return None
    return f"Slurm is not installed ({', '.join(absent)}): see tests/install_cluster_tools.sh"


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def eventually(what: str, happened: Callable[[], object], seconds: float) -> None:
    """Waits until something is the case.

    Raises:
        TimeoutError: It was not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


class Cluster:
    """A cluster of nodes n1, n2, ..., to be used as a context manager."""

    def __init__(self, nodes: int) -> None:
        """Takes the number of nodes; nothing is started yet."""
        # The paths of sockets are short.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(self.root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, str(self.root)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Cluster:
        """Brings it up.

        Raises:
            RuntimeError: It did not come up; with the daemons' last words.
        """
        try:
            self._configure()
            munge = self.root / "munge"
            files = [f"--{name}-file={munge}.{name}" for name in ("key", "pid", "log", "seed")]
            socket_path = f"--socket={munge}.socket"
            self._start("munged", "--foreground", "--force", socket_path, *files)
            eventually("munged", (self.root / "munge.socket").exists, 30)
            self._start("slurmctld", "-D", "-c")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node, name=node)
            eventually("all nodes idle", self._all_idle, 60)
        except BaseException as error:
            words = self._last_words()
            self.stop()
            if isinstance(error, (OSError, TimeoutError)):
                raise RuntimeError(f"Slurm did not come up: {error}\n{words}") from error
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _configure(self) -> None:
        for name in ("state", "log"):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for number in range(8):
            (self.root / f"gpu{number}").symlink_to("/dev/null")
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-7]\n")
        # Not for the reaper, which runs this file without the project around it.
        from tests.distributed.launch import free_port

        controller_port, *ports = (free_port() for _ in range(1 + len(self.nodes)))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            " CPUs=4 Gres=gpu:8"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        configuration = CONFIGURATION.format(
            root=self.root,
            user=getpass.getuser(),
            controller_port=controller_port,
            # The launcher's port follows from the job: two clusters on one host want others.
            first_job=random.randrange(1000, 14000),
            nodes=nodes,
            node_timeout=NODE_TIMEOUT,
            kill_wait=KILL_WAIT,
            cred_expire=REQUEUE_DELAY - 1,
        )
        (self.root / "slurm.conf").write_text(configuration)

    def _start(self, program: str, *arguments: str, name: str = "") -> None:
        path = _find(program)
        assert path is not None, missing()
        with (self.root / "log" / f"{name or program}.out").open("ab") as output:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _all_idle(self) -> bool:
        states = self.command("sinfo", "-h", "-N", "-o", "%T", check=False).split()
        return len(states) == len(self.nodes) and set(states) == {"idle"}

    def _last_words(self) -> str:
        logs = sorted((self.root / "log").glob("*")) if (self.root / "log").exists() else []
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def stop(self) -> None:
        """Takes it down, and with it every process that its jobs have left."""
        self._reaper.communicate()
        for daemon in self._daemons.values():
            daemon.wait()

    def command(
        self,
        *words: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] = os.environ,
        check: bool = True,
    ) -> str:
        """Runs a command of Slurm, or any other, as a user of this cluster; gives its output."""
        result = subprocess.run(
            words,
            cwd=cwd,
            env={**environment, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{words} ended with {result.returncode}: {result.stderr}")
        return result.stdout

    def job(self, job: str) -> dict[str, str]:
        """Gives what Slurm knows of a job, such as its JobState, ExitCode and Restarts."""
        words = self.command("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait_for(self, job: str, seconds: float) -> dict[str, str]:
        """Waits until a job has ended for good, and gives what Slurm knows of it."""
        eventually(f"end of job {job}", lambda: self.job(job)["JobState"] not in GOES_ON, seconds)
        return self.job(job)

    def nodes_of(self, job: str) -> list[str]:
        """Names the nodes of a running job, that of the batch script first."""
        return self.command("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def ranks_of(self, job: str, rank: int) -> list[int]:
        """Finds the processes of one rank of a job's run: torchrun gives them their RANK."""
        return sorted(_processes(self.root, f"SLURM_JOB_ID={job}", f"RANK={rank}"))

    def first_of(self, pids: list[int]) -> list[int]:
        """Leaves out those that others of them have started; numbers tell nothing, they wrap."""
        return [pid for pid in pids if int(_status(pid, "PPid")) not in pids]

    def _all_of(self, node: str) -> list[int]:
        """Finds a node's slurmd, the processes of its jobs, and the slurmstepds above them."""
        tasks = set(_processes(self.root, f"SLURMD_NODENAME={node}"))
        parents = {int(_status(pid, "PPid")) for pid in tasks} - tasks - {0, 1, os.getpid()}
        return [self._daemons[node].pid, *tasks, *parents]

    def kill(self, node: str) -> None:
        """Kills all that runs on a node, at once; its connections are closed, as by a reset."""
        for pid in self._all_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def freeze(self, node: str) -> None:
        """Stops all that runs on a node: connections stay, and nobody answers any more."""
        for pid in self._all_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)


def _processes(root: Path, *variables: str) -> Iterable[int]:
    """Finds the processes of a cluster whose environment has all of ``NAME=VALUE`` as well."""
    wanted = {f"SLURM_CONF={root}/slurm.conf", *variables}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().decode(errors="replace")
            if wanted <= set(environment.split("\0")):
                yield int(entry.name)


def _status(pid: int, field: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return line.split()[1]
    return "0"


def _reap(root: Path) -> None:
    """Waits for the end of the process that brought a cluster up, and leaves nothing of it."""
    sys.stdin.read()
    while left := list(_processes(root)):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    _reap(Path(sys.argv[1]))
