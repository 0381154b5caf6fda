"""The processes of one run: what they agree on, and what becomes of the others when one of them ends. No jax.

Process 0 leads: what it says counts for everybody. Each key of `agree` and `gather` is a channel of its own, in which
values come in order; so two threads may talk at the same time, as long as each process does the same under each key.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import STOPPED, ConfigError, HoldfastError, LostProcessError
from runner.hosts.early_end import read_early_end
from runner.hosts.link import (
    Link,
    Sign,
    describe_missing,
    read_sign,
    receive_line,
    send_line,
    tell_sign,
)
from runner.hosts.options import HostsPatience, Place
from runner.hosts.stacks import dump_stacks
from runner.types import JsonObject

# So often each process gives a sign of life to the others.
SIGN_SECONDS = 0.5
# Who connects says at once who it is.
GREETING_SECONDS = 10.0
# So long process 0 stays to tell the others why it ends, those as well that have not come yet.
FAREWELL_SECONDS = 10.0
# Within this time it is heard that a process has ended.
NOTICE_SECONDS = 2.0
# Between two tries to reach process 0, which may start later.
RETRY_SECONDS = 0.1


@dataclass
class Handlers:
    """Hold what is to be done when another process asks for something, or ends; called in a thread of its connection.

    Attributes:
        on_stop: it was asked to stop: why, and the seconds that it has, where that is known.
        on_save: it asks for a save, after which training goes on.
        on_failed: it ends by a failure of its own: its link, its exit code, what it says.
        on_lost: it has gone without a word: its link, and how that was noticed.
        on_early_end: it has ended before it had joined; the error that says so.
        on_end: process 0 says that the run ends here, with this exit code.
    """

    on_stop: Callable[[str, float | None], None] = lambda reason, seconds: None
    on_save: Callable[[str], None] = lambda reason: None
    on_failed: Callable[[Link, int, str], None] = lambda link, code, line: None
    on_lost: Callable[[Link, str], None] = lambda link, how: None
    on_early_end: Callable[[HoldfastError], None] = lambda error: None
    on_end: Callable[[int], None] = lambda code: None


class Mailbox:
    """Values that have come, by channel; who takes one waits for it."""

    def __init__(self) -> None:
        self._values: defaultdict[Any, deque[Any]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._error: HoldfastError | None = None

    def put(self, channel: Any, value: Any) -> None:
        """Add a value to a channel."""
        with self._changed:
            self._values[channel].append(value)
            self._changed.notify_all()

    def take(self, channel: Any) -> Any:
        """Return the next value of a channel. Raises what `fail` was given where none can come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._values[channel] or self._error is not None)
            if self._values[channel]:
                return self._values[channel].popleft()
            assert self._error is not None
            raise self._error

    def wait_for_error(self, seconds: float) -> HoldfastError | None:
        """Return what `fail` was given, waiting so long for it; None where it was given nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, timeout=seconds)
            return self._error

    def fail(self, error: HoldfastError) -> None:
        """Have everybody who waits, from now on, raise this."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class Group(ABC):
    """Answer what the processes of a run ask each other; one process answers itself at once."""

    index = 0
    count = 1

    def __init__(self) -> None:
        self.handlers = Handlers()
        # Asked for each sign of life; replaced when the attempt has a heartbeat.
        self.read_own_sign: Callable[[], Sign] = Sign

    @abstractmethod
    def agree(self, key: str, value: Any) -> Any:
        """Return the value of process 0, in every process. It must be plain JSON."""

    @abstractmethod
    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Return what each process has, in their order, to process 0; None to the others. Plain JSON."""

    @abstractmethod
    def ask_to_stop(self, reason: str, seconds: float | None) -> None:
        """Ask process 0 to stop the run; `seconds` until this process is killed, where that is known."""

    @abstractmethod
    def ask_to_save(self, reason: str) -> None:
        """Ask process 0 for a save, after which training goes on."""

    @abstractmethod
    def tell_end(self, code: int) -> None:
        """Tell the others that the run ends here, with this exit code. Does not wait for them."""

    def end_others(self, code: int) -> None:
        """Tell the others that the run ends here, and wait a while until they have ended."""
        self.tell_end(code)

    def find_lost(self) -> HoldfastError | None:
        """Return the error that says which process has gone; None where none has. Waits a moment to hear of it.

        An error of jax comes first where a process goes in the middle of a computation of all.
        """
        return None

    def collect_stacks(self, seconds: float) -> Mapping[str, str]:
        """Return where the threads of the other processes are, by the name of each; of those that answer in time."""
        return {}

    @property
    @abstractmethod
    def links(self) -> Sequence[Link]:
        """Return the connections to other processes."""


class Alone(Group):
    """One process: it leads, agrees with itself, and waits for nobody."""

    links = ()

    def agree(self, key: str, value: Any) -> Any:
        """Return the value."""
        return value

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Return the one value there is."""
        return [value]

    def ask_to_stop(self, reason: str, seconds: float | None) -> None:
        """Do nothing: this process has been asked, and decides."""

    def ask_to_save(self, reason: str) -> None:
        """Do nothing: this process has been asked, and decides."""

    def tell_end(self, code: int) -> None:
        """Do nothing: there is nobody to tell."""


