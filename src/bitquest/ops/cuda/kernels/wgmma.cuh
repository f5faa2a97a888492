// The warpgroup products of the kernels: D (64 × COLUMNS, int32) += A (64 rows) · B (COLUMNS rows), both operands in
// shared memory behind descriptors. COLUMNS is 64, 128, 192 or 256; a thread holds COLUMNS / 2 accumulators:
// accumulator i of lane 4r + q of warp w stands in row 16w + r + 8·((i / 2) mod 2), column 8·(i / 4) + 2q + (i mod 2).
#pragma once

#include <hopper_ptx.cuh>

#define NAMES_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_1 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_2 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_3 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define EIGHT(d, i)                                                                                                   \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]),       \
        "+r"(d[i + 7])
#define THIRTY_TWO(d, i) EIGHT(d, i), EIGHT(d, i + 8), EIGHT(d, i + 16), EIGHT(d, i + 24)

// Bits: 256 along K, 32 bytes a row of either operand; D += popcount(a AND b). `keep` 0 starts D at zero.
#define BITS_PRODUCT(COLUMNS, NAMES, A, B, KEEP, ...)                                                                 \
    DEVICE void bits_product(int(&d)[COLUMNS / 2], u64 a, u64 b, u32 keep) {                                          \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " KEEP ", 0;\n\t"                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k256.s32.b1.b1.and.popc {" NAMES "}, " A ", " B    \
                     ", p;\n\t}"                                                                                      \
                     : __VA_ARGS__                                                                                    \
                     : "l"(a), "l"(b), "r"(keep));                                                                    \
    }

// Bytes, A 2:4 sparse: 64 along K, 32 bytes a row of A (the kept ones), 64 of B. `places` says where A's bytes belong:
// two bits each, four bits for every four places along K; lane 4r + q of warp w gives row 16w + r + 8·(q mod 2), the
// half q / 2 of K.
#define SPARSE_PRODUCT(COLUMNS, NAMES, A, B, PLACES, KEEP, ...)                                                       \
    DEVICE void sparse_product(int(&d)[COLUMNS / 2], u64 a, u64 b, u32 places, u32 keep) {                            \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " KEEP ", 0;\n\t"                                          \
                     "wgmma.mma_async.sp.sync.aligned.m64n" #COLUMNS "k64.s32.s8.s8 {" NAMES "}, " A ", " B           \
                     ", " PLACES ", 0, p;\n\t}"                                                                       \
                     : __VA_ARGS__                                                                                    \
                     : "l"(a), "l"(b), "r"(places), "r"(keep));                                                       \
    }

BITS_PRODUCT(64, NAMES_0, "%32", "%33", "%34", THIRTY_TWO(d, 0))
BITS_PRODUCT(128, NAMES_0 ", " NAMES_1, "%64", "%65", "%66", THIRTY_TWO(d, 0), THIRTY_TWO(d, 32))
BITS_PRODUCT(192, NAMES_0 ", " NAMES_1 ", " NAMES_2, "%96", "%97", "%98",
             THIRTY_TWO(d, 0), THIRTY_TWO(d, 32), THIRTY_TWO(d, 64))
BITS_PRODUCT(256, NAMES_0 ", " NAMES_1 ", " NAMES_2 ", " NAMES_3, "%128", "%129", "%130",
             THIRTY_TWO(d, 0), THIRTY_TWO(d, 32), THIRTY_TWO(d, 64), THIRTY_TWO(d, 96))
SPARSE_PRODUCT(64, NAMES_0, "%32", "%33", "%34", "%35", THIRTY_TWO(d, 0))
SPARSE_PRODUCT(128, NAMES_0 ", " NAMES_1, "%64", "%65", "%66", "%67", THIRTY_TWO(d, 0), THIRTY_TWO(d, 32))
SPARSE_PRODUCT(192, NAMES_0 ", " NAMES_1 ", " NAMES_2, "%96", "%97", "%98", "%99",
               THIRTY_TWO(d, 0), THIRTY_TWO(d, 32), THIRTY_TWO(d, 64))
SPARSE_PRODUCT(256, NAMES_0 ", " NAMES_1 ", " NAMES_2 ", " NAMES_3, "%128", "%129", "%130", "%131",
               THIRTY_TWO(d, 0), THIRTY_TWO(d, 32), THIRTY_TWO(d, 64), THIRTY_TWO(d, 96))
