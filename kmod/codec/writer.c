// SPDX-License-Identifier: GPL-2.0
/* Writing an image: the engine's own file, compiled for the kernel. */
#include "image_writer.c"
