#!/usr/bin/env bash
# Training on two machines (or NNODES of them) without a scheduler: start this on each, with the same words. It waits
# until all are there.
#
#     NODE_RANK=0 MASTER_ADDR=node-a examples/launch/torchrun_two_nodes.sh recipe=llama32_1b.pretrain    # on node-a
#     NODE_RANK=1 MASTER_ADDR=node-a examples/launch/torchrun_two_nodes.sh recipe=llama32_1b.pretrain    # on node-b
#
# NODE_RANK       0 on the machine that MASTER_ADDR names, then 1, 2, ...
# MASTER_ADDR     a name or address of the first machine that all of them reach
# MASTER_PORT     a free port there; 29500 if not given
# NNODES          machines; 2 if not given
# NPROC_PER_NODE  processes on each; one a GPU if not given
#
# Checkpoints and data lie on a file system that all of them see; tokens of text are cached by one process of each.
# Where a machine has several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one to use.
set -euo pipefail
: "${NODE_RANK:?0 on the machine that MASTER_ADDR names, then 1, 2, ...}"
: "${MASTER_ADDR:?a name or address of the first machine that all of them reach}"

exec torchrun \
  --nnodes "${NNODES:-2}" --node-rank "$NODE_RANK" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  -m weightcast.trainer.pretrain "$@"
