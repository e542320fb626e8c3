# distutils: language = c++
# cython: boundscheck=False, wraparound=False
"""The C++ block index, as `kvindex.index.native` uses it: events are converted once each, answers are arrays."""

cimport cython
from cython.operator cimport dereference
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector

import numpy as np

from kvindex.errors import IntegrityError
from kvindex.events.model import Cleared, Kind, Removed, Stored
from kvindex.index.keys import _text, encode_extra

from cython_ext.keys import xxh3_64


cdef extern from "placing.hpp" namespace "kvindex" nogil:
    cdef enum class c_Kind "kvindex::Kind":
        UNSAID, FULL, WINDOW, STATE, IGNORED

    cdef enum class What:
        STORED, REMOVED, CLEARED

    cdef cppclass Event:
        Event() except +
        What what
        vector[uint64_t] keys
        const uint32_t* tokens
        int64_t token_count, block_size, window
        uint64_t parent
        cbool has_parent, placeholder, any_media
        c_Kind kind
        int32_t tier, group
        string lora, salt
        vector[uint64_t] seeds, gone

    cdef cppclass Group:
        int32_t number
        c_Kind kind
        int64_t block_size, window
        vector[uint32_t] sizes


cdef extern from *:
    """
    #include <new>
    #include <stdexcept>
    // Audits throw std::logic_error; everything else keeps Cython's own translation.
    static void raise_from_cpp() {
        try {
            throw;
        } catch (const std::out_of_range& e) {
            PyErr_SetString(PyExc_KeyError, e.what());
        } catch (const std::bad_alloc& e) {
            PyErr_SetString(PyExc_MemoryError, e.what());
        } catch (const std::exception& e) {
            PyErr_SetString(PyExc_RuntimeError, e.what());
        } catch (...) {
            PyErr_SetString(PyExc_RuntimeError, "unknown C++ exception");
        }
    }
    """
    void raise_from_cpp()


cdef extern from "block_index.hpp" namespace "kvindex" nogil:
    ctypedef uint32_t Ref
    const Ref NONE

    cdef enum class c_Status "kvindex::Status":
        STORED, REMOVED

    cdef cppclass Said:
        int32_t publisher, group
        int64_t at
        uint32_t generation
        c_Status status

    cdef cppclass Counts:
        int64_t stored, removed, orphans, unplaced, cleared

    cdef cppclass Row:
        int32_t endpoint
        int64_t blocks, tokens, hbm_tokens
        double score
        vector[int64_t] tiers, load_tokens

    cdef cppclass PromptChain:
        PromptChain() except +
        uint32_t size
        const uint64_t* keys
        int64_t count

    cdef cppclass Table:
        size_t size()

    cdef cppclass Forest:
        Table by_key
        int64_t orphans
        const string& space_text(uint32_t) except +raise_from_cpp

    cdef cppclass BlockIndex:
        BlockIndex(uint64_t) except +raise_from_cpp
        Forest forest
        vector[double] weights
        int32_t open(int32_t, cbool, int64_t, int32_t) except +raise_from_cpp
        void close(int32_t) except +raise_from_cpp
        void drop(int32_t, cbool, uint32_t, int32_t) except +raise_from_cpp
        void hide(int32_t, cbool) except +raise_from_cpp
        Counts apply(int32_t, const vector[Event]&, int64_t) except +raise_from_cpp
        vector[Group] groups(int32_t) except +raise_from_cpp
        void set_endpoints(const vector[vector[int32_t]]&) except +raise_from_cpp
        vector[Row] score(
            vector[PromptChain]&, int64_t, int32_t, cbool, const vector[int32_t]&
        ) except +raise_from_cpp
        Ref find(uint64_t)
        uint32_t tiers_of(int32_t, int32_t, Ref) except +raise_from_cpp
        int32_t best_tier(uint32_t) except +raise_from_cpp
        cbool said(int32_t, int32_t, Ref, Said&) except +raise_from_cpp
        uint32_t generation(int32_t) except +raise_from_cpp
        cbool hidden(int32_t) except +raise_from_cpp
        cbool cleared_at(int32_t, int64_t&) except +raise_from_cpp
        vector[uint64_t] roots() except +raise_from_cpp
        int64_t held_blocks() except +raise_from_cpp
        int64_t entries() except +raise_from_cpp
        int64_t publishers() except +raise_from_cpp
        int64_t bytes() except +raise_from_cpp
        void check() except +raise_from_cpp


