// Which blocks do a batch's engine keys mean? The C++ twin of kvindex/index/placing.py, which gives the reasons.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "chains.hpp"
#include "hybrid.hpp"

namespace kvindex {

constexpr int32_t HBM = 0;  // the first tier's number

enum class What : uint8_t { STORED, REMOVED, CLEARED };

// One event, converted at the boundary. `tokens` belongs to the caller and outlives the call.
struct Event {
    What what = What::CLEARED;
    std::vector<uint64_t> keys;
    const uint32_t* tokens = nullptr;
    int64_t token_count = 0, block_size = 0, window = 0;
    uint64_t parent = 0;
    bool has_parent = false, placeholder = false, any_media = false;
    Kind kind = Kind::UNSAID;
    int32_t tier = HBM, group = 0;
    std::string lora, salt;       // encoded; `salt` is the first block's
    std::vector<uint64_t> seeds;  // one per key, or none: then all are 0
    std::vector<uint64_t> gone;   // sorted: keys that tell which block they mean but are not credited

    bool is_dense() const noexcept {
        return block_size > 0 && token_count == block_size * static_cast<int64_t>(keys.size());
    }
    bool is_gone(uint64_t key) const { return std::binary_search(gone.begin(), gone.end(), key); }
    uint64_t seed(size_t i) const noexcept { return seeds.empty() ? 0 : seeds[i]; }
};

struct Placed {
    uint64_t key;
    Ref block;
};

class Placing {
public:
    Placing(Forest& forest, DomainId domain, const std::vector<Group>& groups, int64_t chunk_tokens)
        : forest_(forest), domain_(domain), groups_(groups), chunk_tokens_(chunk_tokens) {
        for (const Group& group : groups) sizes_.insert(sizes_.end(), group.sizes.begin(), group.sizes.end());
        std::sort(sizes_.begin(), sizes_.end());
        sizes_.erase(std::unique(sizes_.begin(), sizes_.end()), sizes_.end());
    }

    std::vector<Placed> named;  // in the order they were named

    // Names what can be named; returns how many keys of sparse stores were left without a place.
    int64_t place(const std::vector<Event>& events) {
        for (const Event& event : events) {
            if (event.what != What::STORED) continue;
            told_.push_back(&event);
            if (event.keys.empty()) continue;
            stores_.push_back(&event);
            if (event.is_dense()) dense_.push_back(&event);
        }
        std::stable_partition(dense_.begin(), dense_.end(), [](const Event* e) { return e->tier == HBM; });
        for (const Event* event : dense_) dense(*event);
        if (sizes_.size() > 1)
            for (const Event* event : told_)
                if (event->tier == HBM && event->token_count > 0) twins(*event);
        int64_t unplaced = 0;
        for (const Event* event : stores_) {
            if (event->token_count == 0)
                unplaced += placeholder(*event);
            else if (!event->is_dense())
                unplaced += sparse(*event);
        }
        return unplaced;
    }

private:
    using Blocks = std::vector<Ref>;

    Ref known(uint64_t key, uint32_t size) const noexcept { return forest_.known(domain_, key, size); }

    uint32_t group_size(const Event& event, int64_t otherwise) const noexcept {
        for (const Group& group : groups_)
            if (group.number == event.group) return static_cast<uint32_t>(group.block_size);
        return static_cast<uint32_t>(otherwise);
    }

    void give_name(uint64_t key, Ref block, bool provisional) {
        forest_.name(domain_, key, block, provisional);
        named.push_back(Placed{key, block});
    }

    Ref root(const Event& event, uint32_t size, const std::string& salt) {
        return forest_.root(size, forest_.space(event.lora + salt));
    }

    Ref base(const Event& event, uint32_t size) {
        if (!event.has_parent) return root(event, size, event.salt);
        const Ref found = known(event.parent, size);
        return found != NONE ? found : forest_.stub(domain_, event.parent, size);
    }

