/* SPDX-License-Identifier: MIT */
/*
 * Which sockets are in a BPF map of sockets? Only the maps know: reading one gives the cookies of
 * its sockets (net/core/sock_map.c sock_map_lookup_sys()).
 */
#include <errno.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "inspect.h"

static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static bool candidate(const struct sockmi_facts *f)
{
	return f->state;	/* zero if it is not a TCP socket at all */
}

static void mark_unknown(struct sockmi_facts *facts, size_t n, int error)
{
	for (size_t i = 0; i < n; i++)
		if (candidate(&facts[i])) {
			facts[i].findings |= SOCKMI_SOCKMAP_UNKNOWN;
			facts[i].error = error;
		}
}

static int by_cookie(const void *a, const void *b)
{
	const struct sockmi_facts *const *x = a, *const *y = b;

	return ((*x)->cookie > (*y)->cookie) - ((*x)->cookie < (*y)->cookie);
}

static int cookie_is(const void *key, const void *element)
{
	const uint64_t *cookie = key;
	const struct sockmi_facts *const *f = element;

	return (*cookie > (*f)->cookie) - (*cookie < (*f)->cookie);
}

/* Mark those of our sockets (@sorted by cookie) that are in one map. Returns 0 or errno. */
static int check_map(int map, const struct bpf_map_info *info, struct sockmi_facts **sorted, size_t n)
{
	union bpf_attr attr = { .map_fd = (uint32_t)map };
	uint64_t cookie;

	if (info->value_size != sizeof(cookie))
		return ENOSPC;	/* such a map cannot be read */
	char *key = calloc(2, info->key_size), *next = key + info->key_size;

	if (!key)
		return ENOMEM;
	attr.next_key = (uintptr_t)next;
	/* A map that changes meanwhile may start over; a full turn is enough. */
	for (uint64_t turn = 0; turn <= info->max_entries && !bpf(BPF_MAP_GET_NEXT_KEY, &attr); turn++) {
		union bpf_attr look = { .map_fd = (uint32_t)map };

		memcpy(key, next, info->key_size);
		attr.key = (uintptr_t)key;
		look.key = (uintptr_t)key;
		look.value = (uintptr_t)&cookie;
		if (bpf(BPF_MAP_LOOKUP_ELEM, &look))
			continue;	/* an empty slot */
		struct sockmi_facts **found = bsearch(&cookie, sorted, n, sizeof(*sorted), cookie_is);

		if (!found)
			continue;
		while (found > sorted && found[-1]->cookie == cookie)
			found--;
		for (; found < sorted + n && (*found)->cookie == cookie; found++)
			(*found)->findings |= SOCKMI_SOCKMAP;
	}
	free(key);
	return 0;
}

void sockmi_sockmap_check(struct sockmi_facts *facts, size_t n)
{
	union bpf_attr id = { 0 };
	struct sockmi_facts **sorted = NULL;
	size_t sockets = 0;

	while (!bpf(BPF_MAP_GET_NEXT_ID, &id)) {
		union bpf_attr open = { .map_id = id.next_id };
		struct bpf_map_info info = { 0 };
		union bpf_attr get = { .info.info_len = sizeof(info), .info.info = (uintptr_t)&info };
		int map = bpf(BPF_MAP_GET_FD_BY_ID, &open);
		int error = 0;

		id.start_id = id.next_id;
		if (map < 0) {
			if (errno == ENOENT)
				continue;	/* removed meanwhile */
			mark_unknown(facts, n, errno);
			break;
		}
		get.info.bpf_fd = (uint32_t)map;
		if (bpf(BPF_OBJ_GET_INFO_BY_FD, &get)) {
			error = errno;
		} else if (info.type == BPF_MAP_TYPE_SOCKMAP || info.type == BPF_MAP_TYPE_SOCKHASH ||
			   info.type == BPF_MAP_TYPE_REUSEPORT_SOCKARRAY) {
			if (!sorted) {
				sorted = calloc(n, sizeof(*sorted));
				for (size_t i = 0; sorted && i < n; i++)
					if (candidate(&facts[i]))
						sorted[sockets++] = &facts[i];
				if (sorted)
					qsort(sorted, sockets, sizeof(*sorted), by_cookie);
			}
			error = sorted ? check_map(map, &info, sorted, sockets) : ENOMEM;
		}
		close(map);
		if (error)
			mark_unknown(facts, n, error);
	}
	/* ENOENT: that was the last one. ENOSYS: no BPF in this kernel. */
	if (errno != ENOENT && errno != ENOSYS)
		mark_unknown(facts, n, errno);
	free(sorted);
}
