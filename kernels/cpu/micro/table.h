/* table.h: closes an isa's translation unit: the table that its inner loops fill. */
#include "../isa.h"
#include "attend.h"
#include "attend_few.h"
#include "dot.h"
#include "gemm.h"
#include "rotary.h"
#include "rows.h"
#include "score_i8.h"

#define KVKI_TABLE                                                                                 \
    {                                                                                              \
        .name = ISA_NAME, .panel = GEMM_PANEL, .lanes = VF_LANES, .convert = row_convert,          \
        .add = row_add, .add_f64 = row_add_f64, .angles = rotary_angles, .rotate = rotary_rotate,  \
        .gemm = gemm, .quantize = row_quantize, .e4m3 = row_e4m3, .dot = dot,                      \
        .score_i8 = score_i8, .max = row_max, .exp_sum = row_exp_sum, .exp_add = row_exp_add,      \
        .fold_max = row_fold_max, .max2 = row_max2, .filter = row_filter,                          \
        .attend_pack = attend_pack, .attend_block = attend_block, .turn_angles = turn_angles,      \
        .attend_few = attend_few, .attend_merge = attend_merge, .axpby = row_axpby,                \
        .dot_f64 = row_dot_f64,                                                                    \
    }
