/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The NAT helper, as the rest of the module sees it. What it does for programs stands in uapi/sockmi.h.
 *
 * Locks: sockmi_nat_net.lock is a mutex and innermost but for memory allocation: it may be taken with a socket's lock
 * owned, and of the module's only nat_kept.c's shares_lock and a queue's own lock are taken under it.
 */
#ifndef SOCKMI_NAT_H
#define SOCKMI_NAT_H

#include <linux/types.h>

struct net;
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
void sockmi_nat_net_pre_exit(struct sockmi_net *sn);
void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn);
int sockmi_nat_forget(struct sockmi_net *sn, u32 *removed);
long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size);

#endif
