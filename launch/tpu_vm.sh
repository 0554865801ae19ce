#!/usr/bin/env bash
# One run on a slice of Cloud TPU VMs, by gcloud alone.
#
#   launch/tpu_vm.sh create     ask for the slice; it is granted when there is room
#   launch/tpu_vm.sh install    the code and its packages, on every VM
#   launch/tpu_vm.sh train      start the run on every VM, or go on with it
#   launch/tpu_vm.sh log        follow what process 0 prints
#   launch/tpu_vm.sh stop       SIGTERM: all write one checkpoint and end
#   launch/tpu_vm.sh delete     give the slice back
#
# A Spot slice that is taken away goes on with create, install, train: the run is in the bucket.
set -euo pipefail

PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-a}
NAME=${NAME:-mmjax}
ACCELERATOR=${ACCELERATOR:-v5p-512}           # v5litepod-256, v6e-256
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}            # v2-alpha-tpuv5-lite, v2-alpha-tpuv6e
CAPACITY=${CAPACITY:---spot}                  # --reserved, or empty for on demand
REPOSITORY=${REPOSITORY:-https://github.com/me/mmjax.git}
REVISION=${REVISION:-main}                    # a commit, so that every VM runs the same code
BUCKET=${BUCKET:-gs://my-bucket}              # in the region of ZONE
RUN=${RUN:-coattention_b16}
RECIPE=${RECIPE:-configs/pretrain/coattention_b16.py}
OVERRIDES=${OVERRIDES:---config.checkpoint.every=1000}

everywhere() {  # a command on every VM of the slice
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all \
    --command="$1"
}

case "${1:-}" in
  create)
    # shellcheck disable=SC2086  # CAPACITY may be empty
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" \
      --zone="$ZONE" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" $CAPACITY
    gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --format='value(state.state)'
    ;;
  install)
    everywhere "
      set -e
      test -d mmjax || git clone --quiet $REPOSITORY mmjax
      cd mmjax && git fetch --quiet --tags origin $REVISION && git checkout --quiet --detach FETCH_HEAD
      python3 -m venv ~/venv && ~/venv/bin/pip install --quiet -e '.[tpu,gcs]'"
    ;;
  train)
    # Detached, so that the run outlives this connection. Which process a VM is, and where the
    # first of them listens, --distributed finds in the slice's metadata.
    everywhere "
      cd mmjax
      nohup ~/venv/bin/python train.py --distributed --config=$RECIPE $OVERRIDES \
        --workdir=$BUCKET/$RUN >> ~/run.log 2>&1 < /dev/null &
      echo \$! > ~/run.pid"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=0 \
      --command='tail -n 50 -F ~/run.log'
    ;;
  stop)
    everywhere 'kill -TERM $(cat ~/run.pid)'
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force
    ;;
  *)
    sed -n '2,11p' "$0" >&2
    exit 2
    ;;
esac
