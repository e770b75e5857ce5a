# shellcheck shell=bash disable=SC2034  # `launch` and `srun_options` are read by the scripts that source this file
# The environment of every job: modules, Python, settings. Sourced; needs $slurm_dir. Sets
#   launch=(...)        how `python` is started on a node
#   srun_options=(...)  what srun needs for that
# shellcheck source=slurm/cluster.sh
. "${MEGATRON_GIL_CLUSTER:-$slurm_dir/cluster.sh}"
project_dir=$(cd "$slurm_dir/.." && pwd)

if [ ${#modules[@]} -gt 0 ]; then
  module load "${modules[@]}"
fi

# --- Python
srun_options=()
if [ -n "$container_image" ]; then # pyxis: without that plugin srun does not know these options, so only here
  joined=$project_dir:$project_dir
  for directory in "${mounts[@]}"; do joined+=,$directory:$directory; done
  srun_options=(--container-image="$container_image" --container-mounts="$joined" --container-workdir="$PWD")
  launch=(python)
elif [ -n "$apptainer_image" ]; then # --nv: the host's driver; --cleanenv is not used: Slurm's variables are read
  bound=$project_dir
  for directory in "${mounts[@]}"; do bound+=,$directory; done
  launch=(apptainer exec --nv --bind "$bound" --pwd "$PWD" "$apptainer_image" python)
else
  launch=("$venv/bin/python")
fi

# --- Slurm
# Since 22.05 srun does not take --cpus-per-task over from sbatch: every task would get one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# --- threads: one for the process that feeds the GPU. PyTorch's default is a thread per core of the node, in each task.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false # its threads deadlock in forked workers, of which it warns at length

# --- GPUs: the program sets what CUDA, its allocator and cuBLAS read (megatron_gil/parallel/device.py); what is exported
# here or in a job goes before it. For runs that repeat bit for bit give run.deterministic=true.

# --- network
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # the reason of a failed collective, and nothing else
if [ -n "$network_interface" ]; then  # login and storage networks may come first in the list that NCCL and gloo search
  export NCCL_SOCKET_IFNAME=$network_interface GLOO_SOCKET_IFNAME=$network_interface
fi
export HF_HUB_OFFLINE=1 # compute nodes have no way out, and a lookup would wait for its time-out on every rank

# --- files
export PYTHONUNBUFFERED=1 # a line is in the log before the process that wrote it can be killed
[ -z "$datasets_cache" ] || export HF_DATASETS_CACHE=$datasets_cache
