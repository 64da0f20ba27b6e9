// SPDX-License-Identifier: GPL-2.0
/* What a write to the sysctl sockmi.export says. */
#include "../sysctl.c"
#include "cases.h"

struct line {
	const char *name;
	const char *text;
	bool good;
	int pid;
	int fd;
	u8 to[16];
};

static const struct line lines[] = {
	{ "process and descriptor", "pid=510 fd=5", true, 510, 5 },
	{ "the other way round", "fd=5 pid=510", true, 510, 5 },
	{ "descriptor 0", "pid=1 fd=0", true, 1, 0 },
	{ "a newline at the end", "pid=510 fd=5\n", true, 510, 5 },
	{ "tabs and more than one space", "\tpid=510  \t fd=5 ", true, 510, 5 },
	{ "to an IPv4 address", "pid=510 fd=5 to=192.0.2.7", true, 510, 5, { [10] = 0xff, 0xff, 192, 0, 2, 7 } },
	{ "to an IPv6 address", "to=2001:db8::7 pid=510 fd=5", true, 510, 5, { 0x20, 0x01, 0x0d, 0xb8, [15] = 7 } },
	{ "the largest numbers", "pid=2147483647 fd=2147483647", true, S32_MAX, S32_MAX },
	{ "nothing", "" },
	{ "blanks", " \t\n" },
	{ "no descriptor", "pid=510" },
	{ "no process", "fd=5" },
	{ "process 0", "pid=0 fd=5" },
	{ "a negative process", "pid=-510 fd=5" },
	{ "a negative descriptor", "pid=510 fd=-1" },
	{ "a number that is too large", "pid=2147483648 fd=5" },
	{ "a number that wraps", "pid=4294967806 fd=5" },
	{ "hexadecimal", "pid=0x1fe fd=5" },
	{ "no number", "pid= fd=5" },
	{ "letters behind a number", "pid=510x fd=5" },
	{ "the process twice", "pid=510 pid=511 fd=5" },
	{ "the descriptor twice", "pid=510 fd=5 fd=5" },
	{ "the target twice", "pid=510 fd=5 to=192.0.2.7 to=192.0.2.8" },
	{ "an address of three bytes", "pid=510 fd=5 to=192.0.2" },
	{ "an address and a port", "pid=510 fd=5 to=192.0.2.7:80" },
	{ "a byte that is too large", "pid=510 fd=5 to=192.0.2.256" },
	{ "a name", "pid=510 fd=5 to=b" },
	{ "no address", "pid=510 fd=5 to=" },
	{ "another word", "pid=510 fd=5 now" },
	{ "a word that begins like one", "pid=510 fd=5 fdx=1" },
	{ "capitals", "PID=510 fd=5" },
	{ "a comma", "pid=510,fd=5" },
};
SOCKMI_CASES(lines);

static void parses_a_line(struct kunit *test)
{
	const struct line *line = test->param_value;
	struct command command;
	char text[COMMAND_MAX];
	bool good;

	strscpy(text, line->text, sizeof(text));
	good = parse(text, &command);
	KUNIT_EXPECT_EQ(test, good, line->good);
	if (!line->good)
		return;
	KUNIT_EXPECT_EQ(test, command.pid, line->pid);
	KUNIT_EXPECT_EQ(test, command.fd, line->fd);
	KUNIT_EXPECT_EQ(test, memcmp(command.to.address, line->to, sizeof(line->to)), 0);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(parses_a_line, lines_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_sysctl",
	.test_cases = cases,
};
kunit_test_suite(suite);
