// SPDX-License-Identifier: GPL-2.0
/* Which of two packets that wait says all that the other does: sequence numbers modulo 2^32. */
#include "../nat_kept.c"
#include "cases.h"

struct two {
	const char *name;
	struct kept last;
	struct kept next;
	bool supersedes;
};

#define ACK(s, a) { .bare = true, .seq = (s), .ack_seq = (a) }
#define DATA(s, a) { .seq = (s), .ack_seq = (a) }

static const struct two pairs[] = {
	{ "acknowledges more", ACK(100, 500), ACK(100, 501), true },
	{ "a repeated one means something", ACK(100, 500), ACK(100, 500), false },
	{ "acknowledges less", ACK(100, 500), ACK(100, 499), false },
	{ "data is no bare ACK", ACK(100, 500), DATA(100, 600), false },
	{ "data before it stays", DATA(100, 500), ACK(100, 600), false },
	{ "a later sequence number", ACK(100, 500), ACK(200, 600), true },
	{ "an earlier one came late", ACK(100, 500), ACK(99, 600), false },
	{ "over the wrap", ACK(100, 0xffffffff), ACK(100, 0), true },
	{ "the wrap the other way", ACK(100, 0), ACK(100, 0xffffffff), false },
	{ "half the numbers ahead", ACK(100, 1), ACK(100, 0x80000000), true },
	{ "more than half is behind", ACK(100, 0), ACK(100, 0x80000001), false },
	{ "its own number over the wrap", ACK(0xffffffff, 500), ACK(0, 600), true },
	{ "its own number back over the wrap", ACK(0, 500), ACK(0xffffffff, 600), false },
};
SOCKMI_CASES(pairs);

static void supersedes_in_order(struct kunit *test)
{
	const struct two *two = test->param_value;

	KUNIT_EXPECT_EQ(test, supersedes(&two->next, &two->last), two->supersedes);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(supersedes_in_order, pairs_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_nat_kept",
	.test_cases = cases,
};
kunit_test_suite(suite);
