// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bugs on purpose, one for each value of the parameter "bug": the harness must notice every one of them.
 * With bug=none it loads and unloads like any good module.
 */
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/timer.h>

static char *bug = "none";
module_param(bug, charp, 0444);
MODULE_PARM_DESC(bug, "none, use-after-free, overrun, leak, inversion, atomic-sleep, live-timer, warning or panic");

static DEFINE_SPINLOCK(planted_first);
static DEFINE_SPINLOCK(planted_second);

static void planted_expired(struct timer_list *timer)
{
}

/* The store must survive the optimiser, which knows that the memory is about to go. */
static void planted_store(char *where, char what)
{
	WRITE_ONCE(*where, what);
}

static void planted_use_after_free(void)
{
	char *gone = kmalloc(64, GFP_KERNEL);

	if (!gone)
		return;
	OPTIMIZER_HIDE_VAR(gone);
	kfree(gone);
	planted_store(gone + 8, 1);
}

static void planted_overrun(void)
{
	char *small = kmalloc(60, GFP_KERNEL);

	if (!small)
		return;
	OPTIMIZER_HIDE_VAR(small);
	planted_store(small + 60, 1);
	kfree(small);
}

static noinline void planted_leak(void)
{
	int i;

	for (i = 0; i < 32; i++) {
		char *lost = kmalloc(200, GFP_KERNEL);

		if (lost)
			memset(lost, i, 200);
	}
}

static void planted_inversion(void)
{
	spin_lock(&planted_first);
	spin_lock(&planted_second);
	spin_unlock(&planted_second);
	spin_unlock(&planted_first);

	spin_lock(&planted_second);
	spin_lock(&planted_first);
	spin_unlock(&planted_first);
	spin_unlock(&planted_second);
}

static void planted_atomic_sleep(void)
{
	spin_lock(&planted_first);
	msleep(1);
	spin_unlock(&planted_first);
}

static void planted_live_timer(void)
{
	struct timer_list *timer = kmalloc(sizeof(*timer), GFP_KERNEL);

	if (!timer)
		return;
	timer_setup(timer, planted_expired, 0);
	mod_timer(timer, jiffies + 100 * HZ);
	kfree(timer);
}

static int __init planted_init(void)
{
	if (!strcmp(bug, "use-after-free"))
		planted_use_after_free();
	else if (!strcmp(bug, "overrun"))
		planted_overrun();
	else if (!strcmp(bug, "leak"))
		planted_leak();
	else if (!strcmp(bug, "inversion"))
		planted_inversion();
	else if (!strcmp(bug, "atomic-sleep"))
		planted_atomic_sleep();
	else if (!strcmp(bug, "live-timer"))
		planted_live_timer();
	else if (!strcmp(bug, "warning"))
		WARN(1, "planted\n");
	else if (!strcmp(bug, "panic"))
		panic("planted");
	else if (strcmp(bug, "none"))
		return -EINVAL;
	return 0;
}
module_init(planted_init);

static void __exit planted_exit(void)
{
}
module_exit(planted_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Bugs on purpose, for the test harness");
