// XXH3-64 with a seed, for inputs of every length: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
// One-shot only. Reads bytes as little-endian words, so the machine must be little-endian (checked below).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kvindex hashes little-endian words");

namespace kvindex {
namespace xxh3 {

constexpr uint64_t P32_1 = 0x9E3779B1U, P32_2 = 0x85EBCA77U, P32_3 = 0xC2B2AE3DU;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87ULL, P64_2 = 0xC2B2AE3D27D4EB4FULL, P64_3 = 0x165667B19E3779F9ULL;
constexpr uint64_t P64_4 = 0x85EBCA77C2B2AE63ULL, P64_5 = 0x27D4EB2F165667C5ULL;
constexpr uint64_t MX_1 = 0x165667919E3779F9ULL, MX_2 = 0x9FB21C651E98DF25ULL;

constexpr size_t SECRET_BYTES = 192, SECRET_MIN_BYTES = 136, STRIPE_BYTES = 64, STRIPES_PER_BLOCK = 16;

alignas(64) constexpr unsigned char SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b,
    0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0,
    0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3,
    0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3,
    0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1,
    0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40,
    0x7e,
};

inline uint32_t read32(const unsigned char* at) noexcept {
    uint32_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline uint64_t read64(const unsigned char* at) noexcept {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline uint64_t rotate(uint64_t value, int bits) noexcept { return (value << bits) | (value >> (64 - bits)); }

inline uint64_t fold(uint64_t a, uint64_t b) noexcept {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche64(uint64_t hash) noexcept {
    hash = (hash ^ (hash >> 33)) * P64_2;
    hash = (hash ^ (hash >> 29)) * P64_3;
    return hash ^ (hash >> 32);
}

inline uint64_t avalanche(uint64_t hash) noexcept {
    hash = (hash ^ (hash >> 37)) * MX_1;
    return hash ^ (hash >> 32);
}

inline uint64_t mix16(const unsigned char* in, const unsigned char* secret, uint64_t seed) noexcept {
    return fold(read64(in) ^ (read64(secret) + seed), read64(in + 8) ^ (read64(secret + 8) - seed));
}

inline uint64_t hash_0_to_16(const unsigned char* in, size_t length, uint64_t seed) noexcept {
    if (length > 8) {
        const uint64_t low = read64(in) ^ ((read64(SECRET + 24) ^ read64(SECRET + 32)) + seed);
        const uint64_t high = read64(in + length - 8) ^ ((read64(SECRET + 40) ^ read64(SECRET + 48)) - seed);
        return avalanche(length + __builtin_bswap64(low) + high + fold(low, high));
    }
    if (length >= 4) {
        seed ^= static_cast<uint64_t>(__builtin_bswap32(static_cast<uint32_t>(seed))) << 32;
        const uint64_t both = read32(in + length - 4) + (static_cast<uint64_t>(read32(in)) << 32);
        uint64_t hash = both ^ ((read64(SECRET + 8) ^ read64(SECRET + 16)) - seed);
        hash ^= rotate(hash, 49) ^ rotate(hash, 24);
        hash *= MX_2;
        hash ^= (hash >> 35) + length;
        hash *= MX_2;
        return hash ^ (hash >> 28);
    }
    if (length > 0) {
        const uint32_t combined = (static_cast<uint32_t>(in[0]) << 16) | (static_cast<uint32_t>(in[length >> 1]) << 24) |
                                  in[length - 1] | (static_cast<uint32_t>(length) << 8);
        return avalanche64(combined ^ ((read32(SECRET) ^ read32(SECRET + 4)) + seed));
    }
    return avalanche64(seed ^ read64(SECRET + 56) ^ read64(SECRET + 64));
}

inline uint64_t hash_17_to_128(const unsigned char* in, size_t length, uint64_t seed) noexcept {
    uint64_t sum = length * P64_1;
    for (size_t i = (length - 1) / 32 + 1; i-- > 0;) {
        sum += mix16(in + 16 * i, SECRET + 32 * i, seed);
        sum += mix16(in + length - 16 * (i + 1), SECRET + 32 * i + 16, seed);
    }
    return avalanche(sum);
}

inline uint64_t hash_129_to_240(const unsigned char* in, size_t length, uint64_t seed) noexcept {
    uint64_t sum = length * P64_1;
    for (size_t i = 0; i < 8; ++i) sum += mix16(in + 16 * i, SECRET + 16 * i, seed);
    sum = avalanche(sum);
    for (size_t i = 8; i < length / 16; ++i) sum += mix16(in + 16 * i, SECRET + 16 * (i - 8) + 3, seed);
    return avalanche(sum + mix16(in + length - 16, SECRET + SECRET_MIN_BYTES - 17, seed));
}

inline void accumulate(uint64_t* sums, const unsigned char* in, const unsigned char* secret) noexcept {
    for (size_t i = 0; i < 8; ++i) {
        const uint64_t data = read64(in + 8 * i), keyed = data ^ read64(secret + 8 * i);
        sums[i ^ 1] += data;
        sums[i] += (keyed & 0xFFFFFFFFU) * (keyed >> 32);
    }
}

inline uint64_t hash_long(const unsigned char* in, size_t length, uint64_t seed) noexcept {
    alignas(64) unsigned char secret[SECRET_BYTES];
    for (size_t i = 0; i < SECRET_BYTES; i += 16) {
        const uint64_t low = read64(SECRET + i) + seed, high = read64(SECRET + i + 8) - seed;
        std::memcpy(secret + i, &low, 8);
        std::memcpy(secret + i + 8, &high, 8);
    }
    alignas(64) uint64_t sums[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    const size_t stripes = (length - 1) / STRIPE_BYTES;  // the last, possibly overlapping stripe is extra
    for (size_t stripe = 0; stripe < stripes; ++stripe) {
        const size_t n = stripe % STRIPES_PER_BLOCK;
        accumulate(sums, in + stripe * STRIPE_BYTES, secret + 8 * n);
        if (n == STRIPES_PER_BLOCK - 1) {
            for (size_t i = 0; i < 8; ++i)
                sums[i] = (sums[i] ^ (sums[i] >> 47) ^ read64(secret + SECRET_BYTES - STRIPE_BYTES + 8 * i)) * P32_1;
        }
    }
    accumulate(sums, in + length - STRIPE_BYTES, secret + SECRET_BYTES - STRIPE_BYTES - 7);
    uint64_t hash = length * P64_1;
    for (size_t i = 0; i < 8; i += 2)
        hash += fold(sums[i] ^ read64(secret + 11 + 8 * i), sums[i + 1] ^ read64(secret + 19 + 8 * i));
    return avalanche(hash);
}

}  // namespace xxh3

inline uint64_t xxh3_64(const void* data, size_t length, uint64_t seed = 0) noexcept {
    const auto* in = static_cast<const unsigned char*>(data);
    if (length <= 16) return xxh3::hash_0_to_16(in, length, seed);
    if (length <= 128) return xxh3::hash_17_to_128(in, length, seed);
    if (length <= 240) return xxh3::hash_129_to_240(in, length, seed);
    return xxh3::hash_long(in, length, seed);
}

// The hash of a block's own tokens; `seed` is 0 or the hash of its media and embeddings.
inline uint64_t local_hash(const uint32_t* tokens, size_t count, uint64_t seed) noexcept {
    return xxh3_64(tokens, count * sizeof(uint32_t), seed);
}

inline uint64_t chain(uint64_t parent, uint64_t local) noexcept {
    const uint64_t both[2] = {parent, local};
    return xxh3_64(both, sizeof both);
}

// Keys of all full blocks. `seeds` is null or has one seed per block.
inline void chain_keys(const uint32_t* tokens, size_t blocks, size_t block_size, uint64_t root, const uint64_t* seeds,
                       uint64_t* keys) noexcept {
    for (size_t i = 0; i < blocks; ++i) {
        root = chain(root, local_hash(tokens + i * block_size, block_size, seeds == nullptr ? 0 : seeds[i]));
        keys[i] = root;
    }
}

}  // namespace kvindex
