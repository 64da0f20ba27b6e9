// SPDX-License-Identifier: MIT
/*
 * One nftables transaction for many set elements (see nft.h).
 *
 * Wire format: BATCH_BEGIN, {NEW,DEL,DESTROY}SETELEM messages, BATCH_END
 * (linux/netfilter/nfnetlink.h, nf_tables.h). The kernel works through a batch inside
 * sendmsg(2), so every answer waits in the receive queue when sendmsg returns.
 *
 * Linux before 6.3 has no DESTROYSETELEM. There each removal is a message of its own; the
 * kernel goes through the whole batch before it gives up and reports each failed
 * message, so the removals that met ENOENT are left out and the batch is sent again.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>

#include "nft.h"

#define EXPORT __attribute__((visibility("default")))

/* Not in the headers of Linux < 6.3. */
#define MSG_DESTROYSETELEM 30

/* A nested attribute's length is 16 bits; keep well below. */
#define LIST_BYTES_MAX 60000u
#define ATTR_BYTES sizeof(struct nlattr)
#define BATCH_BYTES_MAX (256u << 20)
#define RECEIVE_BYTES (1 << 20)
#define TRIES_MAX 16

struct sockmi_nft {
	int fd;
	bool destroy;
	uint32_t seq;
	size_t send_bytes;	/* what SO_SNDBUF allows in one message */
	uint8_t *buffer;
	size_t size, used;
	size_t *first_op;	/* of each message of the batch, by seq - base - 1 */
	size_t n_messages, messages_size;
	bool oom;
};

static void *grow(struct sockmi_nft *nft, size_t bytes)
{
	size_t size = nft->size ? nft->size : 65536;
	uint8_t *buffer;
	void *at;

	while (size < nft->used + bytes)
		size *= 2;
	if (size != nft->size) {
		buffer = size > BATCH_BYTES_MAX ? NULL : realloc(nft->buffer, size);
		if (!buffer) {
			nft->oom = true;
			return NULL;
		}
		nft->buffer = buffer;
		nft->size = size;
	}
	at = nft->buffer + nft->used;
	memset(at, 0, bytes);
	nft->used += bytes;
	return at;
}

/* Start a message; returns its offset, since the buffer may move. */
static size_t message(struct sockmi_nft *nft, uint16_t type, uint16_t flags, uint8_t family,
		      uint16_t resource)
{
	size_t at = nft->used;
	struct nlmsghdr *header = grow(nft, NLMSG_HDRLEN + sizeof(struct nfgenmsg));
	struct nfgenmsg *generic;

	if (!header)
		return at;
	header->nlmsg_type = type;
	header->nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags);
	header->nlmsg_seq = nft->seq++;
	generic = NLMSG_DATA(header);
	generic->nfgen_family = family;
	generic->version = NFNETLINK_V0;
	generic->res_id = htons(resource);
	return at;
}

static void message_end(struct sockmi_nft *nft, size_t at)
{
	if (!nft->oom)
		((struct nlmsghdr *)(void *)(nft->buffer + at))->nlmsg_len = (uint32_t)(nft->used - at);
}

static size_t nest(struct sockmi_nft *nft, uint16_t type)
{
	size_t at = nft->used;
	struct nlattr *attr = grow(nft, ATTR_BYTES);

	if (attr)
		attr->nla_type = type | NLA_F_NESTED;
	return at;
}

static void nest_end(struct sockmi_nft *nft, size_t at)
{
	if (!nft->oom)
		((struct nlattr *)(void *)(nft->buffer + at))->nla_len = (uint16_t)(nft->used - at);
}

static void put(struct sockmi_nft *nft, uint16_t type, const void *data, size_t bytes)
{
	struct nlattr *attr = grow(nft, ATTR_BYTES + ((bytes + 3) & ~(size_t)3));

	if (!attr)
		return;
	attr->nla_type = type;
	attr->nla_len = (uint16_t)(ATTR_BYTES + bytes);
	memcpy(attr + 1, data, bytes);
}

static void put_value(struct sockmi_nft *nft, uint16_t type, const void *data, size_t bytes)
{
	size_t at = nest(nft, type);

	put(nft, NFTA_DATA_VALUE, data, bytes);
	nest_end(nft, at);
}

static void put_element(struct sockmi_nft *nft, const struct sockmi_nft_set *set,
			const struct sockmi_nft_op *op)
{
	size_t at = nest(nft, NFTA_LIST_ELEM);

	put_value(nft, NFTA_SET_ELEM_KEY, op->key, set->key_bytes);
	if (op->verb == SOCKMI_NFT_ADD) {
		if (set->data_bytes)
			put_value(nft, NFTA_SET_ELEM_DATA, op->data, set->data_bytes);
		if (op->timeout_ms) {
			uint64_t ms = op->timeout_ms;
			uint32_t wire[2] = { htonl((uint32_t)(ms >> 32)), htonl((uint32_t)ms) };

			put(nft, NFTA_SET_ELEM_TIMEOUT, wire, sizeof(wire));
		}
	}
	nest_end(nft, at);
}

