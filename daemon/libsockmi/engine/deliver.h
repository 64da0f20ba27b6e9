/* SPDX-License-Identifier: MIT */
/* Packets that a hold had kept away from this host, given to its own kernel after all. */
#ifndef SOCKMI_ENGINE_DELIVER_H
#define SOCKMI_ENGINE_DELIVER_H

#include <stddef.h>
#include <stdint.h>

#include "image.h"

/* A whole IP packet with a TCP segment, as netfilter has logged it; @length in bytes. */
struct sockmi_packet {
	uint8_t *data;
	size_t length;
	struct sockmi_endpoint local; /* the end on this host that shall get it */
	int32_t socket;		      /* a descriptor of it, if there is one, else -1 */
	int32_t reserved;
};

/*
 * Send @n packets to this host itself, with SO_MARK @mark, their destination rewritten to
 * `local` and their TCP checksum made anew (logged packets may have none yet: checksum offload).
 * A socket that is bound to a device gets them as from that: the route to it names the device.
 * The packets are changed. What is no TCP over IPv4 or plain IPv6 is skipped.
 * Returns how many were sent.
 */
SOCKMI_EXPORT int sockmi_deliver(struct sockmi_packet *packets, size_t n, uint32_t mark);

#endif
