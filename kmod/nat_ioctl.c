// SPDX-License-Identifier: GPL-2.0
/* The NAT helper's calls: what programs pass is checked here, and nowhere else. */
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <net/ipv6.h>

#include "nat_internal.h"
#include "trace.h"

#define FLAGS_KNOWN (SOCKMI_NAT_HOLD | SOCKMI_NAT_MUTE | SOCKMI_NAT_REDIRECT | SOCKMI_NAT_TRANSLATE | \
		     SOCKMI_NAT_UNTRACKED)
/* A record needs at least its flags; more than a page can only be a mistake. */
#define FLOW_BYTES_MIN offsetofend(struct sockmi_ioc_nat_flow, hold_ms)
#define FLOW_BYTES_MAX 4096
/* Flows that a flush removes while it holds the lock. */
#define FLUSH_BATCH 256

static bool is_mapped(const struct sockmi_dev_endpoint *end)
{
	static const u8 prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

	return !memcmp(end->address, prefix, sizeof(prefix));
}

static bool is_none(const struct sockmi_dev_endpoint *end)
{
	return !memchr_inv(end, 0, sizeof(*end));
}

static void take_end(const struct sockmi_dev_endpoint *end, u32 family, __be32 *address, __be16 *port)
{
	memset(address, 0, sizeof(struct in6_addr));
	if (family == AF_INET)
		memcpy(address, end->address + 12, sizeof(*address));
	else
		memcpy(address, end->address, sizeof(struct in6_addr));
	*port = htons(end->port);
}

static void give_end(struct sockmi_dev_endpoint *end, u32 family, const __be32 *address, __be16 port)
{
	memset(end, 0, sizeof(*end));
	if ((u16)family == AF_INET)
		ipv6_addr_set_v4mapped(address[0], (struct in6_addr *)end->address);
	else
		memcpy(end->address, address, sizeof(end->address));
	end->port = ntohs(port);
}

/* Can packets be sent to it by a router, and from it? */
static bool is_unicast(u32 family, const __be32 *address)
{
	if (family == AF_INET)
		return address[0] && !ipv4_is_multicast(*address) && !ipv4_is_lbcast(*address) &&
		       !ipv4_is_loopback(*address) && !ipv4_is_zeronet(*address);
	return (ipv6_addr_type((const struct in6_addr *)address) &
		(IPV6_ADDR_UNICAST | IPV6_ADDR_LINKLOCAL | IPV6_ADDR_LOOPBACK)) == IPV6_ADDR_UNICAST;
}

/* The tuple of a record; a listener's port has no remote end. */
static int read_key(const struct sockmi_ioc_nat_flow *record, struct sockmi_nat_key *key)
{
	const struct sockmi_dev_endpoint *local = &record->local, *remote = &record->remote;

	if (local->reserved || remote->reserved || !local->port)
		return -EINVAL;
	memset(key, 0, sizeof(*key));
	key->kind = is_mapped(local) ? AF_INET : AF_INET6;
	take_end(local, key->kind, key->local, &key->local_port);
	if (is_none(remote))
		return 0;
	if (!remote->port)
		return -EINVAL;
	if (is_mapped(remote) != (key->kind == AF_INET))
		return -EAFNOSUPPORT;
	take_end(remote, key->kind, key->remote, &key->remote_port);
	return 0;
}

/* A new flow as the record says, in no table yet; an error pointer if it says nonsense. */
static struct sockmi_nat_flow *read_flow(const struct sockmi_ioc_nat_flow *record)
{
	u32 flags = record->flags, rewrites = flags & SOCKMI_NAT_REWRITES;
	const struct sockmi_dev_endpoint *to = &record->to;
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	__be32 address[4];
	__be16 port;
	int error;

	error = read_key(record, &key);
	if (error)
		return ERR_PTR(error);
	if (!flags || flags & ~FLAGS_KNOWN || rewrites == SOCKMI_NAT_REWRITES)
		return ERR_PTR(-EINVAL);
	if (record->hold_ms && !(flags & SOCKMI_NAT_HOLD))
		return ERR_PTR(-EINVAL);
	if (!key.remote_port && flags != SOCKMI_NAT_HOLD)
		return ERR_PTR(-EINVAL);
	if (!rewrites) {
		if (!is_none(to))
			return ERR_PTR(-EINVAL);
	} else {
		if (to->reserved || !to->port)
			return ERR_PTR(-EINVAL);
		if (is_mapped(to) != (key.kind == AF_INET))
			return ERR_PTR(-EAFNOSUPPORT);
		take_end(to, key.kind, address, &port);
		if (!memcmp(address, key.local, sizeof(address)) && port == key.local_port)
			return ERR_PTR(-EINVAL);
		if (!is_unicast(key.kind, address) || !is_unicast(key.kind, key.remote))
			return ERR_PTR(-EADDRNOTAVAIL);
	}
	flow = sockmi_nat_flow_new(&key, flags);
	if (!flow)
		return ERR_PTR(-ENOMEM);
	if (rewrites) {
		memcpy(flow->wire.local, address, sizeof(flow->wire.local));
		flow->wire.local_port = port;
	}
	memcpy(flow->tag, record->tag, sizeof(flow->tag));
	return flow;
}

