/* Deltas at memory speed: the loops of delta_codec.py, byte for byte the same (delta_format.py says what they mean).

   Arrays are compared 64 bytes at a time; what differs comes out as a mask of bytes, by AVX-512, AVX2 or plain words,
   whichever the processor has. No header of Python is needed: delta_kernel.py loads the library by ctypes, and checks
   every argument and every payload before it calls. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK_BYTES 64
#define SKIP 255

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_X86 1
#endif

static uint64_t find_differences_plain(const uint8_t *base, const uint8_t *new_)
{
    uint64_t a[8], b[8], any = 0, mask = 0;
    memcpy(a, base, BLOCK_BYTES);
    memcpy(b, new_, BLOCK_BYTES);
    for (int word = 0; word < 8; word++)
        any |= a[word] ^ b[word];
    if (any == 0)
        return 0;
    for (int byte = 0; byte < BLOCK_BYTES; byte++)
        mask |= (uint64_t)(base[byte] != new_[byte]) << byte;
    return mask;
}

#ifdef HAS_X86
__attribute__((target("avx512f,avx512bw"))) static inline uint64_t
find_differences_avx512(const uint8_t *base, const uint8_t *new_)
{
    return _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(base), _mm512_loadu_si512(new_));
}

__attribute__((target("avx2"))) static inline uint64_t find_differences_avx2(const uint8_t *base, const uint8_t *new_)
{
    __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)base), _mm256_loadu_si256((const __m256i *)new_));
    __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)(base + 32)),
                                     _mm256_loadu_si256((const __m256i *)(new_ + 32)));
    return ~((uint64_t)(uint32_t)_mm256_movemask_epi8(low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32);
}
#endif

/* What an encoder has found so far; the caller gives room for `max_bytes` and one more block. */
typedef struct {
    uint8_t *gaps, *low, *values;
    uint32_t *ordinals;
    size_t max_bytes, num_changes, num_gaps, num_exceptions, next;
} found_t;

static size_t found_bytes(const found_t *found, size_t itemsize)
{
    return found->num_changes + found->num_gaps + found->num_exceptions * (itemsize + sizeof(uint32_t));
}

/* One changed element: its gap, its low byte and, where the step to it does not fit a byte, the whole of it. */
#define DEFINE_ADD(BITS)                                                                                              \
    static inline void add_##BITS(found_t *found, const uint8_t *base, const uint8_t *new_, size_t index)             \
    {                                                                                                                 \
        uint##BITS##_t before, after;                                                                                 \
        memcpy(&before, base + index * sizeof before, sizeof before);                                                 \
        memcpy(&after, new_ + index * sizeof after, sizeof after);                                                    \
        size_t skipped = index - found->next;                                                                         \
        for (; skipped >= SKIP; skipped -= SKIP)                                                                      \
            found->gaps[found->num_gaps++] = SKIP;                                                                    \
        found->gaps[found->num_gaps++] = (uint8_t)skipped;                                                            \
        found->next = index + 1;                                                                                      \
        found->low[found->num_changes] = (uint8_t)after;                                                              \
        int##BITS##_t step = (int##BITS##_t)(uint##BITS##_t)(after - before);                                         \
        if (step < -128 || step > 127) {                                                                              \
            found->ordinals[found->num_exceptions] = (uint32_t)found->num_changes;                                    \
            memcpy(found->values + found->num_exceptions++ * sizeof after, &after, sizeof after);                     \
        }                                                                                                             \
        found->num_changes++;                                                                                         \
    }

/* All changed elements. 0 when they take more than max_bytes. */
#define DEFINE_ENCODE(BITS, NAME, ATTRIBUTES, FIND)                                                                   \
    ATTRIBUTES static int encode_##BITS##_##NAME(found_t *found, const uint8_t *base, const uint8_t *new_, size_t n)  \
    {                                                                                                                 \
        const size_t size = BITS / 8, per_block = BLOCK_BYTES / size;                                                 \
        const uint64_t element = size == 8 ? 0xff : (1ull << size) - 1;                                               \
        size_t index = 0;                                                                                             \
        for (; index + per_block <= n; index += per_block) {                                                          \
            uint64_t mask = FIND(base + index * size, new_ + index * size);                                           \
            if (mask == 0)                                                                                            \
                continue;                                                                                             \
            do {                                                                                                      \
                size_t place = (size_t)__builtin_ctzll(mask) / size;                                                  \
                mask &= ~(element << (place * size));                                                                 \
                add_##BITS(found, base, new_, index + place);                                                         \
            } while (mask != 0);                                                                                      \
            if (found_bytes(found, size) > found->max_bytes)                                                          \
                return 0;                                                                                             \
        }                                                                                                             \
        for (; index < n; index++)                                                                                    \
            if (memcmp(base + index * size, new_ + index * size, size) != 0)                                          \
                add_##BITS(found, base, new_, index);                                                                 \
        return found_bytes(found, size) <= found->max_bytes;                                                          \
    }

