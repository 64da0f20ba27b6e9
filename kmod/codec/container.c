// SPDX-License-Identifier: GPL-2.0
/* The image container: the engine's own file, compiled for the kernel. */
#include "image.c"
