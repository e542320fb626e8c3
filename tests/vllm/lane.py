"""One engine's share of the workload: prompts one at a time, each predicted, sent, compared and followed to the end."""

from __future__ import annotations

import random
import string
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvindex.events.decode import decode
from kvindex.events.model import Cleared, Removed, Stored
from tests.vllm.drained import ReplayProbe
from tests.vllm.fleet import Fleet
from tests.vllm.servers import BLOCK_SIZE, MAX_MODEL_LEN, Answer, Engine, call
from tests.vllm.traffic import Prompt, Traffic

OUTPUT_TOKENS = (1, 2, 8, 40)


@dataclass(frozen=True)
class Outcome:
    """One request: what the index said, what the router said, what the engine reported."""

    phase: str
    engine: str
    prompt_tokens: int
    predicted: int
    by_router: int
    cached: int

    @property
    def exact(self) -> bool:
        return self.predicted == self.by_router == self.cached


@dataclass
class Lane:
    fleet: Fleet
    engine: Engine
    models: Path
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng = random.Random(f"{self.seed}/{self.engine.name}")
        self._tokenizer = Tokenizer.from_file(str(self.models / self.engine.name / "tokenizer.json"))
        letters = self._tokenizer.encode(string.ascii_letters + string.digits + " .,").ids
        longest = MAX_MODEL_LEN - max(OUTPUT_TOKENS)
        self.traffic = Traffic(self._rng, BLOCK_SIZE, longest, salt=True, memory=12, vocabulary=letters)
        self._probe = ReplayProbe(self.engine.replay_port)
        self._lock = threading.Lock()

    def close(self) -> None:
        self._probe.close()

    def settle(self) -> None:
        """Everything that the engine announced is in the index."""
        for message in self._probe.drain():
            for event in decode(message.payload).events:
                name = {Stored: "stored", Removed: "removed", Cleared: "cleared"}[type(event)]
                self.events[name] += len(getattr(event, "engine_keys", (0,)))
        if self._probe.next_sequence:
            self.fleet.caught_up(self.engine, self._probe.next_sequence - 1)

    def engine_restarted(self) -> None:
        self._probe.close()
        self._probe = ReplayProbe(self.engine.replay_port)

    def run(self, phase: str, requests: int) -> None:
        """One request after the other, each asked about after the engine's stream is drained."""
        for _ in range(requests):
            self.one(phase, self.traffic.prompt())

    def one(self, phase: str, prompt: Prompt) -> Outcome:
        self.settle()
        predicted = self.fleet.predict(self.engine, prompt.tokens, prompt.salt)
        return self._send(phase, prompt, predicted)

    def chat(self, phase: str, turns: int) -> None:
        """A conversation that grows, as chat: the router's template and tokenizer must agree with vLLM's."""
        messages = [{"role": "system", "content": "You answer in one word. " * 4}]
        for turn in range(turns):
            messages.append({"role": "user", "content": f"Question {turn}: " + "what follows? " * (turn + 1)})
            self.settle()
            tokens = self._ask_engine("/tokenize", {"model": self.engine.name, "messages": messages}).body["tokens"]
            predicted = self.fleet.predict(self.engine, tokens, None)
            body = {"model": self.engine.name, "messages": messages, "max_tokens": 4, "temperature": 0}
            self._note(phase, self.fleet.send("/v1/chat/completions", body), predicted)
            messages.append({"role": "assistant", "content": f"Answer {turn}."})

    def concurrently(self, phase: str, requests: int, clients: int) -> None:
        """Many at once: what is predicted can be overtaken by what the other requests do."""
        prompts = [self.traffic.prompt() for _ in range(requests)]
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda prompt: self._send(phase, prompt, None), prompts))

    def reset(self) -> None:
        """Empty the idle engine's cache. vLLM announces it only with its next step."""
        self.settle()
        answer = self._ask_engine("/reset_prefix_cache", {})
        assert answer.status == 200, answer

    def _ask_engine(self, path: str, body: dict[str, Any]) -> Answer:
        return call(self.engine.port, path, body)

    def _send(self, phase: str, prompt: Prompt, predicted: int | None) -> Outcome:
        body = {
            "model": self.engine.name,
            "prompt": self._as_text(prompt.tokens) or list(prompt.tokens),
            "max_tokens": self._rng.choice(OUTPUT_TOKENS),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if prompt.salt:
            body["cache_salt"] = prompt.salt
        answer = self.fleet.send("/v1/completions", body)
        outcome = self._note(phase, answer, predicted)
        with self._lock:
            produced = tuple(answer.body["choices"][0]["token_ids"])
            whole = (prompt.tokens + produced)[: self.traffic.longest]
            self.traffic.remember(Prompt(whole, salt=prompt.salt))
        return outcome

    def _note(self, phase: str, answer: Answer, predicted: int | None) -> Outcome:
        assert answer.status == 200, (self.engine.name, answer)
        assert answer.headers["x-kvindex-endpoint"] == self.engine.name
        by_router = int(answer.headers["x-kvindex-matched-tokens"])
        usage = answer.body["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        outcome = Outcome(
            phase,
            self.engine.name,
            usage["prompt_tokens"],
            by_router if predicted is None else predicted,
            by_router,
            cached,
        )
        with self._lock:
            self.outcomes.append(outcome)
        return outcome

    def _as_text(self, tokens: tuple[int, ...]) -> str | None:
        """Half of the prompts go as text, where the tokens survive the way there and back."""
        if self._rng.random() < 0.5:
            return None
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=False))
        return text if tuple(self._tokenizer.encode(text).ids) == tokens else None
