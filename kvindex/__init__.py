"""kvindex: where every KV block of an inference fleet is, and where a request should go."""

from kvindex.index.facade import Index, Ingested
from kvindex.scoring.result import ScoreRow, Scores

__version__ = "0.1.0"
__all__ = ["Index", "Ingested", "ScoreRow", "Scores", "__version__"]
