"""Files that all processes of a machine make together, once, while other runs wait."""

from __future__ import annotations

import os

from filelock import FileLock, Timeout

from harness.errors import UserError
from harness.processes import cores, from_each, from_local_main

WAIT_SILENTLY_S = 10


def make_together(accelerator, file, fault, begin, make_share, end, *, leave, made_by, failure):
    """Make sure that `file` can be used: the processes of each machine make it together.

    Where another run makes the file already, they wait for it. All processes call this, and any
    number of runs may do so at once, as the file has a lock.

    Args:
        file: a Path; its folder is made.
        fault: () -> why the file can't be used; "" if it can, "none" where there is no file.
        begin: () -> None. Prepares the work, under the lock, on one process of the machine.
        make_share: (rank, processes) -> result. Does the share of process `rank` of the machine's
            `processes`.
        end: ([result of each process of the machine]) -> None. Completes the file, on one process.
        leave: () -> None. Cleans up before the lock is released, after an error as well.
        made_by: what happens to the images, a participle: "decoded".
        failure: the beginning of the error message when the disk is full or refuses to write.

    Raises UserError, on all processes, where one of these functions does or the disk is full.
    """
    lock = task = results = None
    complete = False

    def on_disk(action):  # turns an error of the disk into a UserError, which all processes get
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"{failure} to {file}: {error.strerror or error}; make room, or set "
                "HF_DATASETS_CACHE to a folder that has it"
            ) from error

    def start():  # on one process of each machine
        nonlocal lock
        reason = "" if complete else fault()
        if not reason:
            return "done"
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(file, wait=False)
        if lock is None:
            return "wait"
        reason = fault()
        if not reason:  # another run has made it in the meantime
            release()
            return "done"
        if reason != "none":
            print(f"{file} is damaged ({reason}): its images are {made_by} again", flush=True)
        begin()
        return "make"

    def work():
        return make_share(rank, len(peers)) if task == "make" else None

    def finish():  # on one process of each machine
        nonlocal complete
        if task == "wait":
            lock_of(file).release()
        if task == "make":
            end([results[k] for k in peers])
            complete = True
            release()

    def release():
        nonlocal lock
        if lock:
            leave()
            lock.release()
            lock = None

    # Three steps, which all processes take together. Where machines share the folder, one of them
    # makes the file and the others wait
    try:
        peers, rank = _peers(accelerator)
        while True:
            task = from_local_main(accelerator, lambda: on_disk(start))
            if set(from_each(accelerator, lambda task=task: task)) == {"done"}:
                return
            results = from_each(accelerator, lambda: on_disk(work))
            from_local_main(accelerator, lambda: on_disk(finish))
    finally:
        release()


def _peers(accelerator):
    """The indices of this machine's processes, and the rank of this process among them."""
    first_index = accelerator.process_index - accelerator.local_process_index
    first_indices = from_each(accelerator, lambda: first_index)
    peers = [k for k, index in enumerate(first_indices) if index == first_index]
    return peers, peers.index(accelerator.process_index)


def lock_of(file, wait=True):
    """Acquire and return the lock of a file. Without wait: None where another process holds it.

    After 10 s of waiting, a line says so.
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
    """The number of threads for one of `processes` on this machine: its share of the cores."""
    usable = cores()
    dealt_out = usable < (os.cpu_count() or 1)  # each process has its own cores already
    return usable if dealt_out else -(-usable // processes)
