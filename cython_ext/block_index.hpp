// The block index: publishers, what is resident at them, and scores. The C++ twin of kvindex/index/reference.py, which
// gives the reasons. Calls are not synchronised; strings and Python's side of things are in kvindex/index/native.py.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chains.hpp"
#include "hybrid.hpp"
#include "placing.hpp"

namespace kvindex {

struct ResidentKey {
    uint64_t key;
    int32_t tier, group;
    bool operator==(const ResidentKey& o) const noexcept { return key == o.key && tier == o.tier && group == o.group; }
};
struct HashResidentKey {
    HashWord word;
    uint64_t operator()(const ResidentKey& k) const noexcept {
        return word(k.key + (static_cast<uint64_t>(k.group) * 64 + static_cast<uint64_t>(k.tier)) * 0x9E3779B97F4A7C15ULL);
    }
};
struct Resident {
    int64_t copies = 0;
    DomainId domain = 0;
};

struct Learnt {  // of one KV-cache group
    Kind kind = Kind::FULL;
    int64_t window = 0;
    uint32_t lower_size = 0;
    std::vector<uint32_t> sizes;  // in HBM, as first seen
};

using Tiers = uint32_t;  // a bit per tier number
constexpr Tiers HBM_BIT = 1;

struct Stream {
    int32_t number = 0, model = -1;  // model -1: matches any
    DomainId domain = 0;
    bool eagle = false, hidden = false, reports_hits = false, mixed_domains = false;
    int64_t chunk_tokens = 0, cleared_at = 0;
    bool was_cleared = false;
    uint32_t generation = 0;
    Tiers tiers = 0;
    OrderedMap<ResidentKey, Resident, HashResidentKey> resident;
    OrderedMap<ResidentKey, int64_t, HashResidentKey> doubtful;
    std::map<int32_t, Learnt> learnt;

    std::vector<Group> groups() const {
        std::vector<Group> found;
        for (const auto& each : learnt) {
            const Learnt& l = each.second;
            Group group{each.first, l.kind, l.lower_size, l.window, l.sizes};
            if (group.sizes.empty()) group.sizes.push_back(l.lower_size);
            group.block_size = *std::max_element(group.sizes.begin(), group.sizes.end());
            if (group.block_size > 0) found.push_back(std::move(group));
        }
        return found;
    }
};

struct Counts {
    int64_t stored = 0, removed = 0, orphans = 0, unplaced = 0, cleared = 0;
};

// One endpoint's line of the answer; `tiers` and `load_tokens` by tier number.
struct Row {
    int32_t endpoint = 0;
    int64_t blocks = 0, tokens = 0, hbm_tokens = 0;
    double score = 0;
    std::vector<int64_t> tiers, load_tokens;
};

// A prompt's keys at one block size. `blocks` is filled as it is asked for, once for all endpoints.
struct PromptChain {
    uint32_t size = 0;
    const uint64_t* keys = nullptr;
    int64_t count = 0;
    std::vector<Ref> blocks;
};

class BlockIndex {
public:
    explicit BlockIndex(uint64_t max_forgotten) : forest(max_forgotten) {}

    Forest forest;
    std::vector<double> weights;  // by tier number

    // `label` numbers stated key domains from 0; -1: to be learnt.
    int32_t open(int32_t label, bool eagle, int64_t chunk_tokens, int32_t model) {
        auto made = std::make_unique<Stream>();
        made->number = static_cast<int32_t>(streams_.size());
        made->eagle = eagle;
        made->chunk_tokens = chunk_tokens;
        made->model = model;
        made->domain = join_domain(label);
        streams_.push_back(std::move(made));
        return streams_.back()->number;
    }

    void close(int32_t number) {
        Stream& gone = stream(number);
        withdraw(gone, ~Tiers(0));
        leave(gone);
        forest.bury();
        streams_[static_cast<size_t>(number)].reset();
    }

