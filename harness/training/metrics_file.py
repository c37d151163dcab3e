"""metrics.jsonl: what was recorded, kept in step with the checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from harness.errors import UserError
from harness.files import has_file, replace_file


def read_metrics(path):
    """The records of a metrics.jsonl up to the first line that is none."""
    records = []
    if has_file(path):
        for line in Path(path).read_bytes().splitlines():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                break
    return records


class MetricsFile:
    """Records are added at the end; `state` says how much a checkpoint may count on.

    path: of metrics.jsonl.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._bytes, self._digest = 0, hashlib.sha256()

    def add(self, record):
        """Append one record, a dict that JSON can hold."""
        line = json.dumps(record).encode() + b"\n"
        with open(self.path, "ab") as file:
            file.write(line)
        self._count(line)

    def state(self):
        """[bytes, sha256] of what was written until now."""
        return [self._bytes, self._digest.hexdigest()]

    def sync(self):
        """Force what was written to the disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def cut_back(self, step, saved=None):
        """Keep the records up to a checkpoint's step; returns what is missing, in words, or None.

        saved: what `state` said at that checkpoint, None where an older version wrote it. Raises
        UserError for a file that is damaged before that, by its line.
        """
        data = self.path.read_bytes() if has_file(self.path) else b""
        missing = None
        if saved and hashlib.sha256(data[: saved[0]]).hexdigest() == saved[1]:
            kept = data[: saved[0]]
        else:
            kept = self._up_to(step, data)
            if saved and len(kept) < saved[0]:
                missing = (
                    f"{self.path} has {len(kept):,} of the {saved[0]:,} bytes up to step {step}"
                )
            elif saved and kept:
                raise UserError(
                    f"{self.path} is not as the checkpoint of step {step} left it: bring it back, "
                    "or move it away to go on without the records until then"
                )
        self._start_with(kept)
        return missing

    def set_aside(self):
        """Begin with no records; those that are there go to another name, which is returned."""
        aside = None
        if has_file(self.path) and self.path.stat().st_size:
            n = 1
            while (aside := self.path.with_name(f"metrics.before-{n}.jsonl")).exists():
                n += 1
            os.rename(self.path, aside)
        self._start_with(b"")
        return aside

    def _up_to(self, step, data):
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                at = json.loads(line)["step"]
                late = at > step
            except (ValueError, KeyError, TypeError, RecursionError):
                if number == len(lines):  # cut short by a kill
                    return b"".join(lines[: number - 1])
                raise UserError(
                    f"{self.path}, line {number} is damaged: bring the file back, or move it away "
                    "to go on without the records until now"
                ) from None
            if late:
                return b"".join(lines[: number - 1])
        return data if data.endswith(b"\n") or not data else data + b"\n"

    def _start_with(self, data):
        self._bytes, self._digest = 0, hashlib.sha256()
        self._count(data)
        replace_file(self.path, data)

    def _count(self, data):
        self._bytes += len(data)
        self._digest.update(data)
