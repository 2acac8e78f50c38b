"""Processes that train: killed at any time, two in one folder, a parent that is gone, Ctrl-C."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from cpu_cases import isolated_environment
from test_sparse_flow import RUN, make_flow, run, same, small_set

from sparseflow_kernels.training import FolderInUseError, sparse_flow, train
from sparseflow_kernels.training.lock import locked_file, locked_folder
from sparseflow_kernels.training.processes import run_in_processes

LONG = {**RUN, "epochs": 6}
SWEEP = ["sweep", "gaussians", "--net", "cnf_l2_h8", "--rows", "200", "--batch", "100", "--repetitions", "2", "--keeps",
         "0.5", "--jobs", "2", "--epochs", "100000", "--folder", "here"]  # fmt: skip


def start(*arguments, **options):
    """A Python of its own, in a session of its own, as a terminal's command is in a group of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = isolated_environment(OMP_NUM_THREADS="1")
    command = [sys.executable, "-P", *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, start_new_session=True, preexec_fn=_hears_ctrl_c, **pipes, **options
    )


def _hears_ctrl_c():
    """Though these tests may run in the background, where SIGINT is ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(ready, process=None, seconds=240):
    end = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def holder(path):
    """What a lock file says, None where there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def is_free(folder):
    try:
        with locked_folder(folder):
            return True
    except FolderInUseError:
        return False


# ------------------------------------------------------------------------------------------------------ killed, resumed

STEPPING = """
import torch
torch.set_num_threads(1)
from test_processes import *

def progress(facts):
    print(facts["cycle"], facts["step"], flush=True)

list(sparse_flow(make_flow(), small_set(), (0.5,), folder={folder!r}, progress=progress, **LONG))
"""


def test_training_killed_at_any_moment_comes_to_the_same_bits(tmp_path):
    straight = list(sparse_flow(make_flow(), small_set(), (0.5,), **LONG))
    steps = 2 * 6 * 3
    moment = random.SystemRandom().randrange(1, steps)
    with start("-c", STEPPING.format(folder=str(tmp_path))) as process:
        for _ in range(moment):
            assert process.stdout.readline(), process.stderr.read()
        time.sleep(random.SystemRandom().random() * 0.01)  # within a step, or a write
        process.kill()
    assert process.returncode == -signal.SIGKILL
    # Another start shows that training goes on from a checkpoint; where none was written yet, it starts anew.
    seed = 3 if any(tmp_path.glob("cycle_*.safetensors")) else 0
    resumed = list(sparse_flow(make_flow(seed), small_set(), (0.5,), folder=tmp_path, **LONG))
    assert all(same(a.flow, b.flow) for a, b in zip(straight, resumed, strict=True)), f"killed after step {moment}"
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"cycle_00.safetensors", "cycle_01.safetensors"}


def test_what_a_kill_between_two_files_leaves_is_removed(tmp_path):
    finished = list(sparse_flow(make_flow(), small_set(), (0.5,), folder=tmp_path, **RUN))
    left = [tmp_path / name for name in ("cycle_00.running.safetensors", ".cycle_01.running.safetensors.x.safetensors")]
    for path in left:
        path.write_bytes((tmp_path / "cycle_00.safetensors").read_bytes())
    again = list(sparse_flow(make_flow(seed=3), small_set(), (0.5,), folder=tmp_path, **RUN))
    assert all(cycle.resumed for cycle in again) and same(again[-1].flow, finished[-1].flow)
    assert not any(path.exists() for path in left)


# ----------------------------------------------------------------------------------------------- two in the same folder

WAITING = """
import os, sys, torch
torch.set_num_threads(1)
from test_processes import *

def progress(facts):
    if facts["cycle"] == 0 and facts["step"] == 2:
        print("training", flush=True)
        sys.stdin.readline()

list(sparse_flow(make_flow(), small_set(), (0.5,), folder={folder!r}, progress=progress, **RUN))
"""


def test_the_second_process_in_a_folder_is_told_and_the_first_goes_on(tmp_path):
    with start("-c", WAITING.format(folder=str(tmp_path))) as process:
        assert process.stdout.readline() == "training\n", process.stderr.read()
        flow, before = make_flow(seed=5), make_flow(seed=5)
        words = rf"process {process.pid} on \S+, since \d{{4}}-.*trains in {tmp_path}"
        with pytest.raises(FolderInUseError, match=words):
            list(sparse_flow(flow, small_set(), (0.5,), folder=tmp_path, **RUN))
        assert same(flow, before)
        _, errors = process.communicate("go on\n", timeout=240)
    assert process.returncode == 0, errors
    straight = list(sparse_flow(make_flow(), small_set(), (0.5,), **RUN))
    found = list(sparse_flow(make_flow(seed=5), small_set(), (0.5,), folder=tmp_path, **RUN))
    assert all(cycle.resumed for cycle in found) and same(found[-1].flow, straight[-1].flow)
    assert {path.name for path in tmp_path.iterdir()} == {"cycle_00.safetensors", "cycle_01.safetensors"}