    // `keep`: the tiers whose claims survive. On a restart `label` is the publisher's, as for `open`.
    void drop(int32_t number, bool restart, Tiers keep, int32_t label) {
        Stream& s = stream(number);
        ++s.generation;
        withdraw(s, ~keep);
        if (restart) {
            if (!s.resident.empty()) {  // kept claims still speak of the old domain
                ++forest.domain(s.domain).members;
                s.mixed_domains = true;
            }
            leave(s);
            s.domain = join_domain(label);
            s.learnt.clear();
            s.reports_hits = false;
            s.was_cleared = false;
        }
        forest.bury();
    }

    void hide(int32_t number, bool hidden) { stream(number).hidden = hidden; }

    Counts apply(int32_t number, const std::vector<Event>& events, int64_t at) {
        Stream& s = stream(number);
        for (const Event& event : events) learn(s, event);
        const int64_t orphans_before = forest.orphans;
        const std::vector<Group> groups = s.groups();
        Placing placing(forest, s.domain, groups, s.chunk_tokens);
        Counts counts;
        counts.unplaced = placing.place(events);
        learn_domain(s, placing.named);
        New fresh;
        for (const Event& event : events) {
            if (event.what == What::STORED) {
                counts.stored += store(s, groups, event, at, fresh);
            } else if (event.what == What::REMOVED) {
                counts.removed += remove(s, event, at);
            } else {
                s.cleared_at = at;
                s.was_cleared = true;
                counts.cleared += withdraw(s, HBM_BIT);
            }
        }
        forest.settle();
        counts.orphans = std::max<int64_t>(0, forest.orphans - orphans_before);
        forest.bury();
        return counts;
    }

    std::vector<Group> groups(int32_t number) const { return stream(number).groups(); }

    // Endpoints in the order in which they are to be answered, each with its publishers' numbers.
    void set_endpoints(const std::vector<std::vector<int32_t>>& endpoints) { endpoints_ = endpoints; }

    // `model` -1: every endpoint under its own. `wanted` lists positions in `endpoints` when `only` is set.
    std::vector<Row> score(std::vector<PromptChain>& chains, int64_t length, int32_t model, bool only,
                           const std::vector<int32_t>& wanted) {
        for (PromptChain& each : chains) each.blocks.assign(static_cast<size_t>(each.count), UNASKED);
        std::vector<Row> rows;
        const size_t count = only ? wanted.size() : endpoints_.size();
        std::vector<const Stream*> asked;
        for (size_t i = 0; i < count; ++i) {
            const size_t endpoint = only ? static_cast<size_t>(wanted[i]) : i;
            asked.clear();
            for (int32_t number : endpoints_.at(endpoint)) {
                const Stream& s = stream(number);
                if (!s.hidden && (model == -1 || s.model == -1 || s.model == model)) asked.push_back(&s);
            }
            if (asked.empty()) continue;
            Row row = score_endpoint(chains, length, asked);
            row.endpoint = static_cast<int32_t>(endpoint);
            if (row.blocks > 0 || row.tokens > 0) rows.push_back(std::move(row));
        }
        return rows;
    }

    // ---- for explain

    Ref find(uint64_t key) const noexcept {
        const Ref* found = forest.by_key.find(key);
        return found == nullptr ? NONE : *found;
    }
    Tiers tiers_of(int32_t number, int32_t group, Ref ref) const { return tiers_of(stream(number), group, ref); }
    int32_t best_tier(Tiers tiers) const {
        int32_t best = -1;
        for (int32_t tier = 0; tier < static_cast<int32_t>(weights.size()); ++tier)
            if ((tiers >> tier & 1) && (best < 0 || weight(tier) > weight(best))) best = tier;
        return best;
    }
    // False when this publisher never spoke of the block.
    bool said(int32_t number, int32_t group, Ref ref, Said& found) const {
        for (const Said& each : forest.at(ref).history) {
            if (each.publisher == number && each.group == group) {
                found = each;
                return true;
            }
        }
        return false;
    }
    uint32_t generation(int32_t number) const { return stream(number).generation; }
    bool hidden(int32_t number) const { return stream(number).hidden; }
    bool cleared_at(int32_t number, int64_t& at) const {
        at = stream(number).cleared_at;
        return stream(number).was_cleared;
    }

