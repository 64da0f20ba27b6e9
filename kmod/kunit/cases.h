/* SPDX-License-Identifier: GPL-2.0 */
/* Tables of cases for KUnit. A test's file includes the source that it tests, for what is static there. */
#ifndef SOCKMI_KUNIT_CASES_H
#define SOCKMI_KUNIT_CASES_H

#include <kunit/test.h>

/* For KUNIT_CASE_PARAM(test, TABLE_gen_params): each case of @table has a name. */
#define SOCKMI_CASES(table)								\
static void table##_name(const typeof(table[0]) *one, char *description)		\
{											\
	strscpy(description, one->name, KUNIT_PARAM_DESC_SIZE);				\
}											\
KUNIT_ARRAY_PARAM(table, table, table##_name)

#endif
