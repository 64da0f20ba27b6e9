// SPDX-License-Identifier: GPL-2.0
/* The checks on an image: the engine's own file, compiled for the kernel. */
#include "image_check.c"
