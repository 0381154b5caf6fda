"""A stream that takes everything: whatever its descriptor does, nobody who prints hears of it, or waits for long."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runner import screen
from runner.screen import BACKLOG_BYTES, LEFT_OUT, DecoupledOutput
from tests.conftest import REPO


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        # A test may have closed it.
        with suppress(OSError):
            os.close(end)


def fill(write_end: int) -> int:
    size = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    return os.write(write_end, b"." * size)


def read_all(read_end: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += os.read(read_end, size - len(found))
    return found


def test_what_is_written_is_there_at_once_and_in_order(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    output = DecoupledOutput(write_end, "stdout")
    for number in range(50):
        assert output.write(b"%d\n" % number) == len(b"%d\n" % number)
        assert os.read(read_end, 100) == b"%d\n" % number
    assert (output.state, output.take_loss()) == ("works", None)


def test_a_reader_who_has_left(pipe: tuple[int, int]) -> None:
    output = DecoupledOutput(pipe[1], "stdout")
    os.close(pipe[0])
    assert output.write(b"x" * 10) == 10
    assert output.write(b"x") == 1
    assert output.state == "failed"
    assert [output.take_loss(), output.take_loss()] == ["Broken pipe", None]


def test_a_descriptor_that_was_closed(pipe: tuple[int, int]) -> None:
    output = DecoupledOutput(pipe[1], "stdout")
    os.close(pipe[1])
    assert output.write(b"x") == 1
    assert output.take_loss() == "Bad file descriptor"
    assert not output.isatty()


def test_a_full_disk_has_room_again(tmp_path: Path) -> None:
    """It is tried again with each line: a job's log goes on once there is room."""
    with open("/dev/full", "wb") as full, (tmp_path / "log").open("wb") as roomy:
        handle = os.dup(full.fileno())
        output = DecoupledOutput(handle, "stdout")
        output.write(b"lost\n")
        os.dup2(roomy.fileno(), handle)
        output.write(b"there\n")
        os.close(handle)
    assert (tmp_path / "log").read_bytes() == b"there\n"
    assert output.take_loss() == "No space left on device"