    void dense(const Event& event) {
        uint32_t size = group_size(event, event.block_size);
        if (event.tier == HBM || event.block_size % size != 0) size = static_cast<uint32_t>(event.block_size);
        const size_t per_key = static_cast<size_t>(event.block_size) / size;
        const bool provisional = event.tier != HBM;
        Ref block = base(event, size);
        if (!forest_.at(block).attached && per_key == 1) {
            const Ref first = known(event.keys[0], size);
            const Ref parent = first == NONE ? NONE : forest_.at(first).parent;
            if (parent != NONE && forest_.at(parent).attached && !forest_.at(parent).is_top()) {
                const Ref top = block;
                forest_.name(domain_, event.parent, parent, provisional);
                block = base(event, size);
                if (top != block) forest_.drop_if_empty(top);
            }
        }
        const Ref start = block;
        for (size_t i = 0; i < event.keys.size(); ++i) {
            const uint64_t key = event.keys[i];
            const Ref found = known(key, size);
            if (found != NONE && (provisional || !forest_.is_provisional(domain_, key, size))) {
                block = found;
                cover(key, block, per_key);
                continue;
            }
            for (size_t part = i * per_key; part < (i + 1) * per_key; ++part) {
                const uint64_t seed = per_key == 1 ? event.seed(i) : 0;
                block = forest_.child(block, local_hash(event.tokens + part * size, size, seed), seed != 0);
            }
            give_name(key, block, provisional);
            cover(key, block, per_key);
        }
        if (forest_.at(start).state == State::STUB) forest_.drop_if_empty(start);
    }

    void twins(const Event& event) {
        if (event.any_media) return;
        std::string salt;
        if (!salt_of(event, salt)) return;
        std::vector<std::pair<int64_t, Ref>> ends;
        for (uint32_t size : sizes_) {
            Ref block = event.has_parent ? known(event.parent, size) : NONE;
            if (!event.has_parent && event.token_count >= size) block = root(event, size, salt);
            if (block == NONE || forest_.at(block).media) continue;
            for (int64_t start = 0; start + size <= event.token_count; start += size) {
                block = forest_.child(block, local_hash(event.tokens + start, size, 0), false);
                ends.emplace_back(start + size, block);
            }
        }
        // in order of first appearance, as Python's dict would have them
        OrderedMap<uint64_t, std::vector<Ref>> by_end;
        for (const auto& each : ends) by_end[static_cast<uint64_t>(each.first)].push_back(each.second);
        by_end.each([&](uint64_t, const std::vector<Ref>& blocks) {
            if (blocks.size() < 2) return;
            std::vector<uint64_t> keys;
            for (Ref block : blocks)
                for (const Name& name : forest_.at(block).names)
                    if (name.domain == domain_) keys.push_back(name.key);
            std::sort(keys.begin(), keys.end());
            keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
            for (Ref block : blocks)
                for (uint64_t key : keys)
                    if (known(key, forest_.at(block).size) == NONE) give_name(key, block, false);
        });
    }

    // The salt of an event from the first token; false when it is not certain.
    bool salt_of(const Event& event, std::string& salt) const {
        if (event.has_parent || event.is_dense()) {
            salt = event.salt;
            return true;
        }
        bool found = false;
        for (const Event* other : dense_) {
            const int64_t common = std::min(other->token_count, event.token_count);
            if (other->has_parent || other->lora != event.lora || other->tier != event.tier ||
                !std::equal(other->tokens, other->tokens + common, event.tokens))
                continue;
            if (other->any_media || (found && salt != other->salt)) return false;
            salt = other->salt;
            found = true;
        }
        return found;
    }

    void cover(uint64_t key, Ref block, size_t blocks) {
        if (blocks <= 1) return;
        for (; blocks > 0 && !forest_.at(block).is_top(); --blocks) {
            forest_.cover(domain_, key, block);
            block = forest_.at(block).parent;
        }
    }

    int64_t placeholder(const Event& event) {
        int64_t unplaced = 0;
        const uint32_t size = group_size(event, 0);
        for (uint64_t key : event.keys) {
            const Ref block = known(key, size);
            if (block != NONE && chunk_tokens_ > 0) cover(key, block, static_cast<size_t>(chunk_tokens_ / size));
            unplaced += !forest_.domain(domain_).names.contains(key);
        }
        return unplaced;
    }

