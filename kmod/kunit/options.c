// SPDX-License-Identifier: GPL-2.0
/* Timeouts of sockets: microseconds in an image, jiffies in the kernel. */
#include "../options.c"
#include "cases.h"

#define JIFFY_US (USEC_PER_SEC / HZ)

struct timeout {
	const char *name;
	s64 us;
	long jiffies;
};

static const struct timeout timeouts[] = {
	{ "none", 0, MAX_SCHEDULE_TIMEOUT },
	{ "nonsense is none", -1, MAX_SCHEDULE_TIMEOUT },
	{ "the most negative", S64_MIN, MAX_SCHEDULE_TIMEOUT },
	{ "less than a jiffy is one", 1, 1 },
	{ "a jiffy", JIFFY_US, 1 },
	{ "a bit more is two", JIFFY_US + 1, 2 },
	{ "a second", USEC_PER_SEC, HZ },
	{ "an hour", 3600LL * USEC_PER_SEC, 3600L * HZ },
};
SOCKMI_CASES(timeouts);

static void makes_jiffies(struct kunit *test)
{
	const struct timeout *timeout = test->param_value;

	KUNIT_EXPECT_EQ(test, timeout_jiffies(timeout->us), timeout->jiffies);
}

/* Whatever an image says, it is a timeout that schedule_timeout() takes, and that moves on as it is. */
static void takes_the_largest(struct kunit *test)
{
	long jiffies_left = timeout_jiffies(S64_MAX);

	KUNIT_EXPECT_GT(test, jiffies_left, 0L);
	KUNIT_EXPECT_EQ(test, timeout_jiffies(timeout_us(jiffies_left)), jiffies_left);
}

/* An application may ask for more than an image can say. */
static void keeps_the_longest(struct kunit *test)
{
	KUNIT_EXPECT_EQ(test, timeout_us(MAX_SCHEDULE_TIMEOUT), 0);
	KUNIT_EXPECT_EQ(test, timeout_us(MAX_SCHEDULE_TIMEOUT - 1), S64_MAX);
	KUNIT_EXPECT_EQ(test, timeout_us(S64_MAX / JIFFY_US + 1), S64_MAX);
	KUNIT_EXPECT_EQ(test, timeout_us(S64_MAX / JIFFY_US), S64_MAX / JIFFY_US * JIFFY_US);
}

static void moves_on_as_it_is(struct kunit *test)
{
	static const long lengths[] = { 1, 2, HZ - 1, HZ, HZ + 1, 86400L * HZ, MAX_SCHEDULE_TIMEOUT };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(lengths); i++)
		KUNIT_EXPECT_EQ(test, timeout_jiffies(timeout_us(lengths[i])), lengths[i]);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(makes_jiffies, timeouts_gen_params),
	KUNIT_CASE(takes_the_largest),
	KUNIT_CASE(keeps_the_longest),
	KUNIT_CASE(moves_on_as_it_is),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_options",
	.test_cases = cases,
};
kunit_test_suite(suite);