cdef dict _KINDS = {Kind.FULL: 0, Kind.WINDOW: 1, Kind.STATE: 2, Kind.IGNORED: 3}
cdef list _KIND_NAMES = [Kind.FULL.value, Kind.WINDOW.value, Kind.STATE.value, Kind.IGNORED.value]
cdef bytes _NO_TEXT = _text(None)
cdef int64_t _MAX = (1 << 62)


cdef inline string _encoded(value):
    return _NO_TEXT if value is None else <bytes>_text(value)


cdef _read_keys(tuple values, vector[uint64_t]& keys):
    cdef object value
    keys.reserve(len(values))
    for value in values:
        keys.push_back(<uint64_t>value)


cdef _read_stored(object event, int32_t tier, Event& out):
    """`out` borrows the event's tokens: the batch must outlive the call."""
    cdef const uint32_t[::1] tokens = event.token_ids
    cdef object extra, first
    cdef bytes raw
    cdef uint64_t seed
    out.what = What.STORED
    _read_keys(event.engine_keys, out.keys)
    out.token_count = tokens.shape[0]
    out.tokens = &tokens[0] if out.token_count else NULL
    out.block_size = min(event.block_size, _MAX)
    out.placeholder = event.is_placeholder
    out.has_parent = event.parent is not None
    out.parent = <uint64_t>event.parent if out.has_parent else 0
    out.kind = <c_Kind>(-1 if event.kind is None else <int>_KINDS[event.kind])
    out.window = min(event.window or 0, _MAX)
    out.tier = tier
    out.group = event.group
    out.lora = _encoded(event.lora)
    out.salt = _NO_TEXT
    out.any_media = False
    if event.gone:
        _read_keys(tuple(sorted(event.gone)), out.gone)
    if event.extras:
        first = event.extras[0].cache_salt
        if first is not None:
            out.salt = _encoded(first)
        for extra in event.extras:
            raw = encode_extra(extra)
            seed = xxh3_64(raw) if raw else 0
            out.any_media = out.any_media or len(raw) > 0
            out.seeds.push_back(seed)


