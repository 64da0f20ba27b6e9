// SPDX-License-Identifier: GPL-2.0
/* The device file: slots, arguments, dispatch of the ioctls. */
#include <linux/compat.h>
#include <linux/cred.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/pid_namespace.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "internal.h"
#include "trace.h"

#define KIND_SHIFT 40 /* of mmap() offsets: slots of kind k begin at k << KIND_SHIFT */

/* ---- Arguments ---- */

int sockmi_arg_in(void *to, size_t known, const void __user *arg, size_t size)
{
	return copy_struct_from_user(to, known, arg, size);
}

int sockmi_arg_out(void __user *arg, size_t size, const void *from, size_t known)
{
	return copy_to_user(arg, from, min(size, known)) ? -EFAULT : 0;
}

/* ---- Slots ---- */

static void free_slots(struct sockmi_slots *slots)
{
	unsigned long i, pages = slots->slot_pages * slots->count;

	if (!slots->pages)
		return;
	vunmap(slots->address);
	for (i = 0; i < pages && slots->pages[i]; i++)
		put_page(slots->pages[i]);
	kvfree(slots->pages);
	sockmi_memory_give(&slots->memory);
	memset(slots, 0, sizeof(*slots));
}

static int make_slots(struct sockmi_slots *slots, unsigned int count, unsigned long slot_pages)
{
	unsigned long i, pages = count * slot_pages;
	int result = sockmi_memory_take(&slots->memory, (u64)pages << PAGE_SHIFT, sockmi_memory_users());

	if (result)
		return result;
	slots->count = count;
	slots->slot_pages = slot_pages;
	slots->pages = kvcalloc(pages, sizeof(*slots->pages), GFP_KERNEL_ACCOUNT);
	if (!slots->pages) {
		sockmi_memory_give(&slots->memory);
		memset(slots, 0, sizeof(*slots));
		return -ENOMEM;
	}
	for (i = 0; i < pages; i++) {
		if (fatal_signal_pending(current)) {
			free_slots(slots);
			return -EINTR;
		}
		slots->pages[i] = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_NOWARN);
		if (!slots->pages[i])
			break;
		cond_resched();
	}
	if (i == pages)
		slots->address = vmap(slots->pages, pages, VM_MAP, PAGE_KERNEL);
	if (!slots->address) {
		free_slots(slots);
		return -ENOMEM;
	}
	return 0;
}

static u64 slot_bytes_of(const struct sockmi_file *file)
{
	return ((u64)file->slots[0].slot_pages * file->slots[0].count +
		(u64)file->slots[1].slot_pages * file->slots[1].count) << PAGE_SHIFT;
}

static long ioctl_slots(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_ioc_slots a;
	struct sockmi_slots *slots;
	unsigned long pages;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.kind != SOCKMI_SLOT_EXPORT && a.kind != SOCKMI_SLOT_IMPORT)
		return -EINVAL;
	if (!a.count || a.count > sockmi_slots_max || !a.bytes || a.bytes > SOCKMI_IMAGE_LIMIT_BYTES)
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	pages = PAGE_ALIGN(a.bytes) >> PAGE_SHIFT;
	slots = &file->slots[a.kind - 1];
	result = mutex_lock_killable(&file->lock);
	if (result)
		return result;
	if (slots->pages)
		result = -EBUSY;
	else if (slot_bytes_of(file) + ((u64)pages * a.count << PAGE_SHIFT) > (u64)sockmi_slots_max_mb << 20)
		result = -EDQUOT;
	else
		result = make_slots(slots, a.count, pages);
	mutex_unlock(&file->lock);
	a.bytes = (u64)pages << PAGE_SHIFT;
	a.offset = (u64)a.kind << KIND_SHIFT;
	return result ?: sockmi_arg_out(arg, size, &a, sizeof(a));
}

void *sockmi_slot_get(struct sockmi_file *file, unsigned int kind, u32 index, size_t *bytes)
{
	struct sockmi_slots *slots = &file->slots[kind - 1];
	void *place = NULL;

	mutex_lock(&file->lock);
	if (slots->pages && index < slots->count && !test_and_set_bit(index, slots->busy)) {
		*bytes = slots->slot_pages << PAGE_SHIFT;
		place = (u8 *)slots->address + index * *bytes;
	}
	mutex_unlock(&file->lock);
	return place;
}

