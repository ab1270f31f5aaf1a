#!/bin/bash
# One command, on every node at about the same time.
#   NODES=4 HEAD=node-0 bash configs/cluster/torchrun.sh fit --config ... --ckpt_path last
# NODES: how many there are; HEAD: a name or address of one of them that all can reach.
# A node that dies is started again with the same command; meanwhile the others wait for it for half an hour, and then all
# go on from the last checkpoint, which must lie where every node sees it. Where HEAD itself dies, start all of them again.
# At SIGTERM every process finishes its step, saves and leaves; torchrun kills what has not left after LEAVE seconds (of its
# own accord: 30) and ends with status 1.
set -eu
# With a store that outlives a restart, a node that comes back waits for an address that nobody tells it (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-8}" --max-restarts=3 --shutdown-timeout="${LEAVE:-270}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" --rdzv-id=clp \
  --rdzv-conf="join_timeout=1800${RDZV_CONF:+,$RDZV_CONF}" \
  -m clp_lightning "$@"