    // Pairs of block size and namespace.
    std::vector<uint64_t> roots() const {
        std::vector<uint64_t> found;
        forest.each_root([&](uint32_t size, uint32_t space) {
            found.push_back(size);
            found.push_back(space);
        });
        return found;
    }

    // ---- sizes

    int64_t held_blocks() const {
        int64_t held = 0;
        forest.by_key.each([&](uint64_t, Ref ref) { held += forest.is_held(ref); });
        return held;
    }
    int64_t entries() const {
        int64_t sum = 0;
        for (const auto& each : streams_) sum += each ? static_cast<int64_t>(each->resident.size()) : 0;
        return sum;
    }
    int64_t publishers() const {
        int64_t sum = 0;
        for (const auto& each : streams_) sum += each != nullptr;
        return sum;
    }
    int64_t bytes() const {
        size_t sum = forest.bytes();
        for (const auto& each : streams_)
            if (each) sum += sizeof(Stream) + each->resident.bytes() + each->doubtful.bytes();
        return static_cast<int64_t>(sum);
    }

    void check() const {
        forest.check();
        std::map<std::pair<DomainId, uint64_t>, int64_t> expected;
        for (const auto& each : streams_) {
            if (!each) continue;
            each->resident.each([&](const ResidentKey& key, const Resident& entry) {
                if (entry.copies < 1 || (key.tier != HBM && entry.copies != 1))
                    violated("publisher " + std::to_string(each->number) + " holds " + std::to_string(entry.copies) +
                             " copies of " + std::to_string(key.key));
                if (!each->mixed_domains && entry.domain != each->domain)
                    violated("publisher " + std::to_string(each->number) + " holds a key of another domain");
                ++expected[{entry.domain, key.key}];
            });
        }
        size_t references = 0;
        for (const auto& each : expected) {
            const int64_t* found = forest.domain(each.first.first).references.find(each.first.second);
            if (found == nullptr || *found != each.second)
                violated("engine key " + std::to_string(each.first.second) + " is miscounted");
        }
        for (DomainId id = 0; id < forest.domains(); ++id) references += forest.domain(id).references.size();
        if (references != expected.size()) violated("engine keys are counted that nobody holds");
    }

private:
    static constexpr Ref UNASKED = NONE - 1;

    // What one batch stored that a request in the same step could not have hit (see reference.py).
    struct New {
        OrderedMap<ResidentKey, uint32_t, HashResidentKey> run_of;
        uint32_t run = 1;
        int32_t group = -1;

        void next_event(const Event& event) {
            if (event.tier != HBM || event.group <= group) ++run;
            group = event.tier == HBM ? event.group : -1;
        }
        bool hides(const ResidentKey& key, bool is_state) const {
            const uint32_t* found = run_of.find(key);
            return found != nullptr && (is_state || *found == run);
        }
    };

    enum class Repeats { NO, PERHAPS, SURELY };

    Stream& stream(int32_t number) { return const_cast<Stream&>(static_cast<const BlockIndex*>(this)->stream(number)); }
    const Stream& stream(int32_t number) const {
        if (number < 0 || static_cast<size_t>(number) >= streams_.size() || !streams_[static_cast<size_t>(number)])
            throw std::out_of_range("no publisher " + std::to_string(number));
        return *streams_[static_cast<size_t>(number)];
    }

    DomainId join_domain(int32_t label) {
        if (label >= 0) {
            while (static_cast<size_t>(label) >= stated_.size()) stated_.push_back(forest.new_domain(true));
            ++forest.domain(stated_[static_cast<size_t>(label)]).members;
            return stated_[static_cast<size_t>(label)];
        }
        const DomainId made = forest.new_domain(false);
        forest.domain(made).members = 1;
        return made;
    }

    void leave(Stream& s) {
        Domain& domain = forest.domain(s.domain);
        if (--domain.members == 0 && !domain.stated) forest.forget_domain(s.domain);
    }

    int64_t withdraw(Stream& s, Tiers which) {
        int64_t count = 0;
        for (const ResidentKey& key : s.resident.keys()) {
            if (!(which >> key.tier & 1)) continue;
            forget(s, key);
            ++count;
        }
        return count;
    }

