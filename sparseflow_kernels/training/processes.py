"""Work in processes of its own, so many at a time, one thread each; they end when this one does, however it ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Callable, Iterator, Sequence

import torch

from ..threads import set_num_threads

Tell = Callable[[Any], None]

_POLL = 0.5  # seconds between two looks at whether the parent is there
_PATIENCE = 5.0  # seconds for a process that is told to end


def run_in_processes(
    work: Callable[[Any, Tell], Any], tasks: Sequence[Any], processes: int,
    tell: Callable[[int, Any], None] | None = None,
) -> tuple[dict[int, Any], dict[int, str]]:  # fmt: skip
    """Do `work(task, tell)` for every task, at most so many at a time: ({task's index: what it returned}, {index: error
    text of those that failed}; the others go on).

    work: a function a new process can import.  tell: called here with the index and each value that the work tells.
    A KeyboardInterrupt, and any other error here, ends the processes.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    waiting = list(range(len(tasks)))
    running: dict[Any, tuple[Any, int]] = {}  # by the pipe that a process answers through
    done: dict[int, Any] = {}
    failed: dict[int, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(work, tasks[waiting[0]], send, os.getpid()), daemon=True
                )
                with _no_interrupt():
                    process.start()
                send.close()
                running[receive] = (process, waiting.pop(0))
            answers: list[Any] = multiprocessing.connection.wait(list(running), timeout=1.0)
            for pipe in answers:
                process, index = running[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    process.join()
                    del running[pipe]
                    if index not in done and index not in failed:
                        failed[index] = f"the process ended with status {process.exitcode}"
                    continue
                if kind == "done":
                    done[index] = value
                elif kind == "error":
                    failed[index] = value
                elif tell is not None:
                    tell(index, value)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(_PATIENCE)
            process.kill()
            process.join()
    return done, failed


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which the terminal sends to all of them: their parent ends them."""
    resource_tracker.ensure_running()  # which the first process would start, and it lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(
    work: Callable[[Any, Tell], Any], task: Any, pipe: multiprocessing.connection.Connection, parent: int
) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    told_to_end = False

    def end(*_: Any) -> None:
        nonlocal told_to_end
        told_to_end = True
        sys.exit(1)  # an exception: what is held is let go of

    signal.signal(signal.SIGTERM, end)
    torch.set_num_threads(1)
    set_num_threads(1)
    try:
        try:
            message = ("done", work(task, lambda value: pipe.send(("told", value))))
        except Exception as error:  # noqa: BLE001 - told to the parent, whatever it is
            message = ("error", f"{type(error).__name__}: {error}")
        pipe.send(message)
    except BaseException:
        # Nobody wants to hear of what ending has become on its way here, and taking torch down in order takes a second.
        if told_to_end:
            os._exit(1)
        raise


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: nobody reads what it tells, and its files are whole at any time. A
    process that was killed can tell nobody, and not every system has a signal for that, so it is looked for."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)
