// SPDX-License-Identifier: GPL-2.0
/* What is left of a timer: microseconds in an image, jiffies in the kernel. */
#include "../restore_timers.c"
#include "cases.h"

#define JIFFY_US (USEC_PER_SEC / HZ)

struct timer {
	const char *name;
	u64 us;
	u64 most;
	unsigned long jiffies;
};

static const struct timer timers[] = {
	{ "due", 1, TCP_RTO_MAX, 1 },
	{ "never 0, which would not be armed", 0, TCP_RTO_MAX, 1 },
	{ "a jiffy", JIFFY_US, TCP_RTO_MAX, 1 },
	{ "not quite two", 2 * JIFFY_US - 1, TCP_RTO_MAX, 1 },
	{ "two", 2 * JIFFY_US, TCP_RTO_MAX, 2 },
	{ "a second", USEC_PER_SEC, TCP_RTO_MAX, HZ },
	{ "the most", 120ULL * USEC_PER_SEC, TCP_RTO_MAX, TCP_RTO_MAX },
	{ "more than the most", 121ULL * USEC_PER_SEC, TCP_RTO_MAX, TCP_RTO_MAX },
	{ "an image may say anything", U64_MAX, TCP_RTO_MAX, TCP_RTO_MAX },
	{ "keepalive's most", U64_MAX, KEEPALIVE_MOST, (unsigned long)MAX_TCP_KEEPIDLE * HZ },
};
SOCKMI_CASES(timers);

static void makes_jiffies(struct kunit *test)
{
	const struct timer *timer = test->param_value;

	KUNIT_EXPECT_EQ(test, in_jiffies(timer->us, timer->most), timer->jiffies);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(makes_jiffies, timers_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_restore_timers",
	.test_cases = cases,
};
kunit_test_suite(suite);
