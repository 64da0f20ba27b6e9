// SPDX-License-Identifier: GPL-2.0
/*
 * sysctl sockmi.*: exports from a plain shell, and the lists' maxima, for each network namespace.
 *
 *	sysctl -w sockmi.export="pid=510 fd=5"
 *	sysctl -w sockmi.export="pid=510 fd=5 to=192.0.2.7"
 *
 * The write claims the socket, hands it to the namespace's daemon and waits for its answer, which becomes the
 * write's result; a read shows the last one. A writer that does not get one knows what that means: see uapi/sockmi.h.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/inet.h>
#include <linux/pid_namespace.h>
#include <linux/slab.h>
#include <linux/sysctl.h>

#include "internal.h"
#include "trace.h"

#define COMMAND_MAX 128

#define REQUESTS_MAX 1024 /* of one network namespace */

/**
 * struct request - a write that waits for the daemon
 * @node: in sockmi_net.requests
 * @id: the claim's
 * @file: of the daemon, only to be compared
 * @text: what was written
 * @answered: @error is valid
 * @left: the writer has gone, though the daemon is at it: who answers frees this
 * @error: positive errno, or 0
 */
struct request {
	struct list_head node;
	u64 id;
	struct sockmi_file *file;
	char text[COMMAND_MAX];
	bool answered;
	bool left;
	u32 error;
};

struct command {
	int pid;
	int fd;
	struct sockmi_dev_endpoint to;
};

/* sockmi_net.lists_lock is held. */
static void remember(struct sockmi_net *sn, const char *command, int error, const char *text)
{
	snprintf(sn->last_result, sizeof(sn->last_result), "%.72s: %s%.95s", command, error ? "" : "ok ", text);
}

/* ---- The command ---- */

static bool parse_address(const char *text, struct sockmi_dev_endpoint *to)
{
	const char *end;

	memset(to, 0, sizeof(*to));
	if (in4_pton(text, -1, to->address + 12, -1, &end) && !*end) {
		to->address[10] = 0xff;
		to->address[11] = 0xff;
		return true;
	}
	return in6_pton(text, -1, to->address, -1, &end) && !*end;
}

/* @text is taken apart. */
static bool parse(char *text, struct command *command)
{
	bool pid = false, fd = false, to = false;
	char *word;

	memset(command, 0, sizeof(*command));
	while ((word = strsep(&text, " \t\n")) != NULL) {
		if (!*word)
			continue;
		if (!strncmp(word, "pid=", 4) && !pid)
			pid = !kstrtoint(word + 4, 10, &command->pid) && command->pid > 0;
		else if (!strncmp(word, "fd=", 3) && !fd)
			fd = !kstrtoint(word + 3, 10, &command->fd) && command->fd >= 0;
		else if (!strncmp(word, "to=", 3) && !to)
			to = parse_address(word + 3, &command->to);
		else
			return false;
		/* A word that was not understood leaves its mark unset. */
		if (!(word[0] == 'p' ? pid : word[0] == 'f' ? fd : to))
			return false;
	}
	return pid && fd;
}

/* ---- Asking the daemon ---- */

/* A process's id in another pid namespace; 0: it is not in it. */
static pid_t pid_in(int pid, struct pid_namespace *ns)
{
	pid_t result;

	rcu_read_lock();
	result = pid_nr_ns(find_vpid(pid), ns);
	rcu_read_unlock();
	return result;
}

/* The event, and the request that its answer will find; under one lock, so that the answer cannot be too early. */
static int ask(struct sockmi_net *sn, struct request *request, const struct command *command, struct sock *sk,
	       unsigned long inode)
{
	struct sockmi_event event = {
		.type = SOCKMI_EVENT_EXPORT_REQUEST,
		.id = request->id,
		.to = command->to,
		.owner_fd = command->fd,
		.inode = inode,
		.wait_ms = READ_ONCE(sockmi_sysctl_wait_ms),
	};
	struct sockmi_identity identity;
	int result = -ENOTCONN;

	sockmi_identify(sk, &identity);
	sockmi_dev_endpoint(&event.local, &identity.local);
	sockmi_dev_endpoint(&event.remote, &identity.remote);
	event.state = identity.state;
	event.kind = identity.kind;
	event.bytes = sockmi_dump_bound(sk);
	spin_lock_bh(&sn->lists_lock);
	if (sn->serving == request->file) {
		event.pid = task_tgid_nr_ns(current, sn->serving->pid_ns);
		event.uid = from_kuid_munged(sn->serving->user_ns, current_euid());
		event.owner_pid = pid_in(command->pid, sn->serving->pid_ns);
		result = -EBUSY;
		if (sn->requests_count < REQUESTS_MAX && sockmi_event(sn->serving, &event)) {
			list_add_tail(&request->node, &sn->requests);
			sn->requests_count++;
			result = 0;
		}
	}
	spin_unlock_bh(&sn->lists_lock);
	return result;
}

