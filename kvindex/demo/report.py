"""What the demo found: a table, a picture, an explanation of single picks."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from kvindex.demo.workload import Measured


class Summary(NamedTuple):
    """One run. `hit_rate`: prompt tokens that the engines found cached. `errors`: predicted minus reported tokens."""

    name: str
    requests: int
    hit_rate: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    exact: float | None
    mean_error: float | None
    endpoints: dict[str, int]


def summarise(name: str, measured: Sequence[Measured]) -> Summary:
    first = np.array([m.seconds_to_first_token for m in measured])
    errors = [m.predicted - m.cached_tokens for m in measured if m.predicted is not None]
    return Summary(
        name,
        len(measured),
        sum(m.cached_tokens for m in measured) / max(1, sum(m.prompt_tokens for m in measured)),
        float(np.mean(first)),
        float(np.percentile(first, 50)),
        float(np.percentile(first, 95)),
        sum(e == 0 for e in errors) / len(errors) if errors else None,
        float(np.mean(np.abs(errors))) if errors else None,
        dict(sorted(Counter(m.endpoint for m in measured).items())),
    )


def as_json(summary: Summary) -> dict[str, Any]:
    return summary._asdict()


def table(summaries: Sequence[Summary], console: Console) -> None:
    shown = Table(title="The same chats, routed twice", title_justify="left")
    shown.add_column("")
    for summary in summaries:
        shown.add_column(summary.name, justify="right")

    def row(label: str, *values: str) -> None:
        shown.add_row(label, *values)

    row("requests", *(str(s.requests) for s in summaries))
    row("prompt tokens found cached", *(f"{s.hit_rate:.1%}" for s in summaries))
    row("time to first token, mean", *(f"{s.ttft_mean * 1e3:.0f} ms" for s in summaries))
    row("time to first token, p50", *(f"{s.ttft_p50 * 1e3:.0f} ms" for s in summaries))
    row("time to first token, p95", *(f"{s.ttft_p95 * 1e3:.0f} ms" for s in summaries))
    row("predictions exactly right", *("-" if s.exact is None else f"{s.exact:.1%}" for s in summaries))
    row("mean prediction error", *("-" if s.mean_error is None else f"{s.mean_error:.1f} tokens" for s in summaries))
    row("requests per engine", *(" ".join(str(n) for n in s.endpoints.values()) for s in summaries))
    console.print(shown)


def picture(runs: Mapping[str, Sequence[Measured]], summaries: Sequence[Summary], path: pathlib.Path) -> bool:
    """Hit rate and distribution of the time to first token. False when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, times = figure.subplots(1, 2, width_ratios=(1, 2))
    colours = ["#9aa5b1", "#1f7a5c"]
    bars = rates.bar([s.name for s in summaries], [100 * s.hit_rate for s in summaries], color=colours)
    rates.bar_label(bars, fmt="%.0f %%")
    rates.set_ylim(0, 100)
    rates.set_ylabel("prompt tokens found cached, %")
    for (name, measured), colour in zip(runs.items(), colours, strict=True):
        first = np.sort([1e3 * m.seconds_to_first_token for m in measured])
        times.plot(first, np.linspace(0, 100, len(first)), label=name, color=colour, linewidth=2)
    times.set_xlabel("time to first token, ms")
    times.set_ylabel("requests, %")
    times.set_xlim(left=0)
    times.grid(alpha=0.3)
    times.legend(loc="lower right")
    for axis in (rates, times):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def explanation(request_id: str, explained: dict[str, Any], console: Console) -> None:
    """Why one request went where it went: a line for each candidate."""
    console.print(f"\n[bold]{request_id}[/bold] -> {explained.get('picked') or explained.get('endpoint')}")
    for candidate in explained.get("candidates", ()):
        parts = [f"{key} {_short(value)}" for key, value in candidate.items() if key not in ("endpoint", "name")]
        console.print(f"  {candidate.get('endpoint') or candidate.get('name')}: " + ", ".join(parts), highlight=False)
    if explained.get("why"):
        console.print(f"  why: {explained['why']}", highlight=False)


def _short(value: Any) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
