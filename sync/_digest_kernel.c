/* Digests at memory speed, alone or in the same pass as a copy: the values of digest.py, which says what they mean.

   A row's bytes are read as lanes of 8 bytes, multiplied by their weights and summed modulo 2^64, by AVX-512, AVX2 or
   plain words, whichever the processor has. No header of Python is needed: digest_kernel.py loads the library by
   ctypes, and checks every argument before it calls. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANE_BYTES 8
#define BLOCK_LANES (1 << 15)
#define BLOCK_AXIS (1 << 8)
#define LINE_BYTES 64
#define MAX_DIMENSIONS 64
/* Shorter spans are not worth a way around the cache: their first and last lines are written in parts. */
#define MIN_STREAM_LANES 64

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_X86 1
#endif

/* What becomes of the bytes that are read: nothing, a copy, or a copy that goes around the cache. */
enum { READ, COPY, STREAM };
enum { PLAIN, AVX2, AVX512 };

/* The odd weight of coordinate `index` on an axis: a step of splitmix64. */
static inline uint64_t weight_of(uint64_t axis, uint64_t index)
{
    uint64_t state = (index + ((axis + 1) << 48) + 1) * 0x9E3779B97F4A7C15u;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    return (state ^ (state >> 31)) | 1;
}

#define INLINE static inline __attribute__((always_inline))

INLINE uint64_t sum_plain(const uint8_t *source, uint8_t *target, size_t num_lanes, const uint64_t *weights, int mode)
{
    uint64_t sum = 0;
    for (size_t lane = 0; lane < num_lanes; lane++) {
        uint64_t value;
        memcpy(&value, source + lane * LANE_BYTES, LANE_BYTES);
        if (mode != READ)
            memcpy(target + lane * LANE_BYTES, &value, LANE_BYTES);
        sum += value * weights[lane];
    }
    return sum;
}

#ifdef HAS_X86
/* Lanes before `target` lies on a cache line; stores around the cache take whole, aligned vectors. */
static inline size_t lanes_to_line(const uint8_t *target, size_t num_lanes)
{
    size_t lanes = (-(uintptr_t)target % LINE_BYTES) / LANE_BYTES;
    return lanes < num_lanes ? lanes : num_lanes;
}

/* A 64-bit product is low*low plus both cross products, shifted by 32, of which the low halves are enough. */
__attribute__((target("avx2"))) INLINE void
step_avx2(const uint8_t *source, uint8_t *target, const uint64_t *weights, __m256i *low, __m256i *cross, int mode)
{
    __m256i value = _mm256_loadu_si256((const __m256i *)source);
    __m256i weight = _mm256_loadu_si256((const __m256i *)weights);
    if (mode == COPY)
        _mm256_storeu_si256((__m256i *)target, value);
    if (mode == STREAM)
        _mm256_stream_si256((__m256i *)target, value);
    *low = _mm256_add_epi64(*low, _mm256_mul_epu32(value, weight));
    *cross = _mm256_add_epi32(*cross, _mm256_mullo_epi32(value, _mm256_shuffle_epi32(weight, 0xb1)));
}

