// How many tokens would the engine itself find cached? The C++ twin of kvindex/scoring/hybrid.py, rule by rule.
// `held(group, size, index)` is a template parameter, so the walks inline it. Sizes come from outside: a least common
// multiple that does not fit saturates, which no prompt reaches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace kvindex {

enum class Kind : int8_t { UNSAID = -1, FULL, WINDOW, STATE, IGNORED };

struct Group {
    int32_t number;
    Kind kind;
    int64_t block_size;
    int64_t window;
    std::vector<uint32_t> sizes;
};

struct Alignment {
    int64_t tokens, unit;
    bool fine;
};

constexpr int64_t HUGE_TOKENS = std::numeric_limits<int64_t>::max();

inline int64_t least_common_multiple(int64_t a, int64_t b) noexcept {
    int64_t product = 0;
    return __builtin_mul_overflow(a / std::gcd(a, b), b, &product) ? HUGE_TOKENS : product;
}

inline Alignment alignment(const std::vector<const Group*>& groups) noexcept {
    int64_t unit = 0, common = 1;
    for (const Group* group : groups) {
        for (uint32_t size : group->sizes) unit = std::gcd(unit, static_cast<int64_t>(size));
        common = common == HUGE_TOKENS ? common : least_common_multiple(common, group->block_size);
    }
    bool any_state = false, all_fit = true;
    for (const Group* group : groups) {
        any_state = any_state || (group->kind == Kind::STATE && group->block_size > unit);
        all_fit = all_fit && (group->kind == Kind::FULL || group->kind == Kind::STATE || group->block_size == unit);
    }
    const bool fine = any_state && all_fit;
    return Alignment{fine ? unit : common, unit, fine};
}

template <class Held>
int64_t leading_blocks(const Group& group, int64_t limit, Held&& held) {
    int64_t count = 0;
    while ((count + 1) * group.block_size <= limit && held(group, group.block_size, count)) ++count;
    return count;
}

template <class Held>
int64_t full_reach(const Group& group, int64_t limit, const Alignment& align, Held&& held) {
    const int64_t reach = leading_blocks(group, limit, held) * group.block_size;
    if (align.fine && group.block_size > align.unit) {
        const int64_t top = std::min(reach + group.block_size - align.unit, limit / align.unit * align.unit);
        for (int64_t boundary = top; boundary > reach; boundary -= align.unit)
            if (held(group, align.unit, boundary / align.unit - 1)) return boundary;
    }
    return reach;
}

inline int64_t window_blocks(const Group& group) noexcept {
    return group.window <= 1 ? 1 : (group.window - 2) / group.block_size + 1;
}

template <class Held>
bool window_valid(const Group& group, int64_t length, bool eagle, Held&& held) {
    const int64_t end = length / group.block_size + eagle;
    const int64_t start = std::max<int64_t>(0, end - window_blocks(group) - eagle);
    for (int64_t i = end; i-- > start;)
        if (!held(group, group.block_size, i)) return false;
    return true;
}

template <class Held>
bool state_valid(const Group& group, int64_t length, const Alignment& align, Held&& held) {
    if (length % group.block_size == 0 && held(group, group.block_size, length / group.block_size - 1)) return true;
    return align.fine && held(group, align.unit, length / align.unit - 1);
}

inline std::vector<const Group*> counted(const std::vector<Group>& groups) {
    std::vector<const Group*> found;
    for (const Group& group : groups)
        if (group.kind != Kind::IGNORED) found.push_back(&group);
    return found;
}

template <class Held>
int64_t usable_tokens(const std::vector<Group>& all, int64_t prompt_tokens, bool eagle, Held&& held) {
    const std::vector<const Group*> groups = counted(all);
    if (groups.empty() || prompt_tokens < 1) return 0;
    const Alignment align = alignment(groups);
    int64_t limit = prompt_tokens - 1, margin = 0;
    if (eagle) {
        for (const Group* group : groups) margin = std::max(margin, group->block_size);
        const int64_t whole = groups.size() > 1 ? prompt_tokens : limit;
        limit = std::min(limit, whole / align.unit * align.unit - margin);
    }
    int64_t reach = limit;
    bool first = true;
    for (const Group* group : groups) {
        if (group->kind != Kind::FULL) continue;
        const int64_t found = full_reach(*group, limit + margin, align, held) - margin;
        reach = first ? found : std::min(reach, found);
        first = false;
    }
    for (int64_t length = std::min(limit, reach) / align.tokens * align.tokens; length > 0; length -= align.tokens) {
        bool valid = true;
        for (const Group* group : groups) {
            if (group->kind == Kind::WINDOW)
                valid = window_valid(*group, length, eagle, held);
            else if (group->kind == Kind::STATE)
                valid = state_valid(*group, length, align, held);
            if (!valid) break;
        }
        if (valid) return length;
    }
    return 0;
}

template <class Held>
int64_t extend_from_lower_tiers(const std::vector<Group>& all, int64_t prompt_tokens, int64_t start,
                                int64_t chunk_tokens, Held&& held) {
    const std::vector<const Group*> groups = counted(all);
    if (groups.empty()) return start;
    int64_t step = std::max<int64_t>(chunk_tokens, 1);
    for (const Group* group : groups) step = step == HUGE_TOKENS ? step : least_common_multiple(step, group->block_size);
    int64_t best = (prompt_tokens - 1) / step * step;
    for (const Group* group : groups) {  // no length beyond a full group's first hole can be valid
        if (group->kind != Kind::FULL) continue;
        int64_t i = start / group->block_size;
        while ((i + 1) * group->block_size <= best && held(*group, group->block_size, i)) ++i;
        best = std::min(best, (i * group->block_size) / step * step);
    }
    for (int64_t length = best; length > start; length -= step) {
        bool valid = true;
        for (const Group* group : groups) {
            if (group->kind == Kind::FULL) continue;
            const int64_t size = group->block_size, chunk = chunk_tokens > 0 ? chunk_tokens : size;
            int64_t from = length / size - 1;
            if (group->kind == Kind::WINDOW) {
                const int64_t chunks = group->window <= 0 ? 0 : (group->window - 1) / chunk + 1;
                const int64_t reach = chunks > length / chunk ? length : chunks * chunk;  // no overflow
                from = std::max<int64_t>(0, length - reach) / size;
            }
            for (int64_t i = length / size; valid && i-- > from;) valid = held(*group, size, i);
            if (!valid) break;
        }
        if (valid) return length;
    }
    return start;
}

}  // namespace kvindex
