#!/usr/bin/env bash
# Runs a command, or a shell, in a container on the project; files that it writes belong to you.
#
#     docker/start_container.sh
#     docker/start_container.sh hf-ilora pipeline quickstart
#     DEVICE=cpu docker/start_container.sh pytest -m "not slow"
#
# DEVICE is cuda where the host has a GPU, else cpu. The image is built at the first start: remove it to build it anew.
# Packages and caches are kept in volumes, hf_ilora-<device> and hf_ilora-home.
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$folder")
if [[ -z ${DEVICE:-} ]]; then
    DEVICE=cpu
    if command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus > /dev/null 2>&1; then DEVICE=cuda; fi
fi
if [[ $DEVICE != cuda && $DEVICE != cpu ]]; then
    echo "start_container.sh: DEVICE is '$DEVICE': expected cuda or cpu" >&2
    exit 2
fi

image=hf_ilora:$DEVICE
docker image inspect "$image" > /dev/null 2>&1 \
    || docker build --tag "$image" --build-arg DEVICE="$DEVICE" "$folder"

options=(
    --rm --init # forwards signals, and reaps processes that training leaves behind
    --shm-size 8g # data loaders and NCCL exchange tensors through shared memory
    --env HOST_UID="$(id -u)" --env HOST_GID="$(id -g)"
    --volume "$project:/workspace"
    --volume "hf_ilora-$DEVICE:/opt/hf_ilora"
    --volume hf_ilora-home:/home/hf_ilora
)
for name in HF_TOKEN HF_HUB_OFFLINE OMP_NUM_THREADS; do
    if [[ -n ${!name:-} ]]; then options+=(--env "$name"); fi
done
if [[ $DEVICE == cuda ]]; then options+=(--gpus all); fi
if [[ -t 0 && -t 1 ]]; then options+=(--interactive --tty); fi
exec docker run "${options[@]}" "$image" "$@"
