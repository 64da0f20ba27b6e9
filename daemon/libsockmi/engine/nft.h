/* SPDX-License-Identifier: MIT */
/*
 * Elements of nftables sets and maps, many in one transaction, over one netlink
 * socket that stays open: the per-connection path of every redirect.
 */
#ifndef SOCKMI_NFT_H
#define SOCKMI_NFT_H

#include <stddef.h>
#include <stdint.h>

#define SOCKMI_NFT_NAME_MAX	32	/* bytes of a name, with its NUL */
#define SOCKMI_NFT_KEY_MAX	40	/* ipv6_addr . inet_service . ipv6_addr . inet_service */
#define SOCKMI_NFT_DATA_MAX	16	/* ipv6_addr */

/* A set or map; each field of a concatenated key is padded to 4 bytes. */
struct sockmi_nft_set {
	uint8_t family;			/* NFPROTO_INET, NFPROTO_NETDEV, ... */
	uint8_t key_bytes;
	uint8_t data_bytes;		/* 0: a set */
	uint8_t reserved;
	char table[SOCKMI_NFT_NAME_MAX];
	char name[SOCKMI_NFT_NAME_MAX];
};

enum sockmi_nft_verb {
	SOCKMI_NFT_ADD,			/* a present element with the same data is no error */
	SOCKMI_NFT_REMOVE,		/* an absent element is no error */
};

struct sockmi_nft_op {
	uint8_t verb;
	uint8_t set;			/* index into the sets of the call */
	uint8_t reserved[2];
	uint32_t timeout_ms;		/* ADD: 0 is no timeout */
	uint8_t key[SOCKMI_NFT_KEY_MAX];
	uint8_t data[SOCKMI_NFT_DATA_MAX];
};

struct sockmi_nft;

/* Flags of sockmi_nft_open(). */
#define SOCKMI_NFT_NO_DESTROY	1u	/* do without NFT_MSG_DESTROYSETELEM (Linux < 6.3) */

/*
 * Open a socket in the caller's network namespace.
 * NULL with errno set: EPERM without CAP_NET_ADMIN, ENOMEM, or socket(2)'s.
 */
struct sockmi_nft *sockmi_nft_open(unsigned int flags);
void sockmi_nft_close(struct sockmi_nft *nft);

/* 1 if the kernel removes absent elements without an error by itself (Linux >= 6.3). */
int sockmi_nft_has_destroy(const struct sockmi_nft *nft);

/*
 * Apply ops in order, all or none, in one transaction. Runs of the same verb and set
 * are cheapest. To replace an element's data or timeout: REMOVE, then ADD.
 *
 * Returns 0, or -errno (ENOENT: no such table or set; EBUSY or EEXIST: ADD of a present key
 * with other data; EPERM; EINVAL: a bad op; EMSGSIZE: batch too large); then *failed, if
 * not NULL, is the index of an op of the first message that failed, or n_ops
 * if the transaction as a whole did.
 */
int sockmi_nft_batch(struct sockmi_nft *nft, const struct sockmi_nft_set *sets, size_t n_sets,
		     const struct sockmi_nft_op *ops, size_t n_ops, size_t *failed);

#endif
