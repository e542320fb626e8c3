"""The step function: batching, time, hits, preemption, aborts, and what is announced when."""

from __future__ import annotations

import itertools
import random

import pytest

from kvindex.errors import ConfigError, UsageError
from kvindex.simulator import Engine, LatencyModel
from kvindex.simulator.results import Finish
from kvindex.simulator.wire import AllBlocksCleared, BlockRemoved, BlockStored
from tests.simulator.engines import Run, config, request, serve


def stored(run: Run) -> list[BlockStored]:
    return [event for event in run.events if isinstance(event, BlockStored)]


def test_a_prompt_takes_its_uncached_tokens_time_and_each_token_its_own() -> None:
    run = serve(Engine(config()), request(20, 3))
    assert run.times == pytest.approx([0.2, 0.3, 0.4])
    assert [output.finish for output in run.outputs] == [None, None, Finish.LENGTH]


def test_equal_prompts_get_equal_answers_and_other_seeds_other_ones() -> None:
    def answer(seed: int = 0, **fields: object) -> list[int]:
        return [output.token for output in serve(Engine(config(seed=seed)), request(20, 8, **fields)).outputs]

    assert answer() == answer()
    assert answer() != answer(seed=1)
    assert answer() != answer(sample_seed=1)


def test_a_second_request_finds_full_blocks_and_never_its_last_token() -> None:
    engine = Engine(config())
    for length, cached in ((20, 0), (20, 16), (21, 20), (19, 16), (4, 0), (5, 4)):
        asked = request(length)
        serve(engine, asked)
        assert asked.cached_tokens == cached, length


def test_recomputing_the_last_block_makes_a_second_copy_that_is_removed_by_itself() -> None:
    engine = Engine(config(num_blocks=5))
    first = stored(serve(engine, request(8)))
    second = stored(serve(engine, request(8)))
    assert [len(event.block_hashes) for event in first] == [2]
    assert [event.block_hashes for event in second] == [first[0].block_hashes[1:]]
    assert second[0].parent_block_hash == first[0].block_hashes[0]
    removed = [event for event in serve(engine, request(range(100, 115))).events if isinstance(event, BlockRemoved)]
    assert sorted(event.block_hashes[0] for event in removed) == sorted(first[0].block_hashes + second[0].block_hashes)


def test_removals_come_one_by_one_tail_first_before_the_store_that_needed_the_room() -> None:
    engine = Engine(config(num_blocks=5))
    keys = stored(serve(engine, request(15)))[0].block_hashes
    (batch,) = serve(engine, request(range(50, 62))).batches
    assert [type(event).__name__ for event in batch] == ["BlockRemoved", "BlockRemoved", "BlockStored"]
    assert [event.block_hashes for event in batch if isinstance(event, BlockRemoved)] == [[keys[2]], [keys[1]]]


def test_blocks_that_decoding_fills_are_announced_one_by_one_with_their_parent() -> None:
    engine = Engine(config())
    asked = request(6, 12)
    events = stored(serve(engine, asked))
    # The last token is sampled but never computed: 17 tokens, 4 full blocks.
    assert [len(event.block_hashes) for event in events] == [1, 1, 1, 1]
    for before, after in itertools.pairwise(events):
        assert after.parent_block_hash == before.block_hashes[0]
    assert [token for event in events for token in event.token_ids] == asked.tokens[:16].tolist()
    follow_up = request([*asked.tokens[:16].tolist(), 1, 2])
    serve(engine, follow_up)
    assert follow_up.cached_tokens == 16


def test_adapters_and_salts_are_apart_and_named_in_events() -> None:
    engine = Engine(config(loras=("sql", "chat")))
    seen: dict[tuple[str | None, str | None], list[int]] = {}
    for lora in (None, "sql", "chat"):
        for salt in (None, "tenant"):
            (event,) = stored(serve(engine, request(9, lora=lora, cache_salt=salt)))
            seen[lora, salt] = event.block_hashes
            assert event.lora_name == lora
            assert event.lora_id == {None: None, "sql": 1, "chat": 2}[lora]
            names = [name for name in (lora, salt) if name]
            assert event.extra_keys == [tuple(names) or None, (lora,) if lora else None]
    keys = [key for block in seen.values() for key in block]
    assert len(set(keys)) == len(keys)
    again = request(9, lora="sql", cache_salt="tenant")
    serve(engine, again)
    assert again.cached_tokens == 8