void sockmi_slot_put(struct sockmi_file *file, unsigned int kind, u32 index)
{
	clear_bit(index, file->slots[kind - 1].busy);
}

static vm_fault_t slot_fault(struct vm_fault *fault)
{
	struct sockmi_file *file = fault->vma->vm_file->private_data;
	unsigned int kind = fault->pgoff >> (KIND_SHIFT - PAGE_SHIFT);
	unsigned long page = fault->pgoff & ((1UL << (KIND_SHIFT - PAGE_SHIFT)) - 1);
	struct sockmi_slots *slots;

	if (kind < 1 || kind > 2)
		return VM_FAULT_SIGBUS;
	slots = &file->slots[kind - 1];
	if (!slots->address || page >= slots->slot_pages * slots->count)
		return VM_FAULT_SIGBUS;
	fault->page = slots->pages[page];
	get_page(fault->page);
	return 0;
}

static const struct vm_operations_struct slot_vm_operations = {
	.fault = slot_fault,
};

static int device_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct sockmi_file *file = filp->private_data;
	unsigned int kind = vma->vm_pgoff >> (KIND_SHIFT - PAGE_SHIFT);
	unsigned long page = vma->vm_pgoff & ((1UL << (KIND_SHIFT - PAGE_SHIFT)) - 1);
	unsigned long pages = vma_pages(vma), have = 0;

	if (kind < 1 || kind > 2)
		return -EINVAL;
	/* Slots are made once and live as long as the file, which the mapping keeps. */
	mutex_lock(&file->lock);
	if (file->slots[kind - 1].address)
		have = file->slots[kind - 1].slot_pages * file->slots[kind - 1].count;
	mutex_unlock(&file->lock);
	if (page >= have || pages > have - page)
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (kind == SOCKMI_SLOT_EXPORT) {
		if (vma->vm_flags & VM_WRITE)
			return -EPERM;
		sockmi_vm_clear(vma, VM_MAYWRITE);
	}
	sockmi_vm_clear(vma, VM_MAYEXEC);
	sockmi_vm_set(vma, VM_DONTEXPAND | VM_DONTDUMP);
	vma->vm_ops = &slot_vm_operations;
	return 0;
}

/* ---- Images that come in ---- */

struct sockmi_blob *sockmi_blob_get(struct sockmi_file *file, u32 slot, u64 address, u64 bytes, u32 *refusal,
				    u32 *image_error)
{
	struct sockmi_blob *blob;
	int result = -ENOMEM;

	*image_error = 0;
	if (bytes > SOCKMI_IMAGE_LIMIT_BYTES) {
		*refusal = SOCKMI_REFUSAL_IMAGE;
		*image_error = SOCKMI_IMAGE_LIMIT;
		return ERR_PTR(-EBADMSG);
	}
	*refusal = SOCKMI_REFUSAL_MEMORY;
	blob = kzalloc(sizeof(*blob), GFP_KERNEL_ACCOUNT);
	if (!blob)
		return ERR_PTR(-ENOMEM);
	refcount_set(&blob->refs, 1);
	if (sockmi_memory_take(&blob->memory, bytes + sizeof(*blob), sockmi_memory_users())) {
		kfree(blob);
		return ERR_PTR(-EDQUOT);
	}
	blob->bytes = bytes;
	blob->data = kvmalloc(bytes, GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!blob->data)
		goto failed;
	*refusal = SOCKMI_REFUSAL_NONE;
	if (slot == SOCKMI_NO_SLOT) {
		result = -EFAULT;
		if (copy_from_user(blob->data, u64_to_user_ptr(address), bytes))
			goto failed;
	} else {
		size_t room = 0;
		void *place = sockmi_slot_get(file, SOCKMI_SLOT_IMPORT, slot, &room);

		result = place ? -EINVAL : -ENXIO;
		if (place && bytes <= room) {
			memcpy(blob->data, place, bytes);
			result = 0;
		}
		if (place)
			sockmi_slot_put(file, SOCKMI_SLOT_IMPORT, slot);
		if (result)
			goto failed;
	}
	*image_error = sockmi_image_decode(blob->data, bytes, SOCKMI_IMAGE_LIMIT_BYTES, &blob->image, NULL);
	if (!*image_error)
		return blob;
	*refusal = SOCKMI_REFUSAL_IMAGE;
	result = -EBADMSG;
failed:
	sockmi_blob_put(blob);
	return ERR_PTR(result);
}

