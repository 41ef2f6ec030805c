"""launch/slurm.sh under a real Slurm with two nodes; see run.sh beside this file."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import hosts
import pytest

ROOT = Path(__file__).parents[2]

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SchedulerParameters=bf_interval=5,sched_min_interval=1000000
NodeName=mae-one NodeHostname={host} Port={ports[1]} CPUs={cores} RealMemory=1000
NodeName=mae-two NodeHostname={host} Port={ports[2]} CPUs={cores} RealMemory=1000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A controller and two nodes; SLURM_CONF of this process names them."""
    folder = tmp_path_factory.mktemp("slurm")
    shutil.chown(folder, "root", "root")
    folder.chmod(0o755)
    for parent in folder.parents[:3]:
        parent.chmod(0o755)
    ports = [hosts.free_port() for _ in range(3)]
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, folder=folder, ports=ports, cores=os.cpu_count())
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    here = [f"--{x}-file={folder}/munge.{x}" for x in ("pid", "log", "seed", "key")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *here]
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []
    for command in (
        munged,
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "mae-one"],
        ["slurmd", "-D", "-N", "mae-two"],
    ):
        with open(folder / "daemons.log", "a") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        time.sleep(1)
    names = Path("/etc/hosts").read_text()  # the processes find each other by them
    Path("/etc/hosts").write_text(f"{names}127.0.0.1 mae-one mae-two\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", environment["SLURM_CONF"])
        patch.setenv("MUNGE_SOCKET", f"{folder}/munge.socket")
        until(lambda: asked("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", 60)
        yield folder
        asked("scancel", "--user=root")
        until(lambda: asked("squeue", "-h").strip() == "", 60)
    Path("/etc/hosts").write_text(names)
    for daemon in daemons[::-1]:
        daemon.kill()
        daemon.wait()


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until(condition, seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, asked("squeue") + asked("sinfo")
        time.sleep(0.5)


class Job:
    """A job of `launch/slurm.sh` on both nodes, one process on each."""

    def __init__(self, folder: Path, *flags: str, options: tuple[str, ...] = ()):
        folder.mkdir()
        self.workdir, self.log = folder / "run", folder / "log"
        own = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        command = ["launch/slurm.sh", *hosts.flags(folder, self.workdir), *flags]
        environment = {**hosts.environment(1), "SLURM_EXPORT_ENV": "ALL"}
        output = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.log}", *own, *options, *command],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert output.returncode == 0, output.stderr
        self.number = output.stdout.strip()

    def fact(self, name: str) -> str:
        return re.search(rf"\b{name}=(\S*)", asked("scontrol", "show", "job", self.number))[1]

    def until_step(self, step: int) -> None:
        until(lambda: any(x["step"] >= step for x in hosts.logged(self.workdir)))

    def until_ended(self, state: str) -> None:
        until(lambda: self.fact("JobState") == state)


def process_of(job: Job, number: int) -> int:
    """Return the process of `mae-jax train` that Slurm started as task `number`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            facts = (folder / "environ").read_text().split("\0")
        except OSError:
            continue  # ended meanwhile
        if {"mae_jax", f"--workdir={job.workdir}"} <= set(
            words
        ) and f"SLURM_PROCID={number}" in facts:
            return int(folder.name)
    raise AssertionError(f"no process of task {number}")


def saved(job: Job) -> int:
    names = [path.name for path in (job.workdir / "checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdigit())


def assert_saves_and_goes_on(job: Job) -> None:
    """Check that a job that is put back into the queue saved its last step, and goes on there."""
    until(lambda: job.fact("Restarts") == "1")
    step = saved(job)
    assert hosts.logged(job.workdir)[-1]["step"] == step
    job.until_step(step + 5)
    assert f"resumed at step {step}" in job.log.read_text()


LONG = "--config.train_for=1000000 steps"


def test_a_killed_process_puts_the_job_back_and_it_ends(cluster, tmp_path):
    steps = 400
    job = Job(tmp_path / "killed", f"--config.train_for={steps} steps")
    job.until_step(5)
    os.kill(process_of(job, 1), signal.SIGKILL)
    until(lambda: job.fact("Restarts") == "1")
    job.until_ended("COMPLETED")
    assert "resumed at step" in job.log.read_text()
    assert [x["step"] for x in hosts.logged(job.workdir)] == list(range(1, steps + 1))


def test_a_job_saves_before_its_time_is_over_and_goes_on(cluster, tmp_path):
    # A limit is a minute at least, and Slurm may signal up to a minute early.
    job = Job(tmp_path / "limit", LONG, options=("--time=2", "--signal=TERM@60"))
    assert_saves_and_goes_on(job)
    asked("scancel", job.number)
    job.until_ended("CANCELLED")


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, tmp_path):
    job = Job(tmp_path / "cancelled", LONG)
    job.until_step(5)
    asked("scancel", job.number)
    job.until_ended("CANCELLED")
    until(lambda: asked("squeue", "-h").strip() == "", 60)
    assert saved(job) == hosts.logged(job.workdir)[-1]["step"]
    assert job.fact("Restarts") == "0"


def test_a_job_that_gives_way_to_another_goes_on_after_it(cluster, tmp_path):
    job = Job(tmp_path / "preempted", LONG)
    job.until_step(5)
    other = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    asked("sbatch", *other)
    assert_saves_and_goes_on(job)
    asked("scancel", job.number)
