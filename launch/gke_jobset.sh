#!/usr/bin/env bash
# One run on a TPU slice of a GKE cluster, as a JobSet; starts again by itself when nodes are lost.
#
#   launch/gke_jobset.sh apply     start it
#   launch/gke_jobset.sh print     show what would be applied
#   launch/gke_jobset.sh log       follow what process 0 prints
#   launch/gke_jobset.sh delete    SIGTERM to all pods: one checkpoint, then the end
#
# The cluster has a TPU node pool of TOPOLOGY, the JobSet controller (v0.6 or newer) and a service
# account that may write to BUCKET (Workload Identity). launch/Dockerfile builds IMAGE.
set -euo pipefail

NAME=${NAME:-coattention-b16}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/images/mmjax:latest}
ACCELERATOR=${ACCELERATOR:-tpu-v5p-slice}     # tpu-v5-lite-podslice, tpu-v6e-slice
TOPOLOGY=${TOPOLOGY:-4x8x8}                   # 16x16 on v5e and v6e
HOSTS=${HOSTS:-64}                            # chips of TOPOLOGY / CHIPS_PER_HOST
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4}
SPOT=${SPOT:-true}                            # as the node pool is
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-mmjax}
BUCKET=${BUCKET:-gs://my-bucket}              # in the region of the cluster
RECIPE=${RECIPE:-configs/pretrain/coattention_b16.py}
OVERRIDES=${OVERRIDES:---config.checkpoint.every=1000}

spot_nodes='cloud.google.com/gke-spot: "true"'
[[ $SPOT == true ]] || spot_nodes=

jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # All pods of a job on one slice, and nothing else there.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
    rules:
    # What no restart mends: see podFailurePolicy.
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        completions: $HOSTS
        parallelism: $HOSTS
        completionMode: Indexed
        backoffLimit: 0  # a lost pod ends the job, and the JobSet starts all of them again
        podFailurePolicy:
          rules:
          - action: FailJob  # status 2 is bad input, told in the log
            onExitCodes: {containerName: train, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            serviceAccountName: $SERVICE_ACCOUNT
            terminationGracePeriodSeconds: 300  # a step and a checkpoint
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
              $spot_nodes
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}
            containers:
            - name: train
              image: $IMAGE
              # exec: the signal must reach Python. An interrupted run ends in a status that is no
              # success, so that it is started again.
              command: [bash, -c]
              args:
              - >-
                exec python train.py --distributed --interrupted_status=75
                --config=$RECIPE $OVERRIDES --workdir=$BUCKET/$NAME
              ports:
              - containerPort: 8471  # between the TPU runtimes
              - containerPort: 8482  # the coordinator
              resources:
                requests: {google.com/tpu: $CHIPS_PER_HOST}
                limits: {google.com/tpu: $CHIPS_PER_HOST}
YAML
}

case "${1:-}" in
  apply)
    jobset | kubectl apply -f -
    ;;
  print)
    jobset
    ;;
  log)
    kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete)
    kubectl delete jobset "$NAME"
    ;;
  *)
    sed -n '2,10p' "$0" >&2
    exit 2
    ;;
esac