__attribute__((target("avx2"))) INLINE uint64_t
sum_avx2(const uint8_t *source, uint8_t *target, size_t num_lanes, const uint64_t *weights, int mode)
{
    __m256i low[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, cross[2] = {low[0], low[0]};
    size_t lane = mode == STREAM ? lanes_to_line(target, num_lanes) : 0;
    uint64_t sum = sum_plain(source, target, lane, weights, mode);
    for (; lane + 8 <= num_lanes; lane += 8)
        for (size_t half = 0; half < 2; half++) {
            size_t first = lane + 4 * half, byte = first * LANE_BYTES;
            step_avx2(source + byte, target + byte, weights + first, &low[half], &cross[half], mode);
        }
    uint64_t lows[4], crosses[4];
    _mm256_storeu_si256((__m256i *)lows, _mm256_add_epi64(low[0], low[1]));
    _mm256_storeu_si256((__m256i *)crosses, _mm256_add_epi32(cross[0], cross[1]));
    for (int part = 0; part < 4; part++)
        sum += lows[part] + (crosses[part] << 32) + (crosses[part] >> 32 << 32);
    size_t byte = lane * LANE_BYTES;
    return sum + sum_plain(source + byte, target + byte, num_lanes - lane, weights + lane, mode);
}

#define AVX512_TARGET __attribute__((target("avx512f,avx512dq")))

AVX512_TARGET INLINE __m512i
step_avx512(const uint8_t *source, uint8_t *target, const uint64_t *weights, __m512i sum, int mode)
{
    __m512i value = _mm512_loadu_si512(source);
    if (mode == COPY)
        _mm512_storeu_si512(target, value);
    if (mode == STREAM)
        _mm512_stream_si512((__m512i *)target, value);
    return _mm512_add_epi64(sum, _mm512_mullo_epi64(value, _mm512_loadu_si512(weights)));
}

AVX512_TARGET INLINE uint64_t
sum_avx512(const uint8_t *source, uint8_t *target, size_t num_lanes, const uint64_t *weights, int mode)
{
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    size_t lane = mode == STREAM ? lanes_to_line(target, num_lanes) : 0;
    uint64_t sum = sum_plain(source, target, lane, weights, mode);
    for (; lane + 32 <= num_lanes; lane += 32)
        for (size_t part = 0; part < 4; part++) {
            size_t first = lane + 8 * part, byte = first * LANE_BYTES;
            sums[part] = step_avx512(source + byte, target + byte, weights + first, sums[part], mode);
        }
    for (; lane + 8 <= num_lanes; lane += 8) {
        size_t byte = lane * LANE_BYTES;
        sums[0] = step_avx512(source + byte, target + byte, weights + lane, sums[0], mode);
    }
    uint64_t parts[8];
    _mm512_storeu_si512(parts, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3])));
    for (int part = 0; part < 8; part++)
        sum += parts[part];
    size_t byte = lane * LANE_BYTES;
    return sum + sum_plain(source + byte, target + byte, num_lanes - lane, weights + lane, mode);
}
#endif

/* One function a level and mode, so that no loop asks. */
#define DEFINE_SPAN(LEVEL, ATTRIBUTES, MODE)                                                                          \
    ATTRIBUTES static uint64_t span_##LEVEL##_##MODE(const uint8_t *source, uint8_t *target, size_t num_lanes,        \
                                                     const uint64_t *weights)                                         \
    {                                                                                                                 \
        return sum_##LEVEL(source, target, num_lanes, weights, MODE);                                                 \
    }
#define DEFINE_SPANS(LEVEL, ATTRIBUTES)                                                                               \
    DEFINE_SPAN(LEVEL, ATTRIBUTES, READ)                                                                              \
    DEFINE_SPAN(LEVEL, ATTRIBUTES, COPY)                                                                              \
    DEFINE_SPAN(LEVEL, ATTRIBUTES, STREAM)

typedef uint64_t span_t(const uint8_t *source, uint8_t *target, size_t num_lanes, const uint64_t *weights);

#define NO_ATTRIBUTES
DEFINE_SPANS(plain, NO_ATTRIBUTES)
#ifdef HAS_X86
DEFINE_SPANS(avx2, __attribute__((target("avx2"))))
DEFINE_SPANS(avx512, AVX512_TARGET)
#define SPANS(LEVEL) {span_##LEVEL##_READ, span_##LEVEL##_COPY, span_##LEVEL##_STREAM}
static span_t *const SPANS_OF[3][3] = {SPANS(plain), SPANS(avx2), SPANS(avx512)};
#else
#define SPANS(LEVEL) {span_##LEVEL##_READ, span_##LEVEL##_COPY, span_##LEVEL##_STREAM}
static span_t *const SPANS_OF[1][3] = {SPANS(plain)};
#endif

/* What all rows of a call have in common. */
typedef struct {
    span_t *const *spans;
    const uint64_t *table;
    size_t row_bytes, first_byte;
    int mode;
} pass_t;

/* A lane of which the row has only `num_bytes`, from byte `lead` of the lane on; zeros stand for the others. */
static inline uint64_t partial_lane(const uint8_t *source, uint8_t *target, size_t lead, size_t num_bytes)
{
    uint8_t lane[LANE_BYTES] = {0};
    uint64_t value;
    memcpy(lane + lead, source, num_bytes);
    if (target != NULL)
        memcpy(target, source, num_bytes);
    memcpy(&value, lane, LANE_BYTES);
    return value;
}

