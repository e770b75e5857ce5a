# shellcheck shell=bash disable=SC2034  # read by the scripts that source this file
# Everything that differs from one cluster to the next. Copy it, edit it, and either put it back here or name it in
# MEGATRON_GIL_CLUSTER. It is read twice: where a job is submitted, and inside every job.

# --- what sbatch is asked for
job_options=(                    # every job
  --partition=gpu
  # --account=ACCOUNT
  # --qos=QOS
)
train_options=(                  # one process per GPU; the number of nodes is pipeline.sh's --nodes, or yours
  --gpus-per-node=8
  --ntasks-per-node=8
  --cpus-per-task=12
  --mem=0                        # all of the node: checkpoints pass through host memory
  --exclusive
  --time=24:00:00
)
tool_options=(                   # one process without a GPU: convert, evaluate, report
  --nodes=1
  --ntasks=1
  --cpus-per-task=8
  --mem=64G
  --time=4:00:00
)

# --- stopping and starting again
save_seconds=900                 # before the time limit, save and requeue. Slurm's clock is off by up to 60 s, and a
                                 # stop waits for the iteration's next safe point: well above the longest iteration
max_requeues=100                 # of one job; after that it fails

# --- where Python comes from: the first of these that is set
container_image=                 # pyxis/enroot: a .sqsh file, or an image as REGISTRY#IMAGE:TAG
apptainer_image=                 # Apptainer: a .sif file
venv=$HOME/megatron_gil/.venv    # a virtual environment on a file system that all nodes see
mounts=()                        # directories that a container must see besides this project: (/data /scratch)
modules=()                       # loaded first: (cuda/13.0 nccl)

# --- files and network
datasets_cache=                  # checked copies of the training files, kept there; empty: each node's TMPDIR, while they are read
network_interface=               # for the rendezvous and gloo (`ip -br link` on a node); empty: they find one
