"""Launch scripts start, restart and requeue runs, and say what they cannot work with."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import yaml

from mae_jax import distributed

LAUNCH = Path(__file__).parents[1] / "launch"


def refused(script: str, cwd: Path, status: int, *arguments: str, **environment: object) -> str:
    """Run a script, which must end with this status, and return its error stream."""
    env = os.environ | {name: str(value) for name, value in environment.items()}
    run = subprocess.run(
        ["bash", LAUNCH / script, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert run.returncode == status, run.stderr
    return run.stderr


def fake_python(path: Path, commands: str) -> Path:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_old_python_is_named_with_the_way_out(script, tmp_path):
    old = fake_python(tmp_path / "old python", "echo 3.9; exit 1")
    error = refused(script, tmp_path, 1, PYTHON=old, VENV=tmp_path / "venv")
    assert f"Python 3.11 or newer is needed, but {old} is 3.9." in error
    assert "Set PYTHON=" in error
    assert not (tmp_path / "venv").exists()


def test_python_without_venv_is_told_what_to_install(tmp_path):
    bare = fake_python(tmp_path / "python", "case $2 in *venv*) exit 1;; esac; echo 3.11")
    error = refused("quickstart.sh", tmp_path, 1, PYTHON=bare, VENV=tmp_path / "venv")
    assert "apt install python3.11-venv" in error


def test_folder_of_somebody_else_is_never_emptied(tmp_path):
    theirs = tmp_path / "venv" / "bin" / "precious"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    error = refused("quickstart.sh", tmp_path, 1, PYTHON=sys.executable, VENV="venv")
    assert f"{tmp_path}/venv was not made by launch/setup.sh" in error
    assert theirs.exists()


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        ("local.sh", {}, "the first argument is the number of hosts"),
        ("host.sh", {"XLA_PRESET": "fast"}, "XLA_PRESET=fast: there are gpu-overlap, gpu-fsdp"),
        ("host.sh", {"VENV": "/nowhere"}, "VENV=/nowhere: there is no /nowhere/bin/python"),
    ],
)
def test_what_is_to_be_corrected_ends_with_status_2(tmp_path, script, environment, words):
    assert words in refused(script, tmp_path, 2, **{"VENV": sys.prefix} | environment)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("cifar10",), ("camvid", "nowhere")])
def test_a_study_asks_what_is_missing_before_it_installs(tmp_path, arguments):
    error = refused("study.sh", tmp_path, 1, *arguments, VENV=tmp_path / "venv")
    assert "Which study?" in error and not (tmp_path / "venv").exists()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_installs_nothing(tmp_path, script):
    refused(script, tmp_path, 0, "--help", VENV=tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_hosts_that_saved_after_ctrl_c_say_so_by_their_status(tmp_path, number, status):
    (tmp_path / "bin").mkdir()
    saves = f"""#!{sys.executable}
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)  # Ctrl-C comes with it
signal.signal({number.value}, lambda *_: (time.sleep(0.5), os._exit({status})))
print("ready", file=sys.stderr, flush=True)
while True:
    time.sleep(0.1)
"""
    (tmp_path / "bin/python").write_text(saves)
    (tmp_path / "bin/python").chmod(0o755)
    command = ["env", f"VENV={tmp_path}", "bash", LAUNCH / "local.sh", "1"]
    hosts = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert hosts.stderr.readline() == "ready\n"
    os.killpg(hosts.pid, number)
    error = hosts.communicate(timeout=30)[1]
    assert hosts.returncode == status, error
    assert "before it could save" not in error
    assert "Run the same command again to continue" in error


@pytest.mark.parametrize("count", ["08", "00", "0", "two"])
def test_a_number_of_hosts_that_is_none_is_refused(tmp_path, count):
    error = refused("local.sh", tmp_path, 2, count, "--config=x", VENV=sys.prefix)
    assert f"is the number of hosts, not '{count}'" in error


def test_host_whose_whole_process_group_is_told_to_end_is_heard_to_its_last_word(tmp_path):
    (tmp_path / "bin").mkdir()
    # Short sleeps: one that was just forked may miss the signal to the group, and ends by itself.
    saves = """trap 'sleep 0.5; echo saved >&2; exit 75' TERM
        echo ready >&2; while :; do sleep 0.1 & wait; done"""
    fake_python(tmp_path / "bin/python", saves)
    command = ["env", f"VENV={tmp_path}", "bash", LAUNCH / "host.sh"]
    host = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert host.stderr.readline() == "ready\n"
    os.killpg(host.pid, signal.SIGTERM)
    assert host.communicate(timeout=30)[1] == "saved\n"
    assert host.returncode == distributed.PREEMPTED


@pytest.mark.parametrize("preset", ["gpu-overlap", "gpu-fsdp", "gpu-deterministic"])
def test_gpu_presets_are_flags_that_this_xla_knows(preset):
    """XLA aborts at an unknown flag on any device. TPU flags are checked by libtpu."""
    code = f'source launch/xla_flags.sh; xla_preset {preset}; "$0" -c "import jax; jax.devices()"'
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run(["bash", "-c", code, sys.executable], cwd=LAUNCH.parent, env=env, check=True)


SRUN = """#!/bin/bash
# Stands for srun: two processes with the variables that Slurm sets. SIGTERM kills both.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  tasks+=($!)
done
worst=0
echo "${tasks[@]}" > "$(dirname "$0")/tasks"
trap 'kill -KILL "${tasks[@]}"; exit 143' TERM
for task in "${tasks[@]}"; do
  wait "$task"
  status=$?
  ((status <= worst)) || worst=$status