HOLDING = """
import contextlib, sys
from sparseflow_kernels.training.lock import locked_file, locked_folder
with contextlib.ExitStack() as stack:
    for folder in {folders!r}:
        stack.enter_context(locked_folder(folder))
    stack.enter_context(locked_file({file!r}))
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_every_command_says_who_is_at_its_folder_and_a_dead_one_is_no_obstacle(tmp_path):
    pytest.importorskip("matplotlib")
    net = ["gaussians", "--net", "cnf_l2_h8", "--rows", "100", "--eval-rows", "50", "--epochs", "1"]
    run("train", *net, "--folder", tmp_path / "trained")
    file = tmp_path / "own.safetensors"
    folders = {
        tmp_path / "train" / "seed_0" / "dense": ["train", *net, "--folder", tmp_path / "train"],
        tmp_path / "sweep": ["sweep", *net, "--folder", tmp_path / "sweep"],
        tmp_path / "prune": ["prune", tmp_path / "trained", "--keep", "0.5", "--out", tmp_path / "prune"],
        tmp_path / "paper": ["paper", "toy", "--quick", "--folder", tmp_path / "paper"],
        tmp_path / "demo": ["demo", "--quick", "--out", tmp_path / "demo"],
    }
    with start("-c", HOLDING.format(folders=[str(folder) for folder in folders], file=str(file))) as process:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        for folder, arguments in folders.items():
            printed = run(*arguments, code=1)
            assert f"process {process.pid} on " in printed and f"trains in {folder}" in printed, printed
            assert [path.name for path in folder.iterdir()] == ["lock.json"]
        with pytest.raises(FolderInUseError, match=f"process {process.pid} on "):
            train(make_flow(), small_set(), checkpoint=file, **RUN)
        process.kill()
    assert all((folder / "lock.json").exists() for folder in folders)  # left behind by the dead one
    run("train", *net, "--folder", tmp_path / "train")
    run("prune", tmp_path / "trained", "--keep", "0.5", "--out", tmp_path / "prune")
    train(make_flow(), small_set(), checkpoint=file, **RUN)
    assert {path.parent.name for path in tmp_path.rglob("*lock*")} == {"sweep", "paper", "demo"}  # not run again


def test_a_lock_is_for_one_thread_and_calls_inside_one_another(tmp_path):
    with locked_folder(tmp_path), locked_file(tmp_path / "a.safetensors"):
        with locked_folder(tmp_path / ".." / tmp_path.name):
            assert holder(tmp_path / "lock.json")["pid"] == os.getpid()
        assert (tmp_path / "lock.json").exists()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(is_free(tmp_path)))
        thread.start()
        thread.join()
        assert seen == [False]
    assert list(tmp_path.iterdir()) == []


def test_a_child_made_by_fork_does_not_count_as_the_holder(tmp_path):
    with locked_folder(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(int(is_free(tmp_path)))
        assert os.waitpid(child, 0)[1] == 0
        assert holder(tmp_path / "lock.json")["pid"] == os.getpid()


def test_a_loop_that_was_left_in_the_middle_does_not_lock_its_own_process_out(tmp_path):
    left = sparse_flow(make_flow(), small_set(), (0.5,), folder=tmp_path, **RUN)
    next(left)
    again = list(sparse_flow(make_flow(), small_set(), (0.5,), folder=tmp_path, **RUN))
    assert [cycle.resumed for cycle in again] == [True, False]
    left.close()
    assert is_free(tmp_path) and not (tmp_path / "lock.json").exists()


def test_a_file_system_without_locks_is_told_and_a_folder_nobody_can_write_needs_none(tmp_path, monkeypatch):
    import fcntl

    def refusing(number):
        def call(*arguments):
            raise OSError(number, os.strerror(number))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
        with pytest.warns(UserWarning, match="file system without locks"), locked_folder(tmp_path):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(errno.EROFS))
        with locked_folder(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- workers, their parent, and Ctrl-C


def _double(task, tell):
    if task < 0:
        raise ValueError(f"{task} is negative")
    tell(torch.get_num_threads())
    if task == 3:
        os._exit(7)
    return 2 * task


def test_work_in_processes_returns_tells_and_fails_one_by_one():
    told = []
    done, failed = run_in_processes(_double, [1, -2, 3], 2, lambda index, value: told.append((index, value)))
    assert done == {0: 2} and failed == {1: "ValueError: -2 is negative", 2: "the process ended with status 7"}
    assert (0, 1) in told


def sweeping(tmp_path):
    """A sweep with a worker for each of two seeds, and their lock files, when both train."""
    process = start("-m", "sparseflow_kernels", *SWEEP, cwd=tmp_path)
    locks = [tmp_path / "here" / f"seed_{seed}" / "dense" / "lock.json" for seed in range(2)]
    until(lambda: all(lock.with_name("cycle_00.running.safetensors").exists() for lock in locks), process)
    return process, locks


def test_ctrl_c_ends_a_sweep_and_says_how_to_go_on(tmp_path):
    process, locks = sweeping(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert len(errors.strip().splitlines()) == 2, errors[-3000:]
    words, again = errors.strip().splitlines()
    assert words == "stopped; every finished epoch is in here. To go on, run the same command again:"
    assert again.split()[1:] == ["-P", "-m", "sparseflow_kernels", *SWEEP]
    assert not any(path.exists() for path in locks)


def test_workers_end_with_a_killed_parent(tmp_path):
    process, locks = sweeping(tmp_path)
    workers = [holder(lock)["pid"] for lock in locks]
    assert process.pid not in workers and len(set(workers)) == 2
    process.kill()
    process.communicate(timeout=240)  # the workers hold its pipes, too
    until(lambda: all(is_free(lock.parent) for lock in locks), seconds=60)
