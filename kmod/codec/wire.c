// SPDX-License-Identifier: GPL-2.0
/* Byte order and the table of sections: the engine's own file, compiled for the kernel. */
#include "image_wire.c"
