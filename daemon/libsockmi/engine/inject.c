// SPDX-License-Identifier: MIT
/*
 * One TCP segment (RFC 9293 section 3.1) delivered to a copy on this host as if its peer had sent it:
 * the only way to tell a socket in repair that the peer has closed, or has acknowledged a FIN.
 * It has no options: without a timestamp it cannot spoil ts_recent (RFC 7323 section 4.3).
 */
#include <unistd.h>

#include "engine_internal.h"

struct segment {
	uint8_t ip[40]; /* the last 20 bytes are used for IPv4 */
	uint8_t tcp[20];
};

static void put16(uint8_t *p, uint32_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static void put32(uint8_t *p, uint32_t value)
{
	put16(p, value >> 16);
	put16(p + 2, value);
}

/* Internet checksum (RFC 1071), not folded. */
static uint32_t sum16(uint32_t sum, const uint8_t *p, size_t length)
{
	for (size_t i = 0; i < length; i += 2)
		sum += (uint32_t)p[i] << 8 | p[i + 1];
	return sum;
}

static uint32_t fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum & 0xffff;
}

static void fill_tcp(uint8_t *tcp, const struct sockmi_endpoint *from, const struct sockmi_endpoint *to,
		     uint32_t seq, uint32_t ack, uint16_t window, bool fin)
{
	size_t skip = sockmi_endpoint_is_mapped(to) ? 12 : 0;
	uint32_t sum = IPPROTO_TCP + 20;

	put16(tcp, from->port);
	put16(tcp + 2, to->port);
	put32(tcp + 4, seq);
	put32(tcp + 8, ack);
	tcp[12] = 5 << 4;
	tcp[13] = (uint8_t)(0x10 | (fin ? 0x01 : 0));
	put16(tcp + 14, window);
	sum = sum16(sum, from->address + skip, 16 - skip);
	sum = sum16(sum, to->address + skip, 16 - skip);
	put16(tcp + 16, fold(sum16(sum, tcp, 20)));
}

int sockmi_inject(const struct sockmi_endpoint *from, const struct sockmi_endpoint *to, uint32_t seq,
		  uint32_t ack, uint16_t window, bool fin, uint32_t mark)
{
	int family = sockmi_endpoint_is_mapped(to) ? AF_INET : AF_INET6;
	struct segment segment = { 0 };
	union sockmi_sockaddr address;
	socklen_t address_length;
	const uint8_t *start = segment.ip;
	size_t length = sizeof(segment);
	ssize_t sent;
	int fd = socket(family, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);

	if (fd < 0)
		return -1;
	fill_tcp(segment.tcp, from, to, seq, ack, window, fin);
	if (family == AF_INET) {
		uint8_t *ip = segment.ip + 20; /* the kernel fills in length, id and checksum */

		start += 20;
		length -= 20;
		ip[0] = 0x45;
		put16(ip + 2, 40);
		ip[8] = 255;
		ip[9] = IPPROTO_TCP;
		memcpy(ip + 12, from->address + 12, 4);
		memcpy(ip + 16, to->address + 12, 4);
	} else {
		segment.ip[0] = 0x60;
		put16(segment.ip + 4, 20);
		segment.ip[6] = IPPROTO_TCP;
		segment.ip[7] = 255;
		memcpy(segment.ip + 8, from->address, 16);
		memcpy(segment.ip + 24, to->address, 16);
	}
	address_length = sockmi_endpoint_to_sockaddr(to, family, &address);
	if (family == AF_INET)
		address.v4.sin_port = 0;
	else
		address.v6.sin6_port = 0; /* of a raw socket: the protocol */
	sent = sockmi_set_int(fd, SOL_SOCKET, SO_MARK, (int)mark) < 0 ?
		       -1 :
		       sendto(fd, start, length, 0, &address.any, address_length);
	if (sent < 0) {
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	close(fd);
	return 0;
}