static uint16_t element_type(const struct sockmi_nft *nft, uint8_t verb)
{
	uint16_t type = verb == SOCKMI_NFT_ADD ? NFT_MSG_NEWSETELEM :
			nft->destroy ? MSG_DESTROYSETELEM : NFT_MSG_DELSETELEM;

	return (uint16_t)(NFNL_SUBSYS_NFTABLES << 8 | type);
}

static bool remember_message(struct sockmi_nft *nft, size_t op)
{
	if (nft->n_messages == nft->messages_size) {
		size_t size = nft->messages_size ? nft->messages_size * 2 : 64;
		size_t *first = realloc(nft->first_op, size * sizeof(*first));

		if (!first)
			return false;
		nft->first_op = first;
		nft->messages_size = size;
	}
	nft->first_op[nft->n_messages++] = op;
	return true;
}

/* Write the batch without the ops that are skipped; returns the seq of BATCH_BEGIN. */
static uint32_t write_batch(struct sockmi_nft *nft, const struct sockmi_nft_set *sets,
			    const struct sockmi_nft_op *ops, size_t n_ops, const bool *skip)
{
	uint32_t base = nft->seq;
	size_t at, list, i = 0, last = 0;

	nft->used = 0;
	nft->n_messages = 0;
	nft->oom = false;
	at = message(nft, NFNL_MSG_BATCH_BEGIN, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES);
	message_end(nft, at);
	while (i < n_ops && !nft->oom) {
		const struct sockmi_nft_op *head = &ops[i];
		const struct sockmi_nft_set *set = &sets[head->set];
		bool alone = head->verb == SOCKMI_NFT_REMOVE && !nft->destroy;

		if (skip && skip[i]) {
			i++;
			continue;
		}
		if (!remember_message(nft, i)) {
			nft->oom = true;
			break;
		}
		last = at = message(nft, element_type(nft, head->verb),
				    head->verb == SOCKMI_NFT_ADD ? NLM_F_CREATE : 0, set->family, 0);
		put(nft, NFTA_SET_ELEM_LIST_TABLE, set->table, strlen(set->table) + 1);
		put(nft, NFTA_SET_ELEM_LIST_SET, set->name, strlen(set->name) + 1);
		list = nest(nft, NFTA_SET_ELEM_LIST_ELEMENTS);
		do {
			put_element(nft, set, &ops[i++]);
		} while (!nft->oom && !alone && i < n_ops && ops[i].verb == head->verb &&
			 ops[i].set == head->set && !(skip && skip[i]) &&
			 nft->used - list < LIST_BYTES_MAX);
		nest_end(nft, list);
		message_end(nft, at);
	}
	if (last && !nft->oom)
		((struct nlmsghdr *)(void *)(nft->buffer + last))->nlmsg_flags |= NLM_F_ACK;
	at = message(nft, NFNL_MSG_BATCH_END, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES);
	message_end(nft, at);
	return base;
}

static int send_batch(struct sockmi_nft *nft)
{
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
	ssize_t sent;

	if (nft->used > nft->send_bytes) {
		/* the kernel doubles what it is told and wants some bytes for itself */
		int bytes = (int)nft->used;

		if (setsockopt(nft->fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)))
			setsockopt(nft->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
		nft->send_bytes = nft->used;
	}
	do {
		sent = sendto(nft->fd, nft->buffer, nft->used, 0, (struct sockaddr *)&kernel, sizeof(kernel));
	} while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : 0;
}

/*
 * Read all answers. Returns 0 if the batch was committed, else -errno of the first failure that
 * is not an absent element; or -ENOENT if there are only such, which are
 * then marked in skip.
 */