def test_engine_keys_are_comparable_only_under_one_hash_seed() -> None:
    def keys(seed: str) -> list[int]:
        return stored(serve(Engine(config(hash_seed=seed)), request(9)))[0].block_hashes

    assert keys("a") == keys("a")
    assert not set(keys("a")) & set(keys("b"))


def test_long_prompts_are_cut_into_chunks_and_decoding_goes_on_beside_them() -> None:
    engine = Engine(config(max_num_batched_tokens=10), vocabulary=[7])
    short, long = request(4, 6), request(range(100, 125))
    engine.add(short, 0.0)
    engine.step(0.0)
    engine.add(long, 0.0)
    run = Run(engine, 0.04)
    # 9 tokens of the long prompt ride along with each token of the short one.
    assert run.times == pytest.approx([0.23, 0.42, 0.59, 0.69, 0.79])
    assert long.first_token_at == pytest.approx(0.59)
    assert [len(event.block_hashes) for event in stored(run) if event.token_ids[0] >= 100] == [2, 2, 2]


def test_a_shared_prefix_hits_already_in_the_same_step() -> None:
    engine = Engine(config())
    first, second = request(16), request(16)
    serve(engine, first, second)
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)


def test_everything_is_slower_under_load_up_to_the_factor() -> None:
    latency = LatencyModel(prefill_tokens_per_second=100, seconds_per_output_token=0.1, load_factor=3)
    assert latency.step_seconds(100, 0, 1, 9) == pytest.approx(1.0)
    assert latency.step_seconds(100, 0, 5, 9) == pytest.approx(2.0)
    assert latency.step_seconds(100, 0, 9, 9) == pytest.approx(3.0)
    assert latency.step_seconds(0, 9, 9, 9) == pytest.approx(0.3)
    assert latency.step_seconds(0, 1, 1, 1) == pytest.approx(0.1)


def test_only_max_num_seqs_run_and_the_others_wait_in_order() -> None:
    engine = Engine(config(max_num_seqs=2))
    asked = [request(range(start, start + 8), 2) for start in (100, 200, 300)]
    for item in asked:
        engine.add(item, 0.0)
    engine.step(0.0)
    assert (len(engine.running), len(engine.waiting)) == (2, 1)
    run = Run(engine)
    assert [output.request.id for output in run.outputs if output.finish] == [item.id for item in asked]


def test_when_blocks_run_out_the_newest_request_starts_over_and_still_finishes() -> None:
    engine = Engine(config(num_blocks=9))
    first, second = request(12, 12), request(range(100, 112), 12)
    run = serve(engine, first, second)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert engine.stats.preemptions == 1
    finished = [output.request for output in run.outputs if output.finish is Finish.LENGTH]
    assert finished == [first, second]
    assert second.output_tokens == 12
    # usage reports what was found when the request was first scheduled
    assert second.cached_tokens == 0


def test_one_batch_holds_no_more_adapters_than_allowed() -> None:
    engine = Engine(config(loras=("a", "b"), max_loras=1))
    blocked, other = request(8, 3, lora="b"), request(8, 3)
    engine.add(request(8, 3, lora="a"), 0.0)
    engine.add(blocked, 0.0)
    engine.add(other, 0.0)
    engine.step(0.0)
    assert list(engine.waiting) == [blocked]
    assert other in engine.running
    Run(engine)
    assert blocked.output_tokens == 3


