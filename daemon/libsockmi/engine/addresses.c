// SPDX-License-Identifier: MIT
/* Endpoints of an image, and the kernel's socket addresses. */
#include "engine_internal.h"

static const uint8_t mapped_prefix[12] = { [10] = 0xff, [11] = 0xff };

bool sockmi_endpoint_is_mapped(const struct sockmi_endpoint *endpoint)
{
	return memcmp(endpoint->address, mapped_prefix, sizeof(mapped_prefix)) == 0;
}

bool sockmi_endpoint_is_zero(const struct sockmi_endpoint *endpoint)
{
	static const struct sockmi_endpoint zero;

	return memcmp(endpoint, &zero, sizeof(zero)) == 0;
}

void sockmi_endpoint_from_sockaddr(struct sockmi_endpoint *endpoint, const union sockmi_sockaddr *address)
{
	memset(endpoint, 0, sizeof(*endpoint));
	if (address->any.sa_family == AF_INET) {
		if (!address->v4.sin_port && !address->v4.sin_addr.s_addr)
			return; /* not bound: no endpoint */
		endpoint->port = ntohs(address->v4.sin_port);
		memcpy(endpoint->address, mapped_prefix, sizeof(mapped_prefix));
		memcpy(endpoint->address + 12, &address->v4.sin_addr, 4);
		return;
	}
	endpoint->port = ntohs(address->v6.sin6_port);
	memcpy(endpoint->address, &address->v6.sin6_addr, 16);
	endpoint->scope_id = sockmi_endpoint_is_mapped(endpoint) ? 0 : address->v6.sin6_scope_id;
}

socklen_t sockmi_endpoint_to_sockaddr(const struct sockmi_endpoint *endpoint, int family,
				      union sockmi_sockaddr *address)
{
	memset(address, 0, sizeof(*address));
	if (family == AF_INET) {
		address->v4.sin_family = AF_INET;
		address->v4.sin_port = htons(endpoint->port);
		memcpy(&address->v4.sin_addr, endpoint->address + 12, 4);
		return sizeof(address->v4);
	}
	address->v6.sin6_family = AF_INET6;
	address->v6.sin6_port = htons(endpoint->port);
	address->v6.sin6_scope_id = endpoint->scope_id;
	memcpy(&address->v6.sin6_addr, endpoint->address, 16);
	return sizeof(address->v6);
}
