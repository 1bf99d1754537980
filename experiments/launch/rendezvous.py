"""Where the processes of a run find each other, and hear of each other's end.

Process 0 keeps a hub; every process, 0 included, connects to it and stays connected until all are
done. JAX's own service needs this company: where a process is missing it aborts without saying
which, and a killed one it notices by heartbeats that stay away, a minute or two later, and without
a reason. A connection that closes is noticed at once.

Messages are JSON, one a line. To the hub: who one is; then {"failed": reason, "code": own exit
code, "echo": whether it may follow from another's failure} or {"done": true}. From the hub:
{"start": the address for JAX's service}; then {"stop": reasons, "of": whose, "code": with which to
exit} or {"finish": true}.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

EXIT_CODE = 5  # of a process that stops because another one failed or is missing
FINAL = (
    2,
    3,
)  # codes of what a new start would meet again: all exit with them, so that no scheduler tries
_SETTLE = 1.0  # seconds from the first failure heard of to the verdict: what failed and what followed from it
_GRACE = 5.0  # seconds for the verdict to reach everybody


class Incomplete(ValueError):
    """Not all processes came, or not all stayed until the start; starting again may help."""


class _Failure(NamedTuple):
    """process: None where it is nobody's in particular. code: of its exit."""

    process: int | None
    text: str
    code: int
    echo: bool = False


