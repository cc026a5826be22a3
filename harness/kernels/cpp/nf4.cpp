// NF4 (arXiv:2305.14314) on a CPU: encode, decode, decode 8-bit constants, and multiply few rows by a packed matrix.
//
// Every result except the product has the bits that torch operations give: float32 arithmetic, no fused multiply-add
// (-ffp-contract=off), and one cast at the end. Blocks have an even number of values, so that none begins inside a byte.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int PIECE = 64;  // values that are decoded at a time; they stay in the first cache
constexpr int LANES = 16;  // partial sums of a product
constexpr int64_t STREAMED = 16 << 20;  // bytes of a result from which it bypasses the cache

using bfloat16 = uint16_t;
using float16 = _Float16;

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

inline void cast(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void cast(const float* from, bfloat16* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = round_to_bfloat16(from[i]);
}

inline void cast(const float* from, float16* to, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < count; i++) to[i] = static_cast<float16>(from[i]);
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
    for (; i < count; i++) to[i] = static_cast<float>(from[i]);
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

#if defined(__AVX512F__)
struct Levels {
    __m512 all;
    explicit Levels(const float* levels) : all(_mm512_loadu_ps(levels)) {}
    __m512 operator()(__m512i codes) const { return _mm512_permutexvar_ps(codes, all); }
};
#elif defined(__AVX2__)
struct Levels {
    __m256 low, high;
    explicit Levels(const float* levels) : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
    __m256 operator()(__m256i codes) const {
        __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), bit3);
    }
};
#else
struct Levels {
    const float* all;
    explicit Levels(const float* levels) : all(levels) {}
};
#endif

// Write level x scale for `count` codes of one block, an even number unless the tensor ends here.
inline void expand(const uint8_t* packed, const Levels& levels, const float* table, float scale, float* out, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 scales = _mm512_set1_ps(scale);
    for (; i + 32 <= count; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
        __m512 high = _mm512_mul_ps(levels(_mm512_srli_epi32(bytes, 4)), scales);
        __m512 low = _mm512_mul_ps(levels(bytes), scales);  // only the lowest four bits of an index count
        _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(high, first, low));
        _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(high, second, low));
    }
#elif defined(__AVX2__)
    const __m256 scales = _mm256_set1_ps(scale);
    for (; i + 16 <= count; i += 16) {
        __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2)));
        __m256 high = _mm256_mul_ps(levels(_mm256_srli_epi32(bytes, 4)), scales);
        __m256 low = _mm256_mul_ps(levels(bytes), scales);
        __m256 a = _mm256_unpacklo_ps(high, low), b = _mm256_unpackhi_ps(high, low);
        _mm256_storeu_ps(out + i, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(out + i + 8, _mm256_permute2f128_ps(a, b, 0x31));
    }
#endif
    for (; i < count; i++) out[i] = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * scale;
}

// Copy to memory that is not read soon. Both pointers and the number of bytes are multiples of 64.
inline void stream(const void* from, void* to, int64_t bytes) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i),
                            _mm512_load_si512(static_cast<const char*>(from) + i));
#else
    std::memcpy(to, from, bytes);
#endif
}

template <typename Out>
void decode(const uint8_t* packed, const Constants& constants, const float* table, Out* out, int64_t count,
            int64_t block, int threads) {
    const Levels levels(table);
    const int64_t blocks = (count + block - 1) / block;
    const bool streamed = count * static_cast<int64_t>(sizeof(Out)) >= STREAMED && block % PIECE == 0 &&
                          reinterpret_cast<uintptr_t>(out) % 64 == 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        alignas(64) float values[PIECE];
        alignas(64) Out cast_values[PIECE];
        const float scale = constants[b];
        const int64_t end = (b + 1) * block < count ? (b + 1) * block : count;
        for (int64_t i = b * block; i < end; i += PIECE) {
            const int64_t piece = end - i < PIECE ? end - i : PIECE;
            expand(packed + i / 2, levels, table, scale, values, piece);
            if (streamed && piece == PIECE) {
                cast(values, cast_values, PIECE);
                stream(cast_values, out + i, sizeof cast_values);
            } else {
                cast(values, out + i, piece);
            }
        }
    }
#if defined(__AVX512F__)
    if (streamed) _mm_sfence();
#endif
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

inline void round_weights(float*, const float*) {}

inline void round_weights(float* values, const bfloat16*) {
    for (int i = 0; i < PIECE; i++) values[i] = bits_to_float(static_cast<uint32_t>(round_to_bfloat16(values[i])) << 16);
}

inline void round_weights(float* values, const float16*) {
    alignas(64) float16 rounded[PIECE];
    cast(values, rounded, PIECE);
    widen(rounded, values, PIECE);
}

// y (ROWS, E) = x (ROWS, D) W^T + bias, with x as float32. D and the block are multiples of PIECE.
template <int ROWS, typename Out>
void multiply(const float* x, const uint8_t* packed, const Constants& constants, const float* table, const Out* bias,
              Out* y, int64_t E, int64_t D, int64_t block, int threads) {
    const Levels levels(table);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t e = 0; e < E; e++) {
        alignas(64) float values[PIECE];
        float sums[ROWS][LANES] = {};
        for (int64_t d = 0; d < D; d += PIECE) {
            const int64_t at = e * D + d;
            expand(packed + at / 2, levels, table, constants[at / block], values, PIECE);
            round_weights(values, y);
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
void multiply(int rows, const float* x, const uint8_t* packed, const Constants& constants, const float* table,
              const Out* bias, Out* y, int64_t E, int64_t D, int64_t block, int threads) {
    switch (rows) {
        case 1: return multiply<1>(x, packed, constants, table, bias, y, E, D, block, threads);
        case 2: return multiply<2>(x, packed, constants, table, bias, y, E, D, block, threads);
        case 3: return multiply<3>(x, packed, constants, table, bias, y, E, D, block, threads);
        default: return multiply<4>(x, packed, constants, table, bias, y, E, D, block, threads);
    }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16.

extern "C" void nf4_decode(const uint8_t* packed, const void* absmax, const float* absmax2, const float* map,
                           const float* offset, int64_t block2, const float* levels, void* out, int64_t count,
                           int64_t block, int dtype, int threads) {
    const Constants constants{absmax, absmax2, map, offset, block2};
    if (dtype == 0) decode(packed, constants, levels, static_cast<float*>(out), count, block, threads);
    if (dtype == 1) decode(packed, constants, levels, static_cast<bfloat16*>(out), count, block, threads);
    if (dtype == 2) decode(packed, constants, levels, static_cast<float16*>(out), count, block, threads);
}

extern "C" void nf4_encode(const void* values, const float* midpoints, uint8_t* packed, float* absmax, int64_t count,
                           int64_t block, int dtype, int threads) {
    if (dtype == 0) encode(static_cast<const float*>(values), midpoints, packed, absmax, count, block, threads);
    if (dtype == 1) encode(static_cast<const bfloat16*>(values), midpoints, packed, absmax, count, block, threads);
    if (dtype == 2) encode(static_cast<const float16*>(values), midpoints, packed, absmax, count, block, threads);
}

extern "C" void double_decode(const uint8_t* codes, const float* absmax2, const float* map, const float* offset,
                              int64_t block2, float* out, int64_t count, int threads) {
    const Constants constants{codes, absmax2, map, offset, block2};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = constants[i];
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