@cython.final
cdef class Core:
    """Owns the C++ index. Tiers, models and key domains are numbers here; the caller keeps their names."""

    cdef unique_ptr[BlockIndex] _index

    def __cinit__(self, uint64_t max_forgotten):
        self._index.reset(new BlockIndex(max_forgotten))

    def add_tier(self, double weight):
        dereference(self._index).weights.push_back(weight)

    def open(self, int32_t label, bint eagle, int64_t chunk_tokens, int32_t model):
        return dereference(self._index).open(label, eagle, chunk_tokens, model)

    def close(self, int32_t number):
        dereference(self._index).close(number)

    def drop(self, int32_t number, bint restart, uint32_t keep, int32_t label):
        dereference(self._index).drop(number, restart, keep, label)

    def hide(self, int32_t number, bint hidden):
        dereference(self._index).hide(number, hidden)

    def set_endpoints(self, list endpoints):
        cdef vector[vector[int32_t]] found = endpoints
        dereference(self._index).set_endpoints(found)

    def apply(self, int32_t number, list events, list tiers, int64_t at):
        """Apply events that were found well-shaped; `tiers` has each one's tier number."""
        cdef vector[Event] read
        cdef Counts counts
        cdef Py_ssize_t i
        cdef object event
        read.resize(len(events))
        for i in range(len(events)):
            event = events[i]
            if type(event) is Stored:
                _read_stored(event, tiers[i], read[i])
            elif type(event) is Removed:
                read[i].what = What.REMOVED
                read[i].tier = tiers[i]
                read[i].group = event.group
                _read_keys(event.engine_keys, read[i].keys)
            else:
                read[i].what = What.CLEARED
        counts = dereference(self._index).apply(number, read, at)
        return counts.stored, counts.removed, counts.orphans, counts.unplaced, counts.cleared

    def groups(self, int32_t number):
        """(group, kind, block size, window) of each group whose block size is known."""
        cdef vector[Group] found = dereference(self._index).groups(number)
        return [(g.number, _KIND_NAMES[<int>g.kind], g.block_size, g.window) for g in found]

    def score(self, dict chains, int64_t length, int32_t model, bint only, list wanted, Py_ssize_t n_tiers):
        """(endpoint positions, blocks, tokens, hbm_tokens, score, tiers by number, load tokens by tier number)."""
        cdef vector[PromptChain] read
        cdef vector[int32_t] asked = wanted
        cdef PromptChain one
        cdef const uint64_t[::1] keys
        cdef list alive = []
        cdef object size
        for size, array in chains.items():
            keys = array
            alive.append(array)
            one.size = size
            one.count = keys.shape[0]
            one.keys = &keys[0] if one.count else NULL
            read.push_back(one)
        cdef vector[Row] rows = dereference(self._index).score(read, length, model, only, asked)
        cdef Py_ssize_t n = <Py_ssize_t>rows.size(), i, tier
        blocks, tokens, hbm_tokens = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
        score, by_tier = np.empty(n, np.float64), np.zeros((n_tiers, n), np.int64)
        load = np.zeros((n_tiers, n), np.int64)
        cdef int64_t[::1] blocks_ = blocks, tokens_ = tokens, hbm_tokens_ = hbm_tokens
        cdef double[::1] score_ = score
        cdef int64_t[:, ::1] by_tier_ = by_tier, load_ = load
        positions = []
        for i in range(n):
            positions.append(rows[i].endpoint)
            blocks_[i], tokens_[i], hbm_tokens_[i] = rows[i].blocks, rows[i].tokens, rows[i].hbm_tokens
            score_[i] = rows[i].score
            for tier in range(min(n_tiers, <Py_ssize_t>rows[i].tiers.size())):
                by_tier_[tier, i] = rows[i].tiers[tier]
                load_[tier, i] = rows[i].load_tokens[tier]
        return positions, blocks, tokens, hbm_tokens, score, by_tier, load

    def knows(self, uint64_t key):
        return dereference(self._index).find(key) != NONE

    def word(self, int32_t number, int32_t group, uint64_t key):
        """What a publisher says of a known block: (best tier or -1, `stored`/`removed`/None, at, is of its present
        generation)."""
        cdef Said said
        cdef Ref ref = dereference(self._index).find(key)
        if ref == NONE:
            return -1, None, 0, True
        cdef int32_t tier = dereference(self._index).best_tier(dereference(self._index).tiers_of(number, group, ref))
        if not dereference(self._index).said(number, group, ref, said):
            return tier, None, 0, True
        status = "stored" if said.status == c_Status.STORED else "removed"
        return tier, status, said.at, said.generation == dereference(self._index).generation(number)

    def cleared_at(self, int32_t number):
        cdef int64_t at = 0
        return at if dereference(self._index).cleared_at(number, at) else None

    def roots(self):
        """(block size, encoded LoRA name and salt) of every chain known."""
        cdef vector[uint64_t] found = dereference(self._index).roots()
        cdef string text
        cdef list answer = []
        cdef size_t i
        for i in range(0, found.size(), 2):
            text = dereference(self._index).forest.space_text(<uint32_t>found[i + 1])
            answer.append((found[i], <bytes>text))
        return answer

    def stats(self):
        cdef int64_t held = dereference(self._index).held_blocks()
        return {
            "blocks": held,
            "forgotten": <int64_t>dereference(self._index).forest.by_key.size() - held,
            "entries": dereference(self._index).entries(),
            "orphans": dereference(self._index).forest.orphans,
            "publishers": dereference(self._index).publishers(),
            "bytes": dereference(self._index).bytes(),
        }

    def check(self):
        try:
            dereference(self._index).check()
        except RuntimeError as error:
            raise IntegrityError(str(error)) from None
