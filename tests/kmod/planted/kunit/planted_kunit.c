// SPDX-License-Identifier: GPL-2.0
/* A KUnit test that fails in one of its cases: tests/kmod/test_kunit.py must notice. */
#include <linux/module.h>
#include <kunit/test.h>

static const int numbers[] = { 1, 2, 3 };
KUNIT_ARRAY_PARAM(numbers, numbers, NULL);

static void is_odd_or_planted(struct kunit *test)
{
	const int *number = test->param_value;

	KUNIT_EXPECT_TRUE(test, *number & 1);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(is_odd_or_planted, numbers_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "planted",
	.test_cases = cases,
};
kunit_test_suite(suite);

MODULE_DESCRIPTION("A KUnit test that fails");
MODULE_LICENSE("GPL");
