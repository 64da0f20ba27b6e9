/* SPDX-License-Identifier: MIT */
/*
 * The kernel engine's hot path: many sockets a call, over /dev/sockmi. The results are as in engine.h. Whether a
 * connection is frozen by its lock, and what that means for its owner, is in kmod/uapi/sockmi.h.
 */
#ifndef SOCKMI_DEVICE_H
#define SOCKMI_DEVICE_H

#include "engine.h"

/* An open device file, and its only export slot. */
struct sockmi_device {
	int32_t fd;
	uint32_t abi;		   /* of the module: major << 16 | minor; 0: it was not asked */
	uint32_t image;		   /* likewise */
	uint32_t features;	   /* SOCKMI_FEATURE_* */
	uint32_t freeze_max_ms;	   /* longest freeze that may be asked for */
	uint32_t dormant_max_ms;   /* how long a copy can wait for sockmi_device_activate() */
	uint64_t slot_bytes;	   /* largest image that can be captured */
	uint64_t slot_bytes_most;  /* what slot_bytes may be at most */
	const void *slot;
};

/* A socket that is frozen. id 0: it is not. */
struct sockmi_frozen {
	uint64_t id;
	uint32_t epoch;
	uint32_t reserved;
};

/* Open, ask for the versions, make the slot: 0, or -errno (EPROTONOSUPPORT: abi and image are not what we know). */
SOCKMI_EXPORT int sockmi_device_open(struct sockmi_device *device, uint64_t slot_bytes);
/* What is frozen goes on, what is dormant is no more. */
SOCKMI_EXPORT void sockmi_device_close(struct sockmi_device *device);

/* What the module has against moving each socket, as of now. */
SOCKMI_EXPORT int sockmi_device_check(const struct sockmi_device *device, const int *fds, size_t n,
				      struct sockmi_result *results);

/*
 * As sockmi_capture(). Those with @keep[i], but for listeners, stay frozen, as @frozen[i] says: until they are
 * committed or thawed, or @deadline_ms have passed. The others go on at once.
 */
SOCKMI_EXPORT int sockmi_device_capture(const struct sockmi_device *device, const int *fds, const uint8_t *keep,
					size_t n, uint32_t deadline_ms, void *buffer, size_t capacity,
					struct sockmi_frozen *frozen, struct sockmi_result *results);

/*
 * As sockmi_release(). What is still frozen equals its image; what is not is frozen again and compared. Those that
 * are closed are frozen no more, so @frozen[i].id is 0 then. With @owned: only if another descriptor than @fds[i] is
 * left (SOCKMI_RESULT_NO_SOCKET); a module that does not know is not asked. @devices[i]: where it was frozen.
 */
SOCKMI_EXPORT int sockmi_device_commit(const struct sockmi_device *const *devices, const int *fds,
				       struct sockmi_frozen *frozen, const void *const *images, const size_t *lengths,
				       size_t n, int owned, struct sockmi_result *results);

/*
 * As sockmi_release_together(): if the first cannot be closed none is, and what is begun ends though this process is
 * killed, which the device files outlive for so long.
 */
SOCKMI_EXPORT int sockmi_device_commit_together(const struct sockmi_device *const *devices, const int *fds,
						struct sockmi_frozen *frozen, const void *const *images,
						const size_t *lengths, size_t n, struct sockmi_result *results);

/* The inverse of a capture that keeps. */
SOCKMI_EXPORT void sockmi_device_thaw(const struct sockmi_device *device, struct sockmi_frozen *frozen, size_t n);

/* As sockmi_restore(): @ids[i] names the dormant copy @out_fds[i], on which nothing can be called that takes its lock. */
SOCKMI_EXPORT int sockmi_device_restore(const struct sockmi_device *device, const void *const *images,
					const size_t *lengths, const struct sockmi_placement *placements, size_t n,
					int *out_fds, uint64_t *ids, struct sockmi_result *results);

/*
 * Make copies anew, in the same sockets, whose time is nearly over, or was: a hold must keep their peers' packets
 * until then. One that fails is closed.
 */
SOCKMI_EXPORT int sockmi_device_renew(const struct sockmi_device *device, const int *fds, uint64_t *ids,
				      const void *const *images, const size_t *lengths,
				      const struct sockmi_placement *placements, size_t n,
				      struct sockmi_result *results);

/* As sockmi_activate(). */
SOCKMI_EXPORT int sockmi_device_activate(const struct sockmi_device *device, const uint64_t *ids, size_t n,
					 struct sockmi_result *results);

/*
 * Put a connection into the accept queue of whoever listens for it here, if that is root's or @uid's; or, with
 * @only_ask, look whether that could be done now. @ifindex: the interface to the peer, 0 if there is none; who
 * listens at another is not asked. After a failure nothing is left of it.
 */
SOCKMI_EXPORT int sockmi_device_deliver(const struct sockmi_device *device, const void *image, size_t length,
					const struct sockmi_placement *placement, uint32_t ifindex,
					uint32_t uid, int only_ask, struct sockmi_result *result);

/* Close dormant copies without a packet, for all who have them; @fds too. */
SOCKMI_EXPORT void sockmi_device_discard(const struct sockmi_device *device, const int *fds, const uint64_t *ids,
					 size_t n);

#endif