#define DEFINE_APPLY(BITS)                                                                                            \
    static void apply_##BITS(uint8_t *current, const uint8_t *gaps, size_t num_gaps, const uint8_t *low,              \
                             const uint8_t *values, const uint8_t *ordinals, size_t num_exceptions)                   \
    {                                                                                                                 \
        size_t index = 0, change = 0, exception = 0;                                                                  \
        uint32_t next_exception = UINT32_MAX;                                                                         \
        if (num_exceptions > 0)                                                                                       \
            memcpy(&next_exception, ordinals, sizeof next_exception);                                                 \
        for (size_t gap = 0; gap < num_gaps; gap++) {                                                                 \
            if (gaps[gap] == SKIP) {                                                                                  \
                index += SKIP;                                                                                        \
                continue;                                                                                             \
            }                                                                                                         \
            index += gaps[gap];                                                                                       \
            uint##BITS##_t value;                                                                                     \
            uint8_t *place = current + index * sizeof value;                                                          \
            if (change == next_exception) {                                                                           \
                memcpy(place, values + exception * sizeof value, sizeof value);                                       \
                next_exception = UINT32_MAX;                                                                          \
                if (++exception < num_exceptions)                                                                     \
                    memcpy(&next_exception, ordinals + exception * sizeof next_exception, sizeof next_exception);     \
            } else {                                                                                                  \
                memcpy(&value, place, sizeof value);                                                                  \
                value = (uint##BITS##_t)(value + (int##BITS##_t)(int8_t)(uint8_t)(low[change] - (uint8_t)value));     \
                memcpy(place, &value, sizeof value);                                                                  \
            }                                                                                                         \
            change++;                                                                                                 \
            index++;                                                                                                  \
        }                                                                                                             \
    }

/* The elements at places that are known already: the way back from a delta, without another search. */
#define DEFINE_FOLLOW(BITS)                                                                                           \
    static void follow_##BITS(found_t *found, const uint8_t *base, const uint8_t *new_, const uint8_t *gaps,          \
                              size_t num_gaps)                                                                        \
    {                                                                                                                 \
        size_t index = 0;                                                                                             \
        for (size_t gap = 0; gap < num_gaps; gap++) {                                                                 \
            index += gaps[gap];                                                                                       \
            if (gaps[gap] != SKIP)                                                                                    \
                add_##BITS(found, base, new_, index++);                                                               \
        }                                                                                                             \
    }

#define NO_ATTRIBUTES
#ifdef HAS_X86
#define DEFINE_ENCODERS(BITS)                                                                                         \
    DEFINE_ENCODE(BITS, plain, NO_ATTRIBUTES, find_differences_plain)                                                 \
    DEFINE_ENCODE(BITS, avx2, __attribute__((target("avx2,bmi"))), find_differences_avx2)                             \
    DEFINE_ENCODE(BITS, avx512, __attribute__((target("avx512f,avx512bw,bmi"))), find_differences_avx512)
#else
#define DEFINE_ENCODERS(BITS) DEFINE_ENCODE(BITS, plain, NO_ATTRIBUTES, find_differences_plain)
#endif

#define DEFINE_ALL(BITS) DEFINE_ADD(BITS) DEFINE_ENCODERS(BITS) DEFINE_FOLLOW(BITS) DEFINE_APPLY(BITS)
DEFINE_ALL(8)
DEFINE_ALL(16)
DEFINE_ALL(32)
DEFINE_ALL(64)

enum { PLAIN, AVX2, AVX512 };

#define EXPORTED __attribute__((visibility("default")))

/* The widest instructions that this processor has. */
EXPORTED int weightcast_delta_level(void)
{
#ifdef HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512f"))
        return AVX512;
    if (__builtin_cpu_supports("avx2"))
        return AVX2;
#endif
    return PLAIN;
}

#ifdef HAS_X86
#define ENCODE_AT(BITS)                                                                                               \
    return level == AVX512 ? encode_##BITS##_avx512(found, base, new_, n)                                             \
           : level == AVX2 ? encode_##BITS##_avx2(found, base, new_, n)                                               \
                           : encode_##BITS##_plain(found, base, new_, n)
#else
#define ENCODE_AT(BITS) return encode_##BITS##_plain(found, base, new_, n)
#endif

/* 1, or 0 when the changes take more than max_bytes. */
EXPORTED int weightcast_delta_encode(int level, size_t itemsize, const uint8_t *base, const uint8_t *new_, size_t n,
                                     found_t *found)
{
    (void)level;
    switch (itemsize) {
    case 1: ENCODE_AT(8);
    case 2: ENCODE_AT(16);
    case 4: ENCODE_AT(32);
    default: ENCODE_AT(64);
    }
}

EXPORTED void weightcast_delta_follow(size_t itemsize, const uint8_t *base, const uint8_t *new_, const uint8_t *gaps,
                                      size_t num_gaps, found_t *found)
{
    switch (itemsize) {
    case 1: follow_8(found, base, new_, gaps, num_gaps); break;
    case 2: follow_16(found, base, new_, gaps, num_gaps); break;
    case 4: follow_32(found, base, new_, gaps, num_gaps); break;
    default: follow_64(found, base, new_, gaps, num_gaps);
    }
}

EXPORTED void weightcast_delta_apply(size_t itemsize, uint8_t *current, const uint8_t *gaps, size_t num_gaps,
                                     const uint8_t *low, const uint8_t *values, const uint8_t *ordinals,
                                     size_t num_exceptions)
{
    switch (itemsize) {
    case 1: apply_8(current, gaps, num_gaps, low, values, ordinals, num_exceptions); break;
    case 2: apply_16(current, gaps, num_gaps, low, values, ordinals, num_exceptions); break;
    case 4: apply_32(current, gaps, num_gaps, low, values, ordinals, num_exceptions); break;
    default: apply_64(current, gaps, num_gaps, low, values, ordinals, num_exceptions);
    }
}