    int64_t sparse(const Event& event) {
        const uint32_t size = static_cast<uint32_t>(event.block_size);
        const std::vector<uint64_t>& keys = event.keys;
        const size_t count = keys.size();
        Blocks blocks(count);
        bool all_attached = true, any_named = false;
        for (size_t i = 0; i < count; ++i) {
            blocks[i] = known(keys[i], size);
            all_attached = all_attached && blocks[i] != NONE && forest_.at(blocks[i]).attached;
            any_named = any_named || forest_.domain(domain_).names.contains(keys[i]);
        }
        if (!all_attached) {
            const Blocks own = any_named ? own_chain(event) : Blocks();
            OrderedMap<uint64_t, int64_t> index_of;
            for (size_t i = 0; i < own.size(); ++i) index_of[own[i]] = static_cast<int64_t>(i);
            std::vector<int64_t> where(count, -1);
            for (size_t i = 0; i < count && !own.empty(); ++i) {
                const int64_t* found = blocks[i] == NONE ? nullptr : index_of.find(blocks[i]);
                where[i] = found != nullptr ? *found : index_in(event, keys[i]);
            }
            for (size_t i = count; i-- > 0;) {
                const int64_t next = i + 1 < count ? where[i + 1] : -1;
                if (where[i] < 0 && next > 0) where[i] = next - 1;
                if (where[i] < 0) continue;
                attach(blocks[i], own, where[i]);
                const Ref now = known(keys[i], size);
                blocks[i] = now != NONE ? now : own[static_cast<size_t>(where[i])];
            }
        }
        for (size_t i = count - 1; i-- > 0;) {
            const Ref next = blocks[i + 1];
            if (blocks[i] != NONE || next == NONE) continue;
            const Ref parent = forest_.at(next).parent;
            if (parent != NONE && !forest_.at(parent).is_top()) blocks[i] = parent;
        }
        int64_t unplaced = 0;
        for (size_t i = 0; i < count; ++i) {
            if (blocks[i] == NONE)
                ++unplaced;
            else if (known(keys[i], size) == NONE)
                give_name(keys[i], blocks[i], false);
        }
        return unplaced;
    }

    // `orphan` turned out to be `own[where]`, so what its stub stands for is known too.
    void attach(Ref orphan, const Blocks& own, int64_t where) {
        if (orphan == NONE || forest_.at(orphan).attached || !forest_.at(own[static_cast<size_t>(where)]).attached) return;
        const Block& top = forest_.at(forest_.top(orphan));
        const int64_t before = where - forest_.at(orphan).end / forest_.at(orphan).size;
        if (top.names.empty() || before < 0) return;
        const uint64_t waits = top.names.begin()->key;
        if (known(waits, forest_.at(orphan).size) == NONE) give_name(waits, own[static_cast<size_t>(before)], false);
    }

    struct Place {
        bool is_stub;
        uint64_t stub_key;
        int64_t end;
    };

    Place place_of(Ref ref) const {
        if (forest_.at(ref).attached) return Place{false, 0, forest_.at(ref).end};
        const Block& top = forest_.at(forest_.top(ref));
        return Place{true, top.names.empty() ? 0 : top.names.begin()->key, forest_.at(ref).end};
    }

    int64_t index_in(const Event& event, uint64_t key) const {
        const ShortList<Named>* names = forest_.domain(domain_).names.find(key);
        if (names == nullptr) return -1;
        const ShortList<Named>* parents = event.has_parent ? forest_.domain(domain_).names.find(event.parent) : nullptr;
        const bool start_known = !event.has_parent || (parents != nullptr && !parents->empty());
        Place start{false, 0, 0};
        if (event.has_parent && start_known) start = place_of(parents->begin()->block);
        for (const Named& each : *names) {
            const Place at = place_of(each.block);
            int64_t offset = -1;
            if (!start_known)
                offset = at.is_stub && at.stub_key == event.parent ? at.end : -1;
            else if (at.is_stub == start.is_stub && at.stub_key == start.stub_key)
                offset = at.end - start.end;
            if (offset > 0 && offset <= event.token_count && offset % event.block_size == 0)
                return offset / event.block_size - 1;
        }
        return -1;
    }

    // All blocks the event's tokens make at its block size; none when their identity is not certain.
    Blocks own_chain(const Event& event) {
        Blocks siblings;
        for (uint64_t key : event.keys)
            if (const ShortList<Named>* names = forest_.domain(domain_).names.find(key))
                for (const Named& each : *names) siblings.push_back(each.block);
        if (event.any_media || siblings.empty()) return Blocks();
        for (Ref ref : siblings)
            if (forest_.at(ref).media) return Blocks();
        const uint32_t size = static_cast<uint32_t>(event.block_size);
        Ref block;
        if (event.has_parent)
            block = base(event, size);
        else if (forest_.at(siblings[0]).attached)
            block = forest_.root(size, forest_.at(siblings[0]).space);
        else
            block = root(event, size, NO_TEXT);
        Blocks found;
        for (int64_t start = 0; start + size <= event.token_count; start += size) {
            block = forest_.child(block, local_hash(event.tokens + start, size, 0), false);
            found.push_back(block);
        }
        return found;
    }

    inline static const std::string NO_TEXT = std::string("\xff\xff\xff\xff", 4);  // the encoding of None

    Forest& forest_;
    DomainId domain_;
    const std::vector<Group>& groups_;
    int64_t chunk_tokens_;
    std::vector<uint32_t> sizes_;
    std::vector<const Event*> told_, stores_, dense_;
};

}  // namespace kvindex
