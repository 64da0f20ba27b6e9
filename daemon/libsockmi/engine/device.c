// SPDX-License-Identifier: MIT
/* /dev/sockmi, many sockets a call. kmod/uapi/sockmi.h is the specification of all that is asked for here. */
#include <fcntl.h>
#include <strings.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../../kmod/uapi/sockmi.h"
#include "device.h"
#include "engine_internal.h"

#define NEEDED (SOCKMI_FEATURE_EXPORT | SOCKMI_FEATURE_RESTORE)
#define ABI_MINOR_OWNED 5 /* knows SOCKMI_COMMIT_OWNED */

/* ---- The device file ---- */

static int greet(struct sockmi_device *device)
{
	struct sockmi_ioc_hello hello = { .abi_major = SOCKMI_DEV_ABI_MAJOR, .abi_minor = SOCKMI_DEV_ABI_MINOR };
	int error = ioctl(device->fd, SOCKMI_IOC_HELLO, &hello) < 0 ? errno : 0;

	device->abi = (uint32_t)hello.abi_major << 16 | hello.abi_minor;
	device->image = (uint32_t)hello.image_major << 16 | hello.image_minor;
	device->features = hello.features;
	device->freeze_max_ms = hello.freeze_max_ms;
	device->dormant_max_ms = hello.dormant_max_ms;
	device->slot_bytes_most = hello.image_max_bytes < hello.slots_max_bytes ? hello.image_max_bytes :
										  hello.slots_max_bytes;
	if (error)
		return -error;
	return hello.abi_major != SOCKMI_DEV_ABI_MAJOR || hello.image_major != SOCKMI_IMAGE_MAJOR ||
			       (hello.features & NEEDED) != NEEDED ? -EPROTONOSUPPORT : 0;
}

static int make_slot(struct sockmi_device *device, uint64_t bytes)
{
	struct sockmi_ioc_slots slots = { .kind = SOCKMI_SLOT_EXPORT, .count = 1, .bytes = bytes };
	void *slot;

	if (ioctl(device->fd, SOCKMI_IOC_SLOTS, &slots) < 0)
		return -errno;
	slot = mmap(NULL, slots.bytes, PROT_READ, MAP_SHARED, device->fd, (off_t)slots.offset);
	if (slot == MAP_FAILED)
		return -errno;
	device->slot = slot;
	device->slot_bytes = slots.bytes;
	return 0;
}

int sockmi_device_open(struct sockmi_device *device, uint64_t slot_bytes)
{
	int error;

	memset(device, 0, sizeof(*device));
	device->fd = open(SOCKMI_DEV_PATH, O_RDWR | O_CLOEXEC);
	if (device->fd < 0)
		return -errno;
	error = greet(device);
	if (!error)
		error = make_slot(device, slot_bytes < device->slot_bytes_most ? slot_bytes : device->slot_bytes_most);
	if (error) {
		close(device->fd);
		device->fd = -1;
	}
	return error;
}

void sockmi_device_close(struct sockmi_device *device)
{
	if (device->slot)
		munmap((void *)(uintptr_t)device->slot, device->slot_bytes);
	if (device->fd >= 0)
		close(device->fd);
	device->slot = NULL;
	device->fd = -1;
}

/* ---- Refusals ---- */