void sockmi_blob_put(struct sockmi_blob *blob)
{
	if (!blob || !refcount_dec_and_test(&blob->refs))
		return;
	kvfree(blob->data);
	sockmi_memory_give(&blob->memory);
	kfree(blob);
}

/* ---- The file ---- */

static int device_open(struct inode *inode, struct file *filp)
{
	struct sockmi_file *file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);

	if (!file)
		return -ENOMEM;
	refcount_set(&file->refs, 1);
	mutex_init(&file->lock);
	file->users = sockmi_memory_users();
	file->net = get_net(current->nsproxy->net_ns);
	file->user_ns = get_user_ns(current_user_ns());
	file->pid_ns = get_pid_ns(task_active_pid_ns(current));
	xa_init_flags(&file->exports, XA_FLAGS_ALLOC1);
	xa_init_flags(&file->dormants, XA_FLAGS_ALLOC1);
	spin_lock_init(&file->events_lock);
	INIT_LIST_HEAD(&file->events);
	init_waitqueue_head(&file->events_wait);
	filp->private_data = file;
	return stream_open(inode, filp);
}

void sockmi_file_put(struct sockmi_file *file)
{
	if (!refcount_dec_and_test(&file->refs))
		return;
	sockmi_events_free(file);
	free_slots(&file->slots[0]);
	free_slots(&file->slots[1]);
	xa_destroy(&file->exports);
	xa_destroy(&file->dormants);
	put_pid_ns(file->pid_ns);
	put_user_ns(file->user_ns);
	put_net(file->net);
	mutex_destroy(&file->lock);
	kfree(file);
}

static int device_fasync(int fd, struct file *filp, int on)
{
	struct sockmi_file *file = filp->private_data;

	return fasync_helper(fd, filp, on, &file->fasync);
}

static int device_release(struct inode *inode, struct file *filp)
{
	struct sockmi_file *file = filp->private_data;

	sockmi_serve_end(file);
	sockmi_exports_end(file);
	sockmi_dormants_end(file);
	sockmi_reserved_end(file);
	sockmi_file_put(file);
	return 0;
}

static __poll_t device_poll(struct file *filp, poll_table *table)
{
	struct sockmi_file *file = filp->private_data;

	poll_wait(filp, &file->events_wait, table);
	return list_empty_careful(&file->events) ? 0 : EPOLLIN | EPOLLRDNORM;
}

static long ioctl_hello(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_ioc_hello a;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);
	bool wrong;

	if (result)
		return result;
	wrong = a.abi_major != SOCKMI_DEV_ABI_MAJOR;
	a = (struct sockmi_ioc_hello){
		.abi_major = SOCKMI_DEV_ABI_MAJOR,
		.abi_minor = SOCKMI_DEV_ABI_MINOR,
		.features = SOCKMI_FEATURE_EXPORT | SOCKMI_FEATURE_RESTORE | SOCKMI_FEATURE_LISTS |
			    SOCKMI_FEATURE_SYSCTL | SOCKMI_FEATURE_DELIVER | SOCKMI_NAT_FEATURE |
			    (SOCKMI_HAS_USEC_TS ? SOCKMI_FEATURE_USEC_TS : 0),
		.image_major = SOCKMI_IMAGE_MAJOR,
		.image_minor = SOCKMI_IMAGE_MINOR,
		.slots_max = sockmi_slots_max,
		.image_max_bytes = SOCKMI_IMAGE_LIMIT_BYTES,
		.slots_max_bytes = (u64)sockmi_slots_max_mb << 20,
		.freeze_default_ms = sockmi_freeze_default_ms,
		.freeze_max_ms = sockmi_freeze_max_ms,
		.claim_max_ms = sockmi_claim_max_ms,
		.dormant_max_ms = sockmi_dormant_max_ms,
	};
	result = sockmi_arg_out(arg, size, &a, sizeof(a));
	if (wrong)
		return -EPROTONOSUPPORT;
	if (!result)
		WRITE_ONCE(file->greeted, true);
	return result;
}

