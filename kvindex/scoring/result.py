"""What a score call answers, and what the answer costs or saves in seconds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvindex.index.config import OTHER_COST, CostConfig
from kvindex.index.protocol import Columns


class ScoreRow(NamedTuple):
    """One endpoint's score, for those who ask by name."""

    endpoint: str
    blocks: int
    tokens: int
    score: float
    seconds_saved: float
    state: str
    lag_seconds: float
    tiers: dict[str, int]


class Scores(NamedTuple):
    """Aligned columns, one row per endpoint that holds something; an endpoint that is not listed has nothing.

    `blocks`: leading full-attention blocks held. `tokens`: what the engine would find cached. `score`: llm-d's meaning.
    `seconds_saved`: prefill seconds avoided minus load seconds. None is discounted for age: `state` and `lag_seconds`
    stand beside them.
    """

    endpoints: list[str]
    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    seconds_saved: npt.NDArray[np.float64]
    state: list[str]
    lag_seconds: npt.NDArray[np.float64]
    tiers: dict[str, npt.NDArray[np.int64]]

    def row(self, i: int) -> ScoreRow:
        return ScoreRow(
            self.endpoints[i],
            int(self.blocks[i]),
            int(self.tokens[i]),
            float(self.score[i]),
            float(self.seconds_saved[i]),
            self.state[i],
            float(self.lag_seconds[i]),
            {tier: int(column[i]) for tier, column in self.tiers.items() if column[i]},
        )

    def of(self, endpoint: str) -> ScoreRow | None:
        """One endpoint's row, None when it holds nothing."""
        return self.row(self.endpoints.index(endpoint)) if endpoint in self.endpoints else None

    def rows(self) -> list[ScoreRow]:
        return [self.row(i) for i in range(len(self.endpoints))]


def seconds_saved(columns: Columns, cost: CostConfig) -> npt.NDArray[np.float64]:
    """Prefill seconds that `tokens` avoid, minus the seconds to load the part that is below HBM. Never negative: an
    engine may always compute."""
    seconds = columns.tokens / cost.prefill_tokens_per_second
    for tier, tokens in columns.load_tokens.items():
        price = cost.tiers.get(tier, OTHER_COST)
        seconds = seconds - np.where(tokens > 0, price.latency_seconds + tokens / price.tokens_per_second, 0.0)
    return np.maximum(seconds, 0.0)