static int read_answers(struct sockmi_nft *nft, uint32_t base, const struct sockmi_nft_op *ops,
			size_t n_ops, bool *skip, size_t *failed)
{
	uint8_t answer[16384] __attribute__((aligned(NLMSG_ALIGNTO)));
	bool acknowledged = false, absent = false;
	int result = 0;

	*failed = n_ops;
	for (;;) {
		ssize_t got = recv(nft->fd, answer, sizeof(answer), MSG_DONTWAIT);
		struct nlmsghdr *header = (void *)answer;
		size_t left;

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == ENOBUFS) {	/* answers were lost: the outcome is not known */
			result = result ? result : -ENOBUFS;
			continue;
		}
		if (got < 0)
			break;
		left = (size_t)got;
		for (; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
			uint32_t message = header->nlmsg_seq - base;
			int error;

			if (header->nlmsg_type != NLMSG_ERROR ||
			    header->nlmsg_len < NLMSG_LENGTH(sizeof(struct nlmsgerr)))
				continue;
			if (message > nft->n_messages)
				continue;	/* of an earlier batch */
			error = ((struct nlmsgerr *)NLMSG_DATA(header))->error;
			if (!error) {
				acknowledged = true;
			} else if (error == -ENOENT && skip && message &&
				   ops[nft->first_op[message - 1]].verb == SOCKMI_NFT_REMOVE) {
				skip[nft->first_op[message - 1]] = true;
				absent = true;
				if (*failed == n_ops)
					*failed = nft->first_op[message - 1];
			} else if (!result) {
				result = error;
				*failed = message ? nft->first_op[message - 1] : n_ops;
			}
		}
	}
	if (result)
		return result;
	if (absent)
		return -ENOENT;
	return acknowledged ? 0 : -EIO;
}

EXPORT int sockmi_nft_batch(struct sockmi_nft *nft, const struct sockmi_nft_set *sets, size_t n_sets,
			    const struct sockmi_nft_op *ops, size_t n_ops, size_t *failed)
{
	bool *skip = NULL;
	size_t i, first = n_ops;
	int result = 0, tries = 0;

	for (i = 0; i < n_ops; i++) {
		if (ops[i].verb > SOCKMI_NFT_REMOVE || ops[i].set >= n_sets ||
		    !sets[ops[i].set].key_bytes || sets[ops[i].set].key_bytes > SOCKMI_NFT_KEY_MAX ||
		    sets[ops[i].set].data_bytes > SOCKMI_NFT_DATA_MAX ||
		    !memchr(sets[ops[i].set].table, 0, SOCKMI_NFT_NAME_MAX) ||
		    !memchr(sets[ops[i].set].name, 0, SOCKMI_NFT_NAME_MAX)) {
			first = i;
			result = -EINVAL;
			goto out;
		}
	}
	if (!nft->destroy && n_ops) {
		skip = calloc(n_ops, sizeof(*skip));
		if (!skip)
			return -ENOMEM;
	}
	while (n_ops) {
		uint32_t base = write_batch(nft, sets, ops, n_ops, skip);

		first = n_ops;
		if (nft->oom) {
			result = nft->size * 2 > BATCH_BYTES_MAX ? -EMSGSIZE : -ENOMEM;
			break;
		}
		if (!nft->n_messages) {		/* nothing but removals of what is not there */
			result = 0;
			break;
		}
		result = send_batch(nft);
		if (result)
			break;
		result = read_answers(nft, base, ops, n_ops, skip, &first);
		/* an element may expire between two tries, so there can be more than two */
		if (result != -ENOENT || !skip || !skip[first < n_ops ? first : 0] || ++tries == TRIES_MAX)
			break;
	}
out:
	free(skip);
	if (failed)
		*failed = first;
	return result;
}

/* Old kernels answer EINVAL to a message they do not know; new ones ENOENT to a table they do not. */
static bool probe_destroy(struct sockmi_nft *nft)
{
	const struct sockmi_nft_set nowhere = {
		.family = NFPROTO_INET, .key_bytes = 4, .table = "sockmi\x01none", .name = "none",
	};
	const struct sockmi_nft_op op = { .verb = SOCKMI_NFT_REMOVE };

	nft->destroy = true;
	return sockmi_nft_batch(nft, &nowhere, 1, &op, 1, NULL) == -ENOENT;
}

EXPORT struct sockmi_nft *sockmi_nft_open(unsigned int flags)
{
	struct sockmi_nft *nft = calloc(1, sizeof(*nft));
	const int on = 1, bytes = RECEIVE_BYTES;

	if (!nft)
		return NULL;
	nft->fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
	if (nft->fd < 0) {
		free(nft);
		return NULL;
	}
	nft->seq = 1;
	nft->send_bytes = 65536;
	setsockopt(nft->fd, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof(on));
	if (setsockopt(nft->fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes)))
		setsockopt(nft->fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
	nft->destroy = !(flags & SOCKMI_NFT_NO_DESTROY) && probe_destroy(nft);
	return nft;
}

EXPORT void sockmi_nft_close(struct sockmi_nft *nft)
{
	if (!nft)
		return;
	close(nft->fd);
	free(nft->buffer);
	free(nft->first_op);
	free(nft);
}

EXPORT int sockmi_nft_has_destroy(const struct sockmi_nft *nft)
{
	return nft->destroy;
}