/* sockmi_net.lists_lock is held. */
static void done_with(struct sockmi_net *sn, struct request *request)
{
	list_del(&request->node);
	sn->requests_count--;
	kfree(request);
}

/*
 * The result is the daemon's, or tells that there will be none (-ETIMEDOUT, -EINTR; -EINPROGRESS: not yet).
 * @request is freed, or left to who answers.
 */
static int await(struct sockmi_net *sn, struct request *request)
{
	long left = wait_event_interruptible_timeout(sn->wait, READ_ONCE(request->answered),
						     msecs_to_jiffies(READ_ONCE(sockmi_sysctl_wait_ms)));
	bool withdrawn = !READ_ONCE(request->answered) && !sockmi_withdraw(request->file, request->id);
	int result;

	spin_lock_bh(&sn->lists_lock);
	if (request->answered) {
		result = -(int)request->error;
		done_with(sn, request);
	} else if (withdrawn) {
		result = left < 0 ? -EINTR : -ETIMEDOUT;
		remember(sn, request->text, 1, left < 0 ? "interrupted before the daemon began: nothing was done" :
							  "the daemon did not begin: nothing was done");
		done_with(sn, request);
	} else {
		result = left < 0 ? -EINTR : -EINPROGRESS;
		remember(sn, request->text, 1, "under way; read this again");
		request->left = true;
	}
	spin_unlock_bh(&sn->lists_lock);
	return result;
}

/* A reference on the daemon's file, or NULL. */
static struct sockmi_file *serving(struct sockmi_net *sn)
{
	struct sockmi_file *file;

	spin_lock_bh(&sn->lists_lock);
	file = sn->serving;
	if (file)
		refcount_inc(&file->refs);
	spin_unlock_bh(&sn->lists_lock);
	return file;
}

/*
 * Hands the socket to @file, the daemon's, and waits. Puts @socket_file. @asked: the daemon tells what came of it.
 */
static noinline_for_stack int export(struct sockmi_net *sn, struct sockmi_file *file, const struct command *command,
				      const char *text, struct sock *sk, struct file *socket_file, u32 *refusal, bool *asked)
{
	struct request *request = kzalloc(sizeof(*request), GFP_KERNEL_ACCOUNT);
	unsigned long inode;
	int result;
	s64 id;

	id = request ? sockmi_claim(file, socket_file, sockmi_claim_max_ms, refusal) : -ENOMEM;
	inode = file_inode(socket_file)->i_ino;
	/* The claim has it. Were this the last reference in the end, the writer would wait as SO_LINGER has it. */
	fput(socket_file);
	if (id < 0) {
		kfree(request);
		return id;
	}
	request->id = id;
	request->file = file;
	strscpy(request->text, text, sizeof(request->text));
	result = ask(sn, request, command, sk, inode);
	if (result) {
		sockmi_unclaim(file, id);
		kfree(request);
		return result;
	}
	*asked = true;
	result = await(sn, request);
	trace_sockmi_sysctl(sk, id, 0, result, 0);
	return result;
}