class Several(Group):
    """Exchange signs of life with other processes, and notice where one gives none any more."""

    def __init__(self, place: Place, patience: HostsPatience):
        super().__init__()
        self.index, self.count, self.patience = place.index, place.count, patience
        self._mailbox, self._links = Mailbox(), list[Link]()
        self._is_over = threading.Event()

    @property
    def links(self) -> Sequence[Link]:
        """Return the connections to other processes, in their order."""
        return tuple(sorted(self._links, key=lambda link: link.index))

    def find_lost(self) -> HoldfastError | None:
        """Return the error that says which process has gone; None where none has. Waits a moment to hear of it."""
        return self._mailbox.wait_for_error(NOTICE_SECONDS)

    def raise_if_lost(self) -> None:
        """Raise the error that says which process has gone, where one is known to have."""
        if lost := self._mailbox.wait_for_error(0.0):
            raise lost

    def watch(self) -> None:
        """Give signs of life from now on, and notice where another process gives none any more; in a thread."""
        threading.Thread(target=self._watch, name="signs of life", daemon=True).start()

    def _watch(self) -> None:
        # Ticks are counted, not seconds: where this process was suspended, the others were not silent.
        silent: dict[int, int] = {}
        last_heard: dict[int, float] = {}
        while not self._is_over.wait(SIGN_SECONDS):
            sign = tell_sign(self.read_own_sign())
            for link in self.links:
                link.send({"sign": sign})
                heard, last_heard[link.index] = last_heard.get(link.index), link.heard_at
                silent[link.index] = silent.get(link.index, 0) + 1 if heard == link.heard_at else 0
                if silent[link.index] * SIGN_SECONDS > self.patience.lost_seconds and not link.is_leaving:
                    self._lose(link, f"not a word for {self.patience.lost_seconds:g} s")

    def _lose(self, link: Link, how: str) -> None:
        # Once, whoever notices it first.
        if self._forget(link) and not self._is_over.is_set():
            self._mailbox.fail(LostProcessError(describe_lost(link, how)))
            self.handlers.on_lost(link, how)

    def _forget(self, link: Link) -> bool:
        """Return whether a connection was still one of ours; it is none from now on."""
        try:
            self._links.remove(link)
        except ValueError:
            return False
        return True

    def _on_end(self, link: Link) -> None:
        """Take note that a connection is closed: the process has ended, however it did."""
        if link.is_leaving:
            self._forget(link)
        else:
            self._lose(link, "its connection is closed")


def describe_lost(link: Link, how: str) -> str:
    """Return which process has gone, and what it was doing."""
    doing = f", {link.sign.writing} of a checkpoint" if link.sign.writing else ""
    return f"{link.name} is gone ({how}): it was in {link.sign.phase}{doing}, after step {link.sign.step}"


