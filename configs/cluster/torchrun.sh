#!/bin/bash
# One command, on every node at about the same time; a node that dies may be started again.
#   NODES=4 HEAD=node-0 bash configs/cluster/torchrun.sh fit --config ... --ckpt_path last
# NODES: how many there are; HEAD: a name or address of one of them that all can reach.
set -eu
exec torchrun \
  --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-8}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:29500" --rdzv-id=clp \
  -m clp_lightning "$@"
