# distutils: language = c++
# cython: boundscheck=False, wraparound=False
"""Block keys in C++: what `kvindex.index.keys` says in plain Python, for whole prompts at once."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

import numpy as np


cdef extern from "xxh3.hpp" namespace "kvindex" nogil:
    uint64_t c_xxh3_64 "kvindex::xxh3_64"(const void* data, size_t length, uint64_t seed) noexcept
    void c_chain_keys "kvindex::chain_keys"(
        const uint32_t* tokens,
        size_t blocks,
        size_t block_size,
        uint64_t root,
        const uint64_t* seeds,
        uint64_t* keys,
    ) noexcept


def xxh3_64(const unsigned char[::1] data, uint64_t seed=0):
    cdef size_t length = <size_t>data.shape[0]
    return c_xxh3_64(&data[0] if length else NULL, length, seed)


def chain_keys(const uint32_t[::1] tokens, Py_ssize_t block_size, uint64_t root_key, const uint64_t[::1] extras=None):
    """Keys of all full blocks of `tokens`; `extras` has one seed per block (0: nothing but tokens)."""
    if block_size < 1:
        raise ValueError(f"block_size {block_size} is not positive")
    cdef Py_ssize_t blocks = tokens.shape[0] // block_size
    if extras is not None and extras.shape[0] < blocks:
        raise ValueError(f"{extras.shape[0]} extras for {blocks} blocks")
    keys = np.empty(blocks, np.uint64)
    if blocks == 0:
        return keys
    cdef uint64_t[::1] out = keys
    cdef const uint64_t* seeds = &extras[0] if extras is not None else NULL
    with nogil:
        c_chain_keys(&tokens[0], <size_t>blocks, <size_t>block_size, root_key, seeds, &out[0])
    return keys