/* What a refusal of the module is in our words; the others are told by its own number. */
static int code_of(uint32_t refusal, int error)
{
	switch (refusal) {
	case SOCKMI_REFUSAL_NONE:
		return error == EPERM || error == EACCES ? SOCKMI_RESULT_NO_PRIVILEGE : SOCKMI_RESULT_FAILED;
	case SOCKMI_REFUSAL_NO_SOCKET:
		return SOCKMI_RESULT_NO_SOCKET;
	case SOCKMI_REFUSAL_NOT_TCP:
		return SOCKMI_RESULT_NOT_TCP;
	case SOCKMI_REFUSAL_REPAIR:
		return SOCKMI_RESULT_IN_REPAIR;
	case SOCKMI_REFUSAL_STATE:
		return SOCKMI_RESULT_WRONG_STATE;
	case SOCKMI_REFUSAL_URGENT:
		return SOCKMI_RESULT_URGENT_DATA;
	case SOCKMI_REFUSAL_TOO_LARGE:
		return SOCKMI_RESULT_NO_ROOM;
	case SOCKMI_REFUSAL_IMAGE:
		return SOCKMI_RESULT_BAD_IMAGE;
	case SOCKMI_REFUSAL_ADDRESS:
		return SOCKMI_RESULT_NO_ADDRESS;
	case SOCKMI_REFUSAL_PORT_TAKEN:
		return SOCKMI_RESULT_PORT_TAKEN;
	case SOCKMI_REFUSAL_TUPLE_TAKEN:
		return SOCKMI_RESULT_TUPLE_TAKEN;
	case SOCKMI_REFUSAL_TS_UNIT:
		return SOCKMI_RESULT_UNIT;
	default:
		return SOCKMI_RESULT_REFUSED;
	}
}

static int refused(struct sockmi_result *result, int step, uint32_t refusal, uint32_t detail)
{
	int error = errno;
	int code = code_of(refusal, error);

	result->detail = (int32_t)(code == SOCKMI_RESULT_REFUSED ? refusal : detail);
	return sockmi_fail(result, code, step, error);
}

/* ---- Exports ---- */

static int decide(const struct sockmi_device *device, unsigned long request, uint64_t id, uint32_t epoch)
{
	struct sockmi_ioc_decision decision = { .id = id, .epoch = epoch };

	return ioctl(device->fd, request, &decision);
}

static int decide_commit(const struct sockmi_device *device, const struct sockmi_frozen *frozen, int owned)
{
	struct sockmi_ioc_decision decision = { .id = frozen->id, .epoch = frozen->epoch };

	if (owned && (device->abi & 0xffff) >= ABI_MINOR_OWNED)
		decision.flags = SOCKMI_COMMIT_OWNED;
	return ioctl(device->fd, SOCKMI_IOC_COMMIT, &decision);
}

static void let_go(const struct sockmi_device *device, struct sockmi_frozen *frozen)
{
	if (frozen->id)
		decide(device, SOCKMI_IOC_RELEASE, frozen->id, 0);
	frozen->id = 0;
}

static int claim(const struct sockmi_device *device, int fd, struct sockmi_ioc_claim *claim,
		 struct sockmi_result *result)
{
	*claim = (struct sockmi_ioc_claim){ .fd = fd };
	if (ioctl(device->fd, SOCKMI_IOC_CLAIM, claim) == 0)
		return 0;
	return refused(result, SOCKMI_STEP_CLAIM, claim->refusal, claim->state);
}

/* Claim and freeze: the image is in the slot, its length in the result. */
static int freeze(const struct sockmi_device *device, int fd, uint32_t deadline_ms, struct sockmi_ioc_claim *claimed,
		  struct sockmi_frozen *frozen, struct sockmi_result *result)
{
	struct sockmi_ioc_freeze freeze = { .deadline_ms = deadline_ms };

	frozen->id = 0;
	if (claim(device, fd, claimed, result) < 0)
		return -1;
	frozen->id = claimed->id;
	freeze.id = claimed->id;
	if (ioctl(device->fd, SOCKMI_IOC_FREEZE, &freeze) < 0) {
		result->length = freeze.bytes;
		refused(result, SOCKMI_STEP_FREEZE, freeze.refusal, claimed->state);
		let_go(device, frozen);
		return -1;
	}
	frozen->epoch = freeze.epoch;
	result->length = freeze.bytes;
	return 0;
}

