/* SPDX-License-Identifier: GPL-2.0 */
/* What options.c and options_rare.c share. */
#ifndef SOCKMI_OPTIONS_H
#define SOCKMI_OPTIONS_H

#include "internal.h"

/**
 * struct sockmi_plain - an option that setsockopt() takes as an int
 * @id: the image's
 * @level: of setsockopt()
 * @option: of setsockopt(); 0: this kernel does not know it
 * @unit_us: 0: the number as it is; else microseconds in one unit of it
 * @usual: what a fresh socket has, in the image's unit: then the option is not in the image
 */
struct sockmi_plain {
	u16 id;
	u16 level;
	u16 option;
	u32 unit_us;
	s64 usual;
};

/* Does the socket send IPv4 packets, or may it yet? */
bool sockmi_speaks_ipv4(const struct sock *sk);

/* options_rare.c: NULL: the option is not one of these. */
const struct sockmi_plain *sockmi_rare_find(u16 id);
void sockmi_rare_dump(const struct sock *sk, struct sockmi_writer *writer);

#endif
