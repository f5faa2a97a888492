/* What one core of this machine can do at most: sums of products by instruction, and bytes read from memory.
 *
 * Compiled when it is needed, for the processor at hand (cpu_ceilings.py). Each function runs a loop that nothing but
 * the unit in question limits, and returns how many products of elements (or bytes) it did; 0: no such instruction.
 * The empty asm statements make the compiler believe that an operand changes, so that the loop stays a loop.
 */
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CHAINS 12 /* independent sums: latency times the issue width of any of these */
#define EACH for (int i = 0; i < CHAINS; i++)

double float32_products(int64_t rounds) {
#if defined(__AVX512F__)
    __m512 a = _mm512_set1_ps(1e-3f), s[CHAINS];
    EACH s[i] = _mm512_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(a));
        EACH s[i] = _mm512_fmadd_ps(a, a, s[i]);
    }
    EACH __asm__ volatile("" ::"v"(s[i]));
    return (double)rounds * CHAINS * 16;
#elif defined(__FMA__)
    __m256 a = _mm256_set1_ps(1e-3f), s[CHAINS];
    EACH s[i] = _mm256_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+x"(a));
        EACH s[i] = _mm256_fmadd_ps(a, a, s[i]);
    }
    EACH __asm__ volatile("" ::"x"(s[i]));
    return (double)rounds * CHAINS * 8;
#else
    (void)rounds;
    return 0;
#endif
}

double bf16_products(int64_t rounds) {
#if defined(__AVX512BF16__)
    __m512 a = _mm512_set1_ps(1e-3f), s[CHAINS];
    EACH s[i] = _mm512_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(a));
        EACH s[i] = _mm512_dpbf16_ps(s[i], (__m512bh)a, (__m512bh)a);
    }
    EACH __asm__ volatile("" ::"v"(s[i]));
    return (double)rounds * CHAINS * 32;
#else
    (void)rounds;
    return 0;
#endif
}

double int8_products(int64_t rounds) {
#if defined(__AVX512VNNI__)
    __m512i a = _mm512_set1_epi8(1), s[CHAINS];
    EACH s[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(a));
        EACH s[i] = _mm512_dpbusd_epi32(s[i], a, a);
    }
    EACH __asm__ volatile("" ::"v"(s[i]));
    return (double)rounds * CHAINS * 64;
#elif defined(__AVX2__)
    __m256i a = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1), s[CHAINS];
    EACH s[i] = _mm256_set1_epi32(i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+x"(a));
        EACH s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), one));
    }
    EACH __asm__ volatile("" ::"x"(s[i]));
    return (double)rounds * CHAINS * 32;
#else
    (void)rounds;
    return 0;
#endif
}

double one_bit_products(int64_t rounds) {
#if defined(__AVX512VPOPCNTDQ__)
    __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(3), s[CHAINS];
    EACH s[i] = _mm512_set1_epi64(i);
    for (int64_t r = 0; r < rounds; r++)
        EACH {
            __asm__ volatile("" : "+v"(a));
            s[i] = _mm512_add_epi64(s[i], _mm512_popcnt_epi64(_mm512_xor_si512(a, b)));
        }
    EACH __asm__ volatile("" ::"v"(s[i]));
    return (double)rounds * CHAINS * 512;
#else
    (void)rounds;
    return 0;
#endif
}

typedef uint64_t words8 __attribute__((vector_size(64), aligned(8), may_alias));

double read_bytes(const uint64_t *data, int64_t words, int64_t rounds) {
    words8 s[8] = {{0}};
    for (int64_t r = 0; r < rounds; r++) {
        for (int64_t w = 0; w + 64 <= words; w += 64)
            for (int i = 0; i < 8; i++) s[i] += *(const words8 *)(data + w + 8 * i);
        __asm__ volatile("" ::: "memory");
    }
    for (int i = 0; i < 8; i++) __asm__ volatile("" ::"m"(s[i]));
    return (double)rounds * (double)(words / 64 * 64) * 8;
}