/* What there is of it in an image: all that this host or that image cannot do is told on top. */
static uint64_t carried(const struct sockmi_image *i)
{
	static const struct {
		int section;
		uint64_t bit;
	} table[] = {
		{ SOCKMI_WINDOW, SOCKMI_FIDELITY_BIT(WINDOW) },
		{ SOCKMI_NEGOTIATED, SOCKMI_FIDELITY_BIT(NEGOTIATED) },
		{ SOCKMI_TIMESTAMP, SOCKMI_FIDELITY_BIT(TIMESTAMP_CLOCK) },
		{ SOCKMI_RECEIVE_QUEUE, SOCKMI_FIDELITY_BIT(RECEIVE_QUEUE) },
		{ SOCKMI_SENT_QUEUE, SOCKMI_FIDELITY_BIT(SENT_QUEUE) },
		{ SOCKMI_UNSENT_QUEUE, SOCKMI_FIDELITY_BIT(UNSENT_QUEUE) },
		{ SOCKMI_LISTENER, SOCKMI_FIDELITY_BIT(LISTENER) },
		{ SOCKMI_PATH_MODEL, SOCKMI_FIDELITY_BIT(PATH_MODEL) },
		{ SOCKMI_OUT_OF_ORDER, SOCKMI_FIDELITY_BIT(OUT_OF_ORDER) },
		{ SOCKMI_SACK_SCOREBOARD, SOCKMI_FIDELITY_BIT(SACK_SCOREBOARD) },
		{ SOCKMI_ECN, SOCKMI_FIDELITY_BIT(ECN) },
		{ SOCKMI_TIMERS, SOCKMI_FIDELITY_BIT(TIMERS) },
		{ SOCKMI_COUNTERS, SOCKMI_FIDELITY_BIT(COUNTERS) },
		{ SOCKMI_URGENT, SOCKMI_FIDELITY_BIT(URGENT) },
	};
	uint64_t bits = SOCKMI_FIDELITY_BIT(OPTIONS);

	for (size_t k = 0; k < sizeof(table) / sizeof(table[0]); k++)
		if (i->present & SOCKMI_HAS(table[k].section))
			bits |= table[k].bit;
	if (i->timestamp.flags & SOCKMI_TIMESTAMP_HAS_RECENT)
		bits |= SOCKMI_FIDELITY_BIT(TS_RECENT);
	if (i->sequence.flags & SOCKMI_OWN_FIN)
		bits |= SOCKMI_FIDELITY_BIT(OWN_FIN);
	if (i->sequence.flags & SOCKMI_PEER_FIN)
		bits |= SOCKMI_FIDELITY_BIT(PEER_FIN);
	return bits;
}

/* The option that a name of the module's report, "option:ip_options", stands for; 0: none. */
static uint16_t option_of(const struct sockmi_view *name)
{
	static const char prefix[] = "option:";
	const size_t skip = sizeof(prefix) - 1;

	if (name->length <= skip || memcmp(name->data, prefix, skip) != 0)
		return 0;
	for (unsigned int id = 1; id < SOCKMI_OPTION_ID_END; id++) {
		const char *known = sockmi_option_name(id);

		if (known && strlen(known) == name->length - skip &&
		    strncasecmp(known, (const char *)name->data + skip, name->length - skip) == 0)
			return (uint16_t)id;
	}
	return 0;
}

/* What the module says in the image's own report, as bits; names that we do not know stay there. */
static void read_fidelity(const struct sockmi_image *image, struct sockmi_result *result)
{
	struct sockmi_view rest = image->fidelity, name;
	enum sockmi_fidelity_class what;

	result->carried = carried(image);
	while (sockmi_fidelity_next(&rest, &what, &name)) {
		uint16_t option = option_of(&name);

		if (option)
			sockmi_lost_option(result, option);
		for (unsigned int bit = 0; bit < SOCKMI_FIDELITY_END; bit++) {
			const char *known = sockmi_fidelity_name(bit);

			if (!known || strlen(known) != name.length || memcmp(known, name.data, name.length))
				continue;
			if (what == SOCKMI_APPROXIMATED)
				result->approximated |= (uint64_t)1 << bit;
			else if (what == SOCKMI_RESET)
				result->reset |= (uint64_t)1 << bit;
		}
	}
}

int sockmi_device_check(const struct sockmi_device *device, const int *fds, size_t n, struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_ioc_claim claimed;

		if (claim(device, fds[i], &claimed, &results[i]) < 0)
			count++;
		else
			decide(device, SOCKMI_IOC_RELEASE, claimed.id, 0);
	}
	return count;
}