class Hub:
    """Process 0's side, on a thread. Raises ValueError where the port is taken."""

    def __init__(self, port: int, count: int, timeout: float, jax_address: Callable[[], str]):
        self._count, self._timeout, self._jax_address = count, timeout, jax_address
        both = socket.has_dualstack_ipv6()
        try:
            self._socket = socket.create_server(
                ("", port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                dualstack_ipv6=both,
                backlog=count,
            )
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on port {port}: {error.strerror}. Is another run's process 0 on this host? "
                "Give --coordinator another port"
            ) from error
        self._writers, self._names, self._done, self._failures = {}, {}, set(), []
        self._started = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Waits until everybody has been told, and is gone."""
        self._thread.join(timeout)

    async def _serve(self):
        self._changed = asyncio.Event()
        server = await asyncio.start_server(self._member, sock=self._socket)
        async with server:
            started = time.monotonic()
            await self._until(lambda: len(self._writers) == self._count, self._timeout)
            if not self._failures and len(self._writers) < self._count:
                waited = time.monotonic() - started
                self._failures.append(_Failure(None, self._missing(waited), EXIT_CODE))
            if not self._failures:
                self._started = True
                self._tell({"start": self._jax_address()})
                await self._until(lambda: len(self._done) == self._count)
            if self._failures:
                await asyncio.sleep(_SETTLE)
                causes = [f for f in self._failures if not f.echo] or self._failures
                reasons = "\n".join(dict.fromkeys(f.text for f in causes))
                code = min((f.code for f in causes if f.code in FINAL), default=EXIT_CODE)
                self._tell({"stop": reasons, "of": [f.process for f in causes], "code": code})
            else:
                self._tell({"finish": True})
            await self._until(lambda: not self._writers, _GRACE, despite_failures=True)

    async def _until(self, condition, timeout=None, despite_failures=False):
        async def wait():
            while not (condition() or (self._failures and not despite_failures)):
                self._changed.clear()
                await self._changed.wait()

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wait(), timeout)

    def _tell(self, message: dict):
        for writer in self._writers.values():
            writer.write(_encode(message))

    async def _member(self, reader, writer):
        process = None
        with contextlib.suppress(OSError):  # a connection that breaks ends as one that closes
            _keep_alive(writer.get_extra_info("socket"))
            process = self._greet(await reader.readline(), writer)
            while process is not None and (line := await reader.readline()):
                message = json.loads(line)
                if "failed" in message:
                    self._fail(process, message["failed"], message["code"], message["echo"])
                else:
                    self._done.add(process)
                    self._changed.set()
        if process is not None:
            del self._writers[process]
            if process not in self._done and process not in {f.process for f in self._failures}:
                self._fail(process, "ended without a word: killed, or its host is gone", EXIT_CODE)
            self._changed.set()
        writer.close()

    def _greet(self, line: bytes, writer) -> int | None:
        """The number of who has connected; None for a stranger."""
        try:
            who = json.loads(line)
            process, count, name = who["process"], who["count"], who["name"]
        except (ValueError, TypeError, KeyError):
            return None
        if self._started:
            reason = f"the run on this port has all its processes and takes no {name}: give --coordinator another port, or wait"
            writer.write(_encode({"stop": reason, "of": [None], "code": EXIT_CODE}))
            return None
        if count != self._count:
            reason = f"{name} counts {count} processes, process 0 counts {self._count}"
        elif process in self._names:
            reason = f"{name} and {self._names[process]} both are process {process}"
        else:
            self._names[process], self._writers[process] = name, writer
            self._changed.set()
            return process
        self._failures.append(_Failure(None, reason, 2))
        self._changed.set()
        writer.write(_encode({"stop": reason, "of": [None], "code": 2}))
        return None

    def _fail(self, process: int, reason: str, code: int, echo: bool = False):
        text = f"process {process} of {self._count} ({self._names[process]}): {reason}"
        self._failures.append(_Failure(process, text, code, echo))
        self._changed.set()

    def _missing(self, waited: float) -> str:
        here = [f"{process} ({name})" for process, name in sorted(self._names.items())]
        missing = [str(p) for p in range(self._count) if p not in self._names]
        return (
            f"waited {waited:.0f} s for {self._count} processes; missing: {some(missing)}. Here: {some(here)}. "
            "Look at the logs of the missing ones; --distributed_timeout=SECONDS waits longer"
        )


class Member:
    """A process's connection to the hub. `start_at` is where JAX's service is to be.

    Raises Incomplete where process 0 does not answer or processes are missing, ValueError where
    they disagree on how many they are or which they are.
    """

    def __init__(
        self, address: tuple[str, int], process: int, count: int, timeout: float, hub: Hub | None
    ):
        self.process, self.count, self._hub = process, count, hub
        self._state = "running"  # then "failing" or "leaving": own end is under way
        self._verdict = None
        self._heard = threading.Event()
        self._socket = _connect(address, process, timeout)
        _keep_alive(self._socket)
        self._lines = self._socket.makefile("r")
        name = f"{socket.gethostname()}, pid {os.getpid()}"
        self._send({"process": process, "count": count, "name": name})
        message = self._receive()
        if "start" not in message:
            self._wait_for_hub()
            raise (ValueError if message["code"] in FINAL else Incomplete)(message["stop"])
        self.start_at = message["start"]
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def label(self) -> str:
        return f"process {self.process} of {self.count}"

    def leave(self) -> None:
        """Returns once all processes are done; a failure of one of them meanwhile ends this one."""
        self._send({"done": True})
        self._heard.wait()
        self._state = "leaving"

    def fail(self, reason: str, code: int, echo: bool) -> tuple[str, int] | None:
        """Tells all others that this process fails, and will exit with `code`. echo: perhaps only
        because another one did.

        Returns the reason of the others and the exit code that follows from it, where it was not
        this one that failed first.
        """
        self._state = "failing"
        with contextlib.suppress(OSError):
            self._send({"failed": reason, "code": code, "echo": echo})
        self._heard.wait(_SETTLE + _GRACE)
        self._wait_for_hub()
        if self._verdict is None or self.process in self._verdict["of"]:
            return None
        return self._verdict["stop"], self._verdict["code"]

    def _listen(self):
        message = self._receive()
        if "stop" in message:
            self._verdict = message
            if self._state == "running":
                self._wait_for_hub()
                print(f"error: {self.label} stops: {message['stop']}", file=sys.stderr, flush=True)
                # The main thread may hang in a collective that nobody else joins.
                os._exit(message["code"])
        self._heard.set()

    def _receive(self) -> dict:
        with contextlib.suppress(OSError):
            if line := self._lines.readline():
                return json.loads(line)
        gone = f"process 0 of {self.count} ended without a word: killed, or its host is gone"
        return {"stop": gone, "of": [0], "code": EXIT_CODE}

    def _send(self, message: dict):
        self._socket.sendall(_encode(message))

    def _wait_for_hub(self):
        """The hub lives in process 0, which must not end before the others have heard why."""
        if self._hub is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._hub.join(_SETTLE + 2 * _GRACE)


def _connect(address: tuple[str, int], process: int, timeout: float) -> socket.socket:
    started = time.monotonic()
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
            connection.settimeout(None)
            return connection
        except OSError as error:  # not there yet, or its name not known yet
            waited = time.monotonic() - started
            if waited > timeout:
                raise Incomplete(
                    f"process {process} waited {waited:.0f} s for process 0 at {address[0]}:{address[1]}: {error}. Process 0 is "
                    "missing, or the address is not its own; --distributed_timeout=SECONDS waits longer"
                ) from error
            time.sleep(min(0.2, timeout / 10))


def _keep_alive(connection) -> None:
    """A host that vanishes closes nothing: the kernel asks after 20 s of silence, and gives up 20 s
    later."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _encode(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def some(names: list[str]) -> str:
    """The first 16 of them."""
    more = f" and {len(names) - 16} more" if len(names) > 16 else ""
    return ", ".join(names[:16]) + more
