/* SPDX-License-Identifier: MIT */
/* What the benchmark's programs share. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include <err.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

/* CLOCK_MONOTONIC in nanoseconds: the same clock in every namespace, and Python's time.monotonic_ns(). */
static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline unsigned long number(const char *text, unsigned long most)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (!*text || *end || value > most)
		errx(2, "%s is not a number from 0 to %lu", text, most);
	return value;
}

#endif