int sockmi_device_capture(const struct sockmi_device *device, const int *fds, const uint8_t *keep, size_t n,
			  uint32_t deadline_ms, void *buffer, size_t capacity, struct sockmi_frozen *frozen,
			  struct sockmi_result *results)
{
	size_t used = 0;
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_ioc_claim claimed;
		struct sockmi_image image;

		if (freeze(device, fds[i], deadline_ms, &claimed, &frozen[i], &results[i]) < 0) {
			count++;
			continue;
		}
		if (results[i].length > capacity - used) {
			sockmi_fail(&results[i], SOCKMI_RESULT_NO_ROOM, SOCKMI_STEP_ENCODE, 0);
		} else {
			memcpy((char *)buffer + used, device->slot, results[i].length);
			results[i].offset = used;
			if (sockmi_decode_own((char *)buffer + used, results[i].length, &image, &results[i]) == 0) {
				read_fidelity(&image, &results[i]);
				used += (results[i].length + 7) & ~(size_t)7;
				used = used < capacity ? used : capacity;
			}
		}
		if (results[i].code)
			count++;
		/* A listener's lock keeps no connection out, but its queue from being taken. */
		if (results[i].code || !keep[i] || claimed.kind == SOCKMI_KIND_LISTENING)
			let_go(device, &frozen[i]);
	}
	return count;
}

static int changed(struct sockmi_result *result, int step)
{
	return sockmi_fail(result, SOCKMI_RESULT_CHANGED, step, 0);
}

static int length_of_queue(int fd, uint32_t *length)
{
	struct tcp_info info = { 0 };
	socklen_t bytes = sizeof(info);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) < 0) /* of a listener without its lock */
		return -1;
	*length = info.tcpi_unacked;
	return 0;
}

/* It has gone on since its image was made: is it still the same? */
static int compare(const struct sockmi_device *device, int fd, const struct sockmi_image *image, size_t length,
		   struct sockmi_result *result)
{
	struct sockmi_image now;
	uint32_t waiting;

	if (sockmi_decode_own(device->slot, length, &now, result) < 0)
		return -1;
	if (now.identity.state != image->identity.state || now.identity.kind != image->identity.kind) {
		result->detail = now.identity.state;
		return changed(result, SOCKMI_STEP_INFO);
	}
	if (now.identity.kind == SOCKMI_KIND_LISTENING) {
		if (length_of_queue(fd, &waiting) < 0)
			return sockmi_fail(result, SOCKMI_RESULT_FAILED, SOCKMI_STEP_INFO, errno);
		/* Closing it would lose them without a packet. */
		return waiting ? changed(result, SOCKMI_STEP_QUEUE_LENGTH) : 0;
	}
	if (now.sequence.snd_una != image->sequence.snd_una || now.sequence.snd_nxt != image->sequence.snd_nxt ||
	    now.sequence.write_seq != image->sequence.write_seq || now.sequence.rcv_nxt != image->sequence.rcv_nxt ||
	    now.sequence.copied_seq != image->sequence.copied_seq || now.sequence.flags != image->sequence.flags)
		return changed(result, SOCKMI_STEP_SEQUENCE);
	return 0;
}

static int commit(const struct sockmi_device *device, int fd, struct sockmi_frozen *frozen, const void *bytes,
		  size_t length, int owned, struct sockmi_result *result)
{
	struct sockmi_ioc_claim claimed;
	struct sockmi_image image;
	int error, anew = !frozen->id;

	if (anew) {
		if (sockmi_decode_own(bytes, length, &image, result) < 0 ||
		    freeze(device, fd, 0, &claimed, frozen, result) < 0)
			return -1;
		if (compare(device, fd, &image, result->length, result) < 0) {
			let_go(device, frozen);
			return -1;
		}
	}
	error = decide_commit(device, frozen, owned) < 0 ? errno : 0;
	if (!error || anew)
		let_go(device, frozen);
	switch (error) {
	case 0:
		return 0;
	case ETIMEDOUT: /* The kernel has thawed it, when the deadline was over. */
	case ESTALE:
	case EBUSY:
		return changed(result, SOCKMI_STEP_COMMIT);
	case EBADF:
		return sockmi_fail(result, SOCKMI_RESULT_NO_SOCKET, SOCKMI_STEP_COMMIT, error);
	default:
		return sockmi_fail(result, SOCKMI_RESULT_FAILED, SOCKMI_STEP_COMMIT, error);
	}
}

