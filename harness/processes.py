"""Work that not every process does: all of them hear what came of it, or the error.

Otherwise the others would wait in the next collective for a process that is gone. Every function
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

ALONE = SimpleNamespace(  # an accelerator's place, for work that no other process shares
    num_processes=1, process_index=0, local_process_index=0, is_main_process=True,
    is_local_main_process=True,
)  # fmt: skip
ASK_SECONDS = 5  # how often those who wait for another process's work ask for it


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_main(accelerator, action, failure=None):
    """What `action()` gives, on the main process, which does it; None on the others.

    failure: words; an OSError is then a RunStopped on all, "failure: why".
    """
    return _do(accelerator, accelerator.is_main_process, action, failure)


def from_main(accelerator, action, patient=False):
    """What `action()` gives on the main process, on all: anything that can be pickled.

    patient: it may take longer than a collective may wait, see `in_turn`.
    """
    with _patience(accelerator) if patient else contextlib.nullcontext():
        result, error = _attempt(action) if accelerator.is_main_process else (None, None)
    _raise_on_all(accelerator, error)
    return broadcast_object_list([result])[0] if accelerator.num_processes > 1 else result


def from_each(accelerator, action) -> list:
    """What `action()` gives on each process, in their order, on all. It may take hours."""
    if accelerator.num_processes == 1:
        return [action()]
    with _patience(accelerator):
        result, error = _attempt(action)
    _raise_on_all(accelerator, error)
    return gather_object([result])


def in_turn(accelerator, action):
    """What `action()` gives: done by one process of each machine first, then by the others.

    So that the others find in a cache what the first has put there. It may take hours: those who
    wait ask every few seconds, as no collective may wait longer than its timeout.
    """
    result = None
    for first in (True, False):
        turn = accelerator.is_local_main_process == first
        with _patience(accelerator):
            mine, error = _attempt(action) if turn else (None, None)
        _raise_on_all(accelerator, error)
        result = mine if turn else result
    return result


def from_local_main(accelerator, action):
    """What `action()` gives on one process of each machine, on all of that machine.

    It is handed over in a temporary file, which may be large (the list of a million images).
    """
    if accelerator.num_processes == 1:
        return action()
    here = accelerator.is_local_main_process
    result = path = None
    with _patience(accelerator):
        result, error = _attempt(action) if here else (None, None)
    _raise_on_all(accelerator, error)
    try:
        if here:
            path, error = _attempt(lambda: _put_away(result), "handing a result to processes")
        _raise_on_all(accelerator, error)
        paths = gather_object([path])
        own = paths[accelerator.process_index - accelerator.local_process_index]
        if not here:
            result, error = _attempt(lambda: _taken(own), "a result of another process")
        _raise_on_all(accelerator, error)
    finally:
        if path:
            os.unlink(path)
    return result


def only_process(accelerator, script):
    """Raise UserError, on all, where several processes were started for work of one."""
    if accelerator.num_processes > 1:
        raise UserError(f"{script} is the work of one process: python {script} RUN")


def check_same(accelerator, facts):
    """Raise UserError, on all, unless all processes have the same {name: value}.

    "dataset", a path perhaps, may differ where "content" says that the images are the same.
    """
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
    own = accelerator.process_index - accelerator.local_process_index
    firsts = from_each(accelerator, lambda: own)
    return sorted(set(firsts)).index(own), len(set(firsts)), firsts.count(own)


def _put_away(result):
    handle, path = tempfile.mkstemp(prefix="from-local-main-")
    with open(handle, "wb") as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    return path


def _taken(path):
    with open(path, "rb") as file:
        return pickle.load(file)


def _do(accelerator, here, action, failure=None):
    result, error = _attempt(action, failure) if here else (None, None)
    _raise_on_all(accelerator, error)
    return result


def _attempt(action, failure=None):
    """(result, None) or (None, the error that all processes shall hear)."""
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
    for host, error in errors:
        if type(error) is UserError and host not in (None, socket.gethostname()):
            raise UserError(f"{error} (on {host})")
        if error is not None:
            raise error


@contextlib.contextmanager
def _patience(accelerator):
    """Leave the block when all processes have come to its end, however long one takes."""
    if accelerator.num_processes == 1:  # no thread: MPS crashes where two issue work
        yield
        return
    done = threading.Event()
    asking = threading.Thread(target=_ask_until_all, args=(done, accelerator), daemon=True)
    asking.start()
    try:
        yield
    finally:
        done.set()
        asking.join()


def _ask_until_all(done, accelerator):
    """Return when the event `done` is set on all processes."""
    left = 1
    with contextlib.suppress(RuntimeError):  # one is lost: the script's next collective says it
        while left:
            here = float(not done.wait(ASK_SECONDS))
            left = accelerator.reduce(torch.tensor(here, device=accelerator.device), "sum").item()
