"""Output that is rotated while it is read: what is read is what was written, at the offset it says."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sandbox.stdio import RotatingFile
from supervisord.output import Tail

if TYPE_CHECKING:
    from pathlib import Path

DATA = b"".join(b"%07d\n" % number for number in range(60_000))


def test_a_reader_beside_a_fast_writer_never_sees_a_byte_at_a_wrong_offset(tmp_path: Path) -> None:
    file = RotatingFile(str(tmp_path / "stdout.log"), 1000)

    def write() -> None:
        for start in range(0, len(DATA), 333):
            file.write(DATA[start : start + 333])

    writer = threading.Thread(target=write)
    tail = Tail(tmp_path / "stdout.log", stream="stdout")
    read = 0
    writer.start()
    while (writing := writer.is_alive()) or not read:
        chunk = tail.read()
        if chunk is not None:
            read += len(chunk.data)
            assert DATA[chunk.offset : chunk.offset + len(chunk.data)] == chunk.data
        assert writing or read
    writer.join()
    assert read > 0


def test_a_late_reader_gets_the_last_two_files_and_is_told_where_they_begin(tmp_path: Path) -> None:
    file = RotatingFile(str(tmp_path / "stdout.log"), 1000)
    file.write(DATA[:4500])
    tail = Tail(tmp_path / "stdout.log", stream="stdout")
    chunks = []
    while (chunk := tail.read()) is not None:
        chunks.append(chunk)
    assert chunks[0].offset == 3000
    assert b"".join(chunk.data for chunk in chunks) == DATA[3000:4500]


def test_without_rotation_everything_is_there_from_the_first_byte(tmp_path: Path) -> None:
    file = RotatingFile(str(tmp_path / "stdout.log"), 10_000)
    file.write(DATA[:4500])
    chunk = Tail(tmp_path / "stdout.log", stream="stdout").read()
    assert chunk is not None
    assert (chunk.offset, chunk.data) == (0, DATA[:4500])