int sockmi_device_commit(const struct sockmi_device *const *devices, const int *fds, struct sockmi_frozen *frozen,
			 const void *const *images, const size_t *lengths, size_t n, int owned,
			 struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++)
		if (commit(devices[i], fds[i], &frozen[i], images[i], lengths[i], owned, &results[i]) < 0)
			count++;
	return count;
}

struct originals {
	const struct sockmi_device *const *devices;
	const int *fds;
	struct sockmi_frozen *frozen;
	const void *const *images;
	const size_t *lengths;
	size_t n;
	struct sockmi_result *results;
};

static int commit_joined(const void *argument)
{
	const struct originals *o = argument;
	bool begun = false, stay = false;
	int count = 0;

	memset(o->results, 0, o->n * sizeof(*o->results));
	for (size_t i = 0; i < o->n; i++) {
		bool joined = o->frozen[i].id; /* a listener is not kept frozen, and goes by itself */

		if (joined && stay)
			count -= changed(&o->results[i], SOCKMI_STEP_COMMIT);
		else if (commit(o->devices[i], o->fds[i], &o->frozen[i], o->images[i], o->lengths[i], 0,
				&o->results[i]) < 0) {
			count++;
			stay = stay || (joined && !begun);
		} else if (joined && !begun) {
			begun = true;
			sockmi_first_closed();
		}
	}
	return count;
}

int sockmi_device_commit_together(const struct sockmi_device *const *devices, const int *fds,
				  struct sockmi_frozen *frozen, const void *const *images, const size_t *lengths,
				  size_t n, struct sockmi_result *results)
{
	const struct originals originals = { devices, fds, frozen, images, lengths, n, results };

	return sockmi_whatever_happens(commit_joined, &originals);
}

void sockmi_device_thaw(const struct sockmi_device *device, struct sockmi_frozen *frozen, size_t n)
{
	for (size_t i = 0; i < n; i++)
		let_go(device, &frozen[i]);
}

/* ---- Imports ---- */

static int restore(const struct sockmi_device *device, int fd, const void *bytes, size_t length,
		   const struct sockmi_placement *placement, uint64_t *id, struct sockmi_result *result)
{
	struct sockmi_ioc_restore restore = {
		.fd = fd,
		.slot = SOCKMI_NO_SLOT,
		.image = (uintptr_t)bytes,
		.bytes = length,
		.flags = placement->transparent ? SOCKMI_DEV_TRANSPARENT : 0,
	};
	int error;

	_Static_assert(sizeof(restore.local) == sizeof(placement->local), "endpoints are the same");
	_Static_assert(sizeof(restore.lost_options) == sizeof(result->lost_options), "as many lost options");
	memcpy(&restore.local, &placement->local, sizeof(restore.local));
	error = ioctl(device->fd, SOCKMI_IOC_RESTORE, &restore);
	if (error < 0)
		return refused(result, SOCKMI_STEP_RESTORE, restore.refusal, restore.image_error);
	*id = restore.id;
	result->approximated = restore.approximated;
	result->reset = restore.reset;
	result->lost = restore.lost;
	memcpy(result->lost_options, restore.lost_options, sizeof(result->lost_options));
	return 0;
}

