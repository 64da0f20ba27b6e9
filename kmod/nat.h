/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The NAT helper, as the rest of the module sees it. What it does for programs stands in uapi/sockmi.h.
 *
 * Locks: sockmi_nat_net.lock is a mutex and innermost but for memory allocation: it may be taken with a socket's lock
 * owned, and nothing of the module's is taken under it.
 */
#ifndef SOCKMI_NAT_H
#define SOCKMI_NAT_H

#include <linux/types.h>

struct net;
struct sock;
struct sockmi_file;
struct sockmi_net;

/**
 * struct sockmi_nat_key - which connection; what both tables are hashed by, so it has no holes
 * @local: this host's end; IPv4 addresses stand in the first word, the others are zero
 * @remote: the peer's end
 * @local_port: network order
 * @remote_port: network order; 0 with a zero @remote: not a connection but a listener's port
 * @kind: AF_INET or AF_INET6; in the table of replaced addresses also the rewriting flag
 */
struct sockmi_nat_key {
	__be32 local[4];
	__be32 remote[4];
	__be16 local_port;
	__be16 remote_port;
	u32 kind;
};

int sockmi_nat_init(void);
void sockmi_nat_exit(void);
int sockmi_nat_net_init(struct net *net, struct sockmi_net *sn);
void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn);
long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size);

/*
 * The key of a connected socket (or of a listener's port), v4-mapped ones as the IPv4 that they speak. The caller
 * sees to it that the addresses do not change meanwhile, by the socket's lock or because it is connected.
 */
void sockmi_nat_key_of(const struct sock *sk, struct sockmi_nat_key *key);

/*
 * Makes the namespace's tables and hooks if there has been no flow yet, which may take milliseconds: for CLAIM, so that
 * nothing of it is left for the freeze. 0 or -errno.
 */
int sockmi_nat_prepare(struct sockmi_net *sn);

/*
 * Nothing of @key's connection in or out any more, until further notice: HOLD and MUTE. For COMMIT, before the
 * original is closed. A flow that is held or redirected already is only muted, since its owner has planned ahead.
 * Process context, may sleep, also with the socket's lock owned. 0, or -ENOMEM, -ENOSPC (too many flows), and then
 * nothing has changed.
 */
int sockmi_nat_hold(struct sockmi_net *sn, const struct sockmi_nat_key *key);

/* The inverse, for a commit that was not completed: HOLD and MUTE are gone, and a flow that was nothing else. */
void sockmi_nat_unhold(struct sockmi_net *sn, const struct sockmi_nat_key *key);

#endif
