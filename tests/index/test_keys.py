"""Block keys: the plain twin, the C++ one and constants that must never change (they are the layout version)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash

from cython_ext.keys import chain_keys as raw_chain_keys
from cython_ext.keys import xxh3_64
from kvindex.index import keys, native
from kvindex.index.protocol import MultiModalItem, Namespace


def test_our_xxh3_is_xxh3_at_every_length() -> None:
    random_ = random.Random(3)
    for length in range(4097):
        data = random_.randbytes(length)
        for seed in (0, random_.choice([1, 2**32, 2**64 - 1, random_.getrandbits(64)])):
            assert xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed), (length, seed)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 17, 64, 256, 1000])
def test_whole_chains_agree(block_size: int) -> None:
    random_ = random.Random(block_size)
    for _ in range(5):
        tokens = np.array([random_.getrandbits(32) for _ in range(random_.randrange(4 * block_size + 9))], np.uint32)
        namespace = Namespace(
            random_.choice([None, "", "lora"]),
            random_.choice([None, "", "sält \ud800"]),
            random_.choice([(), (MultiModalItem("i", 2, 30), MultiModalItem("j", 0, 1), MultiModalItem("k", 9999, 5))]),
        )
        got, want = native.chain_keys(tokens, block_size, namespace), keys.chain_keys(tokens, block_size, namespace)
        assert got.dtype == np.uint64
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize("chain_keys", [keys.chain_keys, native.chain_keys], ids=["python", "cython"])
def test_golden_constants(chain_keys: object) -> None:
    assert callable(chain_keys)
    tokens = np.arange(1, 9, dtype=np.uint32)
    plain = chain_keys(tokens, 4, Namespace())
    assert plain.tolist() == GOLDEN_PLAIN
    spaced = chain_keys(tokens, 4, Namespace("sql", "tenant", (MultiModalItem("cat", 2, 4),)))
    assert spaced.tolist() == GOLDEN_SPACED


def test_wrong_calls_are_refused() -> None:
    tokens = np.arange(8, dtype=np.uint32)
    with pytest.raises(ValueError, match="not positive"):
        raw_chain_keys(tokens, 0, 1)
    with pytest.raises(ValueError, match="extras"):
        raw_chain_keys(tokens, 4, 1, np.zeros(1, np.uint64))
    assert raw_chain_keys(tokens[:0], 4, 1).tolist() == []
    assert raw_chain_keys(tokens, 9, 1).tolist() == []


GOLDEN_PLAIN = [18441905057683621457, 9086371850731573581]
GOLDEN_SPACED = [4796598878916069059, 5463793959817840614]
