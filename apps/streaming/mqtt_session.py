"""One connection to an MQTT broker, from connecting until it breaks or is no longer wanted.

paho's functions for an event loop of one's own are used, in one thread: an event is sent when it is
published, by a socket that wakes the loop, and nothing of paho's runs in a thread that could not be ended.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from apps.streaming.broker_url import BrokerUrl
from apps.streaming.outbox import Outbox

__all__ = ["BrokerError", "BrokerSession"]

_WINDOW = 16
"""Events with the broker that it has not confirmed; below paho's own limit of 20."""

_KEEPALIVE_S = 15
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
_POLL_S = 1.0
_DRAIN_S = 1.5
_REFUSALS = frozenset(
    {
        "Unsupported protocol version",
        "Client identifier not valid",
        "Bad user name or password",
        "Not authorized",
    }
)


class BrokerError(Exception):
    """A connection that failed or broke.

    Attributes:
        refused: waiting does not mend it; someone must change something.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class BrokerSession:
    """Delivers what is in the outbox, for as long as the connection lasts.

    Args:
        broker: where, and as whom.
        client_id: the same for every session of an app.
        status_topic: gets ``online``, and ``offline`` from here or, as last will, from the broker; retained.
        event_topic: topic of a source's events.
        qos: of the events.
        outbox: confirmed one by one; what is in flight when the session ends is the caller's to restore.
        closing: set when the session is to deliver the rest and end; `wake` is then readable.
        wake: readable when there is something to do.
        on_accepted: called when the broker has accepted the connection.
    """

    def __init__(
        self,
        broker: BrokerUrl,
        client_id: str,
        status_topic: str,
        event_topic: Callable[[str], str],
        qos: int,
        outbox: Outbox,
        closing: threading.Event,
        wake: socket.socket,
        on_accepted: Callable[[], None],
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._status_topic = status_topic
        self._event_topic = event_topic
        self._qos = qos
        self._outbox = outbox
        self._closing = closing
        self._wake = wake
        self._on_accepted = on_accepted
        self._answer: ReasonCode | None = None
        self._unconfirmed: dict[int, paho.MQTTMessageInfo] = {}
        self._goodbye: paho.MQTTMessageInfo | None = None
        self._client: paho.Client

    @property
    def accepted(self) -> bool:
        """Whether the broker accepted the connection."""
        return self._answer is not None and not self._answer.is_failure

    def run(self) -> None:
        """Returns once `closing` is set and everything is delivered, or cannot be within 1.5 s.

        Raises:
            BrokerError: the connection failed or broke.
        """
        try:
            self._client = self._new_client()
            self._deliver(self._connect())
        except BrokerError:
            raise
        except Exception as error:
            # paho has no common error for packets that are none; whatever talks there must not end the thread.
            raise BrokerError(
                f"the connection to {self._broker.shown} failed ({type(error).__name__}: {error})"
            ) from error

    def _deliver(self, connection: Any) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(connection, selectors.EVENT_READ)
                selector.register(self._wake, selectors.EVENT_READ)
                self._exchange(connection, selector)
        finally:
            # Without the DISCONNECT of a completed goodbye, the broker publishes the last will.
            connection.close()

    def _new_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self._client_id, reconnect_on_failure=False
        )
        client.connect_timeout = _CONNECT_TIMEOUT_S
        client.will_set(self._status_topic, "offline", qos=1, retain=True)
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._broker.password)
        if self._broker.tls:
            # The system's authorities, and those that SSL_CERT_FILE and SSL_CERT_DIR name.
            client.tls_set_context(ssl.create_default_context())

        def on_connect(client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
            self._answer = reason

        client.on_connect = on_connect
        return client

    def _connect(self) -> Any:
        shown = self._broker.shown
        try:
            self._client.connect(self._broker.host, self._broker.port, keepalive=_KEEPALIVE_S)
        except ssl.SSLCertVerificationError as error:
            raise BrokerError(
                f"the certificate of {shown} is not trusted ({error.verify_message}); add its authority to the "
                "system's, or name its file in SSL_CERT_FILE",
                refused=True,
            ) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: no name that DNS knows
            reason = getattr(error, "strerror", None) or error
            raise BrokerError(f"{shown} cannot be reached ({reason})") from error
        connection = self._client.socket()
        if connection is None:
            raise BrokerError(f"{shown} closed the connection at once")
        return connection

    def _exchange(self, connection: Any, selector: selectors.BaseSelector) -> None:
        answer_due_s = time.monotonic() + _ANSWER_TIMEOUT_S
        drain_until_s: float | None = None
        greeted = False
        while True:
            now_s = time.monotonic()
            if self.accepted and not greeted:
                greeted = True
                self._publish(self._status_topic, "online", qos=1, retain=True)
                self._on_accepted()
            if self.accepted:
                self._send_waiting()
            elif now_s >= answer_due_s:
                raise BrokerError(f"{self._broker.shown} has not answered for {_ANSWER_TIMEOUT_S:.0f} s")
            if self._closing.is_set():
                drain_until_s = drain_until_s or now_s + _DRAIN_S
                if now_s >= drain_until_s or self._said_goodbye():
                    return
            self._wait(connection, selector, _POLL_S if drain_until_s is None else drain_until_s - now_s)

    def _wait(self, connection: Any, selector: selectors.BaseSelector, timeout_s: float) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
        selector.modify(connection, wanted)
        if self._broker.tls and connection.pending():
            # Decrypted already, so the selector does not see it.
            self._check(self._client.loop_read())
            timeout_s = 0.0
        for key, ready in selector.select(timeout_s):
            if key.fileobj is self._wake:
                self._wake.recv(4096)
                continue
            if ready & selectors.EVENT_READ:
                self._check(self._client.loop_read())
            if ready & selectors.EVENT_WRITE:
                self._check(self._client.loop_write())
        self._check(self._client.loop_misc())

    def _send_waiting(self) -> None:
        """Fills the window; with QoS 0 an event is confirmed by being written, so it goes on at once."""
        self._collect_confirmed()
        while len(self._unconfirmed) < _WINDOW:
            entry = self._outbox.take()
            if entry is None:
                return
            number, source_id, line = entry
            self._unconfirmed[number] = self._publish(self._event_topic(source_id), line, self._qos)
            self._collect_confirmed()

    def _collect_confirmed(self) -> None:
        for number in [number for number, info in self._unconfirmed.items() if info.is_published()]:
            del self._unconfirmed[number]
            self._outbox.confirm(number)

    def _said_goodbye(self) -> bool:
        if not self.accepted or not self._outbox.empty:
            return False
        if self._goodbye is None:
            self._goodbye = self._publish(self._status_topic, "offline", qos=1, retain=True)
        if not self._goodbye.is_published():
            return False
        self._client.disconnect()
        return True

    def _publish(self, topic: str, payload: str, qos: int, retain: bool = False) -> paho.MQTTMessageInfo:
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        self._check(info.rc)
        return info

    def _check(self, code: MQTTErrorCode) -> None:
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS:
            return
        shown, answer = self._broker.shown, self._answer
        if answer is None or not answer.is_failure:
            raise BrokerError(f"the connection to {shown} broke ({paho.error_string(code).rstrip('.')})")
        name = answer.getName()
        if name in ("Bad user name or password", "Not authorized"):
            remedy = "check user and password" if self._broker.username else "it asks for user and password"
            raise BrokerError(f"{shown} refused to let us in ({name}): {remedy}", refused=True)
        raise BrokerError(f"{shown} refused the connection ({name})", refused=name in _REFUSALS)
