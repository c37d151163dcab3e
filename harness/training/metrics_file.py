"""metrics.jsonl: the records of a run, cut back to the checkpoint when the run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from harness.errors import UserError
from harness.files import has_file, replace_file


def read_metrics(path):
    """The records of a metrics.jsonl up to the first line that is damaged."""
    records = []
    if has_file(path):
        for line in Path(path).read_bytes().splitlines():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                break
    return records


class MetricsFile:
    """Records are added at the end; `state` tells a checkpoint how many bytes belong to it.

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
        """[bytes, sha256] of the records written so far."""
        return [self._bytes, self._digest.hexdigest()]

    def sync(self):
        """Force the records to the disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def cut_back(self, step, state=None):
        """Keep the records up to a checkpoint's step; returns a text on missing ones, or None.

        state: what `state` returned at that checkpoint; None where an older version wrote it.
        Raises UserError, with the line's number, where the file is damaged before that step.
        """
        data = self.path.read_bytes() if has_file(self.path) else b""
        missing = None
        size, digest = state or (0, None)
        if state and hashlib.sha256(data[:size]).hexdigest() == digest:
            records = data[:size]
        else:
            records = self._up_to(step, data)
            if state and len(records) < size:
                share = f"{len(records):,} of the {size:,} bytes"
                missing = f"{self.path} has {share} up to step {step}"
            elif state and records:
                raise UserError(
                    f"{self.path} was changed after the checkpoint of step {step}: bring back what "
                    "it was, or move it away to go on without the records until then"
                )
        self._start_with(records)
        return missing

    def set_aside(self):
        """Begin without records. An older file gets another name; returns its path, or None."""
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
                is_later = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError, RecursionError):
                if number == len(lines):  # cut short by a kill
                    return b"".join(lines[: number - 1])
                raise UserError(
                    f"{self.path}, line {number} is damaged: bring the file back, or move it away "
                    "to go on without the records until now"
                ) from None
            if is_later:
                return b"".join(lines[: number - 1])
        return data if data.endswith(b"\n") or not data else data + b"\n"

    def _start_with(self, data):
        self._bytes, self._digest = 0, hashlib.sha256()
        self._count(data)
        replace_file(self.path, data)

    def _count(self, data):
        self._bytes += len(data)
        self._digest.update(data)