    void forget(Stream& s, const ResidentKey& key) {
        const DomainId id = s.resident.find(key)->domain;
        s.resident.erase(key);
        s.doubtful.erase(key);
        Domain& domain = forest.domain(id);
        int64_t* count = domain.references.find(key.key);
        if (count == nullptr || --*count > 0) return;
        domain.references.erase(key.key);
        if (const ShortList<Named>* names = domain.names.find(key.key))
            for (const Named& each : *names) forest.release(each.block);
    }

    static void learn(Stream& s, const Event& event) {
        if (event.what != What::STORED || event.placeholder) return;
        const bool is_new = s.learnt.find(event.group) == s.learnt.end();
        Learnt& group = s.learnt[event.group];
        if (event.kind != Kind::UNSAID) group.kind = event.kind;
        if (is_new && event.kind == Kind::UNSAID) group.kind = Kind::FULL;
        if (event.window != 0) group.window = event.window;
        if (event.token_count == 0) return;
        const uint32_t size = static_cast<uint32_t>(event.block_size);
        if (event.tier != HBM)
            group.lower_size = group.lower_size == 0 ? size : std::min(group.lower_size, size);
        else if (std::find(group.sizes.begin(), group.sizes.end(), size) == group.sizes.end())
            group.sizes.push_back(size);
    }

    void learn_domain(Stream& s, const std::vector<Placed>& named) {
        if (forest.domain(s.domain).settled) return;
        for (const Placed& placed : named) {
            bool others = false;
            DomainId match = NONE;
            for (const Name& name : forest.at(placed.block).names) {
                if (name.domain == s.domain) continue;
                others = true;
                if (name.key == placed.key) match = std::min(match, name.domain);  // the oldest
            }
            if (!others) continue;
            forest.domain(s.domain).settled = true;
            if (match != NONE && forest.domain(s.domain).members == 1) {
                forest.domain(match).settled = true;
                join(s, match);
            }
            return;
        }
    }

    void join(Stream& s, DomainId into) {
        const DomainId old = s.domain;
        s.domain = into;
        ++forest.domain(into).members;
        s.resident.each([&](const ResidentKey&, Resident& entry) {
            if (entry.domain == old) entry.domain = into;
        });
        forest.absorb(old, into);
    }

    int64_t store(Stream& s, const std::vector<Group>& groups, const Event& event, int64_t at, New& fresh) {
        bool doubtful = false;
        fresh.next_event(event);
        if (event.tier == HBM && !event.has_parent && event.is_dense() && event.token_count > 0 && event.gone.empty()) {
            const Repeats repeats = repeats_hit(s, groups, event, fresh);
            if (repeats == Repeats::SURELY || (repeats == Repeats::PERHAPS && s.reports_hits)) {
                forget_doubtful(s);
                return 0;
            }
            doubtful = repeats == Repeats::PERHAPS;
        }
        int64_t count = 0;
        for (uint64_t engine_key : event.keys) {
            if (event.is_gone(engine_key)) continue;
            ++count;
            const ResidentKey key{engine_key, event.tier, event.group};
            if (doubtful) ++s.doubtful[key];
            Resident* entry = s.resident.find(key);
            if (entry == nullptr) {
                s.resident[key] = Resident{1, s.domain};
                s.tiers |= Tiers(1) << event.tier;
                fresh.run_of[key] = fresh.run;
                ++forest.domain(s.domain).references[engine_key];
            } else {
                entry->copies = event.tier == HBM ? entry->copies + 1 : 1;
            }
            note(s, event.group, engine_key, Status::STORED, at);
        }
        return count;
    }

    int64_t remove(Stream& s, const Event& event, int64_t at) {
        int64_t count = 0;
        for (uint64_t engine_key : event.keys) {
            const ResidentKey key{engine_key, event.tier, event.group};
            Resident* entry = s.resident.find(key);
            if (entry == nullptr) continue;
            ++count;
            if (--entry->copies == 0) {
                note(s, event.group, engine_key, Status::REMOVED, at);
                forget(s, key);
            } else if (int64_t* copies = s.doubtful.find(key)) {
                *copies = std::min(*copies, entry->copies);
            }
        }
        return count;
    }

