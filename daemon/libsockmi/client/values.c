// SPDX-License-Identifier: MIT
/* Endpoints, ids and states: from C to JSON and back. */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "client.h"

static const struct {
	unsigned int state;
	const char *name;
} states[] = {
	{ SOCKMI_BOUND, "bound" },
	{ SOCKMI_LISTENING, "listening" },
	{ SOCKMI_CONNECTED, "connected" },
};

json_t *endpoint_address(const struct sockmi_endpoint *endpoint)
{
	char text[INET6_ADDRSTRLEN];

	if (!endpoint->af || !inet_ntop(endpoint->af, &endpoint->address, text, sizeof(text)))
		return json_null();
	return json_string(text);
}

/* "192.0.2.1:80", "[2001:db8::1]:80", or null (all zero). */
int endpoint_parse(const json_t *json, struct sockmi_endpoint *endpoint)
{
	const char *text = json_string_value(json);
	char address[INET6_ADDRSTRLEN + 2];
	const char *colon;
	char *end;
	size_t length;
	unsigned long port;

	memset(endpoint, 0, sizeof(*endpoint));
	if (!text)
		return !json || json_is_null(json) ? 0 : -1;
	colon = strrchr(text, ':');
	length = colon ? (size_t)(colon - text) : 0;
	if (!length || length >= sizeof(address) || colon[1] < '0' || colon[1] > '9')
		return -1;
	port = strtoul(colon + 1, &end, 10);
	if (*end || port > 65535)
		return -1;
	memcpy(address, text, length);
	address[length] = 0;
	endpoint->port = (unsigned int)port;
	if (address[0] != '[') {
		endpoint->af = AF_INET;
		return inet_pton(AF_INET, address, &endpoint->address.in4) == 1 ? 0 : -1;
	}
	if (address[length - 1] != ']')
		return -1;
	address[length - 1] = 0;
	endpoint->af = AF_INET6;
	return inet_pton(AF_INET6, address + 1, &endpoint->address.in6) == 1 ? 0 : -1;
}

/* A random UUID (RFC 9562, version 4). */
void id_new(unsigned char id[16])
{
	while (getrandom(id, 16, 0) != 16)
		;
	id[6] = (unsigned char)((id[6] & 0x0f) | 0x40);
	id[8] = (unsigned char)((id[8] & 0x3f) | 0x80);
}

bool id_is_zero(const unsigned char id[16])
{
	static const unsigned char zero[16];

	return !memcmp(id, zero, sizeof(zero));
}

json_t *id_text(const unsigned char id[16])
{
	char text[37];
	size_t at = 0;

	for (size_t i = 0; i < 16; i++) {
		if (i == 4 || i == 6 || i == 8 || i == 10)
			text[at++] = '-';
		snprintf(text + at, sizeof(text) - at, "%02x", id[i]);
		at += 2;
	}
	return json_string(text);
}

int id_parse(const json_t *json, unsigned char id[16])
{
	const char *text = json_string_value(json);

	memset(id, 0, 16);
	if (!text)
		return !json || json_is_null(json) ? 0 : -1;
	for (size_t i = 0; i < 16; i++) {
		char pair[3];
		char *end;

		if (i == 4 || i == 6 || i == 8 || i == 10)
			if (*text++ != '-')
				return -1;
		if (!strchr("0123456789abcdefABCDEF", text[0]) || !text[0])
			return -1;
		pair[0] = text[0];
		pair[1] = text[1];
		pair[2] = 0;
		id[i] = (unsigned char)strtoul(pair, &end, 16);
		if (*end || !pair[1])
			return -1;
		text += 2;
	}
	return *text ? -1 : 0;
}

json_t *states_list(unsigned int mask)
{
	json_t *list = json_array();

	for (size_t i = 0; list && i < sizeof(states) / sizeof(*states); i++)
		if (mask & states[i].state && json_array_append_new(list, json_string(states[i].name))) {
			json_decref(list);
			return NULL;
		}
	return list;
}

/* The bit of a state's name, 0 if it is none. */
unsigned int state_parse(const json_t *json)
{
	const char *name = json_string_value(json);

	for (size_t i = 0; name && i < sizeof(states) / sizeof(*states); i++)
		if (!strcmp(name, states[i].name))
			return states[i].state;
	return 0;
}