/* A row's weighted sum; rows are cut into blocks of lanes, and a block's number has a weight of its own. */
static uint64_t sum_row(const pass_t *pass, const uint8_t *source, uint8_t *target)
{
    size_t lane = pass->first_byte / LANE_BYTES, lead = pass->first_byte % LANE_BYTES, left = pass->row_bytes;
    uint64_t sum = 0;
#define ADVANCE(BYTES) (source += (BYTES), target = target == NULL ? NULL : target + (BYTES), left -= (BYTES))
    if (lead != 0) {
        size_t num_bytes = LANE_BYTES - lead < left ? LANE_BYTES - lead : left;
        uint64_t value = partial_lane(source, target, lead, num_bytes);
        sum += value * pass->table[lane % BLOCK_LANES] * weight_of(BLOCK_AXIS, lane / BLOCK_LANES);
        ADVANCE(num_bytes);
        lane++;
    }
    while (left >= LANE_BYTES) {
        size_t start = lane % BLOCK_LANES, count = left / LANE_BYTES;
        if (count > BLOCK_LANES - start)
            count = BLOCK_LANES - start;
        int streams = pass->mode == STREAM && count >= MIN_STREAM_LANES && (uintptr_t)target % LANE_BYTES == 0;
        span_t *span = pass->spans[pass->mode == STREAM && !streams ? COPY : pass->mode];
        sum += span(source, target, count, pass->table + start) * weight_of(BLOCK_AXIS, lane / BLOCK_LANES);
        ADVANCE(count * LANE_BYTES);
        lane += count;
    }
    if (left > 0) {
        uint64_t value = partial_lane(source, target, 0, left);
        sum += value * pass->table[lane % BLOCK_LANES] * weight_of(BLOCK_AXIS, lane / BLOCK_LANES);
    }
    return sum;
}

#define EXPORTED __attribute__((visibility("default")))

/* The widest instructions that this processor has. */
EXPORTED int weightcast_digest_level(void)
{
#ifdef HAS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512f"))
        return AVX512;
    if (__builtin_cpu_supports("avx2"))
        return AVX2;
#endif
    return PLAIN;
}

/* The digest of a box of `num_dims` >= 1 dimensions, none of them empty, that lies at `offset` of its tensor; where
   `target` is not NULL, the box is copied there as well, around the cache when `streams`. Shapes and offsets are in
   elements, strides in bytes; the last dimension is contiguous on both sides. `table` has the weights of a block. */
EXPORTED uint64_t weightcast_digest(int level, const uint64_t *table, size_t itemsize, size_t num_dims,
                                    const size_t *shape, const size_t *offset, const uint8_t *source,
                                    const ptrdiff_t *source_strides, uint8_t *target, const ptrdiff_t *target_strides,
                                    int streams)
{
    const size_t last = num_dims - 1;
    pass_t pass = {NULL, table, shape[last] * itemsize, offset[last] * itemsize, READ};
    if (target != NULL)
        pass.mode = streams ? STREAM : COPY;
    pass.spans = SPANS_OF[level];
    /* place: the row's coordinates; outer[d]: the product of the weights of the coordinates before dimension d */
    size_t place[MAX_DIMENSIONS] = {0};
    uint64_t outer[MAX_DIMENSIONS + 1], sum = 0;
    outer[0] = 1;
    for (size_t changed = 0;;) {
        for (size_t dim = changed; dim < last; dim++)
            outer[dim + 1] = outer[dim] * weight_of(last - dim, offset[dim] + place[dim]);
        sum += outer[last] * sum_row(&pass, source, target);
        size_t dim = last;
        for (; dim-- > 0;) {
            source += source_strides[dim];
            if (target != NULL)
                target += target_strides[dim];
            if (++place[dim] < shape[dim])
                break;
            source -= source_strides[dim] * (ptrdiff_t)shape[dim];
            if (target != NULL)
                target -= target_strides[dim] * (ptrdiff_t)shape[dim];
            place[dim] = 0;
        }
        if (dim == (size_t)-1)
            break;
        changed = dim;
    }
#ifdef HAS_X86
    if (pass.mode == STREAM)
        _mm_sfence(); /* what was stored around the cache is seen by other threads before this returns */
#endif
    return sum;
}

/* A box of weightcast_digest, with its target; the order of fields is that of BOX_FIELDS in host_passes.py. */
typedef struct {
    uint64_t itemsize, num_dims;
    const size_t *shape, *offset;
    const ptrdiff_t *source_strides, *target_strides;
    const uint8_t *source;
    uint8_t *target;
    uint64_t streams;
} box_t;

/* The same for `count` boxes, one after the other: chunks have many, and a call from Python costs as much as a copy. */
EXPORTED void weightcast_digest_boxes(int level, const uint64_t *table, size_t count, const box_t *boxes,
                                      uint64_t *digests)
{
    for (size_t number = 0; number < count; number++) {
        const box_t *box = &boxes[number];
        digests[number] = weightcast_digest(level, table, box->itemsize, box->num_dims, box->shape, box->offset,
                                            box->source, box->source_strides, box->target, box->target_strides,
                                            box->streams != 0);
    }
}
