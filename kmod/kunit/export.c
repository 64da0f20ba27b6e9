// SPDX-License-Identifier: GPL-2.0
/* Which exports can be decided about. */
#include "../export.c"
#include "cases.h"

#define EPOCH 3

struct decision {
	const char *name;
	unsigned int state;
	bool timed_out;
	u32 epoch;
	int result;
};

static const struct decision decisions[] = {
	{ "forgotten", 0, false, EPOCH, -ENOENT },
	{ "frozen", SOCKMI_EXPORT_FROZEN, false, EPOCH, 0 },
	{ "frozen again after its deadline", SOCKMI_EXPORT_FROZEN, true, EPOCH, 0 },
	{ "frozen, an earlier image", SOCKMI_EXPORT_FROZEN, false, EPOCH - 1, -ESTALE },
	{ "frozen, an image that is to come", SOCKMI_EXPORT_FROZEN, false, EPOCH + 1, -ESTALE },
	{ "thawed by its deadline", SOCKMI_EXPORT_THAWED, true, EPOCH, -ETIMEDOUT },
	{ "thawed by its deadline, an earlier image", SOCKMI_EXPORT_THAWED, true, EPOCH - 1, -ESTALE },
	{ "thawed by ABORT", SOCKMI_EXPORT_THAWED, false, EPOCH, -EBUSY },
	{ "claimed", SOCKMI_EXPORT_CLAIMED, false, EPOCH, -EBUSY },
	{ "being committed", SOCKMI_EXPORT_COMMITTING, false, EPOCH, -EBUSY },
	{ "committed", SOCKMI_EXPORT_COMMITTED, false, EPOCH, -EBUSY },
	{ "being thawed", SOCKMI_EXPORT_THAWING, false, EPOCH, -EBUSY },
};
SOCKMI_CASES(decisions);

static void decides_once(struct kunit *test)
{
	const struct decision *decision = test->param_value;
	struct sockmi_export *export = kunit_kzalloc(test, sizeof(*export), GFP_KERNEL);

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, export);
	export->state = decision->state;
	export->timed_out = decision->timed_out;
	export->epoch = EPOCH;
	KUNIT_EXPECT_EQ(test, decidable(export, decision->epoch), decision->result);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(decides_once, decisions_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_export",
	.test_cases = cases,
};
kunit_test_suite(suite);