done
exit "$worst"
"""


def slurm(folder: Path, *command: str) -> list[str]:
    """Return the command that sbatch would run, with stand-ins for Slurm's commands."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "scontrol: $@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = (hosts.free_port() % 2**12) + 2**12  # JAX derives the port from it
    path = f"PATH={folder}:{os.environ['PATH']}"
    return ["env", path, f"SLURM_JOB_ID={job}", "bash", "launch/slurm.sh", *command]


def test_slurm_job_saves_before_its_time_is_over_and_queues_itself_again(tmp_path):
    """The processes find each other by Slurm's variables, and one of them gets SIGTERM."""
    assert "\n#SBATCH --signal=TERM@180\n" in (LAUNCH / "slurm.sh").read_text()  # to the processes
    workdir = tmp_path / "run"
    run = hosts.Processes([slurm(tmp_path, *hosts.flags(tmp_path, workdir))], 1)
    run.until(lambda: len(hosts.logged(workdir)) > 2)
    os.kill(int((tmp_path / "tasks").read_text().split()[0]), signal.SIGTERM)
    assert run.end() == [distributed.PREEMPTED], run.text()
    assert "2 host(s)" in run.text()
    assert "scontrol: requeue" in run.text()
    saved = str(hosts.logged(workdir)[-1]["step"])
    assert (workdir / "checkpoints" / saved).is_dir()


@pytest.mark.parametrize(
    "ends, status, words",
    [
        ("exit 0", 0, ""),
        ("exit 75", 75, "requeue"),
        ("[ $SLURM_PROCID = 1 ] && exit 2; exit 75", 2, "process 1 failed with status 2"),
        ("[ $SLURM_PROCID = 0 ] && kill -KILL $PPID; exit 75", 75, "requeue"),
    ],
)
def test_slurm_job_is_queued_again_unless_a_process_had_an_error(tmp_path, ends, status, words):
    (tmp_path / "bin").mkdir()
    fake_python(tmp_path / "bin/python", ends)
    command = ["env", f"VENV={tmp_path}", *slurm(tmp_path)]
    run = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stderr
    assert words in run.stdout + run.stderr
    assert ("requeue" in run.stdout) == (status == distributed.PREEMPTED)
    assert not list(LAUNCH.parent.glob("slurm-*.ended"))


@pytest.mark.parametrize(
    ("cwd", "environment", "words"),
    [
        ("elsewhere", "A=b", "no launch/host.sh in .*: submit from the root of the checkout"),
        (".", "MAX_RESTARTS=5O", "MAX_RESTARTS=5O: write a number"),
    ],
)
def test_slurm_job_that_can_never_start_is_not_queued_again(tmp_path, cwd, environment, words):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / cwd if cwd != "." else LAUNCH.parent
    *variables, _, _ = slurm(tmp_path)
    command = [*variables, environment, "bash", LAUNCH / "slurm.sh"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and re.search(words, run.stderr), run.stderr
    assert "requeue" not in run.stdout


def test_slurm_process_that_waits_for_the_others_in_vain_is_to_be_started_again(tmp_path):
    job = slurm(
        tmp_path, *hosts.flags(tmp_path, tmp_path / "run"), "--config.hosts.connect_seconds=3"
    )
    (tmp_path / "srun").write_text(SRUN.replace("for i in 0 1", "for i in 0"))
    run = hosts.Processes([job], 1)
    assert run.end() == [distributed.PREEMPTED], run.text()
    assert "not all hosts came" in run.text() and "scontrol: requeue" in run.text()


@pytest.mark.parametrize("name, slices", [("single-slice", 1), ("multi-slice", 2)])
def test_jobset_has_what_a_tpu_slice_on_kubernetes_needs(name, slices):
    jobset = yaml.safe_load((LAUNCH / f"gke/{name}.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == slices
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    machines = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == machines
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert container["command"] == ["bash", "launch/host.sh"]
    assert "--distributed" in container["args"]
    # What a restart cures is restarted; what it does not is not.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert distributed.PREEMPTED not in rule["onExitCodes"]["values"]
