/* SPDX-License-Identifier: MIT */
/*
 * Since 2.38 glibc puts functions of C23 in the place of strtoul(), sscanf() and their like, if _GNU_SOURCE is
 * defined. What is built with it would not load in Debian 12, which has 2.36. Included before all else.
 */
#include <features.h>

#ifdef __GLIBC_USE_C2X_STRTOL
#undef __GLIBC_USE_C2X_STRTOL
#define __GLIBC_USE_C2X_STRTOL 0
#endif
#ifdef __GLIBC_USE_C23_STRTOL
#undef __GLIBC_USE_C23_STRTOL
#define __GLIBC_USE_C23_STRTOL 0
#endif
