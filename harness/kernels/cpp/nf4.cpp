// NF4 (arXiv:2305.14314) on a CPU: encode, decode, decode 8-bit constants, and multiply few rows by a packed matrix.
//
// Every result except the product has the bits that torch operations give: float32 arithmetic, no fused multiply-add
// (-ffp-contract=off), and one cast at the end. Blocks have an even number of values, so that none begins inside a byte.

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int PIECE = 64;  // values that are encoded, or multiplied, at a time; they stay in the first cache
constexpr int LANES = 16;  // partial sums of a product
constexpr int64_t STREAMED_BYTES = 32 << 20;  // size of a result from which it bypasses the cache

using bfloat16 = uint16_t;
struct float16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline bfloat16 round_to_bfloat16(float value) {
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<bfloat16>(value != value ? 0x7fc0 : rounded);
}

// Not all compilers have a type of 16-bit floats.
inline float16 round_to_float16(float value) {
    const uint16_t sign = static_cast<uint16_t>(float_to_bits(value) >> 16 & 0x8000);
    const uint32_t bits = float_to_bits(value) & 0x7fffffff;
    uint32_t rounded;
    if (bits > 0x7f800000)
        rounded = 0x7e00;  // NaN
    else if (bits >= 0x47800000)
        rounded = 0x7c00;  // infinity, from 65536 on
    else if (bits < 0x38800000)  // subnormal: next to 0.5 a float32 has the spacing of subnormal float16 numbers
        rounded = float_to_bits(bits_to_float(bits) + 0.5f) - float_to_bits(0.5f);
    else
        rounded = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    return {static_cast<uint16_t>(sign | rounded)};
}

inline float float16_to_float(float16 value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

inline void cast(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void cast(const float* from, bfloat16* to, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff), nan = _mm512_set1_epi32(0x7fc0);
    for (; i + 16 <= count; i += 16) {
        __m512 values = _mm512_loadu_ps(from + i);
        __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(half, odd)), 16);
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), nan);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(rounded));
    }
#endif
    for (; i < count; i++) to[i] = round_to_bfloat16(from[i]);
}

inline void cast(const float* from, float16* to, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#endif
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < count; i++) to[i] = round_to_float16(from[i]);
}

inline void widen(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void widen(const bfloat16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = bits_to_float(static_cast<uint32_t>(from[i]) << 16);
}

inline void widen(const float16* from, float* to, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < count; i++) to[i] = float16_to_float(from[i]);
}

// The constants of the blocks: float32 absmax, or 8-bit codes of it with their own constants (double quantisation).
struct Constants {
    const void* absmax;
    const float* absmax2;  // null without double quantisation
    const float* map;      // the 256 values of the 8-bit codes
    const float* offset;
    int64_t block2;

    float operator[](int64_t i) const {
        if (!absmax2) return static_cast<const float*>(absmax)[i];
        return map[static_cast<const uint8_t*>(absmax)[i]] * absmax2[i / block2] + *offset;
    }
};

// The 16 values of the codes of one block: level x scale, cast once.
template <typename Out>
struct Table {
    alignas(64) Out values[16];

    Table(const float* levels, float scale) {
        float products[16];
        for (int i = 0; i < 16; i++) products[i] = levels[i] * scale;
        cast(products, values, 16);
    }
};

// Store a vector, past the cache if it is not read soon. A streamed address is a multiple of the vector's size.
#if defined(__AVX512F__)
template <bool STREAMED>
inline void store(void* to, __m512i from) {
    if (STREAMED)
        _mm512_stream_si512(static_cast<__m512i*>(to), from);
    else
        _mm512_storeu_si512(to, from);
}
#endif

// Write the values of `count` codes of one block, beginning with a whole byte.
template <bool STREAMED>
inline void expand(const uint8_t* packed, const Table<float>& table, float* out, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 values = _mm512_load_ps(table.values);
    const __m512i low = _mm512_set1_epi64(15);
    for (; i + 16 <= count; i += 16) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2)));
        __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(_mm512_and_si512(bytes, low), 32));
        store<STREAMED>(out + i, _mm512_castps_si512(_mm512_permutexvar_ps(codes, values)));
    }
#elif defined(__AVX2__)
    const __m256 below = _mm256_load_ps(table.values), above = _mm256_load_ps(table.values + 8);
    const __m256i low = _mm256_set1_epi64x(15);
    for (; i + 8 <= count; i += 8) {
        int32_t four;
        std::memcpy(&four, packed + i / 2, sizeof four);
        __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        __m256i codes = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(_mm256_and_si256(bytes, low), 32));
        __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        __m256 first = _mm256_permutevar8x32_ps(below, codes), second = _mm256_permutevar8x32_ps(above, codes);
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(first, second, bit3));
    }
