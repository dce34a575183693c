"""FileSource: all of a file or nothing of it."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flannel_dp.cluster.lease import Lease
from flannel_dp.errors import ConfigError, Unavailable
from flannel_dp.sources import Snapshot, Source
from flannel_dp.sources.file import FileSource

DOCUMENT = b'{"leases": [{"Subnet": "10.244.7.0/24", "PublicIP": "192.0.2.7"}]}'
LEASE = Lease(subnet="10.244.7.0/24", public_ip="192.0.2.7")


def unavailable(source: FileSource) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        source.snapshot()

    assert caught.value.hint
    assert source.origin in caught.value.message
    return caught.value


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "leases.json"
    file.write_bytes(DOCUMENT)
    source: Source = FileSource(file)

    snapshot = source.snapshot()

    assert isinstance(snapshot, Snapshot)
    assert snapshot.claims.leases == [LEASE]
    assert snapshot.origin == str(file)
    assert 0 < snapshot.seconds < 60


def test_every_snapshot_reads_the_file_anew(tmp_path: Path) -> None:
    file = tmp_path / "leases.json"
    file.write_bytes(DOCUMENT)
    source = FileSource(file)
    before = source.snapshot()
    file.write_bytes(b"[]")

    assert before.claims.leases == [LEASE]
    assert source.snapshot().claims.leases == []


def test_missing_directory_empty_and_unreadable_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_bytes(b"\n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    assert "no such file" in unavailable(FileSource(tmp_path / "absent")).message
    assert "directory" in unavailable(FileSource(tmp_path)).message
    assert "it is empty" in unavailable(FileSource(empty)).message
    assert "symbolic links" in unavailable(FileSource(tmp_path / "loop")).message
    with pytest.raises(Unavailable, match="null byte"):
        FileSource("a\0b").snapshot()


@pytest.mark.parametrize("cut", range(1, len(DOCUMENT)))
def test_a_half_written_file_is_refused_wherever_it_ends(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "leases.json"
    file.write_bytes(DOCUMENT[:cut])

    assert "line 1, column" in unavailable(FileSource(file)).message


def _changing(
    monkeypatch: pytest.MonkeyPatch, file: Path, contents: list[bytes]
) -> list[os.stat_result]:
    """Replace the file's content after each of the first reads, behind the reader's back."""
    calls: list[os.stat_result] = []
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        if len(calls) % 2 == 1 and contents:
            file.write_bytes(contents.pop(0))
        calls.append(real(fd))
        return calls[-1]

    monkeypatch.setattr("flannel_dp.sources.file.os.fstat", fstat)
    return calls


def test_a_file_changed_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "leases.json"
    file.write_bytes(b"[]")
    calls = _changing(monkeypatch, file, [b'{"leases": []}', DOCUMENT])

    assert FileSource(file).snapshot().claims.leases == [LEASE]
    assert len(calls) == 6


def test_a_file_that_never_rests_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "leases.json"
    file.write_bytes(b"[]")
    calls = _changing(monkeypatch, file, [b"[]" + b" " * n for n in range(1, 99)])

    assert "changed during each of 5 reads" in unavailable(FileSource(file)).message
    assert len(calls) == 10


def test_a_file_replaced_by_rename_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "leases.json"
    file.write_bytes(DOCUMENT)
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        new = tmp_path / "new"
        new.write_bytes(b"[]")
        new.rename(file)
        return real(fd)

    monkeypatch.setattr("flannel_dp.sources.file.os.fstat", fstat)

    # The old content or the new one, as the clock's grain has it, but never a mixture.
    assert FileSource(file).snapshot().claims.leases in ([LEASE], [])


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(DOCUMENT,))
    writer.start()
    try:
        assert FileSource(pipe).snapshot().claims.leases == [LEASE]
    finally:
        writer.join()


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(DOCUMENT)))
    source = FileSource("-")

    assert source.snapshot().claims.leases == [LEASE]
    assert "already" in unavailable(source).message
    assert source.origin == "standard input"


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.BytesIO()
    closed.close()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=closed))
    assert "closed file" in unavailable(FileSource("-")).message
    monkeypatch.setattr(sys, "stdin", None)

    assert "it is closed" in unavailable(FileSource("-")).message


def test_the_annotation_prefix_is_used_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    file.write_text(
        '{"kind": "List", "items": [{"metadata": {"name": "a", "annotations":'
        ' {"org.com/x-kube-subnet-manager": "true"}}, "spec": {"podCIDR": "10.0.1.0/24"}}]}'
    )

    assert len(FileSource(file, annotation_prefix="org.com/x").snapshot().claims.leases) == 1
    assert FileSource(file).snapshot().claims.leases == []
    with pytest.raises(ConfigError, match="prefix"):
        FileSource(file, annotation_prefix="org")