    void note(const Stream& s, int32_t group, uint64_t engine_key, Status status, int64_t at) {
        if (const ShortList<Named>* names = forest.domain(s.domain).names.find(engine_key))
            for (const Named& each : *names) forest.note(each.block, Said{s.number, group, at, s.generation, status});
    }

    void forget_doubtful(Stream& s) {
        s.reports_hits = true;
        for (const ResidentKey& key : s.doubtful.keys()) {
            const int64_t* copies = s.doubtful.find(key);
            Resident* entry = s.resident.find(key);
            if (copies == nullptr || entry == nullptr) continue;
            entry->copies -= *copies;
            if (entry->copies < 1) forget(s, key);
        }
        s.doubtful.clear();
    }

    Repeats repeats_hit(const Stream& s, const std::vector<Group>& groups, const Event& event, const New& fresh) {
        std::vector<const Group*> all;
        for (const Group& group : groups) all.push_back(&group);
        const int64_t length = event.token_count;
        if (all.empty() || length % alignment(all).tokens != 0) return Repeats::NO;
        std::map<uint32_t, std::vector<Ref>> blocks;
        for (const Group& group : groups)
            for (uint32_t size : group.sizes)
                if (blocks.find(size) == blocks.end()) blocks[size] = blocks_of(event, size);
        const auto held = [&](const Group& group, int64_t size, int64_t index) {
            const auto chain = blocks.find(static_cast<uint32_t>(size));
            if (chain == blocks.end() || index < 0 || static_cast<size_t>(index) >= chain->second.size()) return false;
            const Ref ref = chain->second[static_cast<size_t>(index)];
            if (ref == NONE) return false;
            for (const Name& name : forest.at(ref).names) {
                const ResidentKey key{name.key, HBM, group.number};
                if (name.domain == s.domain && s.resident.contains(key) &&
                    !fresh.hides(key, group.kind == Kind::STATE))
                    return true;
            }
            return false;
        };
        if (usable_tokens(groups, length + 1, s.eagle, held) != length) return Repeats::NO;
        return usable_tokens(groups, length, s.eagle, held) >= event.block_size ? Repeats::SURELY : Repeats::PERHAPS;
    }

    // The known blocks, at a block size, of the prefix that a parentless event tells.
    std::vector<Ref> blocks_of(const Event& event, uint32_t size) {
        const bool own = size == event.block_size;
        if (!own && event.any_media) return {};
        uint64_t key = forest.root_key(size, forest.space(event.lora + event.salt));
        std::vector<Ref> found;
        for (int64_t i = 0; (i + 1) * size <= event.token_count; ++i) {
            const uint64_t seed = own ? event.seed(static_cast<size_t>(i)) : 0;
            key = chain(key, local_hash(event.tokens + i * size, size, seed));
            found.push_back(find(key));
        }
        return found;
    }

    Tiers tiers_of(const Stream& s, int32_t group, Ref ref) const {
        const Block& block = forest.at(ref);
        Tiers found = 0;
        for (const Name& name : block.names) found |= tiers_of_name(s, group, name);
        for (const Name& name : block.covered_by) found |= tiers_of_name(s, group, name) & ~HBM_BIT;
        return found;
    }

    static Tiers tiers_of_name(const Stream& s, int32_t group, const Name& name) {
        if (name.domain != s.domain && !s.mixed_domains) return 0;
        Tiers found = 0;
        for (int32_t tier = 0; s.tiers >> tier; ++tier) {
            if (!(s.tiers >> tier & 1)) continue;
            const Resident* entry = s.resident.find(ResidentKey{name.key, tier, group});
            if (entry != nullptr && entry->domain == name.domain) found |= Tiers(1) << tier;
        }
        return found;
    }

    double weight(int32_t tier) const { return weights.at(static_cast<size_t>(tier)); }

