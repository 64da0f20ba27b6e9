// SPDX-License-Identifier: MIT
#include <netinet/in.h>
#include <unistd.h>

#include "deliver.h"
#include "engine_internal.h"

static const size_t tcp_header_bytes = 20;

/* Internet checksum (RFC 1071), not folded; @length may be odd. */
static uint64_t sum16(uint64_t sum, const uint8_t *p, size_t length)
{
	for (; length >= 2; p += 2, length -= 2)
		sum += (uint32_t)p[0] << 8 | p[1];
	return length ? sum + ((uint32_t)p[0] << 8) : sum;
}

static uint16_t fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* Where the TCP header starts and how long the segment is; false: not for us. */
static bool find_tcp(const struct sockmi_packet *packet, size_t *start, size_t *length, size_t *addresses,
		     size_t *width)
{
	const uint8_t *ip = packet->data;
	size_t total;

	if (packet->length >= 20 && ip[0] >> 4 == 4) {
		*start = (size_t)(ip[0] & 15) * 4;
		total = (size_t)ip[2] << 8 | ip[3];
		*addresses = 12;
		*width = 4;
		/* A later fragment has no TCP header; a first one alone is of no use. */
		if (ip[9] != IPPROTO_TCP || (ip[6] & 0x3f) || ip[7] || *start < 20)
			return false;
	} else if (packet->length >= 40 && ip[0] >> 4 == 6) {
		*start = 40;
		total = 40 + ((size_t)ip[4] << 8 | ip[5]);
		*addresses = 8;
		*width = 16;
		if (ip[6] != IPPROTO_TCP)
			return false;
	} else {
		return false;
	}
	if (total > packet->length || total < *start + tcp_header_bytes)
		return false;
	*length = total - *start;
	return true;
}

static int raw_socket(int family, uint32_t mark)
{
	int fd = socket(family, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);

	if (fd >= 0 && sockmi_set_int(fd, SOL_SOCKET, SO_MARK, (int)mark) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

/* One for each IP version, bound to the device of whom it has sent to last. */
struct sender {
	int fd;
	int device;
};

static bool bind_to(struct sender *sender, int socket)
{
	int device = 0;

	if (socket >= 0 && sockmi_get_int(socket, SOL_SOCKET, SO_BINDTOIFINDEX, &device) < 0)
		return false;
	if (device != sender->device && sockmi_set_int(sender->fd, SOL_SOCKET, SO_BINDTOIFINDEX, device) < 0)
		return false;
	sender->device = device;
	return true;
}

static bool deliver_one(struct sockmi_packet *packet, struct sender senders[2], uint32_t mark)
{
	size_t start, length, addresses, width;
	union sockmi_sockaddr to;
	socklen_t to_length;
	uint8_t *tcp;
	uint16_t sum;
	struct sender *sender;

	if (!find_tcp(packet, &start, &length, &addresses, &width))
		return false;
	if (sockmi_endpoint_is_mapped(&packet->local) != (width == 4))
		return false;
	sender = &senders[width == 4 ? 0 : 1];
	if (sender->fd < 0)
		sender->fd = raw_socket(width == 4 ? AF_INET : AF_INET6, mark);
	if (sender->fd < 0 || !bind_to(sender, packet->socket))
		return false;
	tcp = packet->data + start;
	memcpy(packet->data + addresses + width, packet->local.address + 16 - width, width);
	tcp[2] = (uint8_t)(packet->local.port >> 8);
	tcp[3] = (uint8_t)packet->local.port;
	tcp[16] = 0;
	tcp[17] = 0;
	sum = fold(sum16(sum16(IPPROTO_TCP + length, packet->data + addresses, 2 * width), tcp, length));
	tcp[16] = (uint8_t)(sum >> 8);
	tcp[17] = (uint8_t)sum;
	to_length = sockmi_endpoint_to_sockaddr(&packet->local, width == 4 ? AF_INET : AF_INET6, &to);
	if (width == 4)
		to.v4.sin_port = 0;
	else
		to.v6.sin6_port = 0; /* of a raw socket: the protocol */
	return sendto(sender->fd, packet->data, start + length, MSG_DONTWAIT, &to.any, to_length) >= 0;
}

int sockmi_deliver(struct sockmi_packet *packets, size_t n, uint32_t mark)
{
	struct sender senders[2] = { { .fd = -1 }, { .fd = -1 } };
	int sent = 0;

	for (size_t i = 0; i < n; i++)
		sent += deliver_one(&packets[i], senders, mark);
	for (size_t i = 0; i < 2; i++)
		if (senders[i].fd >= 0)
			close(senders[i].fd);
	return sent;
}