#endif
    for (; i < count; i++) out[i] = table.values[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

template <bool STREAMED, typename Out>
inline void expand(const uint8_t* packed, const Table<Out>& table, Out* out, int64_t count) {
    static_assert(sizeof(Out) == 2);
    int64_t i = 0;
#if defined(__AVX512BW__)
    // A load of more bytes than were just stored would wait for the store.
    const __m512i values = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.values)));
    const __m512i low = _mm512_set1_epi32(15);
    for (; i + 32 <= count; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
        __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(_mm512_and_si512(bytes, low), 16));
        store<STREAMED>(out + i, _mm512_permutexvar_epi16(codes, values));
    }
#elif defined(__AVX2__)
    // Look up the low and the high byte of each value.
    const __m128i* halves = reinterpret_cast<const __m128i*>(table.values);
    const __m128i first = _mm_load_si128(halves), second = _mm_load_si128(halves + 1), byte = _mm_set1_epi16(255);
    const __m128i below = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i above = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    const __m128i nibble = _mm_set1_epi8(15);
    for (; i + 32 <= count; i += 32) {
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), low = _mm_and_si128(bytes, nibble);
        __m128i* to = reinterpret_cast<__m128i*>(out + i);
        for (__m128i codes : {_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)}) {
            __m128i lower = _mm_shuffle_epi8(below, codes), upper = _mm_shuffle_epi8(above, codes);
            _mm_storeu_si128(to++, _mm_unpacklo_epi8(lower, upper));
            _mm_storeu_si128(to++, _mm_unpackhi_epi8(lower, upper));
        }
    }
#endif
    for (; i < count; i++) out[i] = table.values[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

template <bool STREAMED, typename Out>
void decode(const uint8_t* packed, const Constants& constants, const float* levels, Out* out, int64_t count,
            int64_t block, int threads) {
    const int64_t blocks = (count + block - 1) / block;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t begin = b * block, end = begin + block < count ? begin + block : count;
            expand<STREAMED>(packed + begin / 2, Table<Out>(levels, constants[b]), out + begin, end - begin);
        }
#if defined(__AVX512F__)
        if (STREAMED) _mm_sfence();  // other threads may read the values only after it
#endif
    }
}

template <typename Out>
void decode(const uint8_t* packed, const Constants& constants, const float* levels, void* result, int64_t count,
            int64_t block, int threads) {
    Out* out = static_cast<Out*>(result);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && block * sizeof(Out) % 64 == 0;
    if (aligned && count * static_cast<int64_t>(sizeof(Out)) >= STREAMED_BYTES)
        decode<true>(packed, constants, levels, out, count, block, threads);
    else
        decode<false>(packed, constants, levels, out, count, block, threads);
}

// Encode whole and partial blocks. A code counts the midpoints that are not at or above the scaled value; so a NaN gets 15.
template <typename In>
void encode(const In* in, const float* midpoints, uint8_t* packed, float* absmax, int64_t count, int64_t block,
            int threads) {
    const int64_t blocks = (count + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * block, end = begin + block < count ? begin + block : count;
        alignas(64) float values[PIECE];
        alignas(64) int32_t codes[PIECE];
        uint32_t largest = 0;  // magnitudes are in the order of their bits, with NaN above infinity
        for (int64_t i = begin; i < end; i += PIECE) {
            const int64_t piece = end - i < PIECE ? end - i : PIECE;
            widen(in + i, values, piece);
            for (int64_t j = 0; j < piece; j++) {
                const uint32_t magnitude = float_to_bits(values[j]) & 0x7fffffff;
                largest = magnitude > largest ? magnitude : largest;
            }
        }
        absmax[b] = bits_to_float(largest);
        const float divisor = largest ? absmax[b] : 1.0f;
        for (int64_t i = begin; i < end; i += PIECE) {
            const int64_t piece = end - i < PIECE ? end - i : PIECE;
            widen(in + i, values, piece);
            if (piece % 2) values[piece] = 0;  // pads the last byte of the tensor
            for (int64_t j = 0; j < piece + piece % 2; j++) {
                const float scaled = values[j] / divisor;
                int32_t code = 0;
#pragma GCC unroll 15
                for (int m = 0; m < 15; m++) code += !(scaled <= midpoints[m]);
                codes[j] = code;
            }
            if (piece % 2) codes[piece] = 7;  // the code of zero, also in a block with a NaN
            for (int64_t j = 0; j < piece; j += 2) packed[(i + j) / 2] = static_cast<uint8_t>(codes[j] << 4 | codes[j + 1]);
        }
    }
}

