// Blocks and the chains they form: the C++ twin of kvindex/index/chains.py, which explains the terms.
// Blocks are numbered, not pointed to. A block that is merged away or removed keeps its number, and what it last said,
// until `bury()` at the end of the public call that did it, so nothing in a call can meet a number that was given anew.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "containers.hpp"
#include "xxh3.hpp"

namespace kvindex {

using Ref = uint32_t;
using DomainId = uint32_t;
constexpr Ref NONE = 0xFFFFFFFFU;

struct Name {
    DomainId domain;
    uint64_t key;
    bool operator==(const Name& other) const noexcept { return domain == other.domain && key == other.key; }
};

enum class Status : uint8_t { STORED, REMOVED };

struct Said {  // what a (publisher, group) last said of a block
    int32_t publisher;
    int32_t group;
    int64_t at;
    uint32_t generation;
    Status status;
};

enum class State : uint8_t { FREE, BLOCK, ROOT, STUB, DEAD };

struct Block {
    uint64_t local = 0, key = 0;  // key: only when attached
    int64_t end = 0;
    Ref parent = NONE, first_child = NONE, last_child = NONE, before = NONE, after = NONE;  // siblings in order
    Ref older = NONE, newer = NONE;  // in the list of the forgotten
    uint32_t size = 0, space = 0;
    State state = State::FREE;
    bool attached = false, own_media = false, media = false, listed = false;
    ShortList<Name> names, covered_by;  // a stub's only name is what it waits for
    ShortList<Said> history;
    bool is_top() const noexcept { return parent == NONE; }
};

struct Named {
    uint32_t size;
    Ref block;
    bool provisional;
};

struct KeyAndSize {
    uint64_t key;
    uint64_t size;
    bool operator==(const KeyAndSize& other) const noexcept { return key == other.key && size == other.size; }
};
struct HashKeyAndSize {
    HashWord word;
    uint64_t operator()(const KeyAndSize& k) const noexcept { return word(word(k.key) + k.size); }
};

struct Domain {
    bool stated = false, settled = false;
    int64_t members = 0;
    OrderedMap<uint64_t, ShortList<Named>> names;
    OrderedMap<uint64_t, int64_t> references;
    OrderedMap<uint64_t, OrderedMap<uint64_t, bool>> covers;  // the blocks of a chunk
    OrderedMap<KeyAndSize, Ref, HashKeyAndSize> stubs;
};

class Forest {
public:
    explicit Forest(uint64_t max_forgotten) : max_forgotten_(max_forgotten) {}

    OrderedMap<uint64_t, Ref> by_key;
    int64_t orphans = 0;

    Block& at(Ref ref) noexcept { return chunks_[ref >> CHUNK_BITS][ref & CHUNK_MASK]; }
    const Block& at(Ref ref) const noexcept { return chunks_[ref >> CHUNK_BITS][ref & CHUNK_MASK]; }
    Domain& domain(DomainId id) noexcept { return *domains_[id]; }
    const Domain& domain(DomainId id) const noexcept { return *domains_[id]; }

    size_t domains() const noexcept { return domains_.size(); }

    DomainId new_domain(bool stated) {
        domains_.push_back(std::make_unique<Domain>());
        domains_.back()->stated = domains_.back()->settled = stated;
        return static_cast<DomainId>(domains_.size() - 1);
    }

    // Namespaces are interned; `text` is the encoded LoRA name, then the encoded salt.
    uint32_t space(const std::string& text) {
        ShortList<uint32_t>& found = space_ids_[xxh3_64(text.data(), text.size(), hash_secret())];
        for (uint32_t id : found)
            if (spaces_[id] == text) return id;
        spaces_.push_back(text);
        found.push(static_cast<uint32_t>(spaces_.size() - 1));
        return static_cast<uint32_t>(spaces_.size() - 1);
    }
    const std::string& space_text(uint32_t id) const { return spaces_.at(id); }

    uint64_t root_key(uint32_t size, uint32_t space) const {
        std::string text = "kvindex/1";
        text.append(reinterpret_cast<const char*>(&size), sizeof size);
        text.append(spaces_[space]);
        return xxh3_64(text.data(), text.size());
    }

    Ref root(uint32_t size, uint32_t space) {
        const KeyAndSize key{space, size};
        if (const Ref* found = roots_.find(key)) return *found;
        const Ref made = create(State::ROOT, size);
        Block& top = at(made);
        top.attached = true;
        top.space = space;
        top.key = root_key(size, space);
        roots_[key] = made;
        return made;
    }

