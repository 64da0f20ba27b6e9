// SPDX-License-Identifier: GPL-2.0
/* CRC-32 by the kernel: the engine's own file, compiled for the kernel. */
#include "image_crc.c"
