#!/usr/bin/env bash
# Trains on the nodes of a host file until the run is done: starts again after a failure, ends when it is asked to.
#
#   launchers/pdsh/train.sh HOSTFILE experiment=repa_sit_xl data.path=data/imagenet256 run.dir=runs/xl
#
# Needs ssh without a password from here to every node, pdsh here, repa_scale at the same path on all nodes, and
# run.dir on a file system that all nodes share.
set -euo pipefail
hosts=${1:?the host file is missing: train.sh HOSTFILE KEY=VALUE ...}
shift
exec repa-scale supervise -- repa-scale launch --hostfile "$hosts" "$@"