    // A top that turned out not to be needed, or that lost its last child.
    void drop_if_empty(Ref ref) {
        const Block& top = at(ref);
        if (top.first_child != NONE) return;
        if (top.state == State::ROOT) {
            roots_.erase(KeyAndSize{top.space, top.size});
            kill(ref);
        } else if (top.state == State::STUB) {
            const Name waits = *top.names.begin();
            const KeyAndSize key{waits.key, top.size};
            const Ref* found = domain(waits.domain).stubs.find(key);
            if (found != nullptr && *found == ref) domain(waits.domain).stubs.erase(key);
            kill(ref);
        }
    }

    Ref stub(DomainId id, uint64_t engine_key, uint32_t size) {
        const KeyAndSize key{engine_key, size};
        if (const Ref* found = domain(id).stubs.find(key)) return *found;
        const Ref made = create(State::STUB, size);
        at(made).names.push(Name{id, engine_key});
        domain(id).stubs[key] = made;
        return made;
    }

    Ref find_child(Ref parent, uint64_t local) const noexcept {
        if (at(parent).first_child == NONE) return NONE;
        const Ref* found = children_.find(KeyAndSize{local, parent});
        return found == nullptr ? NONE : *found;
    }

    // The block after `parent` with this content, made when it is new.
    Ref child(Ref parent, uint64_t local, bool media) {
        parent = forward(parent);
        Ref found = find_child(parent, local);
        if (found != NONE) return found;
        found = create(State::BLOCK, at(parent).size);
        Block& block = at(found);
        block.local = local;
        block.own_media = media;
        hang(found, parent);
        if (!block.attached) ++orphans;
        list_last(found);
        return found;
    }

    Ref known(DomainId id, uint64_t engine_key, uint32_t size) const noexcept {
        const ShortList<Named>* found = domain(id).names.find(engine_key);
        if (found == nullptr) return NONE;
        for (const Named& each : *found)
            if (each.size == size) return each.block;
        return NONE;
    }

    bool is_provisional(DomainId id, uint64_t engine_key, uint32_t size) const noexcept {
        const ShortList<Named>* found = domain(id).names.find(engine_key);
        if (found == nullptr) return false;
        for (const Named& each : *found)
            if (each.size == size) return each.provisional;
        return false;
    }

    Ref top(Ref ref) const noexcept {
        while (!at(ref).is_top()) ref = at(ref).parent;
        return ref;
    }

    // Is `stub` the top of `ref`? An attached block hangs under a root.
    bool hangs_under(Ref ref, Ref stub) const noexcept { return !at(ref).attached && top(ref) == stub; }

    void name(DomainId id, uint64_t engine_key, Ref ref, bool provisional) {
        ref = forward(ref);
        const uint32_t size = at(ref).size;
        ShortList<Named>& sizes = domain(id).names[engine_key];
        Named* entry = nullptr;
        for (Named& each : sizes)
            if (each.size == size) entry = &each;
        if (entry == nullptr) {
            at(ref).names.push(Name{id, engine_key});
            sizes.push(Named{size, ref, provisional});
        } else {
            if (entry->block != ref) {
                if (provisional || !entry->provisional) return;
                at(entry->block).names.remove(Name{id, engine_key});
                release(entry->block);
                entry->block = ref;
                at(ref).names.push(Name{id, engine_key});
            }
            if (!provisional) entry->provisional = false;
        }
        const Ref* waiting = domain(id).stubs.find(KeyAndSize{engine_key, size});
        if (waiting != nullptr && !hangs_under(ref, *waiting)) {
            const Ref stub = *waiting;
            domain(id).stubs.erase(KeyAndSize{engine_key, size});
            graft(stub, ref);
            kill(stub);
        }
    }

    void cover(DomainId id, uint64_t engine_key, Ref ref) {
        bool& is_known = domain(id).covers[engine_key][ref];
        if (!is_known) at(ref).covered_by.push(Name{id, engine_key});
        is_known = true;
    }