class Lead(Several):
    """Process 0. It listens from the beginning, so that the others wait for it and not it for them."""

    def __init__(self, place: Place, patience: HostsPatience, facts: JsonObject):
        super().__init__(place, patience)
        self._facts, self._place = facts, place
        self._arrived, self._seen = threading.Condition(), set[int]()
        # Whose place is taken, though it may not be there yet.
        self._taken: set[int] = set()
        self._stacks: dict[str, str] = {}
        # Nobody is waited for any more.
        self._gave_up = False
        # What was said so far, for who comes later.
        self._said: list[JsonObject] = []
        # The first arrival that cannot take part, and why.
        self._stranger: str | None = None
        self._listener = _listen(place)
        threading.Thread(target=self._welcome_all, name="welcome", daemon=True).start()
        self.watch()

    def agree(self, key: str, value: Any) -> Any:
        """Say the value to the others, and return it."""
        self._tell({"say": key, "value": value})
        return value

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Return this value and those of the others; waits for them."""
        return [value, *(self._mailbox.take((key, index)) for index in range(1, self.count))]

    def ask_to_stop(self, reason: str, seconds: float | None) -> None:
        """Tell the others to stop now: training has not begun, so there is no step to agree on."""
        self._tell({"stop": reason, "seconds": seconds})

    def ask_to_save(self, reason: str) -> None:
        """Do nothing: this process decides."""

    def wait_for_all(self, say: Callable[[str], None], raise_if_stopped: Callable[[], None]) -> None:
        """Wait until every process is there. Tells who is missing, after a while.

        Raises LostProcessError, naming who is missing, after `join_seconds`; ConfigError where one cannot take part.
        """
        began, told = time.monotonic(), False
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._has_all() or self._stranger, timeout=RETRY_SECONDS)
            if self._stranger is not None:
                raise ConfigError(self._stranger)
            # One that was there may have gone again, or one has ended before it came: by the same stop, perhaps.
            if self._mailbox.wait_for_error(0.0):
                raise_if_stopped()
                self.raise_if_lost()
            if self._has_all():
                return
            raise_if_stopped()
            waited = time.monotonic() - began
            if waited > self.patience.join_seconds:
                self._gave_up = True
                raise LostProcessError(
                    f"hosts: {self._describe_missing()} did not come within {self.patience.join_seconds:g} s; it must "
                    f"reach {self._place.host}:{self._place.port}; hosts.join_seconds=N waits longer"
                )
            if waited > GREETING_SECONDS and not told:
                told = True
                say(f"waiting for {self._describe_missing()}")

    def tell_end(self, code: int) -> None:
        """Tell the others that the run ends with this exit code."""
        self._is_over.set()
        with self._arrived:
            self._facts = {"end": code}
            for link in self.links:
                link.is_leaving = True
                link.send(self._facts)

    def end_others(self, code: int) -> None:
        """Tell the others that the run ends with this exit code, and wait a while until they have ended.

        The lead ends last: jax aborts the others where its process goes first.
        """
        until = time.monotonic() + FAREWELL_SECONDS
        self.tell_end(code)
        # Who comes now hears it from `_welcome`; who has come and ended counts as having been there.
        while (self._links or not (self._has_all() or self._gave_up)) and time.monotonic() < until:
            time.sleep(RETRY_SECONDS / 10)

    def collect_stacks(self, seconds: float) -> Mapping[str, str]:
        """Return where the threads of the other processes are, by the name of each; of those that answer in time."""
        self._tell({"dump": True})
        until, found = time.monotonic() + seconds, dict[str, str]()
        while len(found) < len(self._links) and time.monotonic() < until:
            time.sleep(RETRY_SECONDS)
            found = dict(self._stacks)
        return found

    def _tell(self, line: JsonObject) -> None:
        if not self._has_all():
            with self._arrived:
                self._said.append(line)
                for link in self._links[:]:
                    link.send(line)
            return
        for link in self._links[:]:
            link.send(line)

    def _has_all(self) -> bool:
        return len(self._seen) == self.count - 1

    def _describe_missing(self) -> str:
        return describe_missing([index for index in range(1, self.count) if index not in self._seen], self.count)

    def _welcome_all(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._welcome, args=(connection, address), daemon=True).start()

    def _welcome(self, connection: socket.socket, address: Any) -> None:
        """Take a process in, or tell it why not."""
        try:
            _prepare(connection)
            hello = receive_line(connection, GREETING_SECONDS)
            if "ended" in hello:
                send_line(connection, {"noted": self._note_early_end(hello)})
                connection.close()
                return
            index, name = int(hello["index"]), f"process {hello['index']} ({hello['host']}, pid {hello['pid']})"
            with self._arrived:
                problem = self._find_problem(index, name, hello)
                # At once: another one of the same index may come at the same moment.
                self._taken |= {index} if problem is None else set()
            if "end" in self._facts or problem is not None:
                send_line(connection, {"end": self._facts.get("end", ConfigError.exit_code)})
                connection.close()
                with self._arrived:
                    self._seen.add(index)
                    self._stranger = self._stranger or problem
                    self._arrived.notify_all()
                return
            try:
                send_line(connection, {"welcome": self._facts})
            except OSError:
                # It has not heard that it is in, and tries again.
                self._taken.discard(index)
                raise
        # Somebody knocks who is no process of a run.
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        link = Link(connection, index, name)
        with self._arrived:
            for line in self._said:
                link.send(line)
            self._links.append(link)
            self._seen.add(index)
            link.start(self._on_line, self._on_end)
            if "end" in self._facts:
                # It came while that was said to the others.
                link.is_leaving = True
                link.send(self._facts)
            self._arrived.notify_all()

    def _note_early_end(self, line: JsonObject) -> bool:
        """Take note that a process has ended; return whether that is known now.

        Where it had joined, its connection tells more.
        """
        end = read_early_end(line)
        if not 0 < end.index < self.count:
            raise ValueError("no process of this run")
        with self._arrived:
            if end.index in self._taken or "end" in self._facts:
                return end.index in self._seen or "end" in self._facts
            # Nobody waits for it any more, to tell it how the run has ended.
            self._seen.add(end.index)
        error = end.build_error()
        if end.code == STOPPED:
            # It was asked to stop, and had nobody to tell it: so is the run.
            self.handlers.on_stop(f"a signal to process {end.index}", None)
            self._mailbox.fail(error)
        else:
            self._mailbox.fail(error)
            self.handlers.on_early_end(error)
        return True

    def _find_problem(self, index: int, name: str, hello: JsonObject) -> str | None:
        """Return why a process cannot take part; None where it can."""
        if hello["count"] != self.count or not 0 < index < self.count:
            return f"hosts: {name} says it is {index} of {hello['count']}; here are {self.count}"
        if index in self._taken and "end" not in self._facts:
            return f"hosts: {name} came twice: two processes have the same index"
        for what, mine in self._facts.items():
            if what != "end" and hello.get(what) != mine:
                return (
                    f"hosts: {name} has another {what}: {hello.get(what)}; here it is {mine}; start the same command, "
                    "of the same version, everywhere"
                )
        return None

    def _on_line(self, link: Link, line: JsonObject) -> None:
        if "sign" in line:
            link.sign = read_sign(line["sign"])
        elif "give" in line:
            self._mailbox.put((line["give"], link.index), line["value"])
        elif "stop" in line:
            self.handlers.on_stop(f"{line['stop']} at {link.name}", line["seconds"])
        elif "save" in line:
            self.handlers.on_save(f"{line['save']} at {link.name}")
        elif "stacks" in line:
            self._stacks[link.name] = line["stacks"]
        elif "failed" in line:
            link.is_leaving = True
            self.handlers.on_failed(link, line["failed"], line["line"])


class Follower(Several):
    """Any process but process 0.

    Attributes:
        ended: the exit code with which the run has ended, where process 0 has said so.
    """

    def __init__(self, place: Place, patience: HostsPatience, connection: socket.socket):
        super().__init__(place, patience)
        self.ended: int | None = None
        self._links = [Link(connection, 0, f"process 0 ({place.host})")]
        self._links[0].start(self._on_line, self._on_end)
        self.watch()

    def agree(self, key: str, value: Any) -> Any:
        """Return the value of process 0; waits for it."""
        return self._mailbox.take(key)

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Tell process 0 the value."""
        self._tell({"give": key, "value": value})
        return None

    def ask_to_stop(self, reason: str, seconds: float | None) -> None:
        """Ask process 0 to stop the run."""
        self._tell({"stop": reason, "seconds": seconds})

    def ask_to_save(self, reason: str) -> None:
        """Ask process 0 for a save."""
        self._tell({"save": reason})

    def tell_failure(self, code: int, line: str) -> None:
        """Tell process 0 how this process ends, so that all end so."""
        self._tell({"failed": code, "line": line})

    def tell_end(self, code: int) -> None:
        """Tell process 0 that this process leaves as it was asked to."""
        if code:
            self.tell_failure(code, "it had to leave before the others")

    def _tell(self, line: JsonObject) -> None:
        for link in self._links[:]:
            link.send(line)

    def _on_line(self, link: Link, line: JsonObject) -> None:
        if "sign" in line:
            link.sign = read_sign(line["sign"])
        elif "say" in line:
            self._mailbox.put(line["say"], line["value"])
        elif "stop" in line:
            self.handlers.on_stop(line["stop"], line["seconds"])
        elif "dump" in line:
            link.send({"stacks": dump_stacks()})
        elif "end" in line:
            link.is_leaving = True
            self._is_over.set()
            self.ended = line["end"]
            self.handlers.on_end(line["end"])