/* What became of a command that the daemon has not heard of: for the log, and for who reads the sysctl. */
static noinline_for_stack void refuse(struct sockmi_net *sn, const char *text, int error, u32 refusal)
{
	char what[64];

	if (refusal)
		snprintf(what, sizeof(what), "refused, reason %u", refusal);
	else
		snprintf(what, sizeof(what),
			 error == -EPERM    ? "CAP_NET_ADMIN and CAP_SYS_PTRACE are needed" :
			 error == -ESRCH    ? "no such process" :
			 error == -EBADF    ? "no such descriptor" :
			 error == -ENOTCONN ? "no daemon serves this network namespace" :
			 error == -EBUSY    ? "too many commands wait for the daemon" :
					      "failed, error %d",
			 -error);
	spin_lock_bh(&sn->lists_lock);
	remember(sn, text, 1, what);
	spin_unlock_bh(&sn->lists_lock);
	pr_notice_ratelimited("sockmi.export: \"%*pE\": %s\n", (int)strlen(text), text, what);
}

static noinline_for_stack int run(struct sockmi_net *sn, const struct command *command, const char *text)
{
	struct file *socket_file = NULL;
	struct sockmi_file *file = NULL;
	struct sock *sk = NULL;
	bool asked = false;
	u32 refusal = 0;
	int result = 0;

	if (!capable(CAP_NET_ADMIN) || !capable(CAP_SYS_PTRACE))
		result = -EPERM;
	if (!result) {
		socket_file = sockmi_file_of(command->pid, command->fd);
		if (IS_ERR(socket_file)) {
			result = PTR_ERR(socket_file);
			socket_file = NULL;
		}
	}
	if (!result) {
		sk = sockmi_tcp_sock(socket_file, &refusal);
		if (sk)
			sock_hold(sk);
		else
			result = sockmi_refusal_errno(refusal);
	}
	if (sk && sockmi_net(sock_net(sk)) != sn) {
		refusal = SOCKMI_REFUSAL_NAMESPACE;
		result = -EXDEV;
	}
	if (!result) {
		file = serving(sn);
		result = -ENOTCONN;
	}
	if (file) {
		result = export(sn, file, command, text, sk, socket_file, &refusal, &asked);
		socket_file = NULL;
	}
	if (!asked) {
		trace_sockmi_sysctl(sk, 0, 0, result, refusal);
		refuse(sn, text, result, refusal);
	}
	if (file)
		sockmi_file_put(file);
	if (socket_file)
		fput(socket_file);
	if (sk)
		sock_put(sk);
	return result;
}

static int export_handler(SOCKMI_CTL_CONST struct ctl_table *table, int write, void *buffer, size_t *length,
			  loff_t *position)
{
	struct sockmi_net *sn = table->extra1;
	char text[sizeof(sn->last_result)] = "", kept[COMMAND_MAX];
	struct ctl_table copy = { .procname = table->procname, .data = text, .maxlen = sizeof(text), .mode = table->mode };
	struct command command;
	size_t written;
	int result;

	if (!write) {
		spin_lock_bh(&sn->lists_lock);
		strscpy(text, sn->last_result, sizeof(text));
		spin_unlock_bh(&sn->lists_lock);
		return proc_dostring(&copy, 0, buffer, length, position);
	}
	if (*position || *length >= COMMAND_MAX) {
		pr_notice_ratelimited("sockmi.export: more than %d bytes, or not written at once\n", COMMAND_MAX - 1);
		return -EINVAL;
	}
	written = *length;
	result = proc_dostring(&copy, 1, buffer, length, position);
	if (result)
		return result;
	strscpy(kept, text, sizeof(kept));
	/* proc_dostring() leaves out what follows the first line. */
	if (written > strlen(kept) + 1 || !parse(text, &command)) {
		pr_notice_ratelimited("sockmi.export: \"%*pE\" is not \"pid=PID fd=FD [to=ADDRESS]\"\n",
				      (int)strnlen(kept, sizeof(kept)), kept);
		return -EINVAL;
	}
	return run(sn, &command, kept);
}

/* ---- ioctls ---- */

long sockmi_ioctl_serve(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_ioc_serve a;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags || a.reserved)
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	spin_lock_bh(&sn->lists_lock);
	if (sn->serving && sn->serving != file)
		result = -EBUSY;
	else
		sn->serving = file;
	spin_unlock_bh(&sn->lists_lock);
	trace_sockmi_serve(NULL, 0, 0, result, 0);
	return result;
}

