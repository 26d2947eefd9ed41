// One variant of the kernels. Compiled once per instruction set: CMDP_ISA names the variant and its namespace.
#include "kernels.h"

#include "mixture.h"
#include "tail.h"

#define CMDP_NAME_(isa) #isa
#define CMDP_NAME(isa) CMDP_NAME_(isa)
#define CMDP_TABLE_(isa) table_##isa
#define CMDP_TABLE(isa) CMDP_TABLE_(isa)

namespace cmdp {

extern const KernelTable CMDP_TABLE(CMDP_ISA) = {
    CMDP_NAME(CMDP_ISA), kLanes,      segments,      fold, finish, update, backward, mixture,
    mixture_backward,    update_tail, tail_backward,
};

}  // namespace cmdp
