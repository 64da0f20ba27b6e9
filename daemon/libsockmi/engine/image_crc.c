// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * CRC-32 of zlib, gzip and Ethernet (reflected polynomial 0xEDB88320): table-driven, eight bytes at a
 * time; on x86-64 by carry-less multiplication (V. Gopal et al., Fast CRC Computation for
 * Generic Polynomials Using PCLMULQDQ, Intel 2009) where the processor has it.
 */
#include "image_internal.h"

#define POLYNOMIAL 0xEDB88320u

/* The product of two residues modulo the polynomial; bit 31 is x^0. */
static uint32_t multiply(uint32_t a, uint32_t b)
{
	uint32_t product = 0;

	for (; a; a <<= 1) {
		if (a & 0x80000000u)
			product ^= b;
		b = b & 1 ? b >> 1 ^ POLYNOMIAL : b >> 1;
	}
	return product;
}

uint32_t sockmi_crc32_shift(uint32_t crc, uint64_t zeros)
{
	uint32_t power = 0x00800000u; /* x^8: one byte */

	for (; zeros; zeros >>= 1) {
		if (zeros & 1)
			crc = multiply(power, crc);
		power = multiply(power, power);
	}
	return crc;
}

#ifdef __KERNEL__
#include <linux/crc32.h>

uint32_t sockmi_crc32(uint32_t crc, const void *bytes, size_t length)
{
	return ~crc32_le(~crc, bytes, length);
}
#else

static uint32_t table[8][256];
static bool have_clmul;

__attribute__((constructor)) static void fill_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
		table[0][i] = crc;
	}
	for (uint32_t i = 0; i < 256; i++)
		for (int k = 1; k < 8; k++)
			table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 0xff];
#ifdef __x86_64__
	__builtin_cpu_init();
	have_clmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#endif
}

static uint32_t update(uint32_t crc, const uint8_t *p, size_t length)
{
	for (; length >= 8; length -= 8, p += 8) {
		uint32_t low = crc ^ sockmi_get32(p), high = sockmi_get32(p + 4);

		crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^
		      table[4][low >> 24] ^ table[3][high & 0xff] ^ table[2][high >> 8 & 0xff] ^
		      table[1][high >> 16 & 0xff] ^ table[0][high >> 24];
	}
	while (length--)
		crc = crc >> 8 ^ table[0][(crc ^ *p++) & 0xff];
	return crc;
}

#ifdef __x86_64__
#include <immintrin.h>

#define CLMUL __attribute__((target("pclmul,sse4.1")))

/* x multiplied by x^n for the n that the two constants stand for, plus the next 16 bytes. */
CLMUL static inline __m128i fold(__m128i x, __m128i constants, __m128i next)
{
	__m128i low = _mm_clmulepi64_si128(x, constants, 0x00);
	__m128i high = _mm_clmulepi64_si128(x, constants, 0x11);

	return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

CLMUL static inline __m128i load(const uint8_t *p)
{
	return _mm_loadu_si128((const __m128i *)(const void *)p);
}

/* @length is at least 64 and a multiple of 16. */
CLMUL static uint32_t update_clmul(uint32_t crc, const uint8_t *p, size_t length)
{
	/* x^(512+32), x^(512-32); x^(128+32), x^(128-32); each modulo the polynomial, reflected, times x. */
	const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
	const __m128i by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
	__m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128((int)crc));
	__m128i b = load(p + 16), c = load(p + 32), d = load(p + 48);
	uint8_t rest[16];

	for (p += 64, length -= 64; length >= 64; p += 64, length -= 64) {
		a = fold(a, by_64, load(p));
		b = fold(b, by_64, load(p + 16));
		c = fold(c, by_64, load(p + 32));
		d = fold(d, by_64, load(p + 48));
	}
	a = fold(a, by_16, b);
	a = fold(a, by_16, c);
	a = fold(a, by_16, d);
	for (; length >= 16; p += 16, length -= 16)
		a = fold(a, by_16, load(p));
	/* These 16 bytes have the same remainder as all that was folded into them. */
	_mm_storeu_si128((__m128i *)(void *)rest, a);
	return update(0, rest, sizeof(rest));
}
#endif

uint32_t sockmi_crc32(uint32_t crc, const void *bytes, size_t length)
{
	const uint8_t *p = bytes;

	crc = ~crc;
#ifdef __x86_64__
	if (have_clmul && length >= 64) {
		size_t whole = length & ~(size_t)15;

		crc = update_clmul(crc, p, whole);
		p += whole;
		length -= whole;
	}
#endif
	return ~update(crc, p, length);
}
#endif
