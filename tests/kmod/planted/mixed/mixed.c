// SPDX-License-Identifier: GPL-2.0-only
/* Mixes byte orders, which no compiler sees, but sparse does. */
#include <linux/module.h>

static __be16 port = 80;
module_param_named(port, port, ushort, 0444);

MODULE_DESCRIPTION("Planted: a port in the wrong byte order");
MODULE_LICENSE("GPL");
