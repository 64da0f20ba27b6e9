// SPDX-License-Identifier: MIT
/* Structs that grow: what an older caller does not have is zero, what we do not know must be. */
#include <errno.h>
#include <string.h>

#include "client.h"

int options_copy(void *own, size_t own_size, const void *given, const char *what)
{
	const unsigned char *bytes = given;
	size_t size;

	memset(own, 0, own_size);
	if (!given)
		return 0;
	memcpy(&size, given, sizeof(size));
	if (size < sizeof(size))
		return fail(EINVAL, "%s.size is %zu: set it to sizeof(the struct).", what, size);
	for (size_t i = own_size; i < size; i++)
		if (bytes[i])
			return fail(E2BIG, "%s has an option that this libsockmi (%s) does not know.",
				    what, SOCKMI_VERSION);
	memcpy(own, given, size < own_size ? size : own_size);
	return 0;
}
