// The two containers the block index is made of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvindex {

// Engine keys come from outside: without a secret, a publisher could make all of them collide.
inline uint64_t hash_secret() {
    static const uint64_t secret = [] {
        std::random_device device;
        return (static_cast<uint64_t>(device()) << 32) ^ device();
    }();
    return secret;
}

inline uint64_t mix(uint64_t value) noexcept {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
    return value ^ (value >> 31);
}

struct HashWord {
    uint64_t operator()(uint64_t value) const noexcept { return mix(value ^ secret); }
    uint64_t secret = hash_secret();
};

// A hash map that iterates in order of insertion, like Python's dict: the order in which blocks are released decides
// which are forgotten first. Erased entries leave a hole until the next rebuild; a rebuild counts holes toward the load.
template <class K, class V, class Hash = HashWord>
class OrderedMap {
public:
    struct Entry {
        K key;
        V value;
        bool live;
    };

    size_t size() const noexcept { return live_; }
    bool empty() const noexcept { return live_ == 0; }

    V* find(const K& key) noexcept {
        const uint32_t at = locate(key);
        return at == FREE ? nullptr : &entries_[at].value;
    }
    const V* find(const K& key) const noexcept { return const_cast<OrderedMap*>(this)->find(key); }
    bool contains(const K& key) const noexcept { return find(key) != nullptr; }

    // The value of `key`, default-made when it is new. Invalidates pointers into the map when it is.
    V& operator[](const K& key) {
        if (V* found = find(key)) return *found;
        if ((entries_.size() + 1) * 4 > table_.size() * 3) rebuild();
        size_t slot = hash_(key) & mask();
        while (table_[slot] != FREE) slot = (slot + 1) & mask();
        entries_.push_back(Entry{key, V(), true});
        table_[slot] = static_cast<uint32_t>(entries_.size() - 1);
        ++live_;
        return entries_.back().value;
    }

    bool erase(const K& key) {
        const uint32_t at = locate(key);
        if (at == FREE) return false;
        entries_[at].live = false;
        entries_[at].value = V();
        if (--live_ == 0) clear();
        return true;
    }

    void clear() {
        std::vector<Entry>().swap(entries_);
        std::vector<uint32_t>().swap(table_);
        live_ = 0;
    }

    template <class F>
    void each(F&& what) {
        for (size_t i = 0; i < entries_.size(); ++i)
            if (entries_[i].live) what(entries_[i].key, entries_[i].value);
    }
    template <class F>
    void each(F&& what) const {
        for (const Entry& entry : entries_)
            if (entry.live) what(entry.key, entry.value);
    }

    std::vector<K> keys() const {
        std::vector<K> found;
        found.reserve(live_);
        each([&](const K& key, const V&) { found.push_back(key); });
        return found;
    }

    size_t bytes() const noexcept { return entries_.capacity() * sizeof(Entry) + table_.capacity() * sizeof(uint32_t); }

private:
    static constexpr uint32_t FREE = 0xFFFFFFFFU;

    uint32_t locate(const K& key) const noexcept {
        if (live_ == 0) return FREE;
        for (size_t slot = hash_(key) & mask();; slot = (slot + 1) & mask()) {
            const uint32_t at = table_[slot];
            if (at == FREE || (entries_[at].live && entries_[at].key == key)) return at;
        }
    }

    size_t mask() const noexcept { return table_.size() - 1; }

    void rebuild() {
        size_t wanted = 8;
        while (wanted * 3 < (live_ + 1) * 8) wanted *= 2;  // at most three eighths full after a rebuild
        if (wanted > (1ULL << 31)) throw std::length_error("a table of the block index is full");
        std::vector<uint32_t> table(wanted, FREE);
        std::vector<Entry> kept;
        kept.reserve(live_ + 1);
        for (Entry& entry : entries_)
            if (entry.live) kept.push_back(std::move(entry));
        for (size_t at = 0; at < kept.size(); ++at) {
            size_t slot = hash_(kept[at].key) & (wanted - 1);
            while (table[slot] != FREE) slot = (slot + 1) & (wanted - 1);
            table[slot] = static_cast<uint32_t>(at);
        }
        table_.swap(table);
        entries_.swap(kept);
    }

