/* SPDX-License-Identifier: Apache-2.0
 *
 * What both tables of FDB entries have in common.
 */
#ifndef FDP_FDB_H
#define FDP_FDB_H

#include "rtnl.h"

/* Whose an entry is that the kernel holds. enum fdp_owner, never FDP_SKIP. */
int fdp_fdb_owner(const struct fdp_scope *scope, const struct fdp_fdb_any *row);

#endif
