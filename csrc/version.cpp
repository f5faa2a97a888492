// What this library is: the version of its interface, and the sources it was made from (setup.py gives their hash).
#include "include/bitquest.h"

#ifndef BQ_SOURCE_HASH
#define BQ_SOURCE_HASH ""
#endif

int32_t bq_version(void) { return BQ_ABI_VERSION; }

const char *bq_source_hash(void) { return BQ_SOURCE_HASH; }
