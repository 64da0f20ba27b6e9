// SPDX-License-Identifier: GPL-2.0
/* Lists within an image: the engine's own file, compiled for the kernel. */
#include "image_list.c"