    std::vector<Entry> entries_;
    std::vector<uint32_t> table_;  // positions in `entries_`; an erased entry keeps its slot until the rebuild
    size_t live_ = 0;
    Hash hash_;
};

// A list that is nearly always empty or of one element, which then needs no memory of its own.
template <class T>
class ShortList {
    static_assert(std::is_trivially_copyable<T>::value, "moved with memcpy");

public:
    ShortList() noexcept : one_{} {}
    ShortList(const ShortList& other) : one_{} { assign(other); }
    ShortList(ShortList&& other) noexcept : one_{} { take(other); }
    ShortList& operator=(const ShortList& other) {
        if (this != &other) {
            release();
            assign(other);
        }
        return *this;
    }
    ShortList& operator=(ShortList&& other) noexcept {
        if (this != &other) {
            release();
            take(other);
        }
        return *this;
    }
    ~ShortList() { release(); }

    T* begin() noexcept { return reinterpret_cast<T*>(capacity_ > 1 ? many_ : one_); }
    T* end() noexcept { return begin() + size_; }
    const T* begin() const noexcept { return const_cast<ShortList*>(this)->begin(); }
    const T* end() const noexcept { return begin() + size_; }
    size_t size() const noexcept { return size_; }
    bool empty() const noexcept { return size_ == 0; }
    size_t bytes() const noexcept { return capacity_ > 1 ? capacity_ * sizeof(T) : 0; }

    void push(const T& value) {
        const T copy = value;  // it may lie in the memory that is about to be replaced
        if (size_ == capacity_) {
            if (capacity_ > 0x7FFFFFFFU) throw std::length_error("a list of the block index is full");
            const uint32_t wanted = capacity_ * 2;
            void* grown = std::malloc(wanted * sizeof(T));
            if (grown == nullptr) throw std::bad_alloc();
            std::memcpy(grown, begin(), size_ * sizeof(T));
            if (capacity_ > 1) std::free(many_);
            many_ = static_cast<unsigned char*>(grown);
            capacity_ = wanted;
        }
        std::memcpy(static_cast<void*>(begin() + size_), &copy, sizeof(T));
        ++size_;
    }

    // Removes the first element equal to `value`, keeping the order of the rest.
    bool remove(const T& value) noexcept {
        for (T* at = begin(); at != end(); ++at) {
            if (*at == value) {
                erase(at);
                return true;
            }
        }
        return false;
    }

    void erase(T* at) noexcept {
        std::memmove(static_cast<void*>(at), at + 1, static_cast<size_t>(end() - at - 1) * sizeof(T));
        --size_;
    }

    bool contains(const T& value) const noexcept {
        for (const T& each : *this)
            if (each == value) return true;
        return false;
    }

    void clear() noexcept {
        release();
        size_ = 0;
        capacity_ = 1;
    }

private:
    void release() noexcept {
        if (capacity_ > 1) std::free(many_);
    }
    void take(ShortList& other) noexcept {
        std::memcpy(static_cast<void*>(one_), other.one_, sizeof one_);
        size_ = other.size_;
        capacity_ = other.capacity_;
        other.size_ = 0;
        other.capacity_ = 1;
    }
    void assign(const ShortList& other) {
        size_ = 0;
        capacity_ = 1;
        for (const T& value : other) push(value);
    }

    union {
        alignas(T) unsigned char one_[sizeof(T) < sizeof(void*) ? sizeof(void*) : sizeof(T)];
        unsigned char* many_;
    };
    uint32_t size_ = 0;
    uint32_t capacity_ = 1;
};

}  // namespace kvindex
