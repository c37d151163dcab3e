"""Work that only some processes do: all of them learn whether it succeeded.

Otherwise the others would wait in the next collective for a process that has ended. Every function
here is called by all processes; a UserError of any of them is raised on all.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import tempfile
import threading
from types import SimpleNamespace

import torch
from accelerate.utils import broadcast_object_list, gather_object

from harness.errors import RunStopped, UserError, shortened

ALONE = SimpleNamespace(  # in an accelerator's place, for work of one process
    num_processes=1, process_index=0, local_process_index=0, is_main_process=True,
    is_local_main_process=True,
)  # fmt: skip
ASK_SECONDS = 5  # between two questions of processes that wait for another's work


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_main(accelerator, action, failure=None):
    """Run `action()` on the main process; returns its result there, None on the others.

    failure: a text; an OSError then becomes a RunStopped on all, "failure: error".
    """
    result, error = _attempt(action, failure) if accelerator.is_main_process else (None, None)
    _raise_on_all(accelerator, error)
    return result


def from_main(accelerator, action, patient=False):
    """Run `action()` on the main process; returns its result, which is pickled, on all.

    patient: it may take longer than a collective may wait, see `in_turn`.
    """
    with _patience(accelerator) if patient else contextlib.nullcontext():
        result, error = _attempt(action) if accelerator.is_main_process else (None, None)
    _raise_on_all(accelerator, error)
    return broadcast_object_list([result])[0] if accelerator.num_processes > 1 else result


def from_each(accelerator, action) -> list:
    """Run `action()`, maybe for hours, on each process; returns all results in order, on all."""
    if accelerator.num_processes == 1:
        return [action()]
    with _patience(accelerator):
        result, error = _attempt(action)
    _raise_on_all(accelerator, error)
    return gather_object([result])


def in_turn(accelerator, action):
    """Run `action()` on one process of each machine first, then on the others; returns its result.

    So the others find in a cache what the first has stored there. It may take hours: processes that
    wait ask every few seconds, as no collective may wait longer than its timeout.
    """
    result = None
    for is_local_main in (True, False):
        turn = accelerator.is_local_main_process == is_local_main
        with _patience(accelerator):
            turn_result, error = _attempt(action) if turn else (None, None)
        _raise_on_all(accelerator, error)
        result = turn_result if turn else result
    return result


def from_local_main(accelerator, action):
    """Run `action()` on one process of each machine; returns its result on all of that machine.

    The result passes through a temporary file, as it may be large (the list of a million images).
    """
    if accelerator.num_processes == 1:
        return action()
    is_local_main = accelerator.is_local_main_process
    result = path = None
    with _patience(accelerator):
        result, error = _attempt(action) if is_local_main else (None, None)
    _raise_on_all(accelerator, error)
    try:
        if is_local_main:
            path, error = _attempt(lambda: _store(result), "handing a result to processes")
        _raise_on_all(accelerator, error)
        paths = gather_object([path])
        machine_path = paths[accelerator.process_index - accelerator.local_process_index]
        if not is_local_main:
            result, error = _attempt(lambda: _load(machine_path), "a result of another process")
        _raise_on_all(accelerator, error)
    finally:
        if path:
            os.unlink(path)
    return result


def only_process(accelerator, script):
    """Raise UserError, on all, where several processes were started for the work of one."""
    if accelerator.num_processes > 1:
        raise UserError(f"{script} is the work of one process: python {script} RUN")


def check_same(accelerator, facts):
    """Raise UserError, on all, unless all processes have the same {name: value}.

    "dataset", a path perhaps, may differ where "content" says that the images are the same.
    """
    if accelerator.num_processes == 1:
        return
    texts = {name: repr(value) for name, value in facts.items()}
    if "content" in texts:
        texts.pop("dataset", None)
    (first_host, first), *others = from_each(accelerator, lambda: (socket.gethostname(), texts))
    for rank, (host, theirs) in enumerate(others, start=1):
        for name in first:
            if theirs.get(name) != first[name]:
                here, there = shortened(first[name]), shortened(str(theirs.get(name)))
                raise UserError(
                    f"process {rank} on {host} has {name} {there}, process 0 on {first_host} has "
                    f"{here}: all need the same flags and the same data"
                )


def machines(accelerator) -> tuple[int, int, int]:
    """(which machine this is, how many there are, how many processes it has)."""
    local_main = accelerator.process_index - accelerator.local_process_index
    local_mains = from_each(accelerator, lambda: local_main)
    numbers = sorted(set(local_mains))
    return numbers.index(local_main), len(numbers), local_mains.count(local_main)


def _store(result):
    handle, path = tempfile.mkstemp(prefix="from-local-main-")
    with open(handle, "wb") as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    return path


def _load(path):
    with open(path, "rb") as file:
        return pickle.load(file)


def _attempt(action, failure=None):
    """(result, None) or (None, the error to raise on all processes)."""
    try:
        return action(), None
    except UserError as error:
        return None, error
    except OSError as error:
        if failure is None:
            raise
        return None, RunStopped(f"{failure}: {error}")


def _raise_on_all(accelerator, error):
    if accelerator.num_processes == 1:
        errors = [(None, error)]
    else:
        errors = gather_object([(socket.gethostname(), error)])
    for host, process_error in errors:
        if type(process_error) is UserError and host not in (None, socket.gethostname()):
            raise UserError(f"{process_error} (on {host})")
        if process_error is not None:
            raise process_error


@contextlib.contextmanager
def _patience(accelerator):
    """Leave the block when all processes have reached its end, however long one takes."""
    if accelerator.num_processes == 1:  # no thread: MPS crashes where two of them issue work
        yield
        return
    end = threading.Event()
    thread = threading.Thread(target=_ask_until_all, args=(end, accelerator), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _ask_until_all(end, accelerator):
    """Return when the event `end` is set on all processes."""
    working = 1
    with contextlib.suppress(RuntimeError):  # a process is lost: the next collective raises it
        while working:
            is_working = float(not end.wait(ASK_SECONDS))
            flag = torch.tensor(is_working, device=accelerator.device)
            working = accelerator.reduce(flag, "sum").item()