    Ref block_at(PromptChain& chain, int64_t index) const {
        if (index < 0 || index >= chain.count) return NONE;
        Ref& known = chain.blocks[static_cast<size_t>(index)];
        if (known == UNASKED) known = find(chain.keys[index]);
        return known;
    }

    Row score_endpoint(std::vector<PromptChain>& chains, int64_t length, const std::vector<const Stream*>& streams) {
        std::map<int32_t, Group> by_number;
        bool eagle = false, lower = false;
        int64_t chunk = 0;
        for (const Stream* s : streams) {
            for (Group& group : s->groups()) by_number[group.number] = std::move(group);
            eagle = eagle || s->eagle;
            lower = lower || (s->tiers & ~HBM_BIT) != 0;
            if (chunk == 0) chunk = s->chunk_tokens;
        }
        std::vector<Group> groups;
        for (auto& each : by_number) groups.push_back(std::move(each.second));

        // What was looked up stays for the other walks over the same blocks: tiers + 1, 0 is not asked yet.
        struct Memo {
            int32_t group;
            PromptChain* chain;
            std::vector<Tiers> tiers;
        };
        std::vector<Memo> memos;
        const auto tiers_at = [&](const Group& group, int64_t size, int64_t index) -> Tiers {
            Memo* memo = nullptr;
            for (Memo& each : memos)
                if (each.group == group.number && each.chain->size == size) memo = &each;
            if (memo == nullptr) {
                PromptChain* chain = nullptr;
                for (PromptChain& each : chains)
                    if (each.size == size) chain = &each;
                if (chain == nullptr) return 0;
                memos.push_back(Memo{group.number, chain, {}});
                memo = &memos.back();
            }
            const Ref ref = block_at(*memo->chain, index);
            if (ref == NONE) return 0;
            if (static_cast<size_t>(index) >= memo->tiers.size()) memo->tiers.resize(static_cast<size_t>(index) + 1, 0);
            Tiers& known = memo->tiers[static_cast<size_t>(index)];
            if (known == 0) {
                known = 1U << 31;
                for (const Stream* s : streams) known |= tiers_of(*s, group.number, ref);
            }
            return known & ~(1U << 31);
        };
        const auto in_hbm = [&](const Group& g, int64_t size, int64_t i) { return (tiers_at(g, size, i) & HBM_BIT) != 0; };
        const auto below = [&](const Group& g, int64_t size, int64_t i) { return (tiers_at(g, size, i) & ~HBM_BIT) != 0; };
        const auto anywhere = [&](const Group& g, int64_t size, int64_t i) { return tiers_at(g, size, i) != 0; };

        Row row;
        row.hbm_tokens = row.tokens = usable_tokens(groups, length, eagle, in_hbm);
        if (lower) row.tokens = extend_from_lower_tiers(groups, length, row.hbm_tokens, chunk, below);
        const Group* first = nullptr;
        int64_t reach = 0;
        for (const Group& group : groups) {
            if (group.kind != Kind::FULL) continue;
            const int64_t found = leading_blocks(group, length, anywhere) * group.block_size;
            reach = first == nullptr ? found : std::min(reach, found);
            if (first == nullptr) first = &group;
        }
        if (first == nullptr) return row;
        row.tiers.assign(weights.size(), 0);
        row.load_tokens.assign(weights.size(), 0);
        row.blocks = reach / first->block_size;
        for (int64_t i = 0; i < row.blocks; ++i) {
            const int32_t tier = best_tier(tiers_at(*first, first->block_size, i));
            if (tier < 0) continue;
            row.score += weight(tier);
            ++row.tiers[static_cast<size_t>(tier)];
        }
        for (int64_t i = row.hbm_tokens / first->block_size; i < row.tokens / first->block_size; ++i) {
            const int32_t tier = best_tier(tiers_at(*first, first->block_size, i) & ~HBM_BIT);
            if (tier >= 0) row.load_tokens[static_cast<size_t>(tier)] += first->block_size;
        }
        return row;
    }

    std::vector<std::unique_ptr<Stream>> streams_;  // by number; closed ones are null
    std::vector<DomainId> stated_;
    std::vector<std::vector<int32_t>> endpoints_;
};

}  // namespace kvindex