/* Under the lock. */
static void write_record(const struct sockmi_nat_flow *flow, struct sockmi_ioc_nat_flow *record)
{
	const struct sockmi_nat_key *key = &flow->tuple;
	const struct sockmi_nat_count *count = flow->count;

	memset(record, 0, sizeof(*record));
	give_end(&record->local, key->kind, key->local, key->local_port);
	if (key->remote_port)
		give_end(&record->remote, key->kind, key->remote, key->remote_port);
	if (flow->flags & SOCKMI_NAT_REWRITES)
		give_end(&record->to, key->kind, flow->wire.local, flow->wire.local_port);
	record->flags = flow->flags;
	if (!RB_EMPTY_NODE(&flow->lapse.node))
		record->hold_ms = clamp_t(s64, ktime_ms_delta(flow->lapse.expires, ktime_get()), 1, U32_MAX);
	memcpy(record->tag, flow->tag, sizeof(record->tag));
	record->id = flow->id;
	record->packets = atomic64_read(&count->packets);
	record->bytes = atomic64_read(&count->bytes);
	record->held = atomic64_read(&count->held);
	record->muted = atomic64_read(&count->muted);
	record->errors = atomic64_read(&count->errors);
	record->seen = atomic_read(&count->seen);
	record->kept = READ_ONCE(count->kept.packets.qlen);
	record->idle_s = (u32)ktime_get_seconds() - READ_ONCE(count->last_s);
}

static int check_array(u32 count, u32 flow_bytes)
{
	if (count > SOCKMI_NAT_BATCH_MAX || flow_bytes < FLOW_BYTES_MIN || flow_bytes > FLOW_BYTES_MAX)
		return -EINVAL;
	return 0;
}

static int breathe(void)
{
	cond_resched();
	return fatal_signal_pending(current) ? -EINTR : 0;
}

static int change_one(struct sockmi_nat_net *nat, const struct sockmi_ioc_nat_flow *record, u32 action)
{
	struct sockmi_nat_flow *old, *flow = read_flow(record);
	int error;

	if (IS_ERR(flow))
		return PTR_ERR(flow);
	mutex_lock(&nat->lock);
	old = sockmi_nat_find(nat, &flow->tuple);
	if (old)
		error = action == SOCKMI_NAT_ADD ? -EEXIST : sockmi_nat_replace(nat, old, flow, record->hold_ms);
	else
		error = action == SOCKMI_NAT_REPLACE ? -ENOENT : sockmi_nat_add(nat, flow, record->hold_ms);
	mutex_unlock(&nat->lock);
	if (error)
		sockmi_nat_flow_free(flow);
	return error;
}

static int remove_one(struct sockmi_nat_net *nat, const struct sockmi_ioc_nat_flow *record)
{
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	int error = read_key(record, &key);

	if (error)
		return error;
	mutex_lock(&nat->lock);
	flow = sockmi_nat_find(nat, &key);
	if (flow)
		sockmi_nat_remove(nat, flow);
	mutex_unlock(&nat->lock);
	return flow ? 0 : -ENOENT;
}

static long nat_change(struct sockmi_nat_net *nat, struct sockmi_ioc_nat_change *call)
{
	struct sockmi_ioc_nat_flow record;
	void __user *at = u64_to_user_ptr(call->flows);
	int error = check_array(call->count, call->flow_bytes);

	call->done = 0;
	if (!error && (call->action < SOCKMI_NAT_ADD || call->action > SOCKMI_NAT_REMOVE))
		error = -EINVAL;
	for (; !error && call->done < call->count; at += call->flow_bytes) {
		error = breathe();
		if (!error)
			error = sockmi_arg_in(&record, sizeof(record), at, call->flow_bytes);
		if (!error)
			error = call->action == SOCKMI_NAT_REMOVE ? remove_one(nat, &record) :
				change_one(nat, &record, call->action);
		if (!error)
			call->done++;
	}
	return error;
}

