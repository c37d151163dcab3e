#!/bin/bash
# Two machines of eight GPUs under Slurm; it goes on by itself after a preemption or a failed node:
#   sbatch slurm/train.sh --dataset path/to/folder --model resnet50 --run_name mine
# The flags of train.py follow the script's name. Fetch the data set before: nodes are often
# without network. The output folder must be one that all nodes see, or the first node's own.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -eu

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun, which accelerate calls on several processes, passes on what it is told to, and kills 30 s
# later unless told otherwise; --signal above leaves two minutes.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGXCPU
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
export first GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# One launcher a node; SLURM_NODEID is only known inside srun, hence the single quotes.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$first" \
    train.py --resume_from_checkpoint auto "$@"' train "$@"