int sockmi_device_restore(const struct sockmi_device *device, const void *const *images, const size_t *lengths,
			  const struct sockmi_placement *placements, size_t n, int *out_fds, uint64_t *ids,
			  struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_image image;

		out_fds[i] = -1;
		ids[i] = 0;
		if (sockmi_decode_own(images[i], lengths[i], &image, &results[i]) < 0) {
			count++;
			continue;
		}
		out_fds[i] = socket(image.identity.family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		if (out_fds[i] < 0) {
			sockmi_fail(&results[i], SOCKMI_RESULT_FAILED, SOCKMI_STEP_SOCKET, errno);
			count++;
		} else if (restore(device, out_fds[i], images[i], lengths[i], &placements[i], &ids[i], &results[i]) < 0) {
			close(out_fds[i]);
			out_fds[i] = -1;
			count++;
		} else {
			results[i].carried = carried(&image);
		}
	}
	return count;
}

int sockmi_device_renew(const struct sockmi_device *device, const int *fds, uint64_t *ids, const void *const *images,
			const size_t *lengths, const struct sockmi_placement *placements, size_t n,
			struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		decide(device, SOCKMI_IOC_DISCARD, ids[i], 0); /* ENOENT: the kernel has done that */
		ids[i] = 0;
		if (restore(device, fds[i], images[i], lengths[i], &placements[i], &ids[i], &results[i]) < 0)
			count++;
	}
	return count;
}

int sockmi_device_activate(const struct sockmi_device *device, const uint64_t *ids, size_t n,
			   struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++)
		if (decide(device, SOCKMI_IOC_ACTIVATE, ids[i], 0) < 0) {
			sockmi_fail(&results[i],
				    errno == EADDRINUSE ? SOCKMI_RESULT_PORT_TAKEN :
				    errno == ENOENT	? SOCKMI_RESULT_TOO_LATE :
							  SOCKMI_RESULT_FAILED,
				    SOCKMI_STEP_ACTIVATE, errno);
			count++;
		}
	return count;
}

void sockmi_device_discard(const struct sockmi_device *device, const int *fds, const uint64_t *ids, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		decide(device, SOCKMI_IOC_DISCARD, ids[i], 0);
		close(fds[i]);
	}
}

int sockmi_device_deliver(const struct sockmi_device *device, const void *image, size_t length,
			  const struct sockmi_placement *placement, uint32_t ifindex, uint32_t uid, int only_ask,
			  struct sockmi_result *result)
{
	static const struct sockmi_endpoint none;
	struct sockmi_ioc_deliver deliver = { .slot = SOCKMI_NO_SLOT, .ifindex = ifindex };
	struct sockmi_image decoded;

	memset(result, 0, sizeof(*result));
	if (!(device->features & SOCKMI_FEATURE_DELIVER))
		return sockmi_fail(result, SOCKMI_RESULT_FAILED, SOCKMI_STEP_DELIVER, EOPNOTSUPP);
	if (sockmi_decode_own(image, length, &decoded, result) < 0)
		return -1;
	memcpy(&deliver.local, memcmp(&placement->local, &none, sizeof(none)) ? &placement->local :
										 &decoded.identity.local,
	       sizeof(deliver.local));
	memcpy(&deliver.remote, &decoded.identity.remote, sizeof(deliver.remote));
	deliver.flags = SOCKMI_DELIVER_PROBE | SOCKMI_DELIVER_ANY_UID;
	if (ioctl(device->fd, SOCKMI_IOC_DELIVER, &deliver) < 0)
		return refused(result, SOCKMI_STEP_DELIVER, deliver.refusal, 0);
	if (deliver.listener_uid && deliver.listener_uid != uid)
		return refused(result, SOCKMI_STEP_DELIVER, SOCKMI_REFUSAL_OWNER, 0);
	if (only_ask)
		return 0;
	deliver.flags = 0;
	deliver.uid = deliver.listener_uid; /* whoever listens by now must be the same user */
	deliver.image = (uintptr_t)image;
	deliver.bytes = length;
	deliver.restore_flags = placement->transparent ? SOCKMI_DEV_TRANSPARENT : 0;
	if (ioctl(device->fd, SOCKMI_IOC_DELIVER, &deliver) < 0)
		return refused(result, SOCKMI_STEP_DELIVER, deliver.refusal, deliver.image_error);
	return 0;
}