def test_an_aborted_request_leaves_no_block_behind() -> None:
    engine = Engine(config())
    running, waiting = request(8, 50), request(8, 50)
    engine.add(running, 0.0)
    engine.step(0.0)
    engine.add(waiting, 0.0)
    engine.abort(running.id)
    engine.abort(waiting.id)
    engine.abort("unknown")
    assert not engine.is_idle
    result = engine.step(0.08)
    assert result.outputs == []
    assert result.next_time is None
    # What had been scheduled is computed and cached all the same.
    assert [type(event) for event in result.events] == [BlockStored]
    assert engine.is_idle
    assert engine.cache.pool.usage == 0
    assert engine.stats.aborted_requests == 2


def test_an_idle_engines_reset_is_announced_with_its_next_step() -> None:
    engine = Engine(config())
    serve(engine, request(8))
    assert engine.reset_prefix_cache()
    assert engine.step(10.0).events == []
    again = request(8)
    (batch,) = serve(engine, again, now=20.0).batches
    assert [type(event) for event in batch] == [AllBlocksCleared, BlockStored]
    assert again.cached_tokens == 0


def test_a_busy_engine_is_reset_only_by_force() -> None:
    engine = Engine(config())
    asked = request(8, 4)
    engine.add(asked, 0.0)
    engine.step(0.0)
    assert not engine.reset_prefix_cache()
    assert engine.reset_prefix_cache(reset_running=True)
    run = Run(engine, 0.08)
    assert AllBlocksCleared in [type(event) for event in run.events]
    assert asked.preemptions == 1
    assert asked.output_tokens == 4


def test_early_steps_change_nothing() -> None:
    engine = Engine(config())
    engine.add(request(20), 0.0)
    due = engine.step(0.0).next_time
    assert due == pytest.approx(0.2)
    assert engine.step(0.1) == ([], [], due)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(250, 3), r"250 \+ 3 tokens; the model's context has 252"),
        (request(0), "0 prompt tokens"),
        (request(4, 0), "asks for 0"),
        (request(4, lora="x"), "LoRA 'x' is not one of"),
    ],
)
def test_requests_that_can_never_run_are_refused(asked: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(config()).add(asked, 0.0)  # type: ignore[arg-type]


def test_an_id_cannot_run_twice() -> None:
    engine = Engine(config())
    asked = request(4)
    engine.add(asked, 0.0)
    with pytest.raises(UsageError, match="already running"):
        engine.add(asked, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size: 0"),
        ({"num_blocks": 1}, "num_blocks: 1"),
        ({"max_model_len": 253}, "max_model_len: 253 does not fit"),
        ({"latency": LatencyModel(load_factor=0.5)}, "load_factor: 0.5"),
        ({"latency": LatencyModel(prefill_tokens_per_second=0)}, "prefill_tokens_per_second: 0"),
        ({"latency": LatencyModel(seconds_per_output_token=-1)}, "seconds_per_output_token: -1"),
    ],
)
def test_wrong_configs_name_the_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_keeps_the_pool_whole(seed: int) -> None:
    print(f"seed {seed}")
    random_ = random.Random(seed)
    engine = Engine(config(num_blocks=24, max_num_seqs=5, max_num_batched_tokens=16, loras=("a",), max_loras=1))
    asked = []
    now = 0.0
    for _ in range(200):
        for _ in range(random_.randrange(3)):
            prompt = [random_.randrange(2) for _ in range(random_.randrange(1, 40))]
            item = request(prompt, random_.randrange(1, 12), lora=random_.choice([None, "a"]))
            asked.append(item)
            engine.add(item, now)
        if asked and random_.random() < 0.2:
            engine.abort(random_.choice(asked).id)
        if random_.random() < 0.05:
            engine.reset_prefix_cache(reset_running=random_.random() < 0.5)
        result = engine.step(now)
        engine.cache.pool.check()
        now = result.next_time if result.next_time is not None else now + 1.0
    Run(engine, now)
    assert engine.is_idle
    assert engine.cache.pool.usage == 0
    assert engine.stats.finished_requests + engine.stats.aborted_requests == len(asked)