def join_lead(
    place: Place, patience: HostsPatience, facts: JsonObject, raise_if_stopped: Callable[[], None]
) -> Follower | int:
    """Return this process as one of the group, once process 0 is there; or the exit code with which the run has ended.

    Raises LostProcessError where process 0 cannot be reached within `join_seconds`.
    """
    until = time.monotonic() + patience.join_seconds
    hello = {"index": place.index, "count": place.count, "host": socket.gethostname(), "pid": os.getpid(), **facts}
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=GREETING_SECONDS)
            _prepare(connection)
            send_line(connection, hello)
            answer = receive_line(connection, GREETING_SECONDS)
            # A port of those that the kernel gives to connections may connect to itself.
            if not answer.keys() & {"end", "welcome"}:
                raise ValueError("no answer of process 0")
        # It has not started, or its name is not known yet; or somebody else listens there, and says nothing of ours.
        except (OSError, ValueError) as error:
            raise_if_stopped()
            if time.monotonic() > until:
                raise LostProcessError(
                    f"hosts: process {place.index} of {place.count} did not reach process 0 at {place.host}:"
                    f"{place.port} within {patience.join_seconds:g} s ({error}); start it, or name another address"
                ) from None
            time.sleep(RETRY_SECONDS)
            continue
        return answer["end"] if "end" in answer else Follower(place, patience, connection)


def _prepare(connection: socket.socket) -> None:
    # A word is one small packet, and a step waits for it.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _listen(place: Place) -> socket.socket:
    """Return the socket at which process 0 listens. Raises ConfigError where that cannot be."""
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        try:
            return _bind(found[0][0], found[0][4], place.count)
        # The address is one by which the others reach this machine, and not its own: behind a service, say.
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return _bind(socket.AF_INET, ("", place.port), place.count)
    except OSError as error:
        raise ConfigError(
            f"hosts: process 0 cannot listen at {place.host}:{place.port} ({error.strerror or error}); name another "
            "address"
        ) from None


def _bind(family: int, address: Any, backlog: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    # The run that was here a moment ago may have connections that the kernel has not forgotten.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener
