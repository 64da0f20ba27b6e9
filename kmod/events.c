// SPDX-License-Identifier: GPL-2.0
/* Events: what read(), poll() and SIGIO tell a daemon. */
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

/**
 * struct event - one that waits
 * @node: in its file's list
 * @memory: that it takes, a share of what the file's opener may have
 * @content: what read() gives
 */
struct event {
	struct list_head node;
	struct sockmi_memory memory;
	struct sockmi_event content;
};

/* Events that any process can cause leave room for those that somebody waits for. */
static unsigned int room_for(u32 type)
{
	return type == SOCKMI_EVENT_TAKEN || type == SOCKMI_EVENT_WAITING ? SOCKMI_EVENTS_MAX / 2 : SOCKMI_EVENTS_MAX;
}

/* Charged to whoever causes it, who is not in reach of a deadline. NULL: no memory. */
static struct event *make(const struct sockmi_file *file)
{
	struct event *event = kmalloc(sizeof(*event), GFP_ATOMIC | __GFP_ACCOUNT | __GFP_NOWARN);

	if (event && sockmi_memory_take(&event->memory, sizeof(*event), file->users)) {
		kfree(event);
		event = NULL;
	}
	return event;
}

static void end(struct event *event)
{
	if (!event)
		return;
	sockmi_memory_give(&event->memory);
	kfree(event);
}

bool sockmi_event(struct sockmi_file *file, const struct sockmi_event *content)
{
	struct event *event = make(file);

	spin_lock_bh(&file->events_lock);
	if (!event || file->events_count >= room_for(content->type)) {
		file->events_lost++;
		spin_unlock_bh(&file->events_lock);
		end(event);
		return false;
	}
	event->content = *content;
	event->content.lost = file->events_lost;
	file->events_lost = 0;
	list_add_tail(&event->node, &file->events);
	file->events_count++;
	spin_unlock_bh(&file->events_lock);
	wake_up_interruptible(&file->events_wait);
	kill_fasync(&file->fasync, SIGIO, POLL_IN);
	return true;
}

void sockmi_event_serving(struct sockmi_net *sn, const struct sockmi_event *content)
{
	spin_lock_bh(&sn->lists_lock);
	if (sn->serving)
		sockmi_event(sn->serving, content);
	spin_unlock_bh(&sn->lists_lock);
}

/* The first event, taken off; NULL: none. */
static struct event *take(struct sockmi_file *file)
{
	struct event *event;

	spin_lock_bh(&file->events_lock);
	event = list_first_entry_or_null(&file->events, struct event, node);
	if (event) {
		list_del(&event->node);
		file->events_count--;
	}
	spin_unlock_bh(&file->events_lock);
	return event;
}

/* After a fault: the reader shall find it again. */
static void put_back(struct sockmi_file *file, struct event *event)
{
	spin_lock_bh(&file->events_lock);
	list_add(&event->node, &file->events);
	file->events_count++;
	spin_unlock_bh(&file->events_lock);
}

ssize_t sockmi_events_read(struct file *file, char __user *buffer, size_t bytes, loff_t *position)
{
	struct sockmi_file *sf = file->private_data;
	size_t done = 0;

	if (bytes < sizeof(struct sockmi_event))
		return -EINVAL;
	while (bytes - done >= sizeof(struct sockmi_event)) {
		struct event *event = take(sf);

		if (!event) {
			int result;

			if (done)
				break;
			if (file->f_flags & O_NONBLOCK)
				return -EAGAIN;
			result = wait_event_interruptible(sf->events_wait, !list_empty_careful(&sf->events));
			if (result)
				return result;
			continue;
		}
		if (copy_to_user(buffer + done, &event->content, sizeof(event->content))) {
			put_back(sf, event);
			return done ? (ssize_t)done : -EFAULT;
		}
		end(event);
		done += sizeof(struct sockmi_event);
	}
	return (ssize_t)done;
}

void sockmi_events_free(struct sockmi_file *file)
{
	struct event *event;

	while ((event = take(file)))
		end(event);
}