static sockmi_ioctl *const ioctls[] = {
	[_IOC_NR(SOCKMI_IOC_HELLO)] = ioctl_hello,
	[_IOC_NR(SOCKMI_IOC_SLOTS)] = ioctl_slots,
	[_IOC_NR(SOCKMI_IOC_SERVE)] = sockmi_ioctl_serve,
	[_IOC_NR(SOCKMI_IOC_ANSWER)] = sockmi_ioctl_answer,
	[_IOC_NR(SOCKMI_IOC_FORGET)] = sockmi_ioctl_forget,
	[_IOC_NR(SOCKMI_IOC_CLAIM)] = sockmi_ioctl_claim,
	[_IOC_NR(SOCKMI_IOC_FREEZE)] = sockmi_ioctl_freeze,
	[_IOC_NR(SOCKMI_IOC_COMMIT)] = sockmi_ioctl_commit,
	[_IOC_NR(SOCKMI_IOC_ABORT)] = sockmi_ioctl_abort,
	[_IOC_NR(SOCKMI_IOC_RELEASE)] = sockmi_ioctl_release,
	[_IOC_NR(SOCKMI_IOC_EXPORT_INFO)] = sockmi_ioctl_export_info,
	[_IOC_NR(SOCKMI_IOC_RESTORE)] = sockmi_ioctl_restore,
	[_IOC_NR(SOCKMI_IOC_ACTIVATE)] = sockmi_ioctl_activate,
	[_IOC_NR(SOCKMI_IOC_DISCARD)] = sockmi_ioctl_discard,
	[_IOC_NR(SOCKMI_IOC_DELIVER)] = sockmi_ioctl_deliver,
	[_IOC_NR(SOCKMI_IOC_LIST_ADD)] = sockmi_ioctl_list_add,
	[_IOC_NR(SOCKMI_IOC_PUBLISH)] = sockmi_ioctl_publish,
	[_IOC_NR(SOCKMI_IOC_REMOVE)] = sockmi_ioctl_remove,
	[_IOC_NR(SOCKMI_IOC_LIST_INFO)] = sockmi_ioctl_list_info,
	[_IOC_NR(SOCKMI_IOC_LIST_NEXT)] = sockmi_ioctl_list_next,
	[_IOC_NR(SOCKMI_IOC_MATCH)] = sockmi_ioctl_match,
	[_IOC_NR(SOCKMI_IOC_IMPORT)] = sockmi_ioctl_import,
};

static long call(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size)
{
	if (nr != _IOC_NR(SOCKMI_IOC_HELLO) && !READ_ONCE(file->greeted))
		return -EPROTO;
	if (nr >= 0x40 && nr <= 0x5f)
		return sockmi_nat_ioctl(file, nr, arg, size);
	if (nr >= ARRAY_SIZE(ioctls))
		return -ENOTTY;
	nr = array_index_nospec(nr, ARRAY_SIZE(ioctls));
	if (!ioctls[nr])
		return -ENOTTY;
	return ioctls[nr](file, arg, size);
}

static long device_ioctl(struct file *filp, unsigned int command, unsigned long arg)
{
	unsigned int nr = _IOC_NR(command), size = _IOC_SIZE(command);
	long result;

	if (_IOC_TYPE(command) != SOCKMI_IOC_MAGIC || _IOC_DIR(command) != (_IOC_READ | _IOC_WRITE))
		return -ENOTTY;
	result = call(filp->private_data, nr, (void __user *)arg, size);
	trace_sockmi_call(NULL, nr, size, result, 0);
	return result;
}

const struct file_operations sockmi_fops = {
	.owner = THIS_MODULE,
	.open = device_open,
	.release = device_release,
	.read = sockmi_events_read,
	.poll = device_poll,
	.fasync = device_fasync,
	.mmap = device_mmap,
	.unlocked_ioctl = device_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};