    void absorb(DomainId old, DomainId into) {
        for (uint64_t engine_key : domain(old).names.keys()) {
            const ShortList<Named> sizes = *domain(old).names.find(engine_key);
            for (const Named& each : sizes) name(into, engine_key, each.block, each.provisional);
        }
        for (uint64_t engine_key : domain(old).covers.keys()) {
            const std::vector<Ref> blocks = covered(old, engine_key);
            for (Ref ref : blocks) cover(into, engine_key, ref);
        }
        for (const KeyAndSize& key : domain(old).stubs.keys()) {
            const Ref waiting = *domain(old).stubs.find(key);
            const Ref place = known(into, key.key, static_cast<uint32_t>(key.size));
            const bool usable = place != NONE && !hangs_under(place, waiting);
            graft(waiting, usable ? place : stub(into, key.key, static_cast<uint32_t>(key.size)));
            kill(waiting);
        }
        domain(old).stubs.clear();
        domain(old).references.each([&](uint64_t key, int64_t count) { domain(into).references[key] += count; });
        domain(old).references.clear();
        forget_domain(old);
    }

    void forget_domain(DomainId id) {
        Domain& gone = domain(id);
        for (uint64_t engine_key : gone.names.keys()) {
            const ShortList<Named> sizes = *gone.names.find(engine_key);
            for (const Named& each : sizes) {
                at(each.block).names.remove(Name{id, engine_key});
                release(each.block);
            }
        }
        for (uint64_t engine_key : gone.covers.keys()) {
            for (Ref ref : covered(id, engine_key)) {
                at(ref).covered_by.remove(Name{id, engine_key});
                release(ref);
            }
        }
        for (const KeyAndSize& key : gone.stubs.keys())
            if (const Ref* found = gone.stubs.find(key)) prune(*found);
        gone.names.clear();
        gone.covers.clear();
        gone.stubs.each([&](const KeyAndSize&, Ref top) {
            if (at(top).first_child == NONE) kill(top);
        });
        gone.stubs.clear();
    }

    bool is_held(Ref ref) const noexcept {
        for (const Name& name : at(ref).names)
            if (domain(name.domain).references.contains(name.key)) return true;
        for (const Name& name : at(ref).covered_by)
            if (domain(name.domain).references.contains(name.key)) return true;
        return false;
    }

    // `ref` may have lost its last holder: remember it, up to the bound.
    void release(Ref ref) {
        if (at(ref).state != State::BLOCK || is_held(ref)) return;
        unlist(ref);
        list_last(ref);
    }

    // After each batch: forget down to the bound.
    void settle() {
        for (uint64_t tries = listed_; listed_ > max_forgotten_ && tries > 0; --tries) {
            const Ref ref = oldest_;
            unlist(ref);
            if (is_held(ref)) continue;
            if (at(ref).first_child != NONE)
                list_last(ref);
            else
                remove(ref);
        }
    }

    // Gives the numbers of dead blocks back. Only at the end of a public call.
    void bury() {
        for (Ref ref : dead_) {
            at(ref) = Block();
            free_.push_back(ref);
        }
        dead_.clear();
    }

    void note(Ref ref, const Said& said) {
        for (Said& each : at(ref).history) {
            if (each.publisher == said.publisher && each.group == said.group) {
                each = said;
                return;
            }
        }
        at(ref).history.push(said);
    }

    template <class F>
    void each_root(F&& what) const {
        roots_.each([&](const KeyAndSize& key, Ref) {
            what(static_cast<uint32_t>(key.size), static_cast<uint32_t>(key.key));
        });
    }

    size_t bytes() const noexcept;
    void check() const;

private:
    static constexpr uint32_t CHUNK_BITS = 12, CHUNK_MASK = (1U << CHUNK_BITS) - 1;

    Ref create(State state, uint32_t size) {
        Ref made;
        if (!free_.empty()) {
            made = free_.back();
            free_.pop_back();
        } else {
            if (used_ == NONE - 1) throw std::length_error("the block index is full");
            if ((used_ & CHUNK_MASK) == 0) chunks_.push_back(std::make_unique<Block[]>(1U << CHUNK_BITS));
            made = used_++;
        }
        at(made).state = state;
        at(made).size = size;
        return made;
    }

    std::vector<Ref> covered(DomainId id, uint64_t engine_key) const {
        const auto* found = domain(id).covers.find(engine_key);
        std::vector<Ref> blocks;
        if (found != nullptr) found->each([&](uint64_t ref, bool) { blocks.push_back(static_cast<Ref>(ref)); });
        return blocks;
    }