// y (ROWS, E) = x (ROWS, D) W^T + bias, with x as float32. D and the block are multiples of PIECE.
template <int ROWS, typename Out>
void multiply(const float* x, const uint8_t* packed, const Constants& constants, const float* levels, const Out* bias,
              Out* y, int64_t E, int64_t D, int64_t block, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t e = 0; e < E; e++) {
        alignas(64) float values[PIECE];
        float sums[ROWS][LANES] = {};
        for (int64_t d = 0; d < D; d += PIECE) {
            const int64_t at = e * D + d;
            const Table<Out> rounded(levels, constants[at / block]);
            Table<float> table(levels, 0);
            widen(rounded.values, table.values, 16);
            expand<false>(packed + at / 2, table, values, PIECE);
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < PIECE; i += LANES)
                    for (int l = 0; l < LANES; l++)
                        sums[r][l] += values[i + l] * x[r * D + d + i + l];
        }
        for (int r = 0; r < ROWS; r++) {
            float sum = 0, start = 0;
            for (int l = 0; l < LANES; l++) sum += sums[r][l];
            if (bias) widen(bias + e, &start, 1);
            sum += start;
            cast(&sum, y + r * E + e, 1);
        }
    }
}

template <typename Out>
void multiply(int rows, const float* x, const uint8_t* packed, const Constants& constants, const float* levels,
              const Out* bias, Out* y, int64_t E, int64_t D, int64_t block, int threads) {
    switch (rows) {
        case 1: return multiply<1>(x, packed, constants, levels, bias, y, E, D, block, threads);
        case 2: return multiply<2>(x, packed, constants, levels, bias, y, E, D, block, threads);
        case 3: return multiply<3>(x, packed, constants, levels, bias, y, E, D, block, threads);
        default: return multiply<4>(x, packed, constants, levels, bias, y, E, D, block, threads);
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16.

extern "C" void nf4_decode(const uint8_t* packed, const void* absmax, const float* absmax2, const float* map,
                           const float* offset, int64_t block2, const float* levels, void* out, int64_t count,
                           int64_t block, int dtype, int threads) {
    const Constants constants{absmax, absmax2, map, offset, block2};
    if (dtype == 0) decode<float>(packed, constants, levels, out, count, block, threads);
    if (dtype == 1) decode<bfloat16>(packed, constants, levels, out, count, block, threads);
    if (dtype == 2) decode<float16>(packed, constants, levels, out, count, block, threads);
}

extern "C" void nf4_encode(const void* values, const float* midpoints, uint8_t* packed, float* absmax, int64_t count,
                           int64_t block, int dtype, int threads) {
    if (dtype == 0) encode(static_cast<const float*>(values), midpoints, packed, absmax, count, block, threads);
    if (dtype == 1) encode(static_cast<const bfloat16*>(values), midpoints, packed, absmax, count, block, threads);
    if (dtype == 2) encode(static_cast<const float16*>(values), midpoints, packed, absmax, count, block, threads);
}

extern "C" void double_decode(const uint8_t* codes, const float* absmax2, const float* map, const float* offset,
                              int64_t block2, float* out, int64_t count, int threads) {
    const int64_t blocks = (count + block2 - 1) / block2;
    const float plus = *offset;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const float scale = absmax2[b];
        const int64_t end = (b + 1) * block2 < count ? (b + 1) * block2 : count;
        for (int64_t i = b * block2; i < end; i++) out[i] = map[codes[i]] * scale + plus;
    }
}

extern "C" void nf4_multiply(const float* x, int rows, const uint8_t* packed, const void* absmax, const float* absmax2,
                             const float* map, const float* offset, int64_t block2, const float* levels,
                             const void* bias, void* y, int64_t E, int64_t D, int64_t block, int dtype, int threads) {
    const Constants constants{absmax, absmax2, map, offset, block2};
    if (dtype == 0)
        multiply(rows, x, packed, constants, levels, static_cast<const float*>(bias), static_cast<float*>(y), E, D,
                 block, threads);
    if (dtype == 1)
        multiply(rows, x, packed, constants, levels, static_cast<const bfloat16*>(bias), static_cast<bfloat16*>(y), E,
                 D, block, threads);
    if (dtype == 2)
        multiply(rows, x, packed, constants, levels, static_cast<const float16*>(bias), static_cast<float16*>(y), E, D,
                 block, threads);
}