/* sockmi_net.lists_lock is held. The writer, if it is still there, frees the request. */
static void answer(struct sockmi_net *sn, struct request *request, u32 error, const char *text)
{
	remember(sn, request->text, error, text);
	request->error = error;
	WRITE_ONCE(request->answered, true);
	if (request->left)
		done_with(sn, request);
}

void sockmi_serve_end(struct sockmi_file *file)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct request *request, *next;

	spin_lock_bh(&sn->lists_lock);
	if (sn->serving == file)
		sn->serving = NULL;
	list_for_each_entry_safe(request, next, &sn->requests, node)
		if (request->file == file && !request->answered)
			answer(sn, request, ECONNRESET, "the daemon ended; its history tells what came of it");
	spin_unlock_bh(&sn->lists_lock);
	wake_up_all(&sn->wait);
}

long sockmi_ioctl_answer(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct request *request, *next;
	struct sockmi_ioc_answer a;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.error >= MAX_ERRNO || a.reserved || strnlen(a.text, sizeof(a.text)) == sizeof(a.text))
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	result = -ENOENT;
	spin_lock_bh(&sn->lists_lock);
	list_for_each_entry_safe(request, next, &sn->requests, node)
		if (request->file == file && request->id == a.id && !request->answered) {
			answer(sn, request, a.error, a.text);
			result = 0;
		}
	spin_unlock_bh(&sn->lists_lock);
	if (!result)
		wake_up_all(&sn->wait);
	trace_sockmi_answer(NULL, a.id, a.error, result, 0);
	return result;
}

/* ---- Tables ---- */

/* A list is walked under a lock, so it cannot be of any length that somebody with a namespace of his own likes. */
static int maximum_handler(SOCKMI_CTL_CONST struct ctl_table *table, int write, void *buffer, size_t *length,
			   loff_t *position)
{
	static const unsigned int most = SOCKMI_LIST_MOST;
	struct ctl_table copy = *table;

	copy.extra2 = (void *)&most;
	return proc_douintvec_minmax(&copy, write, buffer, length, position);
}

static const struct ctl_table template[] = {
	{ .procname = "export", .mode = 0644, .proc_handler = export_handler },
	{ .procname = "max_bound", .maxlen = sizeof(int), .mode = 0644, .proc_handler = maximum_handler },
	{ .procname = "max_listening", .maxlen = sizeof(int), .mode = 0644, .proc_handler = maximum_handler },
	{ .procname = "max_connected", .maxlen = sizeof(int), .mode = 0644, .proc_handler = maximum_handler },
};

int sockmi_sysctl_net_init(struct net *net, struct sockmi_net *sn)
{
	struct ctl_table *table;
	unsigned int i;

	table = kcalloc(ARRAY_SIZE(template) + SOCKMI_CTL_SENTINEL, sizeof(*table), GFP_KERNEL_ACCOUNT);
	if (!table)
		return -ENOMEM;
	memcpy(table, template, sizeof(template));
	table[0].extra1 = sn;
	/* The core insists on data that is the namespace's own. */
	table[0].data = sn->last_result;
	table[0].maxlen = sizeof(sn->last_result);
	for (i = 0; i < SOCKMI_LISTS; i++)
		table[1 + i].data = &sn->max[i];
	strscpy(sn->last_result, "none", sizeof(sn->last_result));
	sn->ctl_header = sockmi_register_sysctl(net, "sockmi", table, ARRAY_SIZE(template));
	if (!sn->ctl_header) {
		kfree(table);
		return -ENOMEM;
	}
	sn->ctl_table = table;
	return 0;
}

void sockmi_sysctl_net_exit(struct sockmi_net *sn)
{
	unregister_net_sysctl_table(sn->ctl_header);
	kfree(sn->ctl_table);
}

/*
 * /proc/sys itself does not ask whose its entries are, so one that were a namespace's would be found from all others as
 * long as it is cached. Below a directory of nobody's each namespace finds its own.
 */
static struct ctl_table_header *directory;

int sockmi_sysctl_init(void)
{
	directory = sockmi_register_sysctl_dir("sockmi");
	return directory ? 0 : -ENOMEM;
}

void sockmi_sysctl_exit(void)
{
	unregister_sysctl_table(directory);
}
