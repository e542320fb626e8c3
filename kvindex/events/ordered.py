"""Delivers one source's messages to a sink in their order, having what was lost replayed before what came after it.

Pure logic: no threads, no sockets. Whoever owns the socket calls `live` for each message, and `sync` when messages may
have been lost without a later one to show it (after a connect, an overflow, or silence).

The order matters: a store that is applied after the removal that followed it credits a block that is gone. So a live
message that reveals a loss is held back until the replay has brought what is missing.

A replay socket belongs to one publisher process, so a source that has one carries one numbered stream. A source
without one may carry many (a bound socket that engines connect to, a proxy): its messages go through as they come, and
the sink's own checks say what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing

import structlog

from kvindex.events.frames import Message, digest, split
from kvindex.events.replaying import Answer, ReplayError
from kvindex.events.sequence import SequenceTracker, Verdict
from kvindex.events.sink import Sink

ATTEMPTS = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds that a replay socket which failed is left alone

Ask = Callable[[int], Generator[list[bytes], None, None]]


class OrderedFeed:
    """One consumer calls it; not thread-safe. `ask` None: the publisher has no replay socket."""

    def __init__(
        self,
        source: str,
        sink: Sink,
        ask: Ask | None = None,
        *,
        topic_prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] = lambda seconds: True,
    ) -> None:
        self.source = source
        self.replays = 0  # questions asked, probes included
        self.failures = 0  # questions without a whole answer
        self.lost = 0  # messages that no replay could bring back
        self.restarts = 0
        self.malformed = 0  # messages without a payload frame
        self.problem = ""  # why the last replay failed, for people; empty when it did not
        self._sink = sink
        self._ask = ask
        self._prefix = topic_prefix
        self._clock = clock
        self._pause = pause  # sleeps; False when the owner wants to stop
        self._tracker = SequenceTracker()
        self._topic: str | None = None
        self._former_topics: set[str] = set()
        self._mixed = False  # several publishers after all: nothing to put in order here
        self._keeps = False  # the replay socket has answered with a message, so it does keep some
        self._bracketed = False
        self._next_pause = _FIRST_PAUSE
        self._ask_again_at = 0.0
        self._log = structlog.get_logger().bind(component="events", source=source)

    @property
    def last_sequence(self) -> int | None:
        return self._tracker.last_sequence

    def live(self, frames: list[bytes]) -> None:
        """Deliver a message of the event socket, after whatever it shows to be missing."""
        if len(frames) < 2:
            self.malformed += 1
            return
        message = split(frames)
        if not isinstance(message, Message) or self._ask is None or not self._same_topic(message.topic):
            self._through(message, frames)
            return
        hashed = digest(message.payload)
        verdict = self._tracker.judge(message.sequence, hashed).verdict
        if verdict is Verdict.DUPLICATE:
            return
        if verdict is Verdict.RESTART:
            self._restart("its sequence went back")
        unseen = self._tracker.last_sequence is None and message.sequence > 0
        complete = True
        if verdict is Verdict.GAP or unseen:
            if verdict is Verdict.GAP:
                self._begin()
            complete = self._catch_up()
        decision = self._tracker.offer(message.sequence, hashed)
        if decision.verdict is not Verdict.DUPLICATE:
            self._forward(message, frames)
        self._end(complete)

    def sync(self) -> bool:
        """Ask for what came since the last message seen, and deliver it. True when the answer was whole.

        Blocks for as long as the replay takes; at once False without a replay socket, or soon after it failed.
        """
        if self._ask is None or self._mixed:
            return False
        complete = self._catch_up()
        self._end(complete)
        return complete

    def rebuild(self) -> bool:
        """What the sink knows of this source is doubted: void it and replay from the beginning. True: whole."""
        if self._ask is None or self._mixed:
            return False
        self._ask_again_at = 0.0
        self._restart("a rebuild was asked for")
        return self.sync()

    # ------------------------------------------------------------------ replays

    def _catch_up(self) -> bool:
        if self._clock() < self._ask_again_at:
            return False
        failed = 0  # in a row, without getting any further
        answer = Answer.RESTARTED
        while failed < ATTEMPTS:
            if answer is Answer.BROKEN and not self._pause(0.1 * 4**failed):
                return False
            before = self._tracker.last_sequence
            answer = self._read_answer(from_start=answer is Answer.DOUBTFUL)
            if answer is Answer.WHOLE:
                self._next_pause = _FIRST_PAUSE
                self.problem = ""
                return not self._tracker.holes
            if answer is Answer.UNNAMED:
                return False
            self.failures += answer is Answer.BROKEN
            further = answer is Answer.BROKEN and self._tracker.last_sequence != before
            failed = 0 if further else failed + 1
        self._ask_again_at = self._clock() + self._next_pause
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
        return False

    def _read_answer(self, *, from_start: bool) -> Answer:
        """Ask from the last message seen, whose payload tells whether it is still the same process that answers."""
        assert self._ask is not None
        seen = self._tracker.last_sequence
        start = 0 if from_start or seen is None else seen
        self.replays += 1
        count, newest = 0, -1
        try:
            with closing(self._ask(start)) as answers:
                for frames in answers:
                    message = split(frames, replay=True) if len(frames) >= 2 else None
                    if not isinstance(message, Message):
                        self.malformed += 1
                        continue
                    if message.is_end:
                        return self._answer_ended(frames, whole=seen is None or newest >= seen, start=start)
                    count, newest = count + 1, message.sequence
                    refused = self._replayed(message, frames, first=count == 1)
                    if refused is not None:
                        return refused
        except ReplayError as failure:
            self.problem = str(failure)
            self._log.warning("replay failed", start=start, answers=count, error=str(failure))
        return Answer.BROKEN

    def _replayed(self, message: Message, frames: list[bytes], *, first: bool) -> Answer | None:
        """Deliver one answer; anything but None ends the reading."""
        if self._topic is None and message.topic is None:
            return Answer.UNNAMED  # vLLM before 0.25: the sink could not tell whose it is
        if message.topic is not None and message.topic != self._topic:
            first_name = self._topic is None
            if not self._same_topic(message.topic) or not first_name:
                return Answer.BROKEN if self._mixed else Answer.RESTARTED
        self._keeps = True
        hashed = digest(message.payload)
        verdict = self._tracker.judge(message.sequence, hashed, replay=True).verdict
        if verdict is Verdict.RESTART:
            self._restart("its replay differs from what it sent")
            return Answer.RESTARTED
        if verdict is Verdict.GAP and not first:
            return Answer.BROKEN  # dropped on the way here: ask again from where it is whole
        # A gap before the first answer: the publisher itself no longer keeps what is missing.
        if self._tracker.offer(message.sequence, hashed, replay=True).verdict is not Verdict.DUPLICATE:
            self._begin()
            named = frames if message.topic is not None else [b"", (self._topic or "").encode(), *frames[-2:]]
            self._forward(message, named, replay=True)
        return None

    def _answer_ended(self, frames: list[bytes], *, whole: bool, start: int) -> Answer:
        """`whole` False: not even the last message seen is there. A process that keeps messages and lacks this one has
        sent less than the one before it."""
        if not whole:
            if not self._keeps:
                return Answer.DOUBTFUL if start > 0 else Answer.WHOLE
            self._keeps = False
            self._restart("its replay buffer lacks the last message seen")
            return Answer.RESTARTED
        if self._bracketed:
            self._sink.ingest(self.source, frames, True)
        return Answer.WHOLE

    # ------------------------------------------------------------------ telling the sink

    def _restart(self, why: str) -> None:
        self.restarts += 1
        self._log.info("publisher restarted", why=why, last_sequence=self._tracker.last_sequence)
        self._tracker.restarted()
        self._sink.restarted(self.source)

    def _begin(self) -> None:
        if not self._bracketed:
            self._bracketed = True
            self._sink.replay_begun(self.source)

    def _end(self, complete: bool) -> None:
        """Close the bracket, if one is open. A probe that brought nothing opened none, and is nobody's business."""
        missing = self._tracker.missing
        if missing:
            self.lost += missing
            self._tracker.forget_holes()
            self._log.warning("messages lost", missing=missing)
        if self._bracketed or missing:
            self._bracketed = False
            self._sink.replay_ended(self.source, complete and not missing)

    def _through(self, message: object, frames: list[bytes]) -> None:
        """No order to keep here; what is malformed goes to the sink too, which counts it by reason."""
        if isinstance(message, Message) and not (message.topic or "").startswith(self._prefix):
            return
        outcome = self._sink.ingest(self.source, frames)
        if getattr(outcome, "status", None) == "gap":
            first, end = getattr(outcome, "missing", None) or (0, 1)
            self.lost += end - first
            self._sink.replay_ended(self.source, False)

    def _forward(self, message: Message, frames: list[bytes], replay: bool = False) -> None:
        """Topics are filtered here, after the sequence check: a filter on the socket would look like losses."""
        topic = self._topic if message.topic is None else message.topic
        if (topic or "").startswith(self._prefix):
            self._sink.ingest(self.source, frames, replay)

    def _same_topic(self, topic: str | None) -> bool:
        """False when this source turns out to carry several publishers."""
        if self._mixed:
            return False
        if topic is None or topic == self._topic:
            return True
        if self._topic is not None:
            if topic in self._former_topics:
                self._mixed = True
                self._log.error("several publishers on one socket: messages that are lost cannot be replayed")
                return False
            self._former_topics.add(self._topic)
            self._restart("its topic changed")
        self._topic = topic
        return True