def test_a_reader_who_pauses_holds_nobody_up(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "PATIENCE_SECONDS", 0.05)
    read_end, write_end = pipe
    filled, output = fill(write_end), DecoupledOutput(write_end, "stdout")
    line = b"line\n" * 200
    kept = 0
    while kept + len(line) <= BACKLOG_BYTES:
        output.write(line)
        kept += len(line)
        assert output.state == "waits"
    output.write(b"too" * len(line))
    assert output.take_loss() == "nobody takes it"
    # Whoever reads again gets all that was kept, in order, and is told that something is missing.
    assert read_all(read_end, filled) == b"." * filled
    assert read_all(read_end, kept) == line * (kept // len(line))
    assert read_all(read_end, len(LEFT_OUT)) == LEFT_OUT
    output.drain(5.0)
    assert output.state == "failed"  # something was lost
    output.write(b"again")
    assert os.read(read_end, 100) == b"again"


def test_a_pause_is_waited_for_once(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in waits: a limit on time would fail on a busy machine."""
    waits: list[float | None] = []
    original = threading.Event.wait

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return original(event, 0.05)

    filled, output = fill(pipe[1]), DecoupledOutput(pipe[1], "stdout")
    output.write(b"first")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", wait)
        for _ in range(20):
            output.write(b"line")
    assert waits == []
    # Its thread must not write into the pipe of the next test.
    read_all(pipe[0], filled + len(b"first") + 20 * len(b"line"))
    output.drain(5.0)


def test_a_descriptor_that_does_not_wait(pipe: tuple[int, int]) -> None:
    """Another process has made the pipe non-blocking: its flag is everybody's."""
    read_end, write_end = pipe
    os.set_blocking(write_end, False)
    output = DecoupledOutput(write_end, "stdout")
    size = 3 * fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(read_all(read_end, size)))
    reader.start()
    output.write(b"x" * size)
    reader.join()
    assert found == [b"x" * size]


def test_a_fork_writes_as_well(pipe: tuple[int, int]) -> None:
    """The thread stays in the parent; its lock may be held at the moment of the fork."""
    output = DecoupledOutput(pipe[1], "stdout")
    output.write(b"parent\n")
    output._counting.acquire()
    child = os.fork()
    if child == 0:
        output.write(b"child\n")
        os._exit(0)
    output._counting.release()
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(pipe[0], 100) == b"parent\nchild\n"


def test_no_thread_is_no_reason_to_lose_a_line(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    DecoupledOutput(pipe[1], "stdout").write(b"line\n")
    assert os.read(pipe[0], 100) == b"line\n"


def ask(code: str, **streams: int) -> subprocess.CompletedProcess[bytes]:
    setup = "import sys\nfrom runner import screen\nscreen.prepare_screen()\nscreen.decouple_screen()\n"
    return subprocess.run([sys.executable, "-c", setup + code], cwd=REPO, stdin=subprocess.DEVNULL, **streams)  # type: ignore[call-overload]


# What prints past us: warnings, handlers of logging, uncaught exceptions in threads, Python's own end.
PRINTING = """
import logging, os, threading, time, warnings
warnings.warn("spoken")
logging.getLogger().warning("logged")
threading.Thread(target=lambda: 1 / 0).start()
print("line → · \\udcff", flush=True)
print("buffered")
sys.stderr.write("half")
"""


@pytest.mark.parametrize("streams", ["/dev/full", "closed pipe"])
def test_whoever_prints_is_told_nothing(streams: str) -> None:
    if streams == "/dev/full":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, target = os.pipe()
        os.close(read_end)
    code = PRINTING + "assert len(screen.take_screen_losses()) == 1\nsys.exit(7)"
    try:
        # Without us it would be 120, and a traceback.
        assert ask(code, stdout=target, stderr=target).returncode == 7
    finally:
        os.close(target)


def test_all_of_it_arrives_where_it_can() -> None:
    done = ask(PRINTING, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout.decode() == "line → · ?\nbuffered\n"
    for part in (b"spoken", b"logged", b"ZeroDivisionError", b"half"):
        assert part in done.stderr


def test_errors_are_said_where_they_can_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    screen.print_error("error: this")
    assert capsys.readouterr().err == "error: this\n"
    for broken in (None, open("/dev/full", "w"), open(os.devnull, "w", encoding="ascii")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", broken)
        screen.print_error("error: →")


def test_a_line_past_the_locks_of_a_print() -> None:
    """A thread holds the lock of stderr, as one does that is inside a print."""
    code = "\n".join(
        [
            "import threading",
            "inside, over = threading.Event(), threading.Event()",
            "class Slow(screen.io.RawIOBase):",
            "    def writable(self): return True",
            "    def write(self, data): inside.set(); over.wait(); return len(data)",
            "sys.stderr = screen.io.TextIOWrapper(screen.io.BufferedWriter(Slow()), write_through=True)",
            "threading.Thread(target=lambda: print('x', file=sys.stderr, flush=True)).start()",
            "inside.wait()",
            "screen.print_past_locks('SIGTERM: saving')",
            "over.set()",
        ]
    )
    assert ask(code, stderr=subprocess.PIPE).stderr == b"\nSIGTERM: saving\n"


def test_nothing_is_lost_at_the_end() -> None:
    """Each line waits for its own write, and the end for what is in buffers."""
    code = "for n in range(3000): print(n)\nscreen.flush_screen()\nimport os; os._exit(3)"
    done = ask(code, stdout=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stdout.split() == [b"%d" % n for n in range(3000)]


def test_a_slow_reader_loses_nothing_up_to_the_backlog() -> None:
    """As a pager does, it reads late."""
    read_end, write_end = os.pipe()
    code = "print('x' * 200_000, flush=True)\nprint(screen.stdout_state(), file=sys.stderr)\nscreen.flush_screen()"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom runner import screen\nscreen.decouple_screen()\n" + code],
        cwd=REPO,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write_end)
    assert process.stderr is not None
    assert process.stderr.readline() == "waits\n"
    time.sleep(0.01)
    assert read_all(read_end, 200_001) == b"x" * 200_000 + b"\n"
    process.stderr.close()
    assert process.wait() == 0
    os.close(read_end)