    void hang(Ref ref, Ref parent) {
        Block &block = at(ref), &above = at(parent);
        children_[KeyAndSize{block.local, parent}] = ref;
        block.parent = parent;
        block.before = above.last_child;
        block.after = NONE;
        if (above.last_child == NONE)
            above.first_child = ref;
        else
            at(above.last_child).after = ref;
        above.last_child = ref;
        block.end = above.end + above.size;
        block.space = above.space;
        block.media = block.own_media || above.media;
        if (above.attached) {
            block.attached = true;
            block.key = chain(above.key, block.local);
            by_key[block.key] = ref;
        }
    }

    void unhang(Ref ref) {
        Block& block = at(ref);
        Block& above = at(block.parent);
        children_.erase(KeyAndSize{block.local, block.parent});
        (block.before == NONE ? above.first_child : at(block.before).after) = block.after;
        (block.after == NONE ? above.last_child : at(block.after).before) = block.before;
        block.before = block.after = NONE;
    }

    struct Move {
        Ref block, place;
    };

    // Move everything under `waiting` to `place`, computing keys when the place is attached. Depth in `moves`, not on
    // the stack: a hostile chain may be as long as it likes.
    void graft(Ref waiting, Ref place) {
        std::vector<Move> moves;
        take_children(waiting, place, moves);
        while (!moves.empty()) {
            const Move move = moves.back();
            moves.pop_back();
            const Ref target = find_child(move.place, at(move.block).local);
            if (target == NONE) {
                const bool was_attached = at(move.block).attached;
                take_children(move.block, move.block, moves);
                hang(move.block, move.place);
                if (at(move.block).attached && !was_attached) --orphans;
            } else {
                take_children(move.block, target, moves);
                merge(move.block, target);
            }
        }
    }

    void take_children(Ref from, Ref place, std::vector<Move>& moves) {
        while (at(from).first_child != NONE) {
            const Ref ref = at(from).first_child;
            unhang(ref);
            moves.push_back(Move{ref, place});
        }
    }

    void merge(Ref ref, Ref into) {
        Block& block = at(ref);
        for (const Name& name : block.names) {
            ShortList<Named>* sizes = domain(name.domain).names.find(name.key);
            if (sizes == nullptr) continue;
            for (Named& each : *sizes)
                if (each.size == block.size) each.block = into;
            at(into).names.push(name);
        }
        for (const Name& name : block.covered_by) {
            if (auto* covered = domain(name.domain).covers.find(name.key)) covered->erase(ref);
            cover(name.domain, name.key, into);
        }
        for (const Said& said : block.history) {
            bool newer = true;
            for (const Said& other : at(into).history)
                if (other.publisher == said.publisher && other.group == said.group) newer = other.at <= said.at;
            if (newer) note(into, said);
        }
        block.names.clear();
        block.covered_by.clear();
        unlist(ref);
        release(into);
        if (!block.attached) --orphans;
        kill(ref);
        block.newer = into;  // where it went, for whoever still has its number in this call
    }

    void prune(Ref top) {
        std::vector<Ref> below{top};
        for (size_t i = 0; i < below.size(); ++i)
            for (Ref ref = at(below[i]).first_child; ref != NONE; ref = at(ref).after) below.push_back(ref);
        for (size_t i = below.size(); i-- > 1;)
            if (at(below[i]).first_child == NONE && !is_held(below[i])) remove(below[i]);
    }

    void remove(Ref ref) {
        Block& block = at(ref);
        unlist(ref);
        for (const Name& name : block.names) {
            ShortList<Named>* sizes = domain(name.domain).names.find(name.key);
            if (sizes == nullptr) continue;
            for (Named* each = sizes->begin(); each != sizes->end(); ++each) {
                if (each->size == block.size) {
                    sizes->erase(each);
                    break;
                }
            }
            if (sizes->empty()) domain(name.domain).names.erase(name.key);
        }
        for (const Name& name : block.covered_by)
            if (auto* covered = domain(name.domain).covers.find(name.key)) covered->erase(ref);
        const Ref parent = block.parent;
        unhang(ref);
        if (block.attached)
            by_key.erase(block.key);
        else
            --orphans;
        kill(ref);
        drop_if_empty(parent);
    }

    void kill(Ref ref) {
        if (at(ref).state == State::DEAD) return;
        at(ref).state = State::DEAD;
        at(ref).newer = NONE;
        dead_.push_back(ref);
    }

