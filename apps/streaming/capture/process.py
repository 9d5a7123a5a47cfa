"""The supervisor's hold on one capture process: starting it, hearing it, ending it."""

from __future__ import annotations

import array
import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from apps.streaming.capture.child import CaptureTask
from apps.streaming.capture.messages import (
    MAX_MESSAGE_BYTES,
    FrameReady,
    Message,
    RingReady,
    decode,
    encode_slot,
)
from apps.streaming.capture.ring import RingReader

__all__ = ["CaptureProcess"]

# The parent's import path, so that the child finds the same packages; `-m` would put the working
# directory before them.
_BOOT = "import sys; a = sys.argv; sys.path[:] = a[4:]; from apps.streaming.capture.child import main; main(a[1:4])"
_LOG_LINES = 20
_LOG_LINE_BYTES = 300
_LOG_READ_BYTES = 1 << 16
_CLOSE_GRACE_S = 1.0
_RECEIVING = int(
    socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
)  # `|` of two flags is Python code, run for every frame


class CaptureProcess:
    """One run of a capture process. Used by one thread, but for `release`.

    It must be started by a thread that outlives it: the kernel kills it with that thread.

    Args:
        task: what it is to do.
        wake_fd: a descriptor that ends `wait` when it can be read.
    """

    def __init__(self, task: CaptureTask, wake_fd: int) -> None:
        self._task = task
        self._ring: RingReader | None = None
        self._generation = 0
        self._lock = threading.Lock()
        self._held = 0
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._log_rest = b""
        self._ended = False
        self._exit_code: int | None = None
        with contextlib.ExitStack() as on_error:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            on_error.callback(ours.close)
            with theirs, os.fdopen(os.memfd_create("edgefold-task"), "w+b") as file:
                pickle.dump(task, file)
                file.flush()
                file.seek(0)
                fds = theirs.fileno(), file.fileno()
                words = [str(number) for number in (*fds, os.getpid())]
                # A session of its own: Ctrl-C is the supervisor's to hear, and what the child starts
                # (GStreamer's plug-in scanner) can be killed with it.
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, *words, *sys.path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=fds,
                    start_new_session=True,
                )
            on_error.pop_all()
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._output_fd = self._output.fileno()
        os.set_blocking(self._output_fd, False)
        self._socket: socket.socket | None = ours
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)
        self._poll.register(self._output, select.POLLIN)
        self._poll.register(wake_fd, select.POLLIN)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it will say nothing more; all that it said has been received."""
        return self._ended

    @property
    def all_slots_held(self) -> bool:
        """Whether it has no slot to write to, so that under ``every`` it waits."""
        with self._lock:
            return self._held >= self._task.n_slots

    def wait(self, seconds: float) -> None:
        """Waits until it says something, or the descriptor can be read, or the time is over."""
        if any(fd == self._output_fd for fd, _ in self._poll.poll(1e3 * seconds)):
            self._read_log()

    def receive(self) -> Iterator[tuple[Message, NDArray[np.uint8] | None]]:
        """What it said since the last time, frames with their pixels (read-only, in shared memory).

        Raises:
            ValueError: it says what no capture process says.
        """
        while self._socket is not None and not self._ended:
            datagram, fds = self._receive_one(self._socket)
            if datagram is None:
                return
            try:
                if not datagram:
                    self._ended = True
                    return
                message = decode(datagram)
                if isinstance(message, RingReady):
                    if not fds:
                        raise ValueError("a ring without its descriptor")
                    with self._lock:
                        self._ring = RingReader(fds[0], message.n_slots, message.slot_bytes)
                        self._generation = message.generation
                        self._held = 0
            finally:
                for fd in fds:
                    os.close(fd)
            yield message, self._pixels(message) if isinstance(message, FrameReady) else None

    @staticmethod
    def _receive_one(connection: socket.socket) -> tuple[bytes | None, array.array[int]]:
        """A datagram and its descriptors; ``None`` where none waits, empty at the end."""
        fds = array.array("i")
        try:
            # Not `socket.recv_fds`: it leaves its flags out (Python 3.11), and would wait.
            datagram, ancillary, _, _ = connection.recvmsg(
                MAX_MESSAGE_BYTES,
                socket.CMSG_SPACE(fds.itemsize),
                _RECEIVING,
            )
        except BlockingIOError:
            return None, fds
        except ConnectionResetError:
            # It ended without having taken all that was sent to it. The kernel says so once, and
            # before what it said itself, which still waits.
            return CaptureProcess._receive_one(connection)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        return datagram, fds

    def _pixels(self, message: FrameReady) -> NDArray[np.uint8]:
        if self._ring is None or message.generation != self._generation:
            raise ValueError(f"a frame in ring {message.generation}; the ring is {self._generation}")
        pixels = self._ring.view(message.slot, message.shape)
        with self._lock:
            self._held += 1
        return pixels

    def release(self, generation: int, slot: int) -> None:
        """The slot may be written to again. From any thread, and after the end of the process too."""
        with self._lock:
            if generation != self._generation or self._socket is None:
                return
            self._held -= 1
            # Dead, or stopped with its socket full of slots: its end is noticed elsewhere.
            with contextlib.suppress(OSError):
                self._socket.send(encode_slot(generation, slot), socket.MSG_DONTWAIT)

    def stop(self) -> None:
        """Asks it to end; returns at once."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def close(self, grace_s: float = _CLOSE_GRACE_S) -> int:
        """Ends it, killing it after `grace_s`; returns its exit status, negative for a signal."""
        if self._exit_code is not None:
            return self._exit_code
        self.stop()
        self._wait_for_exit(grace_s)
        # Not reaped yet, so its number is still its own; what it started is in its group.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._exit_code = self._process.wait()
        self._read_log()
        self._output.close()
        with self._lock:
            assert self._socket is not None
            self._socket.close()
            self._socket = None
        self._ring = None
        return self._exit_code

    def _wait_for_exit(self, seconds: float) -> None:
        pid_fd = os.pidfd_open(self._process.pid)
        try:
            exited = select.poll()
            exited.register(pid_fd, select.POLLIN)
            exited.poll(1e3 * seconds)
        finally:
            os.close(pid_fd)

    def last_words(self) -> str:
        """The end of its log (the libraries' own lines), without credentials; empty where it was silent."""
        return self._task.uri.redact("; ".join(list(self._log)[-3:]))

    def _read_log(self) -> None:
        """Bounded: of what is said too fast or in too long lines the rest is passed over."""
        try:
            data = self._output.read(_LOG_READ_BYTES)
        except BlockingIOError:
            return
        if data is None:
            return
        if not data:
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._output)
            lines, self._log_rest = [self._log_rest], b""
        else:
            *lines, rest = (self._log_rest + data).split(b"\n")
            self._log_rest = rest[:_LOG_LINE_BYTES]
        for line in lines:
            text = line[:_LOG_LINE_BYTES].decode("utf-8", "replace").strip()
            if text:
                self._log.append(text)