static long nat_read(struct sockmi_nat_net *nat, struct sockmi_ioc_nat_read *call)
{
	struct sockmi_ioc_nat_flow record;
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	void __user *at = u64_to_user_ptr(call->flows);
	int error = check_array(call->count, call->flow_bytes);

	call->done = 0;
	for (; !error && call->done < call->count; at += call->flow_bytes) {
		error = breathe();
		if (!error)
			error = sockmi_arg_in(&record, sizeof(record), at, call->flow_bytes);
		if (!error)
			error = read_key(&record, &key);
		if (error)
			break;
		mutex_lock(&nat->lock);
		flow = sockmi_nat_find(nat, &key);
		if (flow)
			write_record(flow, &record);
		mutex_unlock(&nat->lock);
		error = flow ? sockmi_arg_out(at, call->flow_bytes, &record, sizeof(record)) : -ENOENT;
		if (!error)
			call->done++;
	}
	call->total = READ_ONCE(nat->flows);
	return error;
}

static long nat_list(struct sockmi_nat_net *nat, struct sockmi_ioc_nat_read *call)
{
	struct sockmi_ioc_nat_flow record;
	struct sockmi_nat_flow *flow;
	void __user *at = u64_to_user_ptr(call->flows);
	int error = check_array(call->count, call->flow_bytes);
	u32 room = call->count;

	call->count = 0;
	for (; !error && call->count < room; at += call->flow_bytes) {
		error = breathe();
		if (error)
			break;
		mutex_lock(&nat->lock);
		flow = sockmi_nat_after(nat, call->after);
		if (flow)
			write_record(flow, &record);
		mutex_unlock(&nat->lock);
		if (!flow)
			break;
		error = sockmi_arg_out(at, call->flow_bytes, &record, sizeof(record));
		if (!error) {
			call->count++;
			call->after = record.id;
		}
	}
	call->total = READ_ONCE(nat->flows);
	return error;
}

static long nat_flush(struct sockmi_nat_net *nat, struct sockmi_ioc_nat_flush *call)
{
	struct sockmi_nat_flow *flow;
	unsigned int looked = 0;
	u64 after = 0;
	int error = 0;

	call->removed = 0;
	if (call->flags & ~FLAGS_KNOWN)
		return -EINVAL;
	mutex_lock(&nat->lock);
	while ((flow = sockmi_nat_after(nat, after))) {
		after = flow->id;
		if (!call->flags || flow->flags & call->flags) {
			sockmi_nat_remove(nat, flow);
			call->removed++;
		}
		if (++looked % FLUSH_BATCH)
			continue;
		mutex_unlock(&nat->lock);
		error = breathe();
		mutex_lock(&nat->lock);
		if (error)
			break;
	}
	mutex_unlock(&nat->lock);
	return error;
}

int sockmi_nat_forget(struct sockmi_net *sn, u32 *removed)
{
	struct sockmi_ioc_nat_flush all = {};
	long error = nat_flush(sn->nat, &all);

	*removed += all.removed;
	return error;
}

long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size)
{
	union {
		struct sockmi_ioc_nat_change change;
		struct sockmi_ioc_nat_read read;
		struct sockmi_ioc_nat_flush flush;
	} call;
	struct sockmi_nat_net *nat = sockmi_net(file->net)->nat;
	size_t known;
	long error;
	int copied;

	switch (nr) {
	case _IOC_NR(SOCKMI_IOC_NAT_CHANGE):
		known = sizeof(call.change);
		break;
	case _IOC_NR(SOCKMI_IOC_NAT_READ):
	case _IOC_NR(SOCKMI_IOC_NAT_LIST):
		known = sizeof(call.read);
		break;
	case _IOC_NR(SOCKMI_IOC_NAT_FLUSH):
		known = sizeof(call.flush);
		break;
	default:
		return -ENOTTY;
	}
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	error = sockmi_arg_in(&call, known, arg, size);
	if (error)
		return error;
	switch (nr) {
	case _IOC_NR(SOCKMI_IOC_NAT_CHANGE):
		error = nat_change(nat, &call.change);
		trace_sockmi_nat_change(NULL, call.change.action, call.change.done, error, 0);
		break;
	case _IOC_NR(SOCKMI_IOC_NAT_READ):
		error = nat_read(nat, &call.read);
		break;
	case _IOC_NR(SOCKMI_IOC_NAT_LIST):
		error = nat_list(nat, &call.read);
		break;
	case _IOC_NR(SOCKMI_IOC_NAT_FLUSH):
		error = nat_flush(nat, &call.flush);
		trace_sockmi_nat_flush(NULL, call.flush.flags, call.flush.removed, error, 0);
		break;
	}
	copied = sockmi_arg_out(arg, size, &call, known);
	return error ? error : copied;
}