    Ref forward(Ref ref) const noexcept {
        while (at(ref).state == State::DEAD && at(ref).newer != NONE) ref = at(ref).newer;
        return ref;
    }

    void list_last(Ref ref) {
        Block& block = at(ref);
        block.listed = true;
        block.older = newest_;
        block.newer = NONE;
        (newest_ == NONE ? oldest_ : at(newest_).newer) = ref;
        newest_ = ref;
        ++listed_;
    }

    void unlist(Ref ref) {
        Block& block = at(ref);
        if (!block.listed) return;
        block.listed = false;
        (block.older == NONE ? oldest_ : at(block.older).newer) = block.newer;
        (block.newer == NONE ? newest_ : at(block.newer).older) = block.older;
        block.older = block.newer = NONE;
        --listed_;
    }

    std::vector<std::unique_ptr<Block[]>> chunks_;
    uint32_t used_ = 0;
    std::vector<Ref> free_, dead_;
    std::vector<std::unique_ptr<Domain>> domains_;
    std::vector<std::string> spaces_;
    OrderedMap<uint64_t, ShortList<uint32_t>> space_ids_;
    OrderedMap<KeyAndSize, Ref, HashKeyAndSize> roots_;     // (namespace, size) -> root
    OrderedMap<KeyAndSize, Ref, HashKeyAndSize> children_;  // (local hash, parent) -> block
    Ref oldest_ = NONE, newest_ = NONE;
    uint64_t listed_ = 0, max_forgotten_;
};

inline size_t Forest::bytes() const noexcept {
    size_t sum = chunks_.size() * sizeof(Block) * (CHUNK_MASK + 1) + by_key.bytes() + children_.bytes();
    for (const auto& each : domains_)
        sum += sizeof(Domain) + each->names.bytes() + each->references.bytes() + each->covers.bytes() + each->stubs.bytes();
    return sum;
}

[[noreturn]] inline void violated(const std::string& what) { throw std::logic_error(what); }

inline void Forest::check() const {
    int64_t unattached = 0;
    uint64_t attached = 0, listed = 0, hanging = 0;
    for (Ref ref = 0; ref < used_; ++ref) {
        const Block& block = at(ref);
        if (block.state == State::DEAD) violated("a dead block was not buried");
        if (block.state != State::BLOCK) continue;
        ++hanging;
        listed += block.listed;
        const Block& parent = at(block.parent);
        if (parent.state == State::FREE || find_child(block.parent, block.local) != ref || block.size != parent.size ||
            block.end != parent.end + block.size)
            violated("block " + std::to_string(block.key) + " hangs wrongly under its parent");
        if (block.attached != parent.attached || block.media != (block.own_media || parent.media))
            violated("block " + std::to_string(block.key) + " differs from its parent");
        if (!block.attached) {
            ++unattached;
        } else {
            ++attached;
            const Ref* found = by_key.find(block.key);
            if (block.key != chain(parent.key, block.local) || found == nullptr || *found != ref)
                violated("block " + std::to_string(block.key) + " is not what its chain says");
        }
        for (const Name& name : block.names)
            if (known(name.domain, name.key, block.size) != ref)
                violated("engine key " + std::to_string(name.key) + " does not lead back to its block");
        for (const Name& name : block.covered_by) {
            const auto* covers = domain(name.domain).covers.find(name.key);
            if (covers == nullptr || !covers->contains(ref))
                violated("chunk " + std::to_string(name.key) + " does not lead back to its block");
        }
    }
    if (attached != by_key.size()) violated("the key table and the chains name different blocks");
    if (hanging != children_.size()) violated("the children's table and the chains name different blocks");
    if (listed != listed_) violated("the list of the forgotten is miscounted");
    if (unattached != orphans)
        violated(std::to_string(unattached) + " orphans found, " + std::to_string(orphans) + " counted");
    for (DomainId id = 0; id < domains_.size(); ++id) {
        domains_[id]->names.each([&](uint64_t key, const ShortList<Named>& sizes) {
            for (const Named& each : sizes)
                if (at(each.block).state != State::BLOCK || !at(each.block).names.contains(Name{id, key}))
                    violated("engine key " + std::to_string(key) + " names a block that does not know it");
        });
        domains_[id]->stubs.each([&](const KeyAndSize& key, Ref top) {
            if (at(top).state != State::STUB || at(top).size != key.size)
                violated("stub " + std::to_string(key.key) + " is no stub");
        });
    }
}

}  // namespace kvindex
