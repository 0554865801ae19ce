#!/usr/bin/env bash
# One run on a TPU slice of a cluster that XPK manages: `pip install xpk`, `xpk cluster create …`.
#
#   launch/gke_xpk.sh create     queue it
#   launch/gke_xpk.sh list       what is queued and running
#   launch/gke_xpk.sh delete     end it
#
# XPK writes the JobSet itself. launch/Dockerfile builds IMAGE.
set -euo pipefail

PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-a}
CLUSTER=${CLUSTER:-my-cluster}
NAME=${NAME:-coattention-b16}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/images/mmjax:latest}
ACCELERATOR=${ACCELERATOR:-v5p-512}           # v5litepod-256, v6e-256
RESTARTS=${RESTARTS:-100}
BUCKET=${BUCKET:-gs://my-bucket}              # in the region of the cluster
RECIPE=${RECIPE:-configs/pretrain/coattention_b16.py}
OVERRIDES=${OVERRIDES:---config.checkpoint.every=1000}

where=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")

case "${1:-}" in
  create)
    # Of itself XPK starts again after aborts and kills (127 to 255); 75 is an interrupted run.
    xpk workload create "${where[@]}" --workload="$NAME" --docker-image="$IMAGE" \
      --tpu-type="$ACCELERATOR" --num-slices=1 --max-restarts="$RESTARTS" \
      --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
      --command="exec python train.py --distributed --interrupted_status=75 \
        --config=$RECIPE $OVERRIDES --workdir=$BUCKET/$NAME"
    ;;
  list)
    xpk workload list "${where[@]}"
    ;;
  delete)
    xpk workload delete "${where[@]}" --workload="$NAME"
    ;;
  *)
    sed -n '2,8p' "$0" >&2
    exit 2
    ;;
esac
