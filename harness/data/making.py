"""Files that all processes of a machine make together, once, while other runs wait for them."""

from __future__ import annotations

import os

from filelock import FileLock, Timeout

from harness.errors import UserError
from harness.processes import cores, from_each, from_local_main

WAIT_SILENTLY_S = 10


def make_together(accelerator, file, fault, begin, share, end, *, leave, made_by, failure):
    """See that `file` can be used: on each machine its processes make it, or wait for who does.

    Called by all processes; any number of runs may do so at once, as the file has a lock.

    Args:
        file: a Path; its folder is made.
        fault: () -> why the file can't be used: "" if it can, "none" where there is none.
        begin: () -> None, under the lock and before any work, on one process of the machine.
        share: (place, processes) -> what this process, one of so many of the machine, has made.
        end: (what each has made) -> None, on one process: now the file is there.
        made_by: what happens to the images, a participle: "decoded".
        leave: () -> None, whatever happened, before the lock is given back.
        failure: how the line begins when the disk refuses.

    Raises UserError, on all processes, where one of these functions does or the disk is full.
    """
    lock = task = shares = None
    made = False

    def on_disk(action):  # what fails there is heard by all processes, in the user's words
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"{failure} to {file}: {error.strerror or error}; make room, or set "
                "HF_DATASETS_CACHE to a folder that has it"
            ) from error

    def start():  # on one process of each machine
        nonlocal lock
        why = "" if made else fault()
        if not why:
            return "done"
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(file, wait=False)
        if lock is None:
            return "wait"
        why = fault()
        if not why:  # made in the meantime
            release()
            return "done"
        if why != "none":
            print(f"{file} is damaged ({why}): its images are {made_by} again", flush=True)
        begin()
        return "make"

    def work():
        return share(place, len(peers)) if task == "make" else None

    def finish():  # on one process of each machine
        nonlocal made
        if task == "wait":
            lock_of(file).release()
        if task == "make":
            end([shares[k] for k in peers])
            made = True
            release()

    def release():
        nonlocal lock
        if lock:
            leave()
            lock.release()
            lock = None

    # In three steps that all processes take together, as machines that share the folder wait for
    # one of them
    try:
        peers, place = _peers(accelerator)
        while True:
            task = from_local_main(accelerator, lambda: on_disk(start))
            if set(from_each(accelerator, lambda task=task: task)) == {"done"}:
                return
            shares = from_each(accelerator, lambda: on_disk(work))
            from_local_main(accelerator, lambda: on_disk(finish))
    finally:
        release()


def _peers(accelerator):
    """The indices of the processes of this machine, and this one's place among them."""
    own = accelerator.process_index - accelerator.local_process_index
    firsts = from_each(accelerator, lambda: own)
    peers = [k for k, first in enumerate(firsts) if first == own]
    return peers, peers.index(accelerator.process_index)


def lock_of(file, wait=True):
    """The lock of a file, held; None, without wait, where another process has it.

    After 10 s of waiting it is said.
    """
    lock = FileLock(f"{file}.lock")
    try:
        lock.acquire(timeout=WAIT_SILENTLY_S if wait else 0)
    except Timeout:
        if not wait:
            return None
        print(f"waiting for another process to prepare these images ({lock.lock_file})", flush=True)
        lock.acquire()
    return lock


def threads(processes=1):
    """As many as this process has cores, where that many processes share a machine's."""
    own = cores()
    dealt_out = own < (os.cpu_count() or 1)  # already, to each process its own
    return own if dealt_out else -(-own // processes)
