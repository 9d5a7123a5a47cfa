"""Events to an MQTT broker, on ``TOPIC/SOURCE/events``; whether the app is there, on ``TOPIC/status``.

The queue is our own (`apps.streaming.outbox`), not paho's: an event leaves it when the broker has confirmed
it (PUBACK), so that it survives a broker that is away, at the start too. After a broken connection what was
unconfirmed is sent again first, in its order. A receiver thus gets every event that was not given up at
least once, and those of one source in order, but for a repetition, which equals what it repeats in every
byte: that is what QoS 1 promises.
"""

from __future__ import annotations

import logging
import random
import re
import socket
import threading
import uuid
from collections.abc import Sequence

from apps.streaming.broker_url import parse_broker_url
from apps.streaming.config import MqttConfig
from apps.streaming.contracts import Event
from apps.streaming.event_log import event_line
from apps.streaming.naming import plain_name
from apps.streaming.outbox import Outbox
from pipeline.errors import UnsupportedError, UsageError

__all__ = ["MqttPublisher"]

_log = logging.getLogger(__name__)

_RETRY_S = (1.0, 30.0)
_REFUSED_RETRY_S = 60.0
_CLOSE_S = 2.0
_MAX_TOPIC_BYTES = 1024


class MqttPublisher:
    """Delivers events to a broker, whenever it is there; an `EventOutput`.

    Connects, sends and listens in its own thread.

    Args:
        config: broker, topic, QoS and length of the queue.
        source_ids: of all sources; each is a level of the topic, see `topic_of`.

    Raises:
        UsageError: the URL, the topic or a number in `config` is wrong; two sources would share a topic.
        UnsupportedError: paho-mqtt is missing or older than 2.0.
    """

    def __init__(self, config: MqttConfig, source_ids: Sequence[str]) -> None:
        self._broker = parse_broker_url(config.url)
        self._topic = _checked_topic(config.topic)
        if config.queue < 1:
            raise UsageError(f"mqtt: a queue of {config.queue} keeps nothing; give at least 1")
        if config.qos not in (0, 1):
            raise UsageError(
                f"mqtt: no QoS {config.qos}; give 1, or 0 for events that may be lost on their way"
            )
        self._check_distinct(source_ids)
        try:
            from apps.streaming import mqtt_session
        except ImportError as error:
            raise UnsupportedError(
                f"events over MQTT need paho-mqtt 2 ({error}): pip install 'edgefold[mqtt]'"
            ) from error
        self._session = mqtt_session
        self._qos = config.qos
        self._outbox = Outbox(config.queue)
        # One for all connections: the broker then ends a half-open one when the next comes.
        self._client_id = f"edgefold-{uuid.uuid4().hex[:12]}"
        self._closing = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._refused = 0
        self.connected = False
        """Whether the broker has accepted the connection, and it has not broken since."""
        self.last_error: str | None = None
        """Why it is not connected, without credentials; ``None`` when it is."""
        if self._broker.password is not None and not (self._broker.tls or self._broker.is_loopback):
            _log.warning("mqtt: the password for %s goes out unencrypted; use mqtts://", self._broker.shown)
        self._thread = threading.Thread(target=self._serve, name="mqtt", daemon=True)
        self._thread.start()

    def topic_of(self, source_id: str) -> str:
        """Where the events of a source go. What could be a separator or a wildcard becomes ``_``."""
        return f"{self._topic}/{plain_name(source_id)}/events"

    def publish(self, event: Event) -> None:
        """Queues the event."""
        self._outbox.put(event.source_id, event_line(event))
        self._wake()

    def counters(self) -> dict[str, int]:
        """Of the queue; ``failures`` are connections that failed or broke, ``refused`` those among them that
        waiting does not mend: a wrong password, a certificate that is not trusted."""
        return {**self._outbox.counters(), "refused": self._refused}

    def close(self) -> None:
        """Delivers what it can within two seconds, and says ``offline``; twice is harmless."""
        self._closing.set()
        self._wake()
        self._thread.join(_CLOSE_S)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except OSError:
            return  # full: it will wake up anyway; closed: it has ended

    def _check_distinct(self, source_ids: Sequence[str]) -> None:
        seen: dict[str, str] = {}
        for source_id in source_ids:
            other = seen.setdefault(plain_name(source_id), source_id)
            if other != source_id:
                raise UsageError(
                    f"mqtt: {other!r} and {source_id!r} would both be on {self.topic_of(source_id)}; give the "
                    "sources names that differ in letters or digits"
                )

    # --- worker thread ----------------------------------------------------------------------------

    def _serve(self) -> None:
        retry_s = _RETRY_S[0]
        while not (self._closing.is_set() and self._outbox.empty):
            is_last = self._closing.is_set()
            session = self._session.BrokerSession(
                self._broker,
                self._client_id,
                f"{self._topic}/status",
                self.topic_of,
                self._qos,
                self._outbox,
                self._closing,
                self._wake_read,
                self._accepted,
            )
            try:
                session.run()
                break
            except self._session.BrokerError as error:
                refused = error.refused
                self._lost(str(error), refused)
            if is_last:
                break
            if session.accepted:
                retry_s = _RETRY_S[0]
            # Jitter: a hundred devices must not all come back in the second in which their broker does.
            self._closing.wait(_REFUSED_RETRY_S if refused else retry_s * random.uniform(0.5, 1.0))
            retry_s = min(2 * retry_s, _RETRY_S[1])
        self.connected = False
        self._wake_read.close()
        self._wake_write.close()

    def _accepted(self) -> None:
        if self.last_error is not None:
            _log.warning("mqtt: %s takes events again: %s", self._broker.shown, self.counters())
        self.connected, self.last_error = True, None

    def _lost(self, reason: str, refused: bool) -> None:
        """Counts every failure; says a reason once, however often it is met in a row."""
        self._outbox.restore()
        self._outbox.failed()
        self._refused += refused
        if reason != self.last_error:
            _log.warning("mqtt: %s; events are kept, and it is tried again", reason)
        self.connected, self.last_error = False, reason


def _checked_topic(topic: str) -> str:
    wrong = not topic or re.search(r"[+#\0]|^[/$]|/$|//", topic)
    if wrong or len(topic.encode()) > _MAX_TOPIC_BYTES:
        raise UsageError(
            f"mqtt: {topic[:80]!r} is no topic to publish under; give levels separated by /, without + and #, "
            f"not beginning with $, {_MAX_TOPIC_BYTES} bytes at most"
        )
    return topic
