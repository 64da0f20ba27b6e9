/* SPDX-License-Identifier: MIT */
/* The bare programs' elements in the forward redirect's tables, which the daemons have made. */
#ifndef BENCH_FORWARD_H
#define BENCH_FORWARD_H

#include <err.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "engine.h"
#include "nft.h"

#define NFPROTO_INET 1
#define NFPROTO_NETDEV 5
#define KEY_BYTES 16
#define FORWARD_OPS_MAX 1024

enum set { HOLD, FLOW, NEXT, SETS };

struct batch {
	struct sockmi_nft_op ops[FORWARD_OPS_MAX];
	size_t n;
};

static struct sockmi_nft_set sets[SETS];
static uint32_t mark_moved, mark_local, mark_inject;

static void add(struct batch *batch, enum sockmi_nft_verb verb, enum set set, const uint8_t *key,
		const void *data, size_t bytes, uint32_t timeout_ms)
{
	struct sockmi_nft_op *op;

	if (batch->n == FORWARD_OPS_MAX)
		errx(1, "too many operations in a batch");
	op = &batch->ops[batch->n++];
	*op = (struct sockmi_nft_op){ .verb = (uint8_t)verb, .set = (uint8_t)set, .timeout_ms = timeout_ms };
	memcpy(op->key, key, KEY_BYTES);
	if (bytes)
		memcpy(op->data, data, bytes);
}

static void removing(struct batch *batch, enum set set, const uint8_t *key)
{
	add(batch, SOCKMI_NFT_REMOVE, set, key, NULL, 0, 0);
}

static inline void putting(struct batch *batch, enum set set, const uint8_t *key, const void *data, size_t bytes,
		    uint32_t timeout_ms)
{
	removing(batch, set, key);
	add(batch, SOCKMI_NFT_ADD, set, key, data, bytes, timeout_ms);
}

static void commit(struct sockmi_nft *nft, const struct batch *batch)
{
	int result = sockmi_nft_batch(nft, sets, SETS, batch->ops, batch->n, NULL);

	if (result)
		errx(1, "nftables: %s", strerror(-result));
}

static void must(int failed, const struct sockmi_result *result, const char *what)
{
	if (failed)
		errx(1, "%s: code %d at %s: %s", what, result->code, sockmi_step_name((unsigned int)result->step),
		     strerror(result->error));
}

/* The key of an IPv4 connection: the peer's address and port, ours, each port padded to four bytes. */
static void make_key(uint8_t *key, const struct sockaddr_in *peer, const struct sockaddr_in *local)
{
	memset(key, 0, KEY_BYTES);
	memcpy(key, &peer->sin_addr, 4);
	memcpy(key + 4, &peer->sin_port, 2);
	memcpy(key + 8, &local->sin_addr, 4);
	memcpy(key + 12, &local->sin_port, 2);
}

static void make_sets(const char *table)
{
	static const struct { const char *name; uint8_t family, data_bytes; } plan[SETS] = {
		[HOLD] = { "hold4", NFPROTO_INET, 0 },
		[FLOW] = { "flow4", NFPROTO_INET, 4 },
		[NEXT] = { "next4", NFPROTO_NETDEV, 4 },
	};

	for (int i = 0; i < SETS; i++) {
		sets[i].family = plan[i].family;
		sets[i].key_bytes = KEY_BYTES;
		sets[i].data_bytes = plan[i].data_bytes;
		snprintf(sets[i].table, sizeof(sets[i].table), "%s", table);
		snprintf(sets[i].name, sizeof(sets[i].name), "%s", plan[i].name);
	}
}

#endif
